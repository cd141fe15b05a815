"""block_attention for Hopper: one warp streams listed blocks through a ring, two groups of four attend to them."""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dit_sparse.kernels.hopper_copies import produce
from dit_sparse.kernels.hopper_tiles import (
    BLOCK,
    ROWS,
    copyable,
    describe,
    fetch,
    filled_mask,
    hear,
    longest_first,
    next_slot,
    shrunk,
    store,
    thread_sums,
    weights_of,
    whole_blocks,
)
from dit_sparse.kernels.implementation import lists_turn, residual_kind
from dit_sparse.plan import BlockPlan, Correction, Tail

# By channels: blocks in the ring (with the queries and the tail's weights, what 227 KiB of shared memory hold at 128
# channels), blocks of a round, and whether registers hold two blocks' logits and the queries.
SHAPES = {64: dict(SLOTS=8, ROUND=3, AHEAD=True, HELD=True), 128: dict(SLOTS=5, ROUND=2, AHEAD=False, HELD=False)}
# The largest sum of exponentials relative to the first block's maximum that is taken for right: float32 and bfloat16
# hold 2^127.
LIMIT = gl.constexpr(2.0**100)


@gluon.jit
def _exponentials(s, m, l, shrink, scale2, FIXED: gl.constexpr):
    """Logits s, to be scaled into base 2 -> exponentials, row maximum, sums of a thread, what the maximum shrinks.

    FIXED: the maximum stays, and nothing shrinks.
    """
    if FIXED:
        e = gl.exp2(s * scale2 - m[:, None])
        return e, m, l + thread_sums(e), shrink
    top = gl.maximum(m, gl.max(s, 1) * scale2)
    e = gl.exp2(s * scale2 - top[:, None])
    shrink = gl.exp2(m - top)
    return e, top, shrunk(l, shrink) + thread_sums(e), shrink


@gluon.jit
def _logits(
    q, rings, slot, unscale, POOLED: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr, s_layout: gl.constexpr
):  # fmt: skip
    """Start the product with the keys at `slot`; POOLED ones' weights are what it is added to."""
    q_ring, ring, weight_ring = rings
    s = gl.zeros([ROWS, BLOCK], gl.float32, s_layout)
    if POOLED:
        weight = weight_ring.index(slot).load(gl.SliceLayout(0, s_layout)).to(gl.float32)
        s += (weight * unscale)[None, :]
    return warpgroup_mma(q, ring.index(slot).permute((1, 0)), s, use_acc=POOLED, is_async=True)


@gluon.jit
def _add_values(p, o, shrink, ring, full, slot, phase, FIXED: gl.constexpr, o_layout: gl.constexpr):
    """Start adding the values at `slot` to the output, which shrinks before unless the maximum is FIXED."""
    if not FIXED:
        o = o * gl.convert_layout(shrink, gl.SliceLayout(1, o_layout))[:, None]
    mbarrier.wait(full.index(slot), phase)
    return warpgroup_mma(p, ring.index(slot), o, is_async=True)


@gluon.jit
def _round(
    q, p, o, m, l, shrink, rings, bars, slot, phase, scale2, unscale,
    BLOCKS: gl.constexpr, AHEAD: gl.constexpr, POOLED: gl.constexpr, FIXED: gl.constexpr,
    SLOTS: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """Listed blocks, or POOLED ones, the keys of the first at `slot`; p is of the block before.

    Exponentials run beside the values of the block before, and the logits of the next block are queued before those
    values are waited for, so that the tensor cores have something to go on with; AHEAD, where registers hold two
    blocks' logits, even before the exponentials. No product may run on from one round of a loop to the next, or the
    assembler makes each wait for the one before: hence several blocks a round. The wait for the next slot is a branch,
    behind which the assembler would move the exponentials.
    """
    full, empty = bars
    ring = rings[1]
    s = _logits(q, rings, slot, unscale, POOLED, ROWS, BLOCK, s_layout)
    for i in gl.static_range(BLOCKS):
        v_slot, v_phase = next_slot(slot, phase, SLOTS)
        o = _add_values(p, o, shrink, ring, full, v_slot, v_phase, FIXED, o_layout)
        s = warpgroup_mma_wait(1, deps=[s])
        mbarrier.arrive(empty.index(slot))
        slot, phase = next_slot(v_slot, v_phase, SLOTS)
        if AHEAD and i + 1 < BLOCKS:
            mbarrier.wait(full.index(slot), phase)
            after = _logits(q, rings, slot, unscale, POOLED, ROWS, BLOCK, s_layout)
        e, m, l, shrink = _exponentials(s, m, l, shrink, scale2, FIXED)
        p = gl.convert_layout(e.to(ring.dtype), gl.DotOperandLayout(0, o_layout, 2))
        if i + 1 == BLOCKS:
            mbarrier.wait(full.index(slot), phase)
            o = warpgroup_mma_wait(0, deps=[o])
        else:
            if AHEAD:
                after_slot, after_phase = next_slot(slot, phase, SLOTS)
                mbarrier.wait(full.index(after_slot), after_phase)
                s = after
            else:
                mbarrier.wait(full.index(slot), phase)
                s = _logits(q, rings, slot, unscale, POOLED, ROWS, BLOCK, s_layout)
            o = warpgroup_mma_wait(1, deps=[o])
        mbarrier.arrive(empty.index(v_slot))
    return p, o, m, l, shrink, slot, phase


@gluon.jit
def _step(
    q, p, o, m, l, shrink, rings, bars, slot, phase, scale2, unscale, left, p_seen, masked,
    POOLED: gl.constexpr, FIXED: gl.constexpr, MASKED: gl.constexpr,
    SLOTS: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """One block, of which the first `left` keys count, or a POOLED one; MASKED: if it is `masked`, those that are seen
    at p_seen."""
    full, empty = bars
    ring = rings[1]
    s = _logits(q, rings, slot, unscale, POOLED, ROWS, BLOCK, s_layout)
    v_slot, v_phase = next_slot(slot, phase, SLOTS)
    o = _add_values(p, o, shrink, ring, full, v_slot, v_phase, FIXED, o_layout)
    if MASKED:
        # Beside the products, which take longer.
        seen = gl.load(p_seen + gl.arange(0, BLOCK, gl.SliceLayout(0, s_layout)), mask=masked, other=1)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(empty.index(slot))
    if not POOLED:
        counts = gl.arange(0, BLOCK, gl.SliceLayout(0, s_layout)) < left
        if MASKED:
            counts = counts & (seen != 0)
        s = gl.where(counts[None, :], s, float("-inf"))
    e, m, l, shrink = _exponentials(s, m, l, shrink, scale2, FIXED)
    p = gl.convert_layout(e.to(ring.dtype), gl.DotOperandLayout(0, o_layout, 2))
    slot, phase = next_slot(v_slot, v_phase, SLOTS)
    mbarrier.wait(full.index(slot), phase)
    o = warpgroup_mma_wait(0, deps=[o])
    mbarrier.arrive(empty.index(v_slot))
    return p, o, m, l, shrink, slot, phase


@gluon.jit
def _tiles(
    group: gl.constexpr, slot, phase, q_phase,
    p_out, p_lse, p_work, p_scatter, p_text_mask, out_strides, correction, rings, bars, q_bars, facts,
    codes_parts, sizes, scattered, padded, scale,
    D: gl.constexpr, TEXT: gl.constexpr, MASKED: gl.constexpr, TAIL: gl.constexpr,
    SCATTER: gl.constexpr, SCALE: gl.constexpr, SCALE_PER_ROW: gl.constexpr, RESIDUAL: gl.constexpr,
    PER_ROW: gl.constexpr, COPIED: gl.constexpr, SLOTS: gl.constexpr, ROUND: gl.constexpr, AHEAD: gl.constexpr,
    HELD: gl.constexpr, FIXED: gl.constexpr, AGAIN: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Half of the rows of every tile that the copying warp tells, from the first listed block to the store.

    FIXED: also the last tile that was lost; what was lost before it stands in memory.
    """
    LOG2E: gl.constexpr = 1.4426950408889634
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    q_ring, ring, weight_ring = rings
    full, empty = bars
    q_full, q_empty = q_bars
    H, LQ, LK, VISION, COLUMNS, NQ, NK, STEP, texts = sizes
    scale2, unscale = scale * LOG2E, 1.0 / scale
    lost = gl.to_tensor(-1)
    if not HELD:
        q = q_ring.index(group)
    i_bh, row, n, steps, short, tile = hear(facts, q_full, group, q_phase)
    while steps > 0:
        is_text = row >= VISION
        row += group * ROWS
        whole = n - (short < BLOCK).to(gl.int32)
        if HELD:
            q = q_ring.index(group).load(gl.DotOperandLayout(0, s_layout, 2))
            mbarrier.arrive(q_empty.index(group))

        mbarrier.wait(full.index(slot), phase)
        s = warpgroup_mma_wait(0, deps=[_logits(q, rings, slot, unscale, False, ROWS, BLOCK, s_layout)])
        mbarrier.arrive(empty.index(slot))
        slot, phase = next_slot(slot, phase, SLOTS)
        o_c = gl.arange(0, BLOCK, gl.SliceLayout(0, s_layout))
        s = gl.where((o_c < gl.where(n == 1, short, BLOCK))[None, :], s, float("-inf"))
        m = gl.max(s, 1) * scale2
        e = gl.exp2(s * scale2 - m[:, None])
        l = thread_sums(e)
        shrink = gl.full([ROWS], 1.0, gl.float32, s_rows)
        p = gl.convert_layout(e.to(ring.dtype), gl.DotOperandLayout(0, o_layout, 2))
        o = gl.zeros([ROWS, D], gl.float32, o_layout)
        mbarrier.wait(full.index(slot), phase)

        rounds = (whole - 1) // ROUND
        for _ in range(0, rounds):
            p, o, m, l, shrink, slot, phase = _round(
                q, p, o, m, l, shrink, rings, bars, slot, phase, scale2, unscale, ROUND, AHEAD, False, FIXED, SLOTS,
                BLOCK, ROWS, s_layout, o_layout,
            )  # fmt: skip
        for i in range(1 + ROUND * gl.maximum(rounds, 0), steps):
            left = gl.where(i < whole, BLOCK, short)
            if TEXT:
                left = gl.where(i < n, left, LK - COLUMNS - (i - n) * BLOCK)
            p_seen = p_text_mask
            if MASKED:
                p_seen += (i_bh // H * gl.cdiv(LK - COLUMNS, BLOCK) + i - n) * BLOCK
            p, o, m, l, shrink, slot, phase = _step(
                q, p, o, m, l, shrink, rings, bars, slot, phase, scale2, unscale, left, p_seen, i >= n, False, FIXED,
                MASKED, SLOTS, BLOCK, ROWS, s_layout, o_layout,
            )  # fmt: skip

        # The log-sum-exp of the exact part, before the tail joins the sum.
        end = VISION
        if TEXT:
            end = gl.where(is_text, LQ, end)
        o_l = row + gl.arange(0, ROWS, s_rows)
        exact = gl.convert_layout(gl.sum(l, 1), s_rows)
        gl.store(p_lse + i_bh.to(gl.int64) * LQ + o_l, (m + gl.log2(exact)) / LOG2E, mask=o_l < end)

        if TAIL:
            tail_steps = gl.where(is_text, 0, padded // BLOCK)
            for _ in range(0, tail_steps // ROUND):
                p, o, m, l, shrink, slot, phase = _round(
                    q, p, o, m, l, shrink, rings, bars, slot, phase, scale2, unscale, ROUND, AHEAD, True, FIXED, SLOTS,
                    BLOCK, ROWS, s_layout, o_layout,
                )  # fmt: skip
            for _ in range(0, tail_steps % ROUND):
                p, o, m, l, shrink, slot, phase = _step(
                    q, p, o, m, l, shrink, rings, bars, slot, phase, scale2, unscale, BLOCK, p_text_mask, False, True,
                    FIXED, False, SLOTS, BLOCK, ROWS, s_layout, o_layout,
                )  # fmt: skip
        if not HELD:
            mbarrier.arrive(q_empty.index(group))

        o = _add_values(p, o, shrink, ring, full, slot, phase, FIXED, o_layout)
        o_m = row + gl.arange(0, ROWS, o_rows)
        o_d = gl.arange(0, D, gl.SliceLayout(0, o_layout))
        fetched = fetch(
            o_m, o_d, i_bh, is_text, sizes, p_scatter, scattered, correction,
            D, SCATTER, SCALE, SCALE_PER_ROW, RESIDUAL, PER_ROW, COPIED, BLOCK,
        )  # fmt: skip
        o = warpgroup_mma_wait(0, deps=[o])
        mbarrier.arrive(empty.index(slot))
        slot, phase = next_slot(slot, phase, SLOTS)

        total = gl.sum(l, 1)
        if FIXED:
            # Zero times infinity is NaN, and NaN equals nothing.
            finite = gl.convert_layout(gl.sum(o, 1), gl.SliceLayout(1, l.type.layout)) * 0.0 == 0.0
            if gl.max(gl.where((total <= LIMIT) & finite, 0, 1), 0) > 0:
                gl.store(p_work + 1 + 2 * tile + group, lost)
                lost = tile
        o = o * gl.convert_layout(1.0 / total, o_rows)[:, None]
        store(
            o, o_m, o_d, end, i_bh, H, fetched, p_out, out_strides, codes_parts,
            q_phase ^ AGAIN, group, D, SCALE, RESIDUAL, COPIED, ROWS, o_layout,
        )  # fmt: skip

        q_phase ^= 1
        i_bh, row, n, steps, short, tile = hear(facts, q_full, group, q_phase)
    return slot, phase, q_phase, lost


@gluon.jit
def _consume(
    group: gl.constexpr, lost,
    p_out, p_lse, p_work, p_scatter, p_text_mask, out_strides, correction, rings, bars, q_bars, facts,
    codes_parts, sizes, scattered, padded, scale,
    D: gl.constexpr, TEXT: gl.constexpr, MASKED: gl.constexpr, TAIL: gl.constexpr,
    SCATTER: gl.constexpr, SCALE: gl.constexpr, SCALE_PER_ROW: gl.constexpr, RESIDUAL: gl.constexpr,
    PER_ROW: gl.constexpr, COPIED: gl.constexpr, SLOTS: gl.constexpr, ROUND: gl.constexpr, AHEAD: gl.constexpr,
    HELD: gl.constexpr, FIXED: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Half of every tile's rows; of tiles whose sums grew too large, once more."""
    q_full, q_empty = q_bars
    slot, phase, q_phase, last = _tiles(
        group, gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0),
        p_out, p_lse, p_work, p_scatter, p_text_mask, out_strides, correction, rings, bars, q_bars, facts,
        codes_parts, sizes, scattered, padded, scale, D, TEXT, MASKED, TAIL, SCATTER, SCALE,
        SCALE_PER_ROW, RESIDUAL, PER_ROW, COPIED, SLOTS, ROUND, AHEAD, HELD, FIXED, False, BLOCK, ROWS,
    )  # fmt: skip
    if FIXED:
        lost.index(group).store(gl.full([8], last, gl.int32, gl.BlockedLayout([8], [32], [4], [0])))
        mbarrier.arrive(q_empty.index(group))
        _tiles(
            group, slot, phase, q_phase ^ 1,
            p_out, p_lse, p_work, p_scatter, p_text_mask, out_strides, correction, rings, bars, q_bars,
            facts, codes_parts, sizes, scattered, padded, scale, D, TEXT, MASKED, TAIL, SCATTER, SCALE,
            SCALE_PER_ROW, RESIDUAL, PER_ROW, COPIED, SLOTS, ROUND, AHEAD, HELD, False, True, BLOCK, ROWS,
        )  # fmt: skip


# Sizes that change from plan to plan: nothing is gained from compiling again for each.
_SIZES = (
    "H", "LQ", "LK", "VISION", "COLUMNS", "NQ", "NK", "STEP", "texts", "tiles", "scattered", "padded",
    "scales", "residuals",
)  # fmt: skip


@gluon.jit(do_not_specialize=_SIZES)
def block_attention_hopper_kernel(
    d_q, d_k, d_v, d_tail_k, d_tail_v, d_weights, d_codes,
    p_out, p_lse, p_text_mask, p_counts, p_indices, p_every, p_order, p_work, p_scatter, p_scale, p_res,
    p_res_scale, o_sb, o_sh, o_st, r_sb, r_sh, r_st,
    H, LQ, LK, VISION, COLUMNS, NQ, NK, STEP, texts, tiles, scattered, padded, scales, residuals,
    scale,
    D: gl.constexpr, TEXT: gl.constexpr, MASKED: gl.constexpr, TAIL: gl.constexpr,
    SCATTER: gl.constexpr, SCALE: gl.constexpr, SCALE_PER_ROW: gl.constexpr, RESIDUAL: gl.constexpr,
    PER_ROW: gl.constexpr, COPIED: gl.constexpr, TURNED: gl.constexpr, HALVES: gl.constexpr, SLOTS: gl.constexpr,
    ROUND: gl.constexpr, AHEAD: gl.constexpr, HELD: gl.constexpr, FIXED: gl.constexpr, BLOCK: gl.constexpr,
    ROWS: gl.constexpr,
):  # fmt: skip
    """Persistent: every program takes the next tile of BLOCK query rows when it is done with one."""
    dtype: gl.constexpr = d_k.dtype
    tile_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, D], dtype)
    q_ring = gl.allocate_shared_memory(dtype, [2, ROWS, D], tile_layout)
    ring = gl.allocate_shared_memory(dtype, [SLOTS, BLOCK, D], tile_layout)
    rings = (q_ring, ring, ring)
    if TAIL:
        weight_ring = gl.allocate_shared_memory(d_weights.dtype, [SLOTS, BLOCK], d_weights.layout)
        rings = (q_ring, ring, weight_ring)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    bars, q_bars = (full, empty), (q_full, q_empty)
    facts = gl.allocate_shared_memory(gl.int32, [8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    lost = gl.allocate_shared_memory(gl.int32, [2, 8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    codes_parts = (facts, facts, full, empty)
    if COPIED:
        WIDTH: gl.constexpr = D // 2 if RESIDUAL == 3 else D
        codes_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, WIDTH], gl.uint8)
        codes = gl.allocate_shared_memory(gl.uint8, [2, ROWS, WIDTH], codes_layout)
        codes_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        codes_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(2):
            mbarrier.init(codes_full.index(i), count=1)
            mbarrier.init(codes_empty.index(i), count=1)
        codes_parts = (d_codes, codes, codes_full, codes_empty)
    pointers = (p_counts, p_indices, p_every, p_order, p_work)
    sizes = (H, LQ, LK, VISION, COLUMNS, NQ, NK, STEP, texts)
    out_strides = (o_sb, o_sh, o_st)
    correction = (p_scale, p_res, p_res_scale, r_sb, r_sh, r_st, scales, residuals)
    descs = (d_q, d_k, d_v)
    tail_descs = (d_tail_k, d_tail_v, d_weights)
    gl.warp_specialize(
        [
            (_consume, (
                0, lost, p_out, p_lse, p_work, p_scatter, p_text_mask, out_strides, correction, rings,
                bars, q_bars, facts, codes_parts, sizes, scattered, padded, scale, D, TEXT, MASKED, TAIL,
                SCATTER, SCALE, SCALE_PER_ROW, RESIDUAL, PER_ROW, COPIED, SLOTS, ROUND, AHEAD, HELD, FIXED,
                BLOCK, ROWS,
            )),
            (_consume, (
                1, lost, p_out, p_lse, p_work, p_scatter, p_text_mask, out_strides, correction, rings,
                bars, q_bars, facts, codes_parts, sizes, scattered, padded, scale, D, TEXT, MASKED, TAIL,
                SCATTER, SCALE, SCALE_PER_ROW, RESIDUAL, PER_ROW, COPIED, SLOTS, ROUND, AHEAD, HELD, FIXED,
                BLOCK, ROWS,
            )),
            (produce, (
                descs, tail_descs, pointers, rings, bars, q_bars, facts, lost, codes_parts, sizes, tiles, padded,
                TEXT, TAIL, COPIED, FIXED, TURNED, HALVES, SLOTS, BLOCK, ROWS,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def _tail_descriptors(tail: Tail, plan: BlockPlan, dtype: torch.dtype, scale: float) -> Sequence[TensorDescriptor]:
    """The tail as the kernel copies it."""
    keys, values = (describe(x.to(dtype).contiguous(), BLOCK) for x in (tail.keys, tail.values))
    return keys, values, weights_of(tail, plan, dtype, scale)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    correction: Correction,
    key_block: int,
    scale: float,
    text_mask: Tensor | None,
    text: int,
    every: Tensor,
    scatter: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """block_attention of inputs that are not refused; key_block is BLOCK or half of it, text_mask [B, text] bool is
    False for padding, every [key_blocks] int32 is the list of a text row."""
    batch, heads, queries, dim = q.shape
    keys, rows = k.shape[2], queries - text
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    tail, residual, row_scale = correction.tail, correction.residual, correction.scale
    counts, order = longest_first(plan.counts)
    indices, step = plan.lists()
    padded = whole_blocks(plan.key_blocks)
    texts = batch * heads * triton.cdiv(text, BLOCK)
    tiles = texts + counts.numel()
    programs = min(tiles, torch.cuda.get_device_properties(q.device).multi_processor_count)
    per_row = residual is not None and residual.codes.shape[2] == rows
    copied = residual is not None and residual.kind != "full" and per_row and copyable(residual.codes)
    pooled = _tail_descriptors(tail, plan, q.dtype, scale) if tail else [None] * 3
    # float16 has no room for exponentials relative to less than the maximum.
    fixed = q.dtype == torch.bfloat16
    # The next tile, and of each tile and group the one lost before it.
    work = counts.new_zeros(1 + 2 * tiles if fixed else 1)
    block_attention_hopper_kernel[(programs,)](
        describe(q, ROWS), *(describe(x, key_block, dim if key_block == BLOCK else 64) for x in (k, v)),
        *pooled, describe(residual.codes, ROWS) if residual and copied else None,
        out, lse, filled_mask(text_mask) if text_mask is not None else None,
        counts, indices, every if text else None, order, work, scatter,
        row_scale.float().contiguous() if row_scale is not None else None,
        residual.codes if residual and not copied else None,
        residual.scales.contiguous() if residual and residual.scales is not None else None,
        *out.stride()[:3], *(residual.codes.stride()[:3] if residual else (0, 0, 0)),
        heads, queries, keys, rows, keys - text, counts.shape[-1], plan.key_blocks, step,
        texts, tiles, 0 if scatter is None else scatter.numel(), padded,
        row_scale.shape[2] if row_scale is not None else 0, residual.codes.shape[2] if residual else 0,
        scale,
        D=dim, TEXT=text > 0, MASKED=text_mask is not None,
        TAIL=tail is not None, SCATTER=scatter is not None,
        SCALE=row_scale is not None, SCALE_PER_ROW=row_scale is not None and row_scale.shape[2] == rows,
        RESIDUAL=residual_kind(residual),
        PER_ROW=per_row, COPIED=copied, TURNED=lists_turn(k.device, tiles, keys, dim), HALVES=key_block < BLOCK,
        **SHAPES[dim], FIXED=fixed, BLOCK=BLOCK, ROWS=ROWS, num_warps=4,
    )  # fmt: skip
    return out, lse
