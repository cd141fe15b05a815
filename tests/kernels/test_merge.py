"""Parts of attention put together against kernels/reference.py, which computes the whole."""

import math
from dataclasses import replace

import pytest
import torch

from dit_sparse import attention
from dit_sparse.attention import Call, sparse_attention
from dit_sparse.config import SparseConfig
from dit_sparse.kernels import reference
from dit_sparse.kernels.dense_attention import dense_attention
from dit_sparse.kernels.merge import merge_into, with_tail
from dit_sparse.layout import TokenGrid
from dit_sparse.plan import BlockPlan
from dit_sparse.state import Generation, Layer
from tests.close import assert_no_worse
from tests.kernels.attention_inputs import DEVICE, cast, corrected, inputs, random_plan

BLOCK = 16
IMPLS = ["torch", "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def two_parts(dtype=torch.float64, batch=2, queries=77, dim=16, scale=0.3, blind=False):
    """A plan and the rest of it, and their attention: (out, lse) of either and of both, with what they are made of."""
    q, k, v = inputs(batch=batch, heads=3, queries=queries, dim=dim, strided=True)
    blocks = -(-queries // BLOCK)
    plan = random_plan(batch, 3, blocks, blocks)
    rest = ~plan.mask()
    parts = []
    for mask in (plan.mask(), rest, plan.mask() | rest):
        x = [y.to(dtype) for y in (q, k, v)]
        allowed = mask.repeat_interleave(BLOCK, -1).repeat_interleave(BLOCK, -2)[..., :queries, :queries]
        if blind:
            allowed = allowed.clone()
            allowed[:, :, 3] = False
        scores = (x[0] @ x[1].mT * scale).masked_fill(~allowed, float("-inf"))
        lse = scores.logsumexp(-1)
        weights = torch.where(lse.isinf()[..., None], 0, scores.softmax(-1))
        parts.append((weights @ x[2], lse.to(torch.promote_types(dtype, torch.float32))))
    return (q, k, v), plan, parts


@pytest.mark.parametrize("blind", [False, True])
def test_two_parts_are_the_whole_in_float64(blind):
    _, _, (first, second, whole) = two_parts(blind=blind)
    merge_into(*first, *second)
    for a, b in zip(first, whole, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dim", [16, 40, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_parts_err_no_more_than_the_whole_in_pytorch(dtype, dim, impl):
    _, _, (_, _, exact) = two_parts(dim=dim, blind=True)
    _, _, (first, second, whole) = two_parts(dtype, dim=dim, blind=True)
    merge_into(*first, *second, impl=impl)
    assert_no_worse(first[0], whole[0], exact[0])
    assert_no_worse(first[1], whole[1], exact[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_something_larger_are_merged_where_they_lie(impl):
    _, _, (first, second, _) = two_parts(torch.float32)
    out, lse = (
        torch.cat([x, torch.full_like(x[:, :, :5], 7.0)], 2).transpose(1, 2).contiguous().transpose(1, 2)
        for x in first
    )
    lse = lse.contiguous()
    merge_into(out[:, :, :77], lse[:, :, :77], second[0].mT.contiguous().mT, second[1], impl=impl)
    merge_into(*first, *second, impl="torch")
    torch.testing.assert_close(out[:, :, :77], first[0])
    torch.testing.assert_close(lse[:, :, :77], first[1])
    assert (out[:, :, 77:] == 7).all() and (lse[:, :, 77:] == 7).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_logarithms_far_apart_stay_finite(impl):
    out, lse = torch.ones(1, 1, 4, 8, device=DEVICE), torch.tensor([[[-3e4, 3e4, 0.0, 80.0]]], device=DEVICE)
    other, other_lse = torch.zeros_like(out), torch.tensor([[[3e4, -3e4, 0.0, float("-inf")]]], device=DEVICE)
    merge_into(out, lse, other, other_lse, impl=impl)
    torch.testing.assert_close(out[0, 0, :, 0].cpu(), torch.tensor([0.0, 1.0, 0.5, 1.0]))
    torch.testing.assert_close(lse[0, 0].cpu(), torch.tensor([3e4, 3e4, math.log(2), 80.0]))


@pytest.mark.parametrize("second", [(), ("second",), ("second", "limit")], ids=str)
def test_a_tail_is_the_references_in_float64(second):
    (q, k, v), plan, _ = two_parts()
    correction = corrected(q, k, v, plan, BLOCK, 0, ("tail", *second))
    options = {"block": BLOCK, "scale": 0.3}
    out, lse = reference.block_attention(q, k, v, plan, None, **options)
    wanted, _ = reference.block_attention(q, k, v, plan, correction, **options)
    before = out.clone()
    torch.testing.assert_close(with_tail(q, out, lse, plan, correction.tail, **options), wanted)
    assert torch.equal(out, before)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("block", "dim"), [(16, 40), (32, 64), (128, 128)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tail_errs_no_more_than_pytorchs(dtype, block, dim, impl):
    if impl == "triton" and dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices as integers")
    q, k, v = inputs(batch=2, heads=2, queries=2 * block + 5, dim=dim, strided=True)
    blocks = 3
    plan = random_plan(2, 2, blocks, blocks)
    # What stands past the counts must not be read.
    place = torch.arange(plan.indices.shape[-1], device=DEVICE)
    plan = replace(plan, indices=torch.where(place < plan.counts[..., None], plan.indices, 1 << 20).int())
    exact = corrected(q, k, v, plan, block, 0, ("tail", "second"))
    options = {"block": block, "scale": dim**-0.5}
    low = [x.to(dtype) for x in (q, k, v)]
    tail = cast(exact, dtype)
    wanted = reference.block_attention(*(x.double() for x in low), plan, cast(tail, torch.float64), **options)[0]
    eager, _ = reference.block_attention(*low, plan, tail, **options)
    out, lse = reference.block_attention(*(x.double() for x in low), plan, None, **options)
    found = with_tail(low[0], out.to(dtype), lse.float(), plan, tail.tail, block=block, impl=impl)
    assert found.dtype == dtype
    assert_no_worse(found, eager, wanted)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_tail_where_nothing_is_left_out_or_seen_is_what_there_was(impl):
    (q, k, v), plan, ((out, lse), _, _) = two_parts(torch.float32, blind=True)
    q, k, v = (x.float() for x in (q, k, v))
    everything = BlockPlan.full(*plan.counts.shape, plan.key_blocks, DEVICE)
    tail = cast(corrected(q.double(), k.double(), v.double(), plan, BLOCK, 0, ("tail",)), torch.float32).tail
    torch.testing.assert_close(with_tail(q, out, lse, everything, tail, block=BLOCK, impl=impl), out)
    # A row that saw nothing exact sees the tail alone.
    found = with_tail(q, out, lse, plan, tail, block=BLOCK, scale=0.3, impl=impl)
    hidden = plan.mask()[:, :, 0]
    logits = (q[:, :, 3:4] @ tail.keys.mT * 0.3 + tail.log_weights).masked_fill(hidden[:, :, None], float("-inf"))
    alone = logits.softmax(-1).nan_to_num() @ tail.values
    torch.testing.assert_close(found[:, :, 3:4], alone, atol=1e-5, rtol=1e-4)


def test_parts_that_do_not_fit_are_errors():
    (q, k, v), plan, ((out, lse), (other, other_lse), _) = two_parts()
    with pytest.raises(ValueError, match="Both parts must have the same rows"):
        merge_into(out, lse, other[:, :, 1:], other_lse[:, :, 1:])
    with pytest.raises(ValueError, match=r"out must be \[B, H, L, D\]"):
        merge_into(out, lse[:, :1], other, other_lse)
    tail = corrected(q, k, v, plan, BLOCK, 0, ("tail",)).tail
    with pytest.raises(ValueError, match="do not fit in blocks of 32"):
        with_tail(q, out, lse, plan, tail, block=32)
    short = replace(tail, keys=tail.keys[:, :, 1:])
    with pytest.raises(ValueError, match=r"tail.keys must be \(2, 3, 5, 16\)"):
        with_tail(q, out, lse, plan, short, block=BLOCK)
    with pytest.raises(ValueError, match="last dimension of q must be contiguous"):
        with_tail(q.mT.contiguous().mT, out, lse, plan, tail, block=BLOCK)
    with pytest.raises(ValueError, match="lse of torch.float64 must be torch.float64, not torch.float16"):
        merge_into(out, lse.half(), other, other_lse)


def test_wide_float32_runs_in_pytorch():
    (q, k, v), plan, ((out, lse), _, _) = two_parts(torch.float32, dim=256)
    tail = cast(corrected(q, k, v, plan, BLOCK, 0, ("tail",)), torch.float32).tail
    found = with_tail(q.float(), out, lse, plan, tail, block=BLOCK)
    assert torch.equal(found, with_tail(q.float(), out, lse, plan, tail, block=BLOCK, impl="torch"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"anchor_density": 0.6}, {"key_block": 64}], ids=str)
@pytest.mark.parametrize("text", [0, 33])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("method", ["anchor", "reshape"])
def test_on_hopper_an_anchor_visits_each_pair_once_and_errs_no_more(method, dim, text, options, monkeypatch):
    if torch.cuda.get_device_capability()[0] != 9 or (method == "reshape" and "anchor_density" in options):
        pytest.skip("for Hopper, and soft anchors are for one method")
    grid, layer = TokenGrid(5, 20, 23), Layer("layer", 0, 1, 3, dim)
    config = SparseConfig(method, dense_steps=0, block=128, density=0.2, refresh_every=2, residual="bf16", **options)
    steps = [torch.randn(3, 2, 3, grid.tokens + text, dim, device=DEVICE, dtype=torch.bfloat16) for _ in range(4)]

    def outputs(dtype):
        generation, found = Generation(config, [layer]), []
        for step, qkv in enumerate(steps):
            generation.enter(grid, batch=2, device=torch.device(DEVICE), timestep=0.0, step=step, total=4)
            found.append(sparse_attention(*qkv.to(dtype), layer, generation))
        return found, generation.tally.work()

    monkeypatch.setattr(attention, "LONG", 0)
    once, work = outputs(torch.bfloat16)
    monkeypatch.setattr(Call, "visits_once", lambda self, plan: False)
    twice, more = outputs(torch.bfloat16)
    assert work < more - 0.05
    for step, (a, b, qkv) in enumerate(zip(once, twice, steps, strict=True)):
        # Both chose the same blocks, by the same statistics; what they remember is rounded once more or less.
        torch.testing.assert_close(a, b, atol=2**-6, rtol=2**-6)
        if step == 0 or (step == 2 and "anchor_density" not in options):
            assert_no_worse(a, b, dense_attention(*qkv.double(), backend="block")[0])
