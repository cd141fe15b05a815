"""block_attention for Hopper in 8 bits: int8 products of queries and keys, e4m3 products with the values.

The data path is block_attention_hopper.py's: one warp copies, two groups of four attend to 64 rows each. A block's
values are multiplied into registers of their own and added in float32, because Hopper's 8-bit products keep 14 bits of
a sum. A step takes a block in two halves, because registers hold one more half's products: the exponentials of the
second half run beside the values of the first and the next block's first products, and the maximum of the next block's
first half beside the products of its second.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dit_sparse.kernels.hopper8_copies import produce
from dit_sparse.kernels.hopper8_sums import (
    MAGIC,
    UP,
    hidden,
    probabilities,
    products,
    thread_maxima,
    top_of,
    unit_of,
    values,
)
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
from dit_sparse.kernels.implementation import residual_kind
from dit_sparse.kernels.quantise import key_order, quantise, quantise_keys, quantise_values
from dit_sparse.plan import BlockPlan, Correction, Tail

# Blocks of keys and of values in their rings.
SLOTS = 4


@gluon.jit
def _step(
    s, s2, most, unit, q, q_unit, o, m, l, rings, k_bars, v_bars, k_slot, k_phase, v_slot, v_phase,
    left, p_seen, masked,
    SHORT: gl.constexpr, MASKED: gl.constexpr, LAST: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr,
    BLOCK: gl.constexpr, ROWS: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """One block, its halves' products s and s2 in `unit` a row, `most` of the first; also the next block's, unless it
    is the last.

    SHORT: its first `left` keys count. MASKED: if it is `masked`, of them those that are seen at p_seen, by row.

    The exponentials of the second half run beside the values of the first and the next block's first products, which
    take the registers of this block's; each of its quarters' values are on their way before the next quarter's
    exponentials. The next block's second products are queued behind them all, and the output is added up meanwhile.
    """
    q_ring, k_ring, unit_ring, v_ring, weight_ring = rings
    k_full, k_empty = k_bars
    v_full, v_empty = v_bars
    HALF: gl.constexpr = BLOCK // 2
    if not LAST:
        mbarrier.wait(k_full.index(k_slot), k_phase)
    if SHORT:
        s = hidden(s, 0, left, p_seen, masked, MASKED, HALF, s_layout)
        s2 = hidden(s2, HALF, left, p_seen, masked, MASKED, HALF, s_layout)
        most = thread_maxima(s)
    top = top_of(m, gl.maximum(most, thread_maxima(s2)), unit)
    shift = (MAGIC * unit + top - UP)[:, None]
    shrink = gl.exp2(m - top)
    e = gl.exp2(s.to(gl.float32, bitcast=True) * unit[:, None] - shift)
    l = shrunk(l, shrink) + thread_sums(e)
    p = probabilities(e, ROWS, HALF, o_layout)
    if not LAST:
        s = products(q, k_ring, k_slot, 0, HALF, ROWS, s_layout)
    # Before the wait, which the assembler moves nothing past.
    x2 = s2.to(gl.float32, bitcast=True) * unit[:, None] - shift
    mbarrier.wait(v_full.index(v_slot), v_phase)
    part = values(p, gl.zeros([ROWS, D], gl.float32, o_layout), v_ring, v_slot, 0, HALF, False)
    QUARTER: gl.constexpr = BLOCK // 4
    quarter_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QUARTER, 32])
    xa, xb = gl.split(x2.reshape([ROWS, 2, QUARTER]).permute((0, 2, 1)))
    e = gl.exp2(gl.convert_layout(xa, quarter_layout, assert_trivial=True))
    l += gl.convert_layout(thread_sums(e), l.type.layout)
    p = probabilities(e, ROWS, QUARTER, o_layout)
    part = values(p, part, v_ring, v_slot, HALF, QUARTER, True)
    e = gl.exp2(gl.convert_layout(xb, quarter_layout, assert_trivial=True))
    l += gl.convert_layout(thread_sums(e), l.type.layout)
    p = probabilities(e, ROWS, QUARTER, o_layout)
    part = values(p, part, v_ring, v_slot, HALF + QUARTER, QUARTER, True)
    if LAST:
        part = warpgroup_mma_wait(0, deps=[part])
    else:
        s2 = products(q, k_ring, k_slot, HALF, HALF, ROWS, s_layout)
        s, part = warpgroup_mma_wait(1, deps=[s, part])
        unit = q_unit * unit_of(unit_ring, k_slot)
        most = thread_maxima(s)
    mbarrier.arrive(v_empty.index(v_slot))
    v_slot, v_phase = next_slot(v_slot, v_phase, SLOTS)
    o = o * gl.convert_layout(shrink, gl.SliceLayout(1, o_layout))[:, None] + part
    if not LAST:
        s2 = warpgroup_mma_wait(0, deps=[s2])
        mbarrier.arrive(k_empty.index(k_slot))
        k_slot, k_phase = next_slot(k_slot, k_phase, SLOTS)
    return s, s2, most, unit, o, top, l, k_slot, k_phase, v_slot, v_phase


@gluon.jit
def _tail_step(
    q, q_unit, o, m, l, rings, k_bars, v_bars, k_slot, k_phase, v_slot, v_phase,
    SLOTS: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """A block of pooled keys, half by half, with what they weigh."""
    LOG2E: gl.constexpr = 1.4426950408889634
    q_ring, k_ring, unit_ring, v_ring, weight_ring = rings
    k_full, k_empty = k_bars
    v_full, v_empty = v_bars
    HALF: gl.constexpr = BLOCK // 2
    column_layout: gl.constexpr = gl.SliceLayout(0, s_layout)
    mbarrier.wait(k_full.index(k_slot), k_phase)
    unit = q_unit * unit_of(unit_ring, k_slot)
    for half in gl.static_range(2):
        s = products(q, k_ring, k_slot, half * HALF, HALF, ROWS, s_layout)
        weight = weight_ring.index(k_slot).slice(half * HALF, HALF).load(column_layout).to(gl.float32) * LOG2E
        s = warpgroup_mma_wait(0, deps=[s])
        if half == 1:
            mbarrier.arrive(k_empty.index(k_slot))
        t = (s.to(gl.float32, bitcast=True) - MAGIC) * unit[:, None] + weight[None, :]
        top = gl.maximum(m, gl.max(t, 1))
        e = gl.exp2(t - (top - UP)[:, None])
        shrink = gl.exp2(m - top)
        m = top
        l = shrunk(l, shrink) + thread_sums(e)
        p = probabilities(e, ROWS, HALF, o_layout)
        if half == 0:
            mbarrier.wait(v_full.index(v_slot), v_phase)
        # Into the output at once: of so few steps 14 bits of a sum are enough, and registers of their own for what
        # these add would leave the loop over listed blocks too few to have two products under way.
        o = o * gl.convert_layout(shrink, gl.SliceLayout(1, o_layout))[:, None]
        o = warpgroup_mma_wait(0, deps=[values(p, o, v_ring, v_slot, half * HALF, HALF, True)])
    k_slot, k_phase = next_slot(k_slot, k_phase, SLOTS)
    mbarrier.arrive(v_empty.index(v_slot))
    v_slot, v_phase = next_slot(v_slot, v_phase, SLOTS)
    return o, m, l, k_slot, k_phase, v_slot, v_phase


@gluon.jit
def _consume(
    group: gl.constexpr,
    p_out, p_lse, p_scatter, p_text_mask, p_units, out_strides, correction, rings, k_bars, v_bars, q_bars, facts,
    codes_parts, sizes, scattered, padded, scale,
    D: gl.constexpr, TEXT: gl.constexpr, MASKED: gl.constexpr, TAIL: gl.constexpr,
    SCATTER: gl.constexpr, SCALE: gl.constexpr, SCALE_PER_ROW: gl.constexpr, RESIDUAL: gl.constexpr,
    PER_ROW: gl.constexpr, COPIED: gl.constexpr, SLOTS: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Half of a tile's rows, from the first listed block to the store."""
    LOG2E: gl.constexpr = 1.4426950408889634
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK // 2, 32])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    q_ring, k_ring, unit_ring, v_ring, weight_ring = rings
    k_full, k_empty = k_bars
    v_full, v_empty = v_bars
    q_full, q_empty = q_bars
    p_q_unit, p_q_shift, p_v_unit = p_units
    H, LQ, LK, VISION, COLUMNS, NQ, NK, STEP, texts = sizes
    k_slot, k_phase = gl.to_tensor(0), gl.to_tensor(0)
    v_slot, v_phase = gl.to_tensor(0), gl.to_tensor(0)
    q_phase = gl.to_tensor(0)
    q = q_ring.index(group)
    i_bh, row, n, steps, short, _ = hear(facts, q_full, group, q_phase)
    while steps > 0:
        is_text = row >= VISION
        row += group * ROWS
        whole = n - (short < BLOCK).to(gl.int32)
        o_l = row + gl.arange(0, ROWS, s_rows)
        at = i_bh.to(gl.int64) * LQ + o_l
        code = gl.load(p_q_unit + at, mask=o_l < LQ, other=0.0)
        q_unit = code * (scale * LOG2E)

        m = gl.full([ROWS], float("-inf"), gl.float32, s_rows)
        l = thread_sums(gl.zeros([ROWS, BLOCK // 2], gl.float32, s_layout))
        o = gl.zeros([ROWS, D], gl.float32, o_layout)
        mbarrier.wait(k_full.index(k_slot), k_phase)
        # One after the other: under way together, they would make every product of the loop wait.
        s = products(q, k_ring, k_slot, 0, BLOCK // 2, ROWS, s_layout)
        s = warpgroup_mma_wait(0, deps=[s])
        s2 = products(q, k_ring, k_slot, BLOCK // 2, BLOCK // 2, ROWS, s_layout)
        s2 = warpgroup_mma_wait(0, deps=[s2])
        unit = q_unit * unit_of(unit_ring, k_slot)
        mbarrier.arrive(k_empty.index(k_slot))
        k_slot, k_phase = next_slot(k_slot, k_phase, SLOTS)
        most = thread_maxima(s)
        ahead = gl.minimum(whole, steps - 1)
        for _ in range(0, ahead):
            s, s2, most, unit, o, m, l, k_slot, k_phase, v_slot, v_phase = _step(
                s, s2, most, unit, q, q_unit, o, m, l, rings, k_bars, v_bars, k_slot, k_phase, v_slot, v_phase, BLOCK,
                p_text_mask, False, False, False, False, D, SLOTS, BLOCK, ROWS, s_layout, o_layout,
            )  # fmt: skip
        if TEXT:
            for i in range(ahead, steps - 1):
                left = gl.where(i < n, short, LK - COLUMNS - (i - n) * BLOCK)
                p_seen = p_text_mask
                if MASKED:
                    p_seen += (i_bh // H * gl.cdiv(LK - COLUMNS, BLOCK) + i - n) * BLOCK
                s, s2, most, unit, o, m, l, k_slot, k_phase, v_slot, v_phase = _step(
                    s, s2, most, unit, q, q_unit, o, m, l, rings, k_bars, v_bars, k_slot, k_phase, v_slot, v_phase,
                    left, p_seen, i >= n, True, MASKED, False, D, SLOTS, BLOCK, ROWS, s_layout, o_layout,
                )  # fmt: skip
        left = short
        if TEXT:
            left = gl.where(steps > n, LK - COLUMNS - (steps - 1 - n) * BLOCK, left)
        p_seen = p_text_mask
        if MASKED:
            # Text is what comes last.
            p_seen += (i_bh // H * gl.cdiv(LK - COLUMNS, BLOCK) + steps - 1 - n) * BLOCK
        s, s2, most, unit, o, m, l, k_slot, k_phase, v_slot, v_phase = _step(
            s, s2, most, unit, q, q_unit, o, m, l, rings, k_bars, v_bars, k_slot, k_phase, v_slot, v_phase, left,
            p_seen, True, True, MASKED, True, D, SLOTS, BLOCK, ROWS, s_layout, o_layout,
        )  # fmt: skip

        # The log-sum-exp of the exact part, before the tail joins the sum.
        end = VISION
        if TEXT:
            end = gl.where(is_text, LQ, end)
        shift = gl.load(p_q_shift + at, mask=o_l < LQ, other=0.0)
        exact = gl.convert_layout(gl.sum(l, 1), s_rows)
        gl.store(p_lse + at, (m + gl.log2(exact) - UP) / LOG2E + shift, mask=o_l < end)

        if TAIL:
            for _ in range(0, gl.where(is_text, 0, padded // BLOCK)):
                o, m, l, k_slot, k_phase, v_slot, v_phase = _tail_step(
                    q, q_unit, o, m, l, rings, k_bars, v_bars, k_slot, k_phase, v_slot, v_phase,
                    SLOTS, BLOCK, ROWS, s_layout, o_layout,
                )  # fmt: skip
        mbarrier.arrive(q_empty.index(group))

        o_m = row + gl.arange(0, ROWS, o_rows)
        o_d = gl.arange(0, D, gl.SliceLayout(0, o_layout))
        v_unit = gl.load(p_v_unit + i_bh * D + o_d)
        fetched = fetch(
            o_m, o_d, i_bh, is_text, sizes, p_scatter, scattered, correction,
            D, SCATTER, SCALE, SCALE_PER_ROW, RESIDUAL, PER_ROW, COPIED, BLOCK,
        )  # fmt: skip
        o = o * gl.convert_layout(1.0 / gl.sum(l, 1), o_rows)[:, None] * v_unit[None, :]
        store(
            o, o_m, o_d, end, i_bh, H, fetched, p_out, out_strides, codes_parts, q_phase,
            group, D, SCALE, RESIDUAL, COPIED, ROWS, o_layout,
        )  # fmt: skip

        q_phase ^= 1
        i_bh, row, n, steps, short, _ = hear(facts, q_full, group, q_phase)


# Sizes that change from plan to plan: nothing is gained from compiling again for each.
_SIZES = (
    "H", "LQ", "LK", "VISION", "COLUMNS", "NQ", "NK", "STEP", "texts", "tiles", "scattered", "padded",
    "key_blocks", "scales", "residuals",
)  # fmt: skip


@gluon.jit(do_not_specialize=_SIZES)
def block_attention_hopper8_kernel(
    d_q, d_k, d_unit, d_v, d_tail_k, d_tail_unit, d_tail_v, d_weights, d_codes,
    p_out, p_lse, p_q_unit, p_q_shift, p_v_unit, p_text_mask, p_counts, p_indices, p_every, p_order,
    p_next, p_scatter, p_scale, p_res, p_res_scale, o_sb, o_sh, o_st, r_sb, r_sh, r_st,
    H, LQ, LK, VISION, COLUMNS, NQ, NK, STEP, texts, tiles, scattered, padded, key_blocks, scales, residuals,
    scale,
    D: gl.constexpr, TEXT: gl.constexpr, MASKED: gl.constexpr, TAIL: gl.constexpr,
    SCATTER: gl.constexpr, SCALE: gl.constexpr, SCALE_PER_ROW: gl.constexpr, RESIDUAL: gl.constexpr,
    PER_ROW: gl.constexpr, COPIED: gl.constexpr, SLOTS: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Persistent: every program takes the next tile of BLOCK query rows when it is done with one."""
    tile_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, D], gl.int8)
    q_ring = gl.allocate_shared_memory(gl.int8, [2, ROWS, D], tile_layout)
    k_ring = gl.allocate_shared_memory(gl.int8, [SLOTS, BLOCK, D], tile_layout)
    v_ring = gl.allocate_shared_memory(gl.float8e4nv, [SLOTS, D, BLOCK], tile_layout)
    unit_ring = gl.allocate_shared_memory(gl.float32, [SLOTS, 32], d_unit.layout)
    rings = (q_ring, k_ring, unit_ring, v_ring, k_ring)
    if TAIL:
        weight_ring = gl.allocate_shared_memory(d_weights.dtype, [SLOTS, BLOCK], d_weights.layout)
        rings = (q_ring, k_ring, unit_ring, v_ring, weight_ring)
    k_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    k_bars, v_bars, q_bars = (k_full, k_empty), (v_full, v_empty), (q_full, q_empty)
    facts = gl.allocate_shared_memory(gl.int32, [8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    codes_parts = (facts, facts, k_full, k_empty)
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
    pointers = (p_counts, p_indices, p_every, p_order, p_next)
    p_units = (p_q_unit, p_q_shift, p_v_unit)
    sizes = (H, LQ, LK, VISION, COLUMNS, NQ, NK, STEP, texts)
    out_strides = (o_sb, o_sh, o_st)
    correction = (p_scale, p_res, p_res_scale, r_sb, r_sh, r_st, scales, residuals)
    descs = (d_q, d_k, d_unit, d_v)
    tail_descs = (d_tail_k, d_tail_unit, d_tail_v, d_weights)
    gl.warp_specialize(
        [
            (_consume, (
                0, p_out, p_lse, p_scatter, p_text_mask, p_units, out_strides, correction, rings, k_bars, v_bars,
                q_bars, facts, codes_parts, sizes, scattered, padded, scale, D, TEXT, MASKED, TAIL,
                SCATTER, SCALE, SCALE_PER_ROW, RESIDUAL, PER_ROW, COPIED, SLOTS, BLOCK, ROWS,
            )),
            (_consume, (
                1, p_out, p_lse, p_scatter, p_text_mask, p_units, out_strides, correction, rings, k_bars, v_bars,
                q_bars, facts, codes_parts, sizes, scattered, padded, scale, D, TEXT, MASKED, TAIL,
                SCATTER, SCALE, SCALE_PER_ROW, RESIDUAL, PER_ROW, COPIED, SLOTS, BLOCK, ROWS,
            )),
            (produce, (
                descs, tail_descs, pointers, rings, k_bars, v_bars, q_bars, facts, codes_parts, sizes, tiles, padded,
                key_blocks, TEXT, TAIL, COPIED, SLOTS, BLOCK, ROWS,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def _tile_descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A contiguous tensor of bytes [B, H, N, M] -> tiles of `rows` by `columns`."""
    kind = {torch.int8: gl.int8, torch.float8_e4m3fn: gl.float8e4nv}[x.dtype]
    shape = [1, 1, rows, columns]
    return TensorDescriptor(
        x, list(x.shape), list(x.stride()), shape, gl.NVMMASharedLayout.get_default_for(shape, kind)
    )


def _units(x: Tensor) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    return TensorDescriptor(x, [x.numel()], [1], [32], layout)


def _by_row(x: Tensor) -> Tensor:
    """[..., n * BLOCK] by key -> by row of the keys' tiles."""
    return x.unflatten(-1, (-1, BLOCK))[..., key_order(x.device)].flatten(-2)


def _pooled(
    tail: Tail, plan: BlockPlan, mean: Tensor, v_unit: Tensor, dtype: torch.dtype, scale: float
) -> list[TensorDescriptor]:
    """The pooled keys in 8 bits like the keys, and what they weigh."""
    keys, unit = quantise_keys(tail.keys, mean, 0)
    means = quantise_values(tail.values, v_unit, 0)
    return [
        _tile_descriptor(keys, BLOCK, keys.shape[-1]),
        _units(unit),
        _tile_descriptor(means, means.shape[2], BLOCK),
        weights_of(tail, plan, dtype, scale, by_row=True),
    ]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    correction: Correction,
    scale: float,
    text_mask: Tensor | None,
    text: int,
    every: Tensor,
    scatter: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As block_attention_hopper.attend, for 128 channels."""
    batch, heads, queries, dim = q.shape
    keys, rows = k.shape[2], queries - text
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    tail, residual, row_scale = correction.tail, correction.residual, correction.scale
    # The tail knows the means of blocks, of which all but the last have as many keys.
    codes = quantise(q, k, v, text, scale, tail.keys.mean(2, dtype=torch.float32) if tail else None, text_mask)
    pooled = _pooled(tail, plan, codes.k_mean, codes.v_unit, q.dtype, scale) if tail else [None] * 4
    counts, order = longest_first(plan.counts)
    indices, step = plan.lists()
    padded = whole_blocks(plan.key_blocks)
    texts = batch * heads * triton.cdiv(text, BLOCK)
    tiles = texts + counts.numel()
    programs = min(tiles, torch.cuda.get_device_properties(q.device).multi_processor_count)
    per_row = residual is not None and residual.codes.shape[2] == rows
    copied = residual is not None and residual.kind != "full" and per_row and copyable(residual.codes)
    block_attention_hopper8_kernel[(programs,)](
        _tile_descriptor(codes.q, ROWS, dim), _tile_descriptor(codes.k, BLOCK, dim), _units(codes.k_unit),
        _tile_descriptor(codes.v, dim, BLOCK), *pooled,
        describe(residual.codes, ROWS) if residual and copied else None,
        out, lse, codes.q_unit, codes.q_shift, codes.v_unit,
        _by_row(filled_mask(text_mask)).contiguous() if text_mask is not None else None,
        counts, indices, every if text else None, order, counts.new_zeros(1), scatter,
        row_scale.float().contiguous() if row_scale is not None else None,
        residual.codes if residual and not copied else None,
        residual.scales.contiguous() if residual and residual.scales is not None else None,
        *out.stride()[:3], *(residual.codes.stride()[:3] if residual else (0, 0, 0)),
        heads, queries, keys, rows, keys - text, counts.shape[-1], plan.key_blocks, step,
        texts, tiles, 0 if scatter is None else scatter.numel(),
        padded, codes.k_unit.shape[2],
        row_scale.shape[2] if row_scale is not None else 0, residual.codes.shape[2] if residual else 0,
        scale,
        D=dim, TEXT=text > 0, MASKED=text_mask is not None,
        TAIL=tail is not None, SCATTER=scatter is not None,
        SCALE=row_scale is not None, SCALE_PER_ROW=row_scale is not None and row_scale.shape[2] == rows,
        RESIDUAL=residual_kind(residual),
        PER_ROW=per_row, COPIED=copied, SLOTS=SLOTS, BLOCK=BLOCK, ROWS=ROWS, num_warps=4,
    )  # fmt: skip
    return out, lse
