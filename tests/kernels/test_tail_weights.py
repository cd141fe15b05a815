import math

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels import reference
from dit_sparse.kernels.quantise import key_order
from dit_sparse.kernels.tail_weights import HALF_LIMIT, tail_weights, unlisted
from dit_sparse.plan import BlockPlan
from tests.close import assert_no_worse

IMPLS = ["torch", "triton"]
# Batch, heads, query blocks, key blocks, channels.
SHAPES = [(1, 2, 3, 5, 16), (2, 3, 70, 131, 40), (1, 1, 1, 1, 8), (2, 1, 65, 64, 128)]


def statistics(shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    b, h, rows, columns, dim = shape
    g = torch.Generator().manual_seed(3)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype).to(device)

    return {
        "q_mean": 3 * random(b, h, rows, dim),
        "q_var": random(b, h, rows, dim).square(),
        "variances": random(b, h, columns, dim).square(),
        "lengths": torch.randint(1, 129, (columns,), generator=g).to(device),
    }


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("limit", [math.inf, 0.7])
def test_it_errs_no_more_than_pytorch(shape, limit, impl, device):
    exact = statistics(shape, device)
    given = {name: x if name == "lengths" else x.float() for name, x in exact.items()}
    options = {"scale": shape[-1] ** -0.5, "limit": limit}
    got = tail_weights(**given, **options, impl=impl)
    assert got.dtype == torch.float32
    wanted = reference.tail_weights(**exact, **options)
    assert_no_worse(got, reference.tail_weights(**given, **options), wanted)
    half = tail_weights(**given, **options, half=True, impl=impl)
    assert half.dtype == torch.float16
    # A step of float16, and what ten bits of each factor leave of a sum.
    torch.testing.assert_close(half.double(), wanted, atol=2**-10, rtol=2**-9)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_query_that_is_no_number_spoils_no_weight(impl, device):
    given = statistics(SHAPES[0], device, torch.float32)
    given["q_var"][0, 0, 1, 3] = float("nan")
    got = tail_weights(**given, scale=0.3, limit=2.0, impl=impl)
    torch.testing.assert_close(got[0, 0, 1], 2 + given["lengths"].log())


@pytest.mark.parametrize("impl", IMPLS)
def test_float16_holds_what_no_limit_keeps_low(impl, device):
    given = statistics(SHAPES[0], device, torch.float32)
    got = tail_weights(**given | {"variances": given["variances"] * 1e9}, scale=1.0, half=True, impl=impl)
    assert got.isfinite().all() and got.max() <= HALF_LIMIT + 16


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [1, 11, 130])
@pytest.mark.parametrize("dims", [1, 2, 4])
def test_listed_blocks_weigh_nothing(dims, columns, dtype, impl, device):
    mask = torch.rand(2, 3, 5, columns, device=device) < 0.4
    mask[..., -1] = True
    plan = BlockPlan.from_mask(mask)
    # What stands past the counts must not be read.
    place = torch.arange(columns, device=device)
    indices = torch.where(place < plan.counts[..., None], plan.indices, 1 << 30).to(torch.int32)
    plan = BlockPlan(plan.counts, indices, columns)
    shape = {1: (columns,), 2: (2, columns), 4: (2, 3, 5, columns)}[dims]
    weights = torch.randn(shape, device=device).to(dtype)
    wanted = weights if dims == 4 else weights.reshape(-1, 1, 1, columns).expand(2, 3, 5, columns)
    wanted = wanted.masked_fill(mask, float("-inf"))
    width = -(-columns // 128) * 128
    got = unlisted(weights, plan, width=width, impl=impl)
    assert got.dtype == dtype and got.is_contiguous() and got.shape == (2, 3, 5, width)
    assert torch.equal(got[..., :columns], wanted) and got[..., columns:].isneginf().all()
    ordered = unlisted(weights, plan, width=width, by_row=True, impl=impl)
    there = torch.cat([first + key_order(device) for first in range(0, width, 128)])
    assert torch.equal(ordered, got[..., there])


@pytest.mark.parametrize("impl", IMPLS)
def test_weights_may_lie_in_any_strides(impl, device):
    plan = BlockPlan.full(2, 3, 5, 7, device)
    plan = BlockPlan(plan.counts - 3, plan.indices, 7)
    weights = torch.randn(7, 5, 3, 2, device=device).permute(3, 2, 1, 0)
    got = unlisted(weights, plan, width=9, impl=impl)
    assert torch.equal(got, unlisted(weights.contiguous(), plan, width=9, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_compile_and_sound_ops(impl, device):
    given = statistics(SHAPES[0], device, torch.float32)
    plan = BlockPlan.full(1, 2, 3, 5, device)
    plan = BlockPlan(plan.counts - 2, plan.indices, 5)

    def program(q_mean: Tensor) -> Tensor:
        weights = tail_weights(**given | {"q_mean": q_mean * 2}, scale=0.3, half=True, impl=impl)
        return unlisted(weights, plan, width=128, impl=impl) * 2

    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(given["q_mean"]), program(given["q_mean"]))
    ops = torch.ops.dit_sparse
    torch.library.opcheck(ops.tail_weights.default, (*given.values(), 0.3, 2.0, True, impl))
    weights = torch.randn(1, 2, 3, 5, device=device)
    torch.library.opcheck(ops.unlisted.default, (weights, plan.counts, plan.indices, 5, 128, False, impl))


GIVEN = statistics(SHAPES[0], "cpu", torch.float32)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"q_mean": GIVEN["q_mean"].half()}, "must all be float32 or float64, not torch.float16"),
        ({"q_var": GIVEN["variances"]}, r"must agree, but they are \(1, 2, 3, 16\), \(1, 2, 5, 16\)"),
        ({"lengths": torch.ones(4, dtype=torch.int64)}, r"integers of shape \(5,\), not torch.int64 \(4,\)"),
        ({"lengths": torch.ones(5)}, "integers"),
        ({"limit": 0.0}, "limit is a positive number, or inf, not 0.0"),
    ],
)
def test_what_does_not_fit_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        tail_weights(**GIVEN | {"scale": 1.0} | wrong)


@pytest.mark.parametrize("shape", [(4,), (2, 5), (1, 1, 1, 5), (1, 5, 5)])
def test_weights_of_another_plan_are_refused(shape):
    plan = BlockPlan.full(1, 1, 2, 5, "cpu")
    with pytest.raises(ValueError, match=r"log_weights must be one of \(\(5,\), \(1, 5\), \(1, 1, 2, 5\)\), not"):
        unlisted(torch.zeros(shape), plan, width=128)


def test_a_width_that_does_not_fit_is_refused():
    plan = BlockPlan.full(1, 1, 1, 5, "cpu")
    with pytest.raises(ValueError, match="width must be at least 5, not 4"):
        unlisted(torch.zeros(5), plan, width=4)
    with pytest.raises(ValueError, match="width must be a multiple of 128 by row, not 130"):
        unlisted(torch.zeros(5), plan, width=130, by_row=True)
