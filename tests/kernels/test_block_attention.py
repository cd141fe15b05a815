"""block_attention against kernels/reference.py in float64, for both implementations."""

import itertools
import math
import re
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from dit_sparse.kernels import reference
from dit_sparse.kernels.block_attention import block_attention
from dit_sparse.plan import BlockPlan, Correction, Residual, SecondOrder, Tail
from tests.close import assert_no_worse
from tests.kernels.attention_inputs import DEVICE, cast, corrected, inputs, of_all_keys, random_plan, text_mask

IMPLS = ["torch", "triton"]


CASES = {
    "even": dict(queries=64),
    "ragged": dict(queries=75),
    "one short block": dict(queries=9),
    "odd dim": dict(queries=75, dim=40),
    "fewer keys": dict(queries=80, keys=45),
    "batch, strided": dict(batch=2, queries=70, strided=True),
    "text": dict(queries=75 + 5, text=5),
    "text of several blocks": dict(queries=48 + 37, text=37, batch=2),
    "key mask": dict(batch=2, queries=70, masked=True),
    "text, key mask": dict(batch=2, queries=53 + 21, text=21, masked=True, strided=True),
    "key blocks": dict(batch=2, queries=32 * 2 + 9, keys=75, block=32, key_block=16),
    "key blocks, text": dict(queries=64 + 21, text=21, block=64, key_block=16, text_masked=True, batch=2),
    "text mask": dict(batch=2, queries=53 + 21, text=21, text_masked=True, strided=True),
    "text mask, fewer keys": dict(batch=3, queries=80 + 70, keys=33 + 70, text=70, text_masked=True),
}
PARTS = [
    (), ("tail",), ("tail", "second"), ("tail", "second", "limit"), ("scale",), ("block_scale",), ("residual",),
    ("block_residual",), ("weighed",), ("fp8",), ("int4",), ("tail", "second", "scale", "residual"),
    ("tail", "block_scale", "int4"),
]  # fmt: skip


def build(case, parts):
    case = dict(CASES[case])
    block, key_block = case.pop("block", 16), case.pop("key_block", None)
    text, masked, text_masked = case.pop("text", 0), case.pop("masked", False), case.pop("text_masked", False)
    q, k, v = inputs(**case)
    columns = k.shape[2] - text
    plan = random_plan(*q.shape[:2], -(-(q.shape[2] - text) // block), -(-columns // (key_block or block)))
    key_mask = None
    if masked:
        g = torch.Generator().manual_seed(3)
        key_mask = (torch.rand(len(q), k.shape[2], generator=g) < 0.7).to(DEVICE)
    if text_masked:
        key_mask = text_mask(len(q), text)
    correction = corrected(q, k, v, plan, block, text, parts, key_block)
    return q, k, v, plan, correction, dict(block=block, key_block=key_block, key_mask=key_mask, text=text)


@pytest.mark.parametrize("parts", PARTS, ids="+".join)
@pytest.mark.parametrize("case", CASES)
def test_torch_is_the_reference_in_float64(case, parts):
    q, k, v, plan, correction, options = build(case, parts)
    expected = reference.block_attention(q, k, v, plan, correction, scale=0.3, **options)
    actual = block_attention(q, k, v, plan, correction, scale=0.3, impl="torch", **options)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("case", "parts"),
    [
        *((case, ("tail", "second", "scale", "residual")) for case in CASES),
        *(pytest.param("text, key mask", parts, marks=pytest.mark.slow) for parts in PARTS),
        *((case, parts) for case in ("text mask", "key blocks") for parts in PARTS),
    ],
    ids=lambda x: x if isinstance(x, str) else "+".join(x),
)
def test_error_is_at_most_twice_pytorchs(case, parts, impl, dtype):
    if impl == "triton" and dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices as integers")
    q, k, v, plan, correction, options = build(case, parts)
    low = [x.to(dtype) for x in (q, k, v)]
    exact_in = [x.double() for x in low]
    low_correction = cast(correction, dtype)
    exact = reference.block_attention(*exact_in, plan, cast(low_correction, torch.float64), scale=0.3, **options)
    eager = reference.block_attention(*low, plan, low_correction, scale=0.3, **options)
    actual = block_attention(*low, plan, low_correction, scale=0.3, impl=impl, **options)
    assert actual[0].dtype == dtype and actual[1].dtype == torch.float32
    seen = exact[1].isfinite()
    assert torch.equal(actual[1].isfinite(), seen)
    assert_no_worse(actual[0], eager[0], exact[0])
    assert_no_worse(actual[1][seen], eager[1][seen], exact[1][seen])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dim", [8, 24, 64, 72, 128, 256])
def test_head_dims(impl, dim):
    q, k, v = (x.float() for x in inputs(heads=1, queries=40, dim=dim))
    if impl == "triton" and dim > 128:
        with pytest.raises(ValueError, match="float32 up to head dimension 128, not 256"):
            block_attention(q, k, v, BlockPlan.full(1, 1, 3, 3, DEVICE), block=16, impl=impl)
        q, k, v = (x.half() for x in (q, k, v))
    plan = BlockPlan.full(1, 1, 3, 3, DEVICE)
    out, lse = block_attention(q, k, v, plan, block=16, impl=impl)
    off = 2e-5 if q.dtype == torch.float32 else 2e-3
    q, k, v = (x.float() for x in (q, k, v))
    torch.testing.assert_close(out.float(), scaled_dot_product_attention(q, k, v), atol=off, rtol=off)
    torch.testing.assert_close(lse, (q @ k.mT * dim**-0.5).logsumexp(-1), atol=off, rtol=off)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_blocks(impl, block):
    q, k, v = (x.float() for x in inputs(heads=1, queries=2 * block + 7))
    plan = random_plan(1, 1, 3, 3)
    out, _ = block_attention(q, k, v, plan, block=block, impl=impl)
    expected, _ = reference.block_attention(q, k, v, plan, None, block=block, scale=0.25)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("block", "key_block"), [(32, 16), (128, 16), (128, 32), (128, 64), (128, 128)])
def test_key_blocks(impl, block, key_block):
    q, k, v = (x.float() for x in inputs(heads=1, queries=2 * block + 7))
    plan = random_plan(1, 1, 3, -(-q.shape[2] // key_block))
    out, lse = block_attention(q, k, v, plan, block=block, key_block=key_block, impl=impl)
    expected = reference.block_attention(q, k, v, plan, None, block=block, key_block=key_block, scale=0.25)
    torch.testing.assert_close(out, expected[0], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse, expected[1], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_outputs_keep_the_layout_of_the_queries(impl):
    q, k, v = (x.float() for x in inputs(batch=2, strided=True))
    out, _ = block_attention(q, k, v, BlockPlan.full(2, 2, 5, 5, DEVICE), block=16, impl=impl)
    assert out.stride() == q.stride() and not out.is_contiguous()


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_see_nothing_are_zero(impl):
    q, k, v = (x.float() for x in inputs())
    mask = torch.ones(1, 80, dtype=torch.bool, device=DEVICE)
    mask[:, 16:32] = False
    plan = BlockPlan.from_mask(torch.eye(5, dtype=torch.bool, device=DEVICE).expand(1, 2, 5, 5), width=1)
    out, lse = block_attention(q, k, v, plan, block=16, key_mask=mask, impl=impl)
    assert (out[:, :, 16:32] == 0).all() and (lse[:, :, 16:32] == float("-inf")).all()
    assert out[:, :, :16].isfinite().all() and lse[:, :, 32:].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["text, key mask", "text mask"])
def test_a_masked_key_has_no_influence(case, impl):
    q, k, v, plan, _, options = build(case, ())
    q, k, v = (x.float() for x in (q, k, v))
    before = block_attention(q, k, v, plan, impl=impl, **options)
    hidden = ~of_all_keys(options["key_mask"], k.shape[2])[:, None, :, None].expand_as(k)
    after = block_attention(q, k.masked_fill(hidden, 1e4), v.masked_fill(hidden, -1e4), plan, impl=impl, **options)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["text mask", "text mask, fewer keys"])
def test_a_mask_of_text_keys_is_one_of_all_keys(case, impl):
    q, k, v, plan, _, options = build(case, ())
    q, k, v = (x.float() for x in (q, k, v))
    some = block_attention(q, k, v, plan, impl=impl, **options)
    options["key_mask"] = of_all_keys(options["key_mask"], k.shape[2])
    for a, b in zip(some, block_attention(q, k, v, plan, impl=impl, **options), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_batch_rows_are_independent(impl):
    q, k, v, plan, correction, options = build("batch, strided", ("tail", "second", "scale", "int4"))
    correction = cast(correction, torch.float32)
    q, k, v = (x.float() for x in (q, k, v))
    # Each of the batch weighs the pooled keys otherwise.
    t, r = correction.tail, correction.residual
    t = replace(t, log_weights=torch.stack([t.log_weights, t.log_weights.flip(0) / 2]))
    correction = replace(correction, tail=t)
    both, _ = block_attention(q, k, v, plan, correction, impl=impl, block=16)
    expected, _ = reference.block_attention(q, k, v, plan, correction, block=16, scale=0.25)
    torch.testing.assert_close(both, expected, atol=2e-5, rtol=2e-5)
    for b in range(2):
        at = slice(b, b + 1)
        second = SecondOrder(*(x[at] for x in (t.second.q_mean, t.second.q_var, t.second.variances)), t.second.limit)
        one = Correction(
            correction.scale[at],
            Residual(r.codes[at], r.scales[at], r.kind),
            Tail(t.keys[at], t.values[at], t.log_weights[b], second),
        )
        alone, _ = block_attention(
            q[at],
            k[at],
            v[at],
            BlockPlan(plan.counts[at], plan.indices[at], plan.key_blocks),
            one,
            impl=impl,
            block=16,
        )
        torch.testing.assert_close(both[at], alone, atol=1e-6, rtol=1e-6)


def test_very_uneven_counts():
    q, k, v = inputs(heads=3, queries=16 * 40 - 3)
    mask = torch.zeros(1, 3, 40, 40, dtype=torch.bool, device=DEVICE)
    for h, i in itertools.product(range(3), range(40)):
        mask[0, h, i, : 1 + (7 * i + h) % 40] = True
    plan = BlockPlan.from_mask(mask)
    out, lse = block_attention(q, k, v, plan, block=16, impl="torch")
    expected = reference.block_attention(q, k, v, plan, None, block=16, scale=0.25)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(lse, expected[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_that_is_no_number_leaves_16_bits_of_other_rows_numbers(impl):
    """With no limit of its own the second order has that of float16."""
    q, k, v, plan, correction, options = build("ragged", ("tail", "second"))
    q, k, v = (x.half() for x in (q, k, v))
    correction = cast(correction, torch.float16)
    correction.tail.second.q_var[:, :, 1] = float("nan")
    out, lse = block_attention(q, k, v, plan, correction, impl=impl, **options)
    assert out.isfinite().all() and lse.isfinite().all()


OPERANDS = (
    "key_mask", "scatter", "tail_keys", "tail_values", "tail_log_weights", "tail_q_mean", "tail_q_var",
    "tail_variances", "row_scale", "residual", "residual_scales",
)  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("parts", [(), ("tail",), ("tail", "second", "scale", "int4")], ids="+".join)
def test_sound_op(parts, impl):
    q, k, v, plan, correction, options = build("text of several blocks", parts)
    correction = cast(correction, torch.float32)
    tail, residual = correction.tail, correction.residual
    given = dict.fromkeys(OPERANDS) | {"row_scale": correction.scale, "tail_limit": math.inf, "residual_kind": "full"}
    if tail is not None:
        given |= {f"tail_{name}": getattr(tail, name) for name in ("keys", "values", "log_weights")}
        if (second := tail.second) is not None:
            given |= {f"tail_{name}": getattr(second, name) for name in ("q_mean", "q_var", "variances", "limit")}
    if residual is not None:
        given |= {"residual": residual.codes, "residual_scales": residual.scales, "residual_kind": residual.kind}
    given |= {"block": 16, "key_block": 16, "scale": 0.3, "text": options["text"], "impl": impl, "precision": "full"}
    operands = (x.float() for x in (q, k, v))
    torch.library.opcheck(
        torch.ops.dit_sparse.block_attention.default, (*operands, plan.counts, plan.indices, plan.key_blocks), given
    )


@pytest.mark.parametrize("parts", [(), ("tail", "second", "scale", "fp8")], ids="+".join)
def test_custom_op_contract_and_compile(parts):
    q, k, v, plan, correction, options = build("ragged", parts)
    q, k, v = (x.float() for x in (q, k, v))
    correction = cast(correction, torch.float32)

    def call(q, k, v):
        return block_attention(q * 1.0, k, v, plan, correction, impl="torch", block=16)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(q, k, v), call(q, k, v), strict=True):
        torch.testing.assert_close(a, b)


OF_BLOCKS = torch.ones(1, 2, 5, 16)


def tail_of(log_weights=None, second=None):
    weights = torch.ones(5) if log_weights is None else log_weights
    return dict(correction=Correction(tail=Tail(OF_BLOCKS, OF_BLOCKS, weights, second)))


def second_of(q_mean=OF_BLOCKS, q_var=OF_BLOCKS, limit=1.0):
    return tail_of(second=SecondOrder(q_mean, q_var, OF_BLOCKS, limit))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(block=0, impl="torch"), "block must be at least 1, not 0"),
        (dict(key_block=0), "key_block must divide block 16, not 0"),
        (dict(key_block=32), "key_block must divide block 16, not 32"),
        (dict(key_block=12), "key_block must divide block 16, not 12"),
        (dict(key_block=8), "5 key blocks, but the inputs have (1, 2, 5) of 16 tokens and 10 of 8."),
        (dict(text=80), "text must leave at least one vision token of 80"),
        (dict(impl="cuda"), "Unknown impl 'cuda'"),
        (dict(key_mask=torch.ones(1, 80)), "key_mask must be bool (1, 80), not torch.float32 (1, 80)"),
        (dict(key_mask=torch.ones(1, 3).bool()), "key_mask must be bool (1, 80), not torch.bool (1, 3)"),
        (dict(key_mask=torch.ones(1, 3).bool(), text=5), "key_mask must be bool (1, 80) or (1, 5), not torch.bool"),
        (dict(block=32), "The plan covers"),
        (dict(correction=Correction(scale=torch.ones(1, 2, 7))), "scale must be one of"),
        (dict(correction=Correction(residual=Residual(torch.ones(1, 2, 80, 15)))), "residual must be one of"),
        (
            dict(correction=Correction(residual=Residual(torch.ones(1, 2, 80, 16, dtype=torch.uint8), kind="fp8"))),
            "A fp8 residual needs one scale a row, (1, 2, 80), not None.",
        ),
        (
            dict(correction=Correction(residual=Residual(torch.ones(1, 2, 80, 16), torch.ones(1, 2, 1)))),
            "A full residual needs one scale a row, (1, 2, 80), not (1, 2, 1).",
        ),
        (
            dict(correction=Correction(tail=Tail(torch.ones(1, 2, 4, 16), torch.ones(1, 2, 5, 16), torch.ones(5)))),
            "tail.keys must be",
        ),
        (tail_of(log_weights=torch.ones(1, 2, 5, 5)), "log_weights must be one of ((5,), (1, 5)), not (1, 2, 5, 5)"),
        (second_of(q_var=OF_BLOCKS[:, :, 1:]), "q_var must be (1, 2, 5, 16) torch.float32, not (1, 2, 4, 16)"),
        (second_of(q_mean=OF_BLOCKS.double()), "q_mean must be (1, 2, 5, 16) torch.float32, not (1, 2, 5, 16) torch."),
        (second_of(limit=0.0), "tail.second.limit is a positive number, or inf, not 0.0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_does_not_fit_is_refused(change, message):
    q, k, v = inputs()
    options = dict(block=16, correction=None) | change
    with pytest.raises(ValueError, match=re.escape(message)):
        block_attention(q.float(), k.float(), v.float(), BlockPlan.full(1, 2, 5, 5, DEVICE), **options)


def test_unlike_inputs_are_refused():
    q, k, v = inputs()
    plan = BlockPlan.full(1, 2, 5, 5, DEVICE)
    with pytest.raises(ValueError, match="must share one float type"):
        block_attention(q.float(), k, v, plan, block=16)
    with pytest.raises(ValueError, match="must agree"):
        block_attention(q, k[:, :1], v[:, :1], plan, block=16)
    with pytest.raises(ValueError, match="multiple of 8 up to 256, not 12"):
        block_attention(*(x[..., :12] for x in (q, k, v)), plan, block=16)
    with pytest.raises(ValueError, match="takes float16, bfloat16 or float32, not torch.float64"):
        block_attention(q, k, v, plan, block=16, impl="triton")
    with pytest.raises(ValueError, match="last dimension"):
        block_attention(q.mT.contiguous().mT, k, v, plan, block=16)


def test_triton_refuses_blocks_it_has_no_tile_for():
    q, k, v = (x.float() for x in inputs(queries=96))
    with pytest.raises(ValueError, match="block must be 16, 32, 64 or 128 for impl 'triton', not 48"):
        block_attention(q, k, v, BlockPlan.full(1, 2, 2, 2, DEVICE), block=48, impl="triton")
    with pytest.raises(ValueError, match="key_block must be 16, 32, 64 or 128 for impl 'triton', not 8"):
        block_attention(q, k, v, BlockPlan.full(1, 2, 3, 12, DEVICE), block=32, key_block=8, impl="triton")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("counts", "indices", "message"),
    [
        ([2, 0, 2, 2, 2], [0, 1], "Counts must lie in 1..2, but they span 0..2"),
        ([2, 3, 2, 2, 2], [0, 1], "Counts must lie in 1..2, but they span 2..3"),
        ([2, 2, 2, 2, 2], [0, 5], "Key block 5 is out of range: there are 5"),
        ([2, 2, 2, 2, 2], [-1, 1], "Key block -1 is out of range"),
        ([2, 2, 2, 2, 2], [3, 1], "must ascend"),
        ([2, 2, 2, 2, 2], [1, 1], "must ascend"),
    ],
    ids=["none listed", "more than there is room for", "past the end", "negative", "unsorted", "twice"],
)
def test_a_checked_plan_must_be_legal(counts, indices, message, impl):
    q, k, v = (x.float() for x in inputs())
    rows = torch.tensor(counts, dtype=torch.int32, device=DEVICE).expand(1, 2, 5).contiguous()
    listed = torch.tensor(indices, dtype=torch.int32, device=DEVICE).expand(1, 2, 5, 2).contiguous()
    with pytest.raises(ValueError, match=message):
        block_attention(q, k, v, BlockPlan(rows, listed, 5), block=16, impl=impl, check_plan=True)
    legal = BlockPlan.full(1, 2, 5, 5, DEVICE)
    checked = block_attention(q, k, v, legal, block=16, impl=impl, check_plan=True)
    assert torch.equal(checked[0], block_attention(q, k, v, legal, block=16, impl=impl)[0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("beyond", [-7, 0, 5])
def test_rows_are_scattered(beyond, impl):
    q, k, v, plan, correction, options = build("text of several blocks", ("tail", "residual"))
    q, k, v, correction = q.float(), k.float(), v.float(), cast(correction, torch.float32)
    index = torch.randperm(48 + beyond, device=DEVICE).int()
    there, lse = block_attention(q, k, v, plan, correction, impl=impl, **options)
    out, same = block_attention(q, k, v, plan, correction, impl=impl, scatter=index, **options)
    assert torch.equal(out[:, :, index.long()], there[:, :, : len(index)]) and torch.equal(lse, same)
    assert torch.equal(out[:, :, len(index) :], there[:, :, len(index) :])


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.arange(81), r"n at most 80, not \(81,\)"),
        (torch.arange(4)[None], r"\(1, 4\)"),
        (torch.arange(4).short(), "torch.int16"),
    ],
)
def test_a_scatter_that_does_not_fit_is_refused(index, message):
    q, k, v, plan, _, options = build("text", ())
    with pytest.raises(ValueError, match=message):
        block_attention(q, k, v, plan, scatter=index.to(DEVICE), **options)
