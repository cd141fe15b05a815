"""The Hopper kernel against kernels/reference.py in float64; what it does not take, and what auto does then."""

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from dit_sparse.kernels import reference
from dit_sparse.kernels.block_attention import block_attention
from dit_sparse.kernels.implementation import Inputs
from dit_sparse.plan import BlockPlan
from tests.close import assert_no_worse
from tests.kernels.attention_inputs import DEVICE, cast, corrected, inputs, of_all_keys, random_plan, text_mask

HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability()[0] == 9
on_hopper = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9")]

BLOCK = 128
CASES = {
    "even": dict(queries=512),
    "ragged": dict(queries=5 * BLOCK - 53),
    "one short block": dict(queries=9),
    "64 channels": dict(queries=5 * BLOCK - 53, dim=64),
    "fewer keys": dict(queries=700, keys=333),
    "more keys": dict(queries=200, keys=20 * BLOCK + 1),
    "batch, strided": dict(batch=2, queries=700, strided=True),
    "text": dict(queries=700 + 5, text=5),
    "text of several blocks": dict(queries=512 + 300, text=300, batch=2, strided=True),
    "text, 64 channels": dict(queries=700 + 226, text=226, dim=64),
    "more tiles than programs": dict(queries=3000, heads=12),
    "text mask": dict(batch=3, queries=512 + 45, text=45, masked=True),
    "text mask of several blocks": dict(batch=2, queries=700 + 300, text=300, strided=True, masked=True),
    "text mask, 64 channels": dict(batch=2, queries=700 + 226, text=226, dim=64, masked=True),
}
HALVES = {
    "halves": dict(queries=700, key_block=64),
    "halves, one short block": dict(queries=9, key_block=64),
    "halves, fewer keys": dict(queries=700, keys=333, key_block=64),
    "halves, more keys": dict(queries=200, keys=40 * 64 + 1, key_block=64),
    "halves, batch, strided": dict(batch=2, queries=5 * BLOCK - 53, strided=True, key_block=64),
    "halves, text": dict(batch=2, queries=512 + 300, text=300, strided=True, key_block=64),
    "halves, text mask": dict(batch=2, queries=700 + 300, text=300, masked=True, key_block=64),
    "halves, 64 channels": dict(queries=5 * BLOCK - 53, dim=64, key_block=64),
    "halves, text, 64 channels": dict(batch=2, queries=700 + 226, text=226, dim=64, masked=True, key_block=64),
    "halves, more tiles than programs": dict(queries=3000, heads=12, key_block=64),
}
OF_SEVERAL_BLOCKS = ("text of several blocks", "text mask of several blocks")
PARTS = [
    (), ("tail",), ("tail", "second"), ("tail", "second", "limit"), ("scale",), ("block_scale",), ("residual",),
    ("block_residual",), ("weighed",), ("fp8",), ("int4",), ("tail", "second", "scale", "residual"),
    ("tail", "block_scale", "int4"),
]  # fmt: skip


def build(case, parts, dtype):
    case = {"dim": 128} | (CASES | HALVES)[case]
    key_block = case.pop("key_block", BLOCK)
    text, masked = case.pop("text", 0), case.pop("masked", False)
    q, k, v = inputs(**case)
    columns = k.shape[2] - text
    plan = random_plan(*q.shape[:2], -(-(q.shape[2] - text) // BLOCK), -(-columns // key_block))
    correction = cast(corrected(q, k, v, plan, BLOCK, text, parts, key_block), dtype)
    options = dict(block=BLOCK, key_block=key_block, text=text, key_mask=text_mask(len(q), text) if masked else None)
    return [x.to(dtype) for x in (q, k, v)], plan, correction, options


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("case", "parts"),
    [
        *((case, parts) for case in CASES | HALVES for parts in [(), ("tail", "second", "scale", "residual")]),
        *(
            (case, parts)
            for case in (*OF_SEVERAL_BLOCKS, "halves, text", "64 channels", "text mask, 64 channels")
            for parts in PARTS
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "+".join(x),
)
class TestOnHopper:
    pytestmark = on_hopper

    def test_error_is_at_most_twice_pytorchs(self, case, parts, dtype):
        qkv, plan, correction, options = build(case, parts, dtype)
        scale = qkv[0].shape[-1] ** -0.5
        exact = reference.block_attention(
            *(x.double() for x in qkv), plan, cast(correction, torch.float64), scale=scale, **options
        )
        eager = reference.block_attention(*qkv, plan, correction, scale=scale, **options)
        actual = block_attention(*qkv, plan, correction, impl="gluon", **options)
        assert actual[0].dtype == dtype and actual[0].stride() == qkv[0].stride()
        for a, by_torch, e in zip(actual, eager, exact, strict=True):
            assert_no_worse(a, by_torch, e)


@pytest.mark.parametrize("parts", [(), ("tail", "scale", "fp8")], ids="+".join)
@pytest.mark.parametrize("case", ["even", "64 channels", *OF_SEVERAL_BLOCKS, "halves, text mask"])
class TestBeyondTheFirstBlock:
    """Rows whose exponentials relative to the first listed block's maximum exceed what is taken for right."""

    pytestmark = on_hopper

    def compare(self, qkv, plan, correction, options):
        scale = qkv[0].shape[-1] ** -0.5
        exact = reference.block_attention(
            *(x.double() for x in qkv), plan, cast(correction, torch.float64), scale=scale, **options
        )
        eager = reference.block_attention(*qkv, plan, correction, scale=scale, **options)
        actual = block_attention(*qkv, plan, correction, impl="gluon", **options)
        for a, by_torch, e in zip(actual, eager, exact, strict=True):
            assert_no_worse(a, by_torch, e)
        return actual, exact

    def test_logits(self, case, parts):
        (q, k, v), plan, correction, options = build(case, parts, torch.bfloat16)
        # Of some rows, in some tiles: logits of up to some hundreds, and few of them in the first 64 channels' block.
        q[:, :, 3:260:50] *= 80
        k[:, :, : 2 * BLOCK] *= 0.01
        (_, lse), _ = self.compare((q, k, v), plan, correction, options)
        assert (lse[:, :, 3:260:50] > 100).any(), "no row needs more than what float32 holds"
        once, again = (block_attention(q, k, v, plan, correction, impl="gluon", **options) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))

    def test_values(self, case, parts):
        """What they are multiplied by may be 2^100: some of float32's largest would not survive it."""
        (q, k, v), plan, correction, options = build(case, parts, torch.bfloat16)
        q[:, :, 3:260:50] *= 20
        k[:, :, : 2 * BLOCK] *= 0.01
        v *= 1e36
        if correction is not None and correction.tail is not None:
            tail = replace(correction.tail, values=correction.tail.values * 1e36)
            correction = replace(correction, tail=tail)
        (out, _), (exact, _) = self.compare((q, k, v), plan, correction, options)
        assert out.isfinite().all() and exact.isfinite().all()

    def test_a_nan_stays_in_its_row(self, case, parts):
        (q, k, v), plan, correction, options = build(case, parts, torch.bfloat16)
        q[:, :, 7] = float("nan")
        out, lse = block_attention(q, k, v, plan, correction, impl="gluon", **options)
        bad = torch.zeros_like(lse, dtype=torch.bool)
        bad[:, :, 7] = True
        assert torch.equal(out.isnan().all(-1), bad) and torch.equal(out.isnan().any(-1), bad)


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        *((case, ()) for case in CASES if "64" not in case),
        *((case, ("tail", "second", "scale", "fp8")) for case in CASES if "64" not in case),
        *((case, parts) for case in ("ragged", *OF_SEVERAL_BLOCKS) for parts in PARTS),
    ],
    ids=lambda x: x if isinstance(x, str) else "+".join(x),
)
class TestIn8Bits:
    pytestmark = on_hopper

    def test_error_is_what_the_codes_make(self, case, parts):
        """Of random values, which averages make small as fast as errors: a unit in the last place of e4m3 each."""
        qkv, plan, correction, options = build(case, parts, torch.bfloat16)
        exact = reference.block_attention(
            *(x.double() for x in qkv), plan, cast(correction, torch.float64), scale=128**-0.5, **options
        )
        out, lse = block_attention(*qkv, plan, correction, precision="8bit", **options)
        assert out.dtype == torch.bfloat16 and out.stride() == qkv[0].stride()
        assert (out.double() - exact[0]).norm() <= 0.045 * exact[0].norm()
        assert (lse.double() - exact[1]).abs().max() <= 0.02

    def test_same_bits_again(self, case, parts):
        qkv, plan, correction, options = build(case, parts, torch.bfloat16)
        first, again = (block_attention(*qkv, plan, correction, precision="8bit", **options) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("parts", [(), ("tail", "second", "scale", "residual")], ids="+".join)
@pytest.mark.parametrize(
    ("case", "dtype", "precision"),
    [
        *((case, dtype, "full") for case in CASES if "mask" in case for dtype in (torch.bfloat16, torch.float16)),
        *((case, torch.bfloat16, "8bit") for case in CASES if "mask" in case and "64" not in case),
    ],
    ids=str,
)
class TestMasksOfText:
    pytestmark = on_hopper

    def test_a_masked_key_has_no_influence(self, case, parts, dtype, precision):
        (q, k, v), plan, correction, options = build(case, parts, dtype)
        before = block_attention(q, k, v, plan, correction, precision=precision, **options)
        hidden = ~of_all_keys(options["key_mask"], k.shape[2])[:, None, :, None]
        # In 8 bits they are zeros, whatever they were.
        loud = (1e4, -1e4) if precision == "full" else (torch.nan, torch.inf)
        k, v = (x.masked_fill(hidden, y) for x, y in zip((k, v), loud, strict=True))
        after = block_attention(q, k, v, plan, correction, precision=precision, **options)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    def test_a_mask_that_hides_nothing_changes_nothing(self, case, parts, dtype, precision):
        qkv, plan, correction, options = build(case, parts, dtype)
        mask = torch.ones_like(options.pop("key_mask"))
        masked = block_attention(*qkv, plan, correction, key_mask=mask, precision=precision, **options)
        plain = block_attention(*qkv, plan, correction, precision=precision, **options)
        if precision == "full":
            assert all(torch.equal(a, b) for a, b in zip(masked, plain, strict=True))
        else:  # without a tail the mean that is taken off the keys is that of vision alone
            assert (masked[0].double() - plain[0].double()).norm() <= 0.045 * plain[0].double().norm()

    def test_auto_takes_it(self, case, parts, dtype, precision):
        qkv, plan, correction, options = build(case, parts, dtype)
        named = block_attention(*qkv, plan, correction, impl="gluon", precision=precision, **options)
        auto = block_attention(*qkv, plan, correction, precision=precision, **options)
        assert all(torch.equal(a, b) for a, b in zip(named, auto, strict=True))


@pytest.mark.parametrize(
    ("key_block", "dim", "text"),
    [(128, 128, 0), (128, 64, 0), (64, 128, 0), (64, 64, 0), (128, 128, 300), (64, 64, 226)],
)
@pytest.mark.parametrize("spread", [0, 3])
class TestTurnedLists:
    """Of heads that the cache does not hold, each tile's list begins elsewhere."""

    pytestmark = on_hopper

    def build(self, key_block, dim, text, spread, monkeypatch):
        blocks, heads, vision = 37, 2, 37 * BLOCK - 77
        name = "dit_sparse.kernels.block_attention_hopper.lists_turn"
        monkeypatch.setattr(name, lambda device, tiles, keys, head_dim: True)
        q, k, v = (x.bfloat16() for x in inputs(heads=heads, queries=vision + text, dim=dim))
        columns = -(-vision // key_block)
        counts = 19 + torch.arange(blocks, device=DEVICE) % (spread + 1)
        ranks = torch.rand(1, heads, blocks, columns, device=DEVICE).argsort(-1).argsort(-1)
        plan = BlockPlan.from_mask(ranks < counts[:, None])
        correction = cast(corrected(q, k, v, plan, BLOCK, text, ("tail", "fp8"), key_block), torch.bfloat16)
        return (q, k, v), plan, correction, dict(block=BLOCK, key_block=key_block, text=text)

    def test_error_is_at_most_twice_pytorchs(self, key_block, dim, text, spread, monkeypatch):
        qkv, plan, correction, options = self.build(key_block, dim, text, spread, monkeypatch)
        wide = [x.double() for x in qkv]
        exact = reference.block_attention(*wide, plan, cast(correction, torch.float64), scale=dim**-0.5, **options)
        actual = block_attention(*qkv, plan, correction, impl="gluon", **options)
        eager = reference.block_attention(*qkv, plan, correction, scale=dim**-0.5, **options)
        for a, by_torch, e in zip(actual, eager, exact, strict=True):
            assert_no_worse(a, by_torch, e)

    def test_same_bits_again(self, key_block, dim, text, spread, monkeypatch):
        qkv, plan, correction, options = self.build(key_block, dim, text, spread, monkeypatch)
        once, again = (block_attention(*qkv, plan, correction, impl="gluon", **options) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


class TestAnyPlan:
    pytestmark = on_hopper

    def test_uneven_counts(self):
        q, k, v = (x.bfloat16() for x in inputs(heads=3, queries=40 * BLOCK - 3, dim=128))
        listed = 1 + (7 * torch.arange(40, device=DEVICE) + torch.arange(3, device=DEVICE)[:, None]) % 40
        mask = torch.arange(40, device=DEVICE).expand(1, 3, 40, 40) < listed[None, :, :, None]
        plan = BlockPlan.from_mask(mask)
        exact = reference.block_attention(q.double(), k.double(), v.double(), plan, None, block=BLOCK, scale=128**-0.5)
        eager = reference.block_attention(q, k, v, plan, None, block=BLOCK, scale=128**-0.5)
        actual = block_attention(q, k, v, plan, block=BLOCK, impl="gluon")
        for a, by_torch, e in zip(actual, eager, exact, strict=True):
            assert_no_worse(a, by_torch, e)

    @pytest.mark.parametrize("dim", [64, 128])
    def test_uneven_counts_of_halves(self, dim):
        """Odd and even, with and without the last block, of which one key is there."""
        q, k, v = (x.bfloat16() for x in inputs(heads=3, queries=20 * BLOCK - 63, dim=dim))
        listed = 1 + (7 * torch.arange(20, device=DEVICE) + torch.arange(3, device=DEVICE)[:, None]) % 40
        mask = torch.arange(40, device=DEVICE).expand(1, 3, 20, 40) < listed[None, :, :, None]
        mask[:, :, ::3] = mask[:, :, ::3].flip(-1)
        plan = BlockPlan.from_mask(mask)
        options = dict(block=BLOCK, key_block=64)
        wide = (x.double() for x in (q, k, v))
        exact = reference.block_attention(*wide, plan, None, scale=dim**-0.5, **options)
        eager = reference.block_attention(q, k, v, plan, None, scale=dim**-0.5, **options)
        actual = block_attention(q, k, v, plan, impl="gluon", **options)
        for a, by_torch, e in zip(actual, eager, exact, strict=True):
            assert_no_worse(a, by_torch, e)

    def test_pairs_of_halves_are_whole_blocks(self):
        qkv, plan, correction, options = build("text mask of several blocks", ("scale",), torch.bfloat16)
        halves = BlockPlan.from_mask(plan.mask().repeat_interleave(2, -1)[..., : -(-700 // 64)])
        whole = block_attention(*qkv, plan, correction, impl="gluon", **options)
        halved = block_attention(*qkv, halves, correction, impl="gluon", **(options | dict(key_block=64)))
        assert all(torch.equal(a, b) for a, b in zip(whole, halved, strict=True))

    @pytest.mark.parametrize("beyond", [-40, 0, 17])
    def test_rows_are_scattered(self, beyond):
        qkv, plan, correction, options = build("text of several blocks", ("tail", "second", "int4"), torch.bfloat16)
        vision = qkv[0].shape[2] - options["text"]
        index = torch.randperm(vision + beyond, device=DEVICE)
        there, lse = block_attention(*qkv, plan, correction, impl="gluon", **options)
        out, same = block_attention(*qkv, plan, correction, impl="gluon", scatter=index, **options)
        assert torch.equal(out[:, :, index], there[:, :, : len(index)]) and torch.equal(lse, same)
        assert torch.equal(out[:, :, len(index) :], there[:, :, len(index) :])

    @pytest.mark.parametrize("kind", ["fp8", "int4"])
    def test_codes_that_the_copy_engine_does_not_take(self, kind):
        qkv, plan, correction, options = build("ragged", ("tail", kind), torch.bfloat16)
        codes = correction.residual.codes
        shifted = torch.empty(codes.numel() + 4, dtype=torch.uint8, device=DEVICE)[4:].view(codes.shape).copy_(codes)
        other = replace(correction, residual=replace(correction.residual, codes=shifted))
        once = block_attention(*qkv, plan, correction, impl="gluon", **options)
        for a, b in zip(once, block_attention(*qkv, plan, other, impl="gluon", **options), strict=True):
            assert torch.equal(a, b)

    def test_the_same_inputs_give_the_same_bits(self):
        qkv, plan, correction, options = build("text of several blocks", ("tail", "second", "fp8"), torch.bfloat16)
        once = block_attention(*qkv, plan, correction, impl="gluon", **options)
        for _ in range(5):
            again = block_attention(*qkv, plan, correction, impl="gluon", **options)
            assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))

    def test_in_a_graph_it_reads_what_is_there_at_replay(self):
        qkv, plan, correction, options = build("text", ("tail", "second", "fp8"), torch.bfloat16)
        block_attention(*qkv, plan, correction, impl="gluon", **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = block_attention(*qkv, plan, correction, impl="gluon", **options)
        qkv[0].copy_(torch.randn_like(qkv[0]))
        graph.replay()
        for a, b in zip(captured, block_attention(*qkv, plan, correction, impl="gluon", **options), strict=True):
            assert torch.equal(a, b)

    def test_auto_takes_it_where_it_can(self):
        qkv, plan, _, options = build("text", (), torch.bfloat16)
        for a, b in zip(
            block_attention(*qkv, plan, **options), block_attention(*qkv, plan, impl="gluon", **options), strict=True
        ):
            assert torch.equal(a, b)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (dict(dtype=torch.float32), "takes float16 and bfloat16, not torch.float32"),
            (dict(dim=72), "takes head dimensions 64 and 128, not 72"),
            (dict(block=64), "takes blocks of 128, not 64"),
            (dict(key_block=32), "takes key blocks of 64 and 128, not 32"),
            (dict(masked=True), "takes a mask of text keys, [B, text], not of all keys"),
            (dict(offset=4), "needs 16-byte alignment of every row"),
        ],
        ids=lambda x: "" if isinstance(x, str) else next(iter(x)),
    )
    def test_refusals_are_named_and_auto_goes_round_them(self, change, message):
        block, dim, offset = change.get("block", BLOCK), change.get("dim", 128), change.get("offset", 0)
        q, k, v = inputs(queries=200, dim=dim + 2 * offset)
        q, k, v = (x.to(change.get("dtype", torch.bfloat16))[..., offset : offset + dim] for x in (q, k, v))
        mask = torch.ones(1, 200, dtype=torch.bool, device=DEVICE) if "masked" in change else None
        key_block = change.get("key_block", block)
        plan = BlockPlan.full(1, 2, -(-200 // block), -(-200 // key_block), DEVICE)
        options = dict(block=block, key_block=key_block, key_mask=mask)
        with pytest.raises(ValueError, match=re.escape(f"impl 'gluon' {message}")):
            block_attention(q, k, v, plan, impl="gluon", **options)
        out, _ = block_attention(q, k, v, plan, **options)
        exact, _ = reference.block_attention(
            q.double(), k.double(), v.double(), plan, None, block=block, key_block=key_block, scale=dim**-0.5
        )
        eager, _ = reference.block_attention(q, k, v, plan, None, block=block, key_block=key_block, scale=dim**-0.5)
        assert_no_worse(out, eager, exact)


@pytest.mark.skipif(DEVICE == "cuda", reason="CUDA tensors are taken or refused for other reasons")
def test_tensors_of_a_cpu_are_refused():
    q, k, v = (x.bfloat16() for x in inputs(queries=128, dim=128))
    with pytest.raises(ValueError, match="impl 'gluon' needs CUDA tensors and triton 3.6 or newer"):
        block_attention(q, k, v, BlockPlan.full(1, 2, 1, 1, DEVICE), block=BLOCK, impl="gluon")


def test_masks_of_text_are_taken_and_others_refused(monkeypatch):
    tiles = pytest.importorskip("dit_sparse.kernels.hopper_tiles")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    q, k, v = (x.bfloat16() for x in inputs(queries=300, dim=128))
    mask, plan = torch.ones(1, 300, dtype=torch.bool, device=DEVICE), random_plan(1, 2, 3, 3)
    assert tiles.refusal(Inputs(q, k, v, plan, BLOCK, BLOCK, mask[:, :40]), (128,), (128,)) is None
    refused = tiles.refusal(Inputs(q, k, v, plan, BLOCK, BLOCK, mask), (128,), (128,))
    assert refused == "takes a mask of text keys, [B, text], not of all keys"
    halves = Inputs(q, k, v, plan, BLOCK, 64)
    assert tiles.refusal(halves, (128,), (64, 128)) is None
    assert tiles.refusal(halves, (128,), (128,)) == "takes key blocks of 128, not 64"


@pytest.mark.parametrize("text", [1, 128, 200])
def test_what_a_mask_is_filled_up_with_is_padding(text):
    tiles = pytest.importorskip("dit_sparse.kernels.hopper_tiles")
    mask = text_mask(text, 3).T
    filled = tiles.filled_mask(mask)
    assert filled.shape == (3, -(-text // BLOCK) * BLOCK) and filled.is_contiguous()
    assert torch.equal(filled[:, :text].bool(), mask) and not filled[:, text:].any()


class _Pointer(NamedTuple):
    """An address as the kernel adds to it."""

    base: str
    offset: int = 0

    def __add__(self, step):
        return _Pointer(self.base, self.offset + int(step))


def schedule(tiles, monkeypatch, *, heads, blocks, text, programs):
    """The steps of each program, which takes the next tile when it is free, and where tiles begin: (head, row)."""
    counts = torch.randint(blocks // 8, blocks // 4, (heads, blocks))
    counts, order = tiles.longest_first(counts.int()[None])
    rows, texts = blocks * BLOCK - 5, heads * -(-text // BLOCK)
    tables = {"counts": counts.flatten(), "order": order.flatten()}
    language = SimpleNamespace(
        cdiv=lambda a, b: -(-a // b),
        where=lambda c, a, b: a if c else b,
        load=lambda p: tables[p.base][p.offset],
        int64=torch.int64,
    )
    monkeypatch.setattr(tiles, "gl", language)
    pointers = tuple(_Pointer(name) for name in ("counts", "indices", "every", "order", "next"))
    sizes = (heads, rows + text, rows + text, rows, rows, blocks, blocks, 8, texts)
    steps, begins = [0] * programs, []
    for t in range(texts + heads * blocks):
        i_bh, _, _, row, is_text, p_list, n, took = tiles.find_tile.fn(
            torch.tensor(t), pointers, sizes, text > 0, BLOCK
        )
        assert p_list.base == ("every" if is_text else "indices") and n == (blocks if is_text else n) and took >= n
        steps[steps.index(min(steps))] += int(took)
        begins.append((int(i_bh), int(row)))
    return steps, begins, rows


@pytest.mark.parametrize("first", [None, 0, 1])
@pytest.mark.parametrize("text", [0, 300])
@pytest.mark.parametrize("listed", [[0], [4], [0, 4], [1, 2, 3], [0, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 3]])
@pytest.mark.parametrize("columns", [257, 290, 320])
def test_steps_of_two_blocks_take_what_is_listed_once(columns, listed, text, first, monkeypatch):
    copies = pytest.importorskip("dit_sparse.kernels.hopper_copies")
    language = SimpleNamespace(
        cdiv=lambda a, b: -(-a // b),
        where=lambda c, a, b: a if c else b,
        minimum=min,
        load=lambda p, mask=True, other=0: listed[p.offset] if mask else other,
        constexpr=int,
    )
    monkeypatch.setattr(copies, "gl", language)
    monkeypatch.setattr(copies, "_turned", copies._turned.fn)
    pointer, blocks = _Pointer("list"), len(listed)
    all_steps = blocks + -(-text // BLOCK)
    n, steps, short = copies._halved.fn(pointer, blocks, all_steps, columns, BLOCK)
    assert n == -(-blocks // 2) and steps == n + -(-text // BLOCK) and 0 < short <= BLOCK
    if first is not None and first >= max(n - 1, 1):
        pytest.skip("a list begins before its last step")
    seen = []
    for i in range(steps):
        row, other = copies._rows_of.fn(
            pointer, i, first, n, blocks, columns, text > 0, first is not None, True, BLOCK
        )
        counts = BLOCK if i + 1 < n else short if i + 1 == n else min(BLOCK, text - (i - n) * BLOCK)
        seen += [*range(row, row + 64), *range(other, other + 64)][:counts]
    tokens = [t for block in listed for t in range(block * 64, min(block * 64 + 64, columns))]
    begins = BLOCK * (first or 0)
    ends = len(tokens) - short
    turned = tokens[begins:ends] + tokens[:begins] + tokens[ends:]
    assert seen == turned + list(range(columns, columns + text))


@pytest.mark.parametrize(("longest", "shortest"), [(40, 40), (40, 4), (1, 1), (2000, 1999)])
def test_a_tile_begins_where_those_that_started_before_it_are_by_then(longest, shortest, monkeypatch):
    """Every program is at the same place when they start apart and rows are alike; of rows far apart they start
    together, and so they begin."""
    copies = pytest.importorskip("dit_sparse.kernels.hopper_copies")
    blocks, programs = 300, 132
    counts = torch.linspace(longest, shortest, blocks).round()
    language = SimpleNamespace(
        load=lambda p: counts[p.offset],
        num_programs=lambda _: torch.tensor(programs),
        where=lambda c, a, b: a if c else b,
        float32=torch.float32,
        int32=torch.int32,
    )
    monkeypatch.setattr(copies, "gl", language)
    pointers, sizes = (_Pointer("counts"),), (None,) * 5 + (blocks,)
    found = []
    for i in range(blocks):
        n = counts[i].int()
        first = int(copies._first_step.fn(torch.tensor(0), torch.tensor(i), False, n, pointers, sizes, True))
        assert 0 <= first < max(int(n) - 1, 1)
        found.append(first)
        assert abs(first - (i % programs) / programs * shortest / longest * (int(n) - 1)) <= 1
        assert not copies._first_step.fn(torch.tensor(0), torch.tensor(i), True, n, pointers, sizes, True)
    assert found[0] == found[programs] == 0
    assert longest > shortest + 1 or max(found) >= 0.9 * (shortest - 1)


def test_counts_that_lie_otherwise_are_read_in_their_order():
    tiles = pytest.importorskip("dit_sparse.kernels.hopper_tiles")
    counts = torch.randint(1, 9, (1, 6, 5), dtype=torch.int32).mT.contiguous().mT
    ordered, order = tiles.longest_first(counts)
    assert not counts.is_contiguous() and ordered.is_contiguous() and order.is_contiguous()
    assert torch.equal(ordered, counts[0].gather(1, order.long())) and (ordered.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("text", [0, 7, 300])
def test_every_row_is_in_one_tile(text, monkeypatch):
    tiles = pytest.importorskip("dit_sparse.kernels.hopper_tiles")
    _, begins, rows = schedule(tiles, monkeypatch, heads=5, blocks=9, text=text, programs=7)
    vision = [(h, i * BLOCK) for h in range(5) for i in range(9)]
    words = [(h, rows + i * BLOCK) for h in range(5) for i in range(-(-text // BLOCK))]
    assert sorted(begins) == sorted(vision + words)


def test_programs_end_together(monkeypatch):
    tiles = pytest.importorskip("dit_sparse.kernels.hopper_tiles")
    # Tiles of text are four to eight times as long as others; last in line, they would be computed by a few programs.
    steps, _, _ = schedule(tiles, monkeypatch, heads=24, blocks=128, text=512, programs=132)
    assert max(steps) < 1.06 * sum(steps) / len(steps)


@pytest.mark.parametrize(
    ("precision", "impl"), [("8bit", "torch"), ("8bit", "triton"), ("8bit", "auto"), ("4", "auto")]
)
def test_8_bits_are_refused_where_they_are_not_there(precision, impl):
    q, k, v = (x.bfloat16() for x in inputs(queries=300, dim=64))
    plan = random_plan(1, 2, 3, 3)
    with pytest.raises(ValueError, match="precision"):
        block_attention(q, k, v, plan, block=BLOCK, impl=impl, precision=precision)
