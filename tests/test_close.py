import pytest
import torch

from tests.close import assert_no_worse

EXACT = torch.linspace(-2, 2, 1001, dtype=torch.float64)
EAGER = EXACT.bfloat16()


def test_equally_good_passes() -> None:
    assert_no_worse(EAGER, EAGER, EXACT)
    assert_no_worse(EXACT.float(), EAGER, EXACT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.index_fill(0, torch.tensor([7]), float("nan")), "actual has 1 NaN"),
        (lambda x: x.index_fill(0, torch.tensor([7]), float("inf")), "infinities"),
        (lambda x: x.index_fill(0, torch.tensor([7]), x[7] + 0.05), "largest error"),
        (lambda x: x + 0.015, "mean error"),
        (lambda x: x[1:], "shapes"),
    ],
)
def test_worse_fails(change, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_no_worse(change(EAGER), EAGER, EXACT)


def test_nan_in_the_yardstick_fails() -> None:
    with pytest.raises(AssertionError, match="eager_low has 1001 NaN"):
        assert_no_worse(EAGER, EAGER * float("nan"), EXACT)


def test_shared_infinities_pass_and_others_fail() -> None:
    lse = torch.tensor([0.5, float("-inf")], dtype=torch.float64)
    assert_no_worse(lse.float(), lse.float(), lse)
    with pytest.raises(AssertionError, match="infinities"):
        assert_no_worse(-lse.float(), lse.float(), lse)
