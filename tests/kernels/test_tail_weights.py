import math
from dataclasses import replace

import pytest
import torch

from dit_sparse.kernels import reference
from dit_sparse.kernels.tail_weights import HALF_LIMIT, tail_weights
from dit_sparse.plan import BlockPlan, SecondOrder, Tail
from tests.close import assert_no_worse

# Batch, heads, query blocks, key blocks, channels.
SHAPES = [(1, 2, 3, 5, 16), (2, 2, 70, 131, 40), (1, 1, 1, 1, 8), (2, 1, 65, 64, 128)]
ALL = (slice(None), slice(None), slice(None))


def a_tail(
    shape: tuple[int, ...], device: str, *, per_batch: bool = False, second: bool = True, limit: float = math.inf
) -> Tail:
    """In float64."""
    b, h, rows, columns, dim = shape
    g = torch.Generator().manual_seed(3)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64).to(device)

    of_keys = random(b, h, columns, dim)
    lengths = torch.randint(1, 129, (b, columns) if per_batch else (columns,), generator=g).to(device)
    statistics = 3 * random(b, h, rows, dim), random(b, h, rows, dim).square(), random(b, h, columns, dim).square()
    return Tail(of_keys, of_keys, lengths.double().log(), SecondOrder(*statistics, limit) if second else None)


def to(tail: Tail, dtype: torch.dtype) -> Tail:
    second = tail.second
    if second is not None:
        statistics = (x.to(dtype) for x in (second.q_mean, second.q_var, second.variances))
        second = SecondOrder(*statistics, second.limit)
    return Tail(*(x.to(dtype) for x in (tail.keys, tail.values, tail.log_weights)), second)


def a_plan(shape: tuple[int, ...], device: str) -> BlockPlan:
    """What stands past the counts must not be read."""
    columns = shape[3]
    mask = torch.rand(shape[:4], device=device) < 0.4
    mask[..., -1] = True
    plan = BlockPlan.from_mask(mask)
    place = torch.arange(columns, device=device)
    return replace(plan, indices=torch.where(place < plan.counts[..., None], plan.indices, 1 << 30).to(torch.int32))


@pytest.fixture
def unlisted_weights():
    pytest.importorskip("triton")
    from dit_sparse.kernels.tail_weights import unlisted_weights

    return unlisted_weights


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("per_batch", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_reference_in_float64(shape, per_batch, second, device):
    tail = a_tail(shape, device, per_batch=per_batch, second=second, limit=0.7)
    wanted = reference.tail_weights(tail, scale=0.3).expand(shape[:4])
    torch.testing.assert_close(tail_weights(tail, ALL, scale=0.3).expand(shape[:4]), wanted)
    # Of some query blocks, and of some of one head.
    some = (slice(None), slice(None), slice(0, 2))
    torch.testing.assert_close(tail_weights(tail, some, scale=0.3).expand(wanted[some].shape), wanted[some])
    some = (shape[0] - 1, 0, torch.tensor([shape[2] - 1, 0], device=device))
    torch.testing.assert_close(tail_weights(tail, some, scale=0.3).expand(wanted[some].shape), wanted[some])


@pytest.mark.parametrize("limit", [math.inf, 0.7])
@pytest.mark.parametrize("per_batch", [False, True])
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_not_listed_errs_no_more_than_pytorch(shape, second, per_batch, limit, unlisted_weights, device):
    exact, plan = a_tail(shape, device, per_batch=per_batch, second=second, limit=limit), a_plan(shape, device)
    given, scale, listed = to(exact, torch.float32), shape[-1] ** -0.5, plan.mask()
    got = unlisted_weights(given, plan, torch.float32, scale=scale, width=shape[3])
    assert got.dtype == torch.float32 and got.is_contiguous() and got.shape == shape[:4]
    wanted, by_torch = (
        reference.tail_weights(tail, scale=scale).expand(shape[:4]).masked_fill(listed, float("-inf"))
        for tail in (exact, given)
    )
    assert_no_worse(got, by_torch, wanted)
    width = -(-shape[3] // 128) * 128
    for dtype in (torch.float16, torch.bfloat16):
        half = unlisted_weights(given, plan, dtype, scale=scale, width=width)
        assert half.dtype == torch.float16 and half.is_contiguous() and half.shape == (*shape[:3], width)
        assert half[..., shape[3] :].isneginf().all()
        # A step of float16, and what ten bits of each factor leave of a sum.
        torch.testing.assert_close(half[..., : shape[3]].double(), wanted, atol=2**-10, rtol=2**-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("columns", [1, 11, 130])
def test_by_row_is_another_order_of_the_same(columns, second, dtype, unlisted_weights, device):
    from dit_sparse.kernels.quantise import key_order

    shape = (2, 3, 5, columns, 24)
    tail, plan = to(a_tail(shape, device, second=second), torch.float32), a_plan(shape, device)
    width = -(-columns // 128) * 128
    by_key, by_row = (
        unlisted_weights(tail, plan, dtype, scale=0.3, width=width, by_row=order) for order in (False, True)
    )
    there = torch.cat([first + key_order(device) for first in range(0, width, 128)])
    assert torch.equal(by_row, by_key[..., there])


def test_weights_and_plans_may_lie_in_any_strides(unlisted_weights, device):
    shape = (2, 3, 5, 7, 16)
    tail, plan = to(a_tail(shape, device, per_batch=True), torch.float32), a_plan(shape, device)
    options = {"scale": 0.3, "width": 9}
    wanted = unlisted_weights(tail, plan, torch.float32, **options)

    def turned(x: torch.Tensor) -> torch.Tensor:
        return x.mT.contiguous().mT

    second = tail.second
    other = SecondOrder(turned(second.q_mean), turned(second.q_var), turned(second.variances))
    tail = replace(tail, log_weights=turned(tail.log_weights), second=other)
    plan = replace(plan, counts=turned(plan.counts), indices=turned(plan.indices))
    assert torch.equal(unlisted_weights(tail, plan, torch.float32, **options), wanted)


def test_a_query_that_is_no_number_spoils_no_weight(unlisted_weights, device):
    tail = to(a_tail(SHAPES[0], device, limit=2.0), torch.float32)
    tail.second.q_var[0, 0, 1, 3] = float("nan")
    at = (0, 0, slice(1, 2))
    torch.testing.assert_close(tail_weights(tail, at, scale=0.3)[0], 2 + tail.log_weights)
    plan = BlockPlan.full(1, 2, 3, 5, device)
    plan = replace(plan, counts=torch.ones_like(plan.counts))
    got = unlisted_weights(tail, plan, torch.float32, scale=0.3, width=5)
    torch.testing.assert_close(got[0, 0, 1, 1:], 2 + tail.log_weights[1:])


def test_float16_holds_what_is_no_more_than_its_limit(unlisted_weights, device):
    tail, plan = to(a_tail(SHAPES[0], device, limit=HALF_LIMIT), torch.float32), a_plan(SHAPES[0], device)
    tail.second.variances.mul_(1e9)
    got = unlisted_weights(tail, plan, torch.float16, scale=1.0, width=5)
    assert got[~plan.mask()].isfinite().all() and got.max() > 0.9 * HALF_LIMIT
