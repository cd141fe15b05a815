"""block_attention for Hopper: one warp streams listed blocks through a ring, two groups of four attend to them."""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dit_sparse.kernels.block_select import plan_mask
from dit_sparse.plan import BlockPlan, Correction, Tail

# Queries and keys of a step; queries of a group, as many as one warpgroup product takes.
BLOCK, ROWS = 128, 64
# By channels: blocks in the ring (with the queries and the tail's weights, what 227 KiB of shared memory hold at 128
# channels), blocks of a round, and whether registers hold two blocks' logits and the queries.
SHAPES = {64: dict(SLOTS=8, ROUND=3, AHEAD=True, HELD=True), 128: dict(SLOTS=5, ROUND=2, AHEAD=False, HELD=False)}
# The largest sum of exponentials relative to the first block's maximum that is taken for right: float32 and bfloat16
# hold 2^127.
LIMIT = gl.constexpr(2.0**100)

TRITON = tuple(int(x) for x in triton.__version__.split(".")[:2])
# Today's name, and that of Triton 3.6.
_load_tile = tma.async_load if "async_load" in tma.__all__ else tma.async_copy_global_to_shared
_REINTERPRETS = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def _next(slot, phase, SLOTS: gl.constexpr):
    """The slot after this one, and the phase of its barriers."""
    slot += 1
    wrapped = slot == SLOTS
    return gl.where(wrapped, 0, slot), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def _tile(t, pointers, sizes, TEXT: gl.constexpr, BLOCK: gl.constexpr):
    """Tile t: its head, query block and row, the list it reads, and how many steps that list and the text take."""
    p_counts, p_indices, p_every, p_order, p_next = pointers
    H, LQ, LK, VISION, COLUMNS, NQ, NK, W, texts = sizes
    i_bh = t // NQ
    i = t % NQ
    i_block = i
    is_text = i < 0
    if TEXT:
        # Text rows list every block. A head's would meet those of other heads in the same few programs, were they not
        # all at the start, one or none for each program.
        is_text = t < texts
        per_head = gl.cdiv(LQ - VISION, BLOCK)
        i_bh = gl.where(is_text, t // per_head, (t - texts) // NQ)
        i = gl.where(is_text, t % per_head, (t - texts) % NQ)
        i_block = gl.where(is_text, 0, i)
    i_block = gl.load(p_order + i_bh * NQ + i_block)
    i_list = i_bh.to(gl.int64) * NQ + i_block
    n = gl.load(p_counts + i_list)
    p_list = p_indices + i_list * W
    row = i_block * BLOCK
    steps = n
    if TEXT:
        row = gl.where(is_text, VISION + i * BLOCK, row)
        n = gl.where(is_text, NK, n)
        p_list = gl.where(is_text, p_every, p_list)
        steps = n + gl.cdiv(LK - COLUMNS, BLOCK)
    return i_bh, i_list, row, is_text, p_list, n, steps


@gluon.jit
def _fill(desc, b, h, row, to, bars, slot, phase, more: gl.constexpr):
    """Copy a block to the slot's memory once it is empty; `more` bytes are to follow."""
    full, empty = bars
    mbarrier.wait(empty.index(slot), phase ^ 1)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes + more)
    _load_tile(desc, [b, h, row, 0], full.index(slot), to)


@gluon.jit
def _produce(
    descs, tail_descs, pointers, rings, bars, q_bars, facts, lost, codes_parts, sizes, tiles, padded, weight_step,
    TEXT: gl.constexpr, TAIL: gl.constexpr, SECOND: gl.constexpr, COPIED: gl.constexpr, FIXED: gl.constexpr,
    SLOTS: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Every tile of this program, then those that a group could not hold, from each group's list."""
    q_full, q_empty = q_bars
    p_work = pointers[4]
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    q_phase = gl.to_tensor(0)
    t = gl.program_id(0)
    while t < tiles:
        t, slot, phase, q_phase = _copy_tile(
            t, descs, tail_descs, pointers, rings, bars, q_bars, facts, codes_parts, sizes, padded, weight_step,
            slot, phase, q_phase, TEXT, TAIL, SECOND, COPIED, False, SLOTS, BLOCK, ROWS,
        )  # fmt: skip
    _tell_end(facts, q_bars, q_phase)
    if FIXED:
        q_phase ^= 1
        for group in gl.static_range(2):
            mbarrier.wait(q_empty.index(group), q_phase ^ 1)
        layout: gl.constexpr = gl.BlockedLayout([8], [32], [1], [0])
        t, other = gl.max(lost.index(0).load(layout), 0), gl.max(lost.index(1).load(layout), 0)
        group = gl.where(t < 0, 1, 0)
        t = gl.where(t < 0, other, t)
        while t >= 0:
            following = gl.load(p_work + 1 + 2 * t + group)
            _, slot, phase, q_phase = _copy_tile(
                t, descs, tail_descs, pointers, rings, bars, q_bars, facts, codes_parts, sizes, padded, weight_step,
                slot, phase, q_phase, TEXT, TAIL, SECOND, COPIED, True, SLOTS, BLOCK, ROWS,
            )  # fmt: skip
            ended = (following < 0) & (group == 0)
            t = gl.where(ended, other, following)
            group = gl.where(ended, 1, group)
        _tell_end(facts, q_bars, q_phase)


@gluon.jit
def _copy_tile(
    t, descs, tail_descs, pointers, rings, bars, q_bars, facts, codes_parts, sizes, padded, weight_step,
    slot, phase, q_phase,
    TEXT: gl.constexpr, TAIL: gl.constexpr, SECOND: gl.constexpr, COPIED: gl.constexpr, AGAIN: gl.constexpr,
    SLOTS: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Keys of a step, then values of the step before: the order in which they are used. Returns the next tile, too."""
    d_q, d_k, d_v = descs
    q_ring, ring, routed_ring, weight_ring, var_ring = rings
    q_full, q_empty = q_bars
    full, empty = bars
    H, LQ, LK, VISION, COLUMNS, NQ, NK, W, texts = sizes
    i_bh, i_list, row, is_text, p_list, n, steps = _tile(t, pointers, sizes, TEXT, BLOCK)
    b, h = i_bh // H, i_bh % H
    before = gl.load(p_list) * BLOCK
    # Lists ascend, so only the last listed block can be the short one.
    short = COLUMNS - gl.load(p_list + n - 1) * BLOCK
    for group in gl.static_range(2):
        mbarrier.wait(q_empty.index(group), q_phase ^ 1)
    _tell(facts, i_bh, row, n, steps, short, t)
    for group in gl.static_range(2):
        mbarrier.expect(q_full.index(group), d_q.block_type.nbytes)
        _load_tile(d_q, [b, h, row + group * ROWS, 0], q_full.index(group), q_ring.index(group))
    q_phase ^= 1
    _fill(d_k, b, h, before, ring.index(slot), bars, slot, phase, 0)
    slot, phase = _next(slot, phase, SLOTS)
    if not AGAIN:
        t = gl.num_programs(0) + gl.atomic_add(pointers[4], 1)
    for i in range(1, steps):
        start = gl.load(p_list + i, mask=i < n, other=0) * BLOCK
        if TEXT:
            start = gl.where(i < n, start, COLUMNS + (i - n) * BLOCK)
        _fill(d_k, b, h, start, ring.index(slot), bars, slot, phase, 0)
        slot, phase = _next(slot, phase, SLOTS)
        _fill(d_v, b, h, before, ring.index(slot), bars, slot, phase, 0)
        slot, phase = _next(slot, phase, SLOTS)
        before = start
    if TAIL:
        d_tail_k, d_tail_v, d_tail_var, d_routed, d_weights = tail_descs
        tail_steps = gl.where(is_text, 0, padded // BLOCK)
        for i in range(0, tail_steps):
            if SECOND:
                _fill(d_tail_var, b, h, i * BLOCK, var_ring.index(2 * slot), bars, slot, phase, 0)
                slot, phase = _next(slot, phase, SLOTS)
            _fill(d_tail_k, b, h, i * BLOCK, ring.index(slot), bars, slot, phase, BLOCK * 5)
            routed_at = (i_list * padded).to(gl.int32) + i * BLOCK
            _load_tile(d_routed, [routed_at], full.index(slot), routed_ring.index(slot))
            _load_tile(d_weights, [b * weight_step + i * BLOCK], full.index(slot), weight_ring.index(slot))
            slot, phase = _next(slot, phase, SLOTS)
            if i == 0:
                _fill(d_v, b, h, before, ring.index(slot), bars, slot, phase, 0)
            else:
                _fill(d_tail_v, b, h, (i - 1) * BLOCK, ring.index(slot), bars, slot, phase, 0)
            slot, phase = _next(slot, phase, SLOTS)
        if tail_steps == 0:
            _fill(d_v, b, h, before, ring.index(slot), bars, slot, phase, 0)
        else:
            _fill(d_tail_v, b, h, (tail_steps - 1) * BLOCK, ring.index(slot), bars, slot, phase, 0)
    else:
        _fill(d_v, b, h, before, ring.index(slot), bars, slot, phase, 0)
    slot, phase = _next(slot, phase, SLOTS)
    if COPIED:
        # Rows of text lie behind the last one, where the copy engine reads zeros. What ended the first pass came
        # without codes.
        d_codes, codes, codes_full, codes_empty = codes_parts
        for group in gl.static_range(2):
            mbarrier.wait(codes_empty.index(group), q_phase ^ AGAIN)
            mbarrier.expect(codes_full.index(group), d_codes.block_type.nbytes)
            at = [b, h, row + group * ROWS, 0]
            _load_tile(d_codes, at, codes_full.index(group), codes.index(group))
    return t, slot, phase, q_phase


@gluon.jit
def _tell_end(facts, q_bars, q_phase):
    """There is no tile left."""
    q_full, q_empty = q_bars
    for group in gl.static_range(2):
        mbarrier.wait(q_empty.index(group), q_phase ^ 1)
    _tell(facts, 0, 0, 0, 0, 0, 0)
    for group in gl.static_range(2):
        mbarrier.arrive(q_full.index(group), count=1)


@gluon.jit
def _tell(facts, i_bh, row, n, steps, short, tile):
    """What the groups need to know of a tile. No steps: there is none left."""
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [1], [0])
    place = gl.arange(0, 8, layout)
    told = gl.where(place == 0, i_bh, gl.where(place == 1, row, gl.where(place == 2, n, short)))
    facts.store(gl.where(place == 3, steps, gl.where(place == 4, tile, told)))


@gluon.jit
def _hear(facts, q_full, group: gl.constexpr, q_phase):
    """Once the next tile's queries are here: head, first row, listed blocks, steps, keys in the last block, number."""
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    mbarrier.wait(q_full.index(group), q_phase)
    told = facts.load(layout)
    place = gl.arange(0, 8, layout)
    i_bh = gl.sum(gl.where(place == 0, told, 0), 0)
    row = gl.sum(gl.where(place == 1, told, 0), 0)
    n = gl.sum(gl.where(place == 2, told, 0), 0)
    steps = gl.sum(gl.where(place == 3, told, 0), 0)
    tile = gl.sum(gl.where(place == 4, told, 0), 0)
    short = gl.sum(gl.where(place == 5, told, 0), 0)
    return i_bh, row, n, steps, short, tile


@gluon.jit
def _exponentials(s, m, l, shrink, scale2, FIXED: gl.constexpr):
    """Logits s, to be scaled into base 2 -> exponentials, row maximum, sums of a thread, what the maximum shrinks.

    FIXED: the maximum stays, and nothing shrinks.
    """
    if FIXED:
        e = gl.exp2(s * scale2 - m[:, None])
        return e, m, l + _thread_sums(e), shrink
    top = gl.maximum(m, gl.max(s, 1) * scale2)
    e = gl.exp2(s * scale2 - top[:, None])
    shrink = gl.exp2(m - top)
    return e, top, _shrunk(l, shrink) + _thread_sums(e), shrink


@gluon.jit
def _thread_sums(e):
    """[ROWS, N] -> [ROWS, 4], what each of the four threads that share a row holds: pairs of columns, eight apart.

    They are added up when the tile ends: a sum over threads in every block would be two waits in every block.
    """
    parts = e.reshape([e.shape[0], e.shape[1] // 8, 4, 2])
    return gl.sum(gl.sum(parts, 3), 1)


@gluon.jit
def _shrunk(l, shrink):
    """Sums of threads, times a factor a row."""
    return l * gl.convert_layout(shrink, gl.SliceLayout(1, l.type.layout))[:, None]


@gluon.jit
def _logits(q, ring, slot, ROWS: gl.constexpr, BLOCK: gl.constexpr, s_layout: gl.constexpr):
    s = gl.zeros([ROWS, BLOCK], gl.float32, s_layout)
    return warpgroup_mma(q, ring.index(slot).permute((1, 0)), s, use_acc=False, is_async=True)


@gluon.jit
def _add_values(p, o, shrink, ring, full, slot, phase, FIXED: gl.constexpr, o_layout: gl.constexpr):
    """Start adding the values at `slot` to the output, which shrinks before unless the maximum is FIXED."""
    if not FIXED:
        o = o * gl.convert_layout(shrink, gl.SliceLayout(1, o_layout))[:, None]
    mbarrier.wait(full.index(slot), phase)
    return warpgroup_mma(p, ring.index(slot), o, is_async=True)


@gluon.jit
def _round(
    q, p, o, m, l, shrink, ring, bars, slot, phase, scale2,
    BLOCKS: gl.constexpr, AHEAD: gl.constexpr, FIXED: gl.constexpr,
    SLOTS: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """Listed blocks, the keys of the first at `slot`; p is of the block before.

    Exponentials run beside the values of the block before, and the logits of the next block are queued before those
    values are waited for, so that the tensor cores have something to go on with; AHEAD, where registers hold two
    blocks' logits, even before the exponentials. No product may run on from one round of a loop to the next, or the
    assembler makes each wait for the one before: hence several blocks a round. The wait for the next slot is a branch,
    behind which the assembler would move the exponentials.
    """
    full, empty = bars
    s = _logits(q, ring, slot, ROWS, BLOCK, s_layout)
    for i in gl.static_range(BLOCKS):
        v_slot, v_phase = _next(slot, phase, SLOTS)
        o = _add_values(p, o, shrink, ring, full, v_slot, v_phase, FIXED, o_layout)
        s = warpgroup_mma_wait(1, deps=[s])
        mbarrier.arrive(empty.index(slot))
        slot, phase = _next(v_slot, v_phase, SLOTS)
        if AHEAD and i + 1 < BLOCKS:
            mbarrier.wait(full.index(slot), phase)
            after = _logits(q, ring, slot, ROWS, BLOCK, s_layout)
        e, m, l, shrink = _exponentials(s, m, l, shrink, scale2, FIXED)
        p = gl.convert_layout(e.to(ring.dtype), gl.DotOperandLayout(0, o_layout, 2))
        if i + 1 == BLOCKS:
            mbarrier.wait(full.index(slot), phase)
            o = warpgroup_mma_wait(0, deps=[o])
        else:
            if AHEAD:
                next_slot, next_phase = _next(slot, phase, SLOTS)
                mbarrier.wait(full.index(next_slot), next_phase)
                s = after
            else:
                mbarrier.wait(full.index(slot), phase)
                s = _logits(q, ring, slot, ROWS, BLOCK, s_layout)
            o = warpgroup_mma_wait(1, deps=[o])
        mbarrier.arrive(empty.index(v_slot))
    return p, o, m, l, shrink, slot, phase


@gluon.jit
def _step(
    q, p, o, m, l, shrink, ring, bars, slot, phase, scale2, left, FIXED: gl.constexpr,
    SLOTS: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """One block, of which the first `left` keys count."""
    full, empty = bars
    s = _logits(q, ring, slot, ROWS, BLOCK, s_layout)
    v_slot, v_phase = _next(slot, phase, SLOTS)
    o = _add_values(p, o, shrink, ring, full, v_slot, v_phase, FIXED, o_layout)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(empty.index(slot))
    o_c = gl.arange(0, BLOCK, gl.SliceLayout(0, s_layout))
    s = gl.where((o_c < left)[None, :], s, float("-inf"))
    e, m, l, shrink = _exponentials(s, m, l, shrink, scale2, FIXED)
    p = gl.convert_layout(e.to(ring.dtype), gl.DotOperandLayout(0, o_layout, 2))
    slot, phase = _next(v_slot, v_phase, SLOTS)
    mbarrier.wait(full.index(slot), phase)
    o = warpgroup_mma_wait(0, deps=[o])
    mbarrier.arrive(empty.index(v_slot))
    return p, o, m, l, shrink, slot, phase


@gluon.jit
def _tail_step(
    q, q2, q2_unit, p, o, m, l, shrink, rings, bars, slot, phase, scale, scale2, limit,
    SECOND: gl.constexpr, FIXED: gl.constexpr, SLOTS: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr,
    s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """A block of pooled keys: weight, second-order term and mask are what the product of the logits is added to."""
    q_ring, ring, routed_ring, weight_ring, var_ring = rings
    full, empty = bars
    k_slot, k_phase = slot, phase
    if SECOND:
        s8_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 32])
        s = gl.zeros([ROWS, BLOCK], gl.float32, s8_layout)
        s = warpgroup_mma(q2, var_ring.index(2 * slot).permute((1, 0)), s, use_acc=False, is_async=True)
        k_slot, k_phase = _next(slot, phase, SLOTS)
        mbarrier.wait(full.index(k_slot), k_phase)
        s = gl.convert_layout(warpgroup_mma_wait(0, deps=[s]), s_layout)
        mbarrier.arrive(empty.index(slot))
        s = gl.minimum(s * q2_unit[:, None], limit)
    else:
        s = gl.zeros([ROWS, BLOCK], gl.float32, s_layout)
    column_layout: gl.constexpr = gl.SliceLayout(0, s_layout)
    weight = weight_ring.index(k_slot).load(column_layout)
    weight = gl.where(routed_ring.index(k_slot).load(column_layout) != 0, float("-inf"), weight)
    s = (s + weight[None, :]) * (1.0 / scale)
    s = warpgroup_mma(q, ring.index(k_slot).permute((1, 0)), s, is_async=True)
    v_slot, v_phase = _next(k_slot, k_phase, SLOTS)
    o = _add_values(p, o, shrink, ring, full, v_slot, v_phase, FIXED, o_layout)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(empty.index(k_slot))
    e, m, l, shrink = _exponentials(s, m, l, shrink, scale2, FIXED)
    p = gl.convert_layout(e.to(ring.dtype), gl.DotOperandLayout(0, o_layout, 2))
    slot, phase = _next(v_slot, v_phase, SLOTS)
    mbarrier.wait(full.index(slot), phase)
    o = warpgroup_mma_wait(0, deps=[o])
    mbarrier.arrive(empty.index(v_slot))
    return p, o, m, l, shrink, slot, phase


@gluon.jit
def _fetch(
    o_m, o_d, i_bh, is_text, sizes, p_scatter, scattered, correction,
    D: gl.constexpr, SCATTER: gl.constexpr, SCALE: gl.constexpr, SCALE_PER_ROW: gl.constexpr, RESIDUAL: gl.constexpr,
    PER_ROW: gl.constexpr, COPIED: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """What the store of these rows needs from memory: where they go, factor, residual's scale and codes."""
    H, LQ, LK, VISION, COLUMNS, NQ, NK, W, texts = sizes
    p_scale, p_res, p_res_scale, r_sb, r_sh, r_st, scales, residuals = correction
    b, h = (i_bh // H).to(gl.int64), (i_bh % H).to(gl.int64)
    m_r = (o_m < VISION) & (is_text == 0)
    o_o = o_m.to(gl.int64)
    factor, unit, codes = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    if SCATTER:
        o_o = gl.where(o_m < scattered, gl.load(p_scatter + o_m, mask=o_m < scattered, other=0).to(gl.int64), o_o)
    if SCALE:
        o_r = o_m if SCALE_PER_ROW else o_m // BLOCK
        factor = gl.load(p_scale + i_bh.to(gl.int64) * scales + o_r, mask=m_r, other=1.0)
    if RESIDUAL > 0:
        o_r = o_m if PER_ROW else o_m // BLOCK
        if RESIDUAL > 1:
            unit = gl.load(p_res_scale + i_bh.to(gl.int64) * residuals + o_r, mask=m_r, other=0.0)
        if not COPIED:
            p_r = p_res + b * r_sb + h * r_sh + o_r.to(gl.int64)[:, None] * r_st
            if RESIDUAL == 3:
                p_r += (o_d % (D // 2))[None, :]
            else:
                p_r += o_d[None, :]
            codes = gl.load(p_r, mask=m_r[:, None], other=0)
    return o_o, factor, unit, codes


@gluon.jit
def _store(
    o, o_m, o_d, end, i_bh, H, fetched, p_out, out_strides, codes_parts, q_phase,
    group: gl.constexpr, D: gl.constexpr, SCALE: gl.constexpr, RESIDUAL: gl.constexpr, COPIED: gl.constexpr,
    ROWS: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """out = factor * o + residual, to where the rows go."""
    o_o, factor, unit, codes = fetched
    o_sb, o_sh, o_st = out_strides
    b, h = (i_bh // H).to(gl.int64), (i_bh % H).to(gl.int64)
    if SCALE:
        o = o * factor[:, None]
    if COPIED:
        d_codes, codes_ring, codes_full, codes_empty = codes_parts
        mbarrier.wait(codes_full.index(group), q_phase)
        if RESIDUAL == 3:
            half = codes_ring.index(group).load(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 2, 16]))
            # A byte holds channel d in its low half and channel d + D/2 in its high half.
            codes = gl.join(half & 15, half >> 4).permute((0, 2, 1)).reshape([ROWS, D])
            codes = gl.convert_layout(codes, o_layout)
        else:
            codes = codes_ring.index(group).load(o_layout)
        mbarrier.arrive(codes_empty.index(group))
    if RESIDUAL == 1:
        o += codes.to(gl.float32)
    elif RESIDUAL == 2:
        o += codes.to(gl.float8e4nv, bitcast=True).to(gl.float32) * unit[:, None]
    elif RESIDUAL == 3:
        if COPIED:
            o += (codes.to(gl.float32) - 8.0) * unit[:, None]
        else:
            nibble = (codes.to(gl.int32) >> (4 * (o_d // (D // 2)))[None, :]) & 15
            o += (nibble.to(gl.float32) - 8.0) * unit[:, None]
    p_o = p_out + b * o_sb + h * o_sh + o_o[:, None] * o_st + o_d[None, :]
    gl.store(p_o, o.to(p_out.dtype.element_ty), mask=(o_m < end)[:, None])


@gluon.jit
def _tiles(
    group: gl.constexpr, slot, phase, q_phase,
    p_out, p_lse, p_work, p_scatter, p_var_unit, out_strides, correction, rings, bars, q_bars, facts, codes_parts,
    sizes, scattered, padded, scale, limit,
    D: gl.constexpr, TEXT: gl.constexpr, TAIL: gl.constexpr, SECOND: gl.constexpr, SCATTER: gl.constexpr,
    SCALE: gl.constexpr, SCALE_PER_ROW: gl.constexpr, RESIDUAL: gl.constexpr, PER_ROW: gl.constexpr,
    COPIED: gl.constexpr, SLOTS: gl.constexpr, ROUND: gl.constexpr, AHEAD: gl.constexpr, HELD: gl.constexpr,
    FIXED: gl.constexpr, AGAIN: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Half of the rows of every tile that the copying warp tells, from the first listed block to the store.

    FIXED: also the last tile that was lost; what was lost before it stands in memory.
    """
    LOG2E: gl.constexpr = 1.4426950408889634
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    q_ring, ring, routed_ring, weight_ring, var_ring = rings
    full, empty = bars
    q_full, q_empty = q_bars
    H, LQ, LK, VISION, COLUMNS, NQ, NK, W, texts = sizes
    scale2 = scale * LOG2E
    lost = gl.to_tensor(-1)
    if not HELD:
        q = q_ring.index(group)
    i_bh, row, n, steps, short, tile = _hear(facts, q_full, group, q_phase)
    while steps > 0:
        is_text = row >= VISION
        row += group * ROWS
        whole = n - (short < BLOCK).to(gl.int32)
        if HELD:
            q = q_ring.index(group).load(gl.DotOperandLayout(0, s_layout, 2))
            if not SECOND:
                mbarrier.arrive(q_empty.index(group))

        mbarrier.wait(full.index(slot), phase)
        s = warpgroup_mma_wait(0, deps=[_logits(q, ring, slot, ROWS, BLOCK, s_layout)])
        mbarrier.arrive(empty.index(slot))
        slot, phase = _next(slot, phase, SLOTS)
        o_c = gl.arange(0, BLOCK, gl.SliceLayout(0, s_layout))
        s = gl.where((o_c < gl.where(n == 1, short, BLOCK))[None, :], s, float("-inf"))
        m = gl.max(s, 1) * scale2
        e = gl.exp2(s * scale2 - m[:, None])
        l = _thread_sums(e)
        shrink = gl.full([ROWS], 1.0, gl.float32, s_rows)
        p = gl.convert_layout(e.to(ring.dtype), gl.DotOperandLayout(0, o_layout, 2))
        o = gl.zeros([ROWS, D], gl.float32, o_layout)
        mbarrier.wait(full.index(slot), phase)

        rounds = (whole - 1) // ROUND
        for _ in range(0, rounds):
            p, o, m, l, shrink, slot, phase = _round(
                q, p, o, m, l, shrink, ring, bars, slot, phase, scale2, ROUND, AHEAD, FIXED, SLOTS, BLOCK, ROWS,
                s_layout, o_layout,
            )  # fmt: skip
        for i in range(1 + ROUND * gl.maximum(rounds, 0), steps):
            left = gl.where(i < whole, BLOCK, short)
            if TEXT:
                left = gl.where(i < n, left, LK - COLUMNS - (i - n) * BLOCK)
            p, o, m, l, shrink, slot, phase = _step(
                q, p, o, m, l, shrink, ring, bars, slot, phase, scale2, left, FIXED, SLOTS, BLOCK, ROWS, s_layout,
                o_layout,
            )  # fmt: skip

        # The log-sum-exp of the exact part, before the tail joins the sum.
        end = VISION
        if TEXT:
            end = gl.where(is_text, LQ, end)
        o_l = row + gl.arange(0, ROWS, s_rows)
        exact = gl.convert_layout(gl.sum(l, 1), s_rows)
        gl.store(p_lse + i_bh.to(gl.int64) * LQ + o_l, (m + gl.log2(exact)) / LOG2E, mask=o_l < end)

        if TAIL:
            q2, q2_unit = gl.to_tensor(0), gl.to_tensor(0)
            if SECOND:
                s8_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 32])
                squares = q_ring.index(group).load(gl.DotOperandLayout(0, s8_layout, 4)).to(gl.float32) * scale
                squares = squares * squares
                top = gl.maximum(gl.max(squares, 1), 1e-30)
                q2 = (squares * (448.0 / top)[:, None]).to(gl.float8e4nv)
                # Half: the second term of the series of the mean of exp.
                q2_unit = gl.convert_layout(top, s_rows) * (gl.load(p_var_unit + i_bh) * (0.5 / 448.0))
            for _ in range(0, gl.where(is_text, 0, padded // BLOCK)):
                p, o, m, l, shrink, slot, phase = _tail_step(
                    q, q2, q2_unit, p, o, m, l, shrink, rings, bars, slot, phase, scale, scale2, limit,
                    SECOND, FIXED, SLOTS, BLOCK, ROWS, s_layout, o_layout,
                )  # fmt: skip
        if SECOND or not HELD:
            mbarrier.arrive(q_empty.index(group))

        o = _add_values(p, o, shrink, ring, full, slot, phase, FIXED, o_layout)
        o_m = row + gl.arange(0, ROWS, o_rows)
        o_d = gl.arange(0, D, gl.SliceLayout(0, o_layout))
        fetched = _fetch(
            o_m, o_d, i_bh, is_text, sizes, p_scatter, scattered, correction,
            D, SCATTER, SCALE, SCALE_PER_ROW, RESIDUAL, PER_ROW, COPIED, BLOCK,
        )  # fmt: skip
        o = warpgroup_mma_wait(0, deps=[o])
        mbarrier.arrive(empty.index(slot))
        slot, phase = _next(slot, phase, SLOTS)

        total = gl.sum(l, 1)
        if FIXED:
            # Zero times infinity is NaN, and NaN equals nothing.
            finite = gl.convert_layout(gl.sum(o, 1), gl.SliceLayout(1, l.type.layout)) * 0.0 == 0.0
            if gl.max(gl.where((total <= LIMIT) & finite, 0, 1), 0) > 0:
                gl.store(p_work + 1 + 2 * tile + group, lost)
                lost = tile
        o = o * gl.convert_layout(1.0 / total, o_rows)[:, None]
        _store(
            o, o_m, o_d, end, i_bh, H, fetched, p_out, out_strides, codes_parts,
            q_phase ^ AGAIN, group, D, SCALE, RESIDUAL, COPIED, ROWS, o_layout,
        )  # fmt: skip

        q_phase ^= 1
        i_bh, row, n, steps, short, tile = _hear(facts, q_full, group, q_phase)
    return slot, phase, q_phase, lost


@gluon.jit
def _consume(
    group: gl.constexpr, lost,
    p_out, p_lse, p_work, p_scatter, p_var_unit, out_strides, correction, rings, bars, q_bars, facts, codes_parts,
    sizes, scattered, padded, scale, limit,
    D: gl.constexpr, TEXT: gl.constexpr, TAIL: gl.constexpr, SECOND: gl.constexpr, SCATTER: gl.constexpr,
    SCALE: gl.constexpr, SCALE_PER_ROW: gl.constexpr, RESIDUAL: gl.constexpr, PER_ROW: gl.constexpr,
    COPIED: gl.constexpr, SLOTS: gl.constexpr, ROUND: gl.constexpr, AHEAD: gl.constexpr, HELD: gl.constexpr,
    FIXED: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Half of every tile's rows; of tiles whose sums grew too large, once more."""
    q_full, q_empty = q_bars
    slot, phase, q_phase, last = _tiles(
        group, gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0),
        p_out, p_lse, p_work, p_scatter, p_var_unit, out_strides, correction, rings, bars, q_bars, facts, codes_parts,
        sizes, scattered, padded, scale, limit, D, TEXT, TAIL, SECOND, SCATTER, SCALE, SCALE_PER_ROW, RESIDUAL,
        PER_ROW, COPIED, SLOTS, ROUND, AHEAD, HELD, FIXED, False, BLOCK, ROWS,
    )  # fmt: skip
    if FIXED:
        lost.index(group).store(gl.full([8], last, gl.int32, gl.BlockedLayout([8], [32], [4], [0])))
        mbarrier.arrive(q_empty.index(group))
        _tiles(
            group, slot, phase, q_phase ^ 1,
            p_out, p_lse, p_work, p_scatter, p_var_unit, out_strides, correction, rings, bars, q_bars, facts,
            codes_parts, sizes, scattered, padded, scale, limit, D, TEXT, TAIL, SECOND, SCATTER, SCALE, SCALE_PER_ROW,
            RESIDUAL, PER_ROW, COPIED, SLOTS, ROUND, AHEAD, HELD, False, True, BLOCK, ROWS,
        )  # fmt: skip


# Sizes that change from plan to plan: nothing is gained from compiling again for each.
_SIZES = (
    "H", "LQ", "LK", "VISION", "COLUMNS", "NQ", "NK", "W", "texts", "tiles", "scattered", "padded", "weight_step",
    "scales", "residuals",
)  # fmt: skip


@gluon.jit(do_not_specialize=_SIZES)
def block_attention_hopper_kernel(
    d_q, d_k, d_v, d_tail_k, d_tail_v, d_tail_var, d_routed, d_weights, d_codes,
    p_out, p_lse, p_var_unit, p_counts, p_indices, p_every, p_order, p_work, p_scatter, p_scale, p_res, p_res_scale,
    o_sb, o_sh, o_st, r_sb, r_sh, r_st,
    H, LQ, LK, VISION, COLUMNS, NQ, NK, W, texts, tiles, scattered, padded, weight_step, scales, residuals,
    scale, limit,
    D: gl.constexpr, TEXT: gl.constexpr, TAIL: gl.constexpr, SECOND: gl.constexpr, SCATTER: gl.constexpr,
    SCALE: gl.constexpr, SCALE_PER_ROW: gl.constexpr, RESIDUAL: gl.constexpr, PER_ROW: gl.constexpr,
    COPIED: gl.constexpr, SLOTS: gl.constexpr, ROUND: gl.constexpr, AHEAD: gl.constexpr, HELD: gl.constexpr,
    FIXED: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Persistent: every program takes the next tile of BLOCK query rows when it is done with one."""
    dtype: gl.constexpr = d_k.dtype
    tile_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, D], dtype)
    q_ring = gl.allocate_shared_memory(dtype, [2, ROWS, D], tile_layout)
    ring = gl.allocate_shared_memory(dtype, [SLOTS, BLOCK, D], tile_layout)
    rings = (q_ring, ring, ring, ring, ring)
    if TAIL:
        routed_ring = gl.allocate_shared_memory(gl.uint8, [SLOTS, BLOCK], d_routed.layout)
        weight_ring = gl.allocate_shared_memory(gl.float32, [SLOTS, BLOCK], d_weights.layout)
        # Variances are half as wide as keys: a tile of them is the first half of a slot.
        var_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, D], gl.float8e4nv)
        if _REINTERPRETS:
            var_ring = ring.reinterpret(gl.float8e4nv, [2 * SLOTS, BLOCK, D], var_layout)
        else:
            var_ring = ring._reinterpret(gl.float8e4nv, [2 * SLOTS, BLOCK, D], var_layout)
        rings = (q_ring, ring, routed_ring, weight_ring, var_ring)
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
    sizes = (H, LQ, LK, VISION, COLUMNS, NQ, NK, W, texts)
    out_strides = (o_sb, o_sh, o_st)
    correction = (p_scale, p_res, p_res_scale, r_sb, r_sh, r_st, scales, residuals)
    descs = (d_q, d_k, d_v)
    tail_descs = (d_tail_k, d_tail_v, d_tail_var, d_routed, d_weights)
    gl.warp_specialize(
        [
            (_consume, (
                0, lost, p_out, p_lse, p_work, p_scatter, p_var_unit, out_strides, correction, rings, bars, q_bars,
                facts, codes_parts, sizes, scattered, padded, scale, limit, D, TEXT, TAIL, SECOND, SCATTER, SCALE,
                SCALE_PER_ROW, RESIDUAL, PER_ROW, COPIED, SLOTS, ROUND, AHEAD, HELD, FIXED, BLOCK, ROWS,
            )),
            (_consume, (
                1, lost, p_out, p_lse, p_work, p_scatter, p_var_unit, out_strides, correction, rings, bars, q_bars,
                facts, codes_parts, sizes, scattered, padded, scale, limit, D, TEXT, TAIL, SECOND, SCATTER, SCALE,
                SCALE_PER_ROW, RESIDUAL, PER_ROW, COPIED, SLOTS, ROUND, AHEAD, HELD, FIXED, BLOCK, ROWS,
            )),
            (_produce, (
                descs, tail_descs, pointers, rings, bars, q_bars, facts, lost, codes_parts, sizes, tiles, padded,
                weight_step, TEXT, TAIL, SECOND, COPIED, FIXED, SLOTS, BLOCK, ROWS,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def refusal(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, block: int, key_mask: Tensor | None, head_dims: tuple[int, ...]
) -> str | None:
    """Why a kernel for these head dimensions does not take such inputs, or None."""
    if torch.cuda.get_device_capability(q.device)[0] != 9:
        return "needs a GPU of compute capability 9"
    if TRITON < (3, 6):
        return f"needs triton 3.6, not {triton.__version__}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {q.dtype}"
    if q.shape[-1] not in head_dims:
        dims = " and ".join(map(str, head_dims))
        return f"takes head dimension{'s' if len(head_dims) > 1 else ''} {dims}, not {q.shape[-1]}"
    if block != BLOCK:
        return f"takes blocks of {BLOCK}, not {block}"
    if key_mask is not None:
        return "takes no key mask"
    if not all(_copyable(x) for x in (q, k, v)):
        return "needs 16-byte alignment of every row"
    if plan.counts.numel() * _padded(plan.key_blocks) >= 2**31:
        return "takes fewer than 2^31 pairs of blocks"
    return None


def _padded(blocks: int) -> int:
    return triton.cdiv(blocks, BLOCK) * BLOCK


def _copyable(x: Tensor) -> bool:
    """Whether the copy engine takes it: whole rows, each on a multiple of 16 bytes."""
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and not any(n * x.element_size() % 16 for n in _strides(x))


def _strides(x: Tensor) -> list[int]:
    """Strides of all but the last dimension; a dimension of one is never stepped along."""
    unit = 16 // x.element_size()
    return [unit if n == 1 else stride for n, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)]


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """[B, H, L, D] -> tiles of `rows` by D."""
    shape = (1, 1, rows, x.shape[-1])
    return TensorDescriptor(x, list(x.shape), [*_strides(x), 1], list(shape), _layout(shape, x.dtype))


@lru_cache
def _layout(shape: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a tile lies in shared memory."""
    kind = {
        torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.uint8: gl.uint8,
        torch.float8_e4m3fn: gl.float8e4nv,
    }[dtype]  # fmt: skip
    return gl.NVMMASharedLayout.get_default_for(list(shape), kind)


def _line(x: Tensor) -> TensorDescriptor:
    """Any contiguous tensor as one row -> pieces of BLOCK numbers."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=8 * x.element_size(), rank=1)
    return TensorDescriptor(x, [x.numel()], [1], [BLOCK], layout)


def codes_of_variances(variances: Tensor) -> tuple[Tensor, Tensor]:
    """[B, H, N, D] -> e4m3, and what a code stands for, [B, H] float32.

    The second-order term is at most some units of a logit, and a sum over channels: three bits of each are as good.
    """
    unit = variances.float().amax((-1, -2)).clamp(min=1e-20) / 448
    return (variances.float() / unit[..., None, None]).to(torch.float8_e4m3fn), unit


def _tail_descriptors(
    tail: Tail, plan: BlockPlan, dtype: torch.dtype
) -> tuple[Sequence[TensorDescriptor | None], Tensor | None]:
    """The tail as the kernel copies it, and the unit of its variances."""
    padded = _padded(plan.key_blocks)
    # Pooled keys that do not exist weigh nothing.
    weights = tail.log_weights.new_full((*tail.log_weights.shape[:-1], padded), float("-inf"), dtype=torch.float32)
    weights[..., : plan.key_blocks] = tail.log_weights
    routed = plan_mask(BlockPlan(plan.counts, plan.indices, padded), impl="triton")
    variances = var_unit = None
    if tail.variances is not None:
        codes, var_unit = codes_of_variances(tail.variances)
        variances = _descriptor(codes, BLOCK)
    keys, values = (_descriptor(x.to(dtype).contiguous(), BLOCK) for x in (tail.keys, tail.values))
    return [keys, values, variances, _line(routed), _line(weights)], var_unit


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    correction: Correction,
    scale: float,
    text: int,
    every: Tensor,
    scatter: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """block_attention of inputs that are not refused; every [key_blocks] int32 is the list of a text row."""
    batch, heads, queries, dim = q.shape
    keys, rows = k.shape[2], queries - text
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    tail, residual, row_scale = correction.tail, correction.residual, correction.scale
    counts, indices = plan.counts.contiguous(), plan.indices.contiguous()
    # Longest first within a head, so that programs end together, while the head's keys and values stay in the cache.
    order = counts.flatten(0, 1).sort(dim=-1, descending=True, stable=True).indices.int()
    padded = _padded(plan.key_blocks)
    texts = batch * heads * triton.cdiv(text, BLOCK)
    tiles = texts + counts.numel()
    programs = min(tiles, torch.cuda.get_device_properties(q.device).multi_processor_count)
    per_row = residual is not None and residual.codes.shape[2] == rows
    copied = residual is not None and residual.kind != "full" and per_row and _copyable(residual.codes)
    pooled, var_unit = _tail_descriptors(tail, plan, q.dtype) if tail else ([None] * 5, None)
    # float16 has no room for exponentials relative to less than the maximum.
    fixed = q.dtype == torch.bfloat16
    # The next tile, and of each tile and group the one lost before it.
    work = counts.new_zeros(1 + 2 * tiles if fixed else 1)
    block_attention_hopper_kernel[(programs,)](
        _descriptor(q, ROWS), _descriptor(k, BLOCK), _descriptor(v, BLOCK),
        *pooled,
        _descriptor(residual.codes, ROWS) if residual and copied else None,
        out, lse, var_unit, counts, indices, every if text else None, order, work, scatter,
        row_scale.float().contiguous() if row_scale is not None else None,
        residual.codes if residual and not copied else None,
        residual.scales.contiguous() if residual and residual.scales is not None else None,
        *out.stride()[:3], *(residual.codes.stride()[:3] if residual else (0, 0, 0)),
        heads, queries, keys, rows, keys - text, counts.shape[-1], plan.key_blocks, indices.shape[-1],
        texts, tiles, 0 if scatter is None else scatter.numel(),
        padded, padded if tail and tail.log_weights.dim() == 2 else 0,
        row_scale.shape[2] if row_scale is not None else 0, residual.codes.shape[2] if residual else 0,
        scale, tail.limit if tail else 0.0,
        D=dim, TEXT=text > 0, TAIL=tail is not None, SECOND=tail is not None and tail.variances is not None,
        SCATTER=scatter is not None,
        SCALE=row_scale is not None, SCALE_PER_ROW=row_scale is not None and row_scale.shape[2] == rows,
        RESIDUAL={None: 0, "full": 1, "fp8": 2, "int4": 3}[residual and residual.kind],
        PER_ROW=per_row, COPIED=copied, **SHAPES[dim], FIXED=fixed, BLOCK=BLOCK, ROWS=ROWS, num_warps=4,
    )  # fmt: skip
    return out, lse
