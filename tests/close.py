"""How far a low-precision result may be from the exact one."""

import torch
from torch import Tensor


def assert_no_worse(
    actual: Tensor, eager_low: Tensor, exact64: Tensor, *, factor: float = 2.0, through: float = 0.3
) -> None:
    """The error of `actual` is at most `factor` times the error of plain PyTorch at the same precision.

    actual and eager_low are the same result in the precision under test, exact64 in float64 from the same inputs. Both
    the largest and the mean error are compared, each with a band for the rounding of the result itself: what adding
    `through` and taking it away again does to the exact values in that precision; a result that is the difference of
    larger numbers has their rounding. Infinities must be the same ones in all three; NaN never passes.
    """
    assert exact64.dtype == torch.float64, f"the exact result is {exact64.dtype}, not float64"
    assert actual.shape == eager_low.shape == exact64.shape, (
        f"shapes differ: {tuple(actual.shape)}, {tuple(eager_low.shape)}, exact {tuple(exact64.shape)}"
    )
    for name, x in (("actual", actual), ("eager_low", eager_low), ("exact64", exact64)):
        assert not x.isnan().any(), f"{name} has {x.isnan().sum()} NaN of {x.numel()}"
    finite = exact64.isfinite()
    for name, x in (("actual", actual), ("eager_low", eager_low)):
        same = torch.where(finite, x.isfinite(), x.double() == exact64)
        assert same.all(), f"{name} differs from the exact result in {(~same).sum()} infinities"
    if not finite.any():
        return
    exact = exact64[finite]
    low = exact.to(eager_low.dtype)
    rounding = ((low + through - through) - low).double().abs()
    error = (actual[finite].double() - exact).abs()
    eager = (eager_low[finite].double() - exact).abs()
    for name, worst in (("largest", Tensor.max), ("mean", Tensor.mean)):
        allowed = factor * worst(eager) + 2 * worst(rounding)
        assert worst(error) <= allowed, (
            f"{name} error {worst(error):.3e} exceeds {allowed:.3e} = {factor} * {worst(eager):.3e} (plain PyTorch) "
            f"+ {2 * worst(rounding):.3e} (rounding)"
        )
