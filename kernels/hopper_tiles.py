"""What both Hopper kernels share: what a tile is and how groups hear of it, sums of rows, the store, descriptors."""

from functools import lru_cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dit_sparse.kernels.implementation import Inputs
from dit_sparse.kernels.tail_weights import unlisted_weights
from dit_sparse.plan import BlockPlan, Tail

# Queries and keys of a step; queries of a group, as many as one warpgroup product takes.
BLOCK, ROWS = 128, 64
TRITON = tuple(int(x) for x in triton.__version__.split(".")[:2])
# Today's name, and that of Triton 3.6.
load_tile = tma.async_load if "async_load" in tma.__all__ else tma.async_copy_global_to_shared


@gluon.jit
def next_slot(slot, phase, SLOTS: gl.constexpr):
    """The slot after this one, and the phase of its barriers."""
    slot += 1
    wrapped = slot == SLOTS
    return gl.where(wrapped, 0, slot), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def find_tile(t, pointers, sizes, TEXT: gl.constexpr, BLOCK: gl.constexpr):
    """Tile t: its head and place there, query block and row, the list it reads, and how many steps that list and the
    text take."""
    p_counts, p_indices, p_every, p_order, _ = pointers
    H, LQ, LK, VISION, COLUMNS, NQ, NK, STEP, texts = sizes
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
    n = gl.load(p_counts + i_bh * NQ + i_block)
    i_block = gl.load(p_order + i_bh * NQ + i_block)
    i_list = i_bh.to(gl.int64) * NQ + i_block
    p_list = p_indices + i_list * STEP
    row = i_block * BLOCK
    steps = n
    if TEXT:
        row = gl.where(is_text, VISION + i * BLOCK, row)
        n = gl.where(is_text, NK, n)
        p_list = gl.where(is_text, p_every, p_list)
        steps = n + gl.cdiv(LK - COLUMNS, BLOCK)
    return i_bh, i, i_list, row, is_text, p_list, n, steps


@gluon.jit
def tell(facts, i_bh, row, n, steps, short, tile):
    """What the groups need to know of a tile. No steps: there is none left."""
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [1], [0])
    place = gl.arange(0, 8, layout)
    told = gl.where(place == 0, i_bh, gl.where(place == 1, row, gl.where(place == 2, n, short)))
    facts.store(gl.where(place == 3, steps, gl.where(place == 4, tile, told)))


@gluon.jit
def begin_tile(d_q, q_ring, q_bars, q_phase, facts, H, i_bh, row, n, steps, short, tile, ROWS: gl.constexpr):
    """Tell both groups of a tile and copy their queries, once they are done with those before."""
    q_full, q_empty = q_bars
    b, h = i_bh // H, i_bh % H
    for group in gl.static_range(2):
        mbarrier.wait(q_empty.index(group), q_phase ^ 1)
    tell(facts, i_bh, row, n, steps, short, tile)
    for group in gl.static_range(2):
        mbarrier.expect(q_full.index(group), d_q.block_type.nbytes)
        load_tile(d_q, [b, h, row + group * ROWS, 0], q_full.index(group), q_ring.index(group))


@gluon.jit
def tell_end(facts, q_bars, q_phase):
    """There is no tile left."""
    q_full, q_empty = q_bars
    for group in gl.static_range(2):
        mbarrier.wait(q_empty.index(group), q_phase ^ 1)
    tell(facts, 0, 0, 0, 0, 0, 0)
    for group in gl.static_range(2):
        mbarrier.arrive(q_full.index(group), count=1)


@gluon.jit
def copy_codes(codes_parts, b, h, row, phase, ROWS: gl.constexpr):
    """Both groups' codes of the residual. Rows of text lie behind the last one, where the copy engine reads zeros."""
    d_codes, codes, codes_full, codes_empty = codes_parts
    for group in gl.static_range(2):
        mbarrier.wait(codes_empty.index(group), phase)
        mbarrier.expect(codes_full.index(group), d_codes.block_type.nbytes)
        load_tile(d_codes, [b, h, row + group * ROWS, 0], codes_full.index(group), codes.index(group))


@gluon.jit
def hear(facts, q_full, group: gl.constexpr, q_phase):
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
def thread_sums(e):
    """[ROWS, N] -> [ROWS, 4], what each of the four threads that share a row holds: pairs of columns, eight apart.

    They are added up when the tile ends: a sum over threads in every block would be two waits in every block.
    """
    parts = e.reshape([e.shape[0], e.shape[1] // 8, 4, 2])
    return gl.sum(gl.sum(parts, 3), 1)


@gluon.jit
def shrunk(l, shrink):
    """Sums of threads, times a factor a row."""
    return l * gl.convert_layout(shrink, gl.SliceLayout(1, l.type.layout))[:, None]


@gluon.jit
def fetch(
    o_m, o_d, i_bh, is_text, sizes, p_scatter, scattered, correction,
    D: gl.constexpr, SCATTER: gl.constexpr, SCALE: gl.constexpr, SCALE_PER_ROW: gl.constexpr, RESIDUAL: gl.constexpr,
    PER_ROW: gl.constexpr, COPIED: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """What the store of these rows needs from memory: where they go, factor, residual's scale and codes."""
    H, LQ, LK, VISION, COLUMNS, NQ, NK, STEP, texts = sizes
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


@gluon.constexpr_function
def _whole_lines(rows, columns):
    """Each thread of a group has eight numbers side by side, in the row where it has those of a product."""
    wide = [[0, 32], [0, 64]][: columns // 64]
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], *wide, [8, 0]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [],
        [rows, columns],
    )  # fmt: skip


@gluon.jit
def store(
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
    elif RESIDUAL == 4:
        o += codes.to(gl.float32) * unit[:, None]
    elif RESIDUAL == 2:
        o += codes.to(gl.float8e4nv, bitcast=True).to(gl.float32) * unit[:, None]
    elif RESIDUAL == 3:
        if COPIED:
            o += (codes.to(gl.float32) - 8.0) * unit[:, None]
        else:
            nibble = (codes.to(gl.int32) >> (4 * (o_d // (D // 2)))[None, :]) & 15
            o += (nibble.to(gl.float32) - 8.0) * unit[:, None]
    # A product leaves a thread two numbers in every eight of its row; the four threads of a row trade them for eight
    # side by side, so that a store is of 16 bytes, not 4.
    lines: gl.constexpr = _whole_lines(ROWS, D)
    o = gl.convert_layout(o.to(p_out.dtype.element_ty), lines)
    o_o = gl.convert_layout(o_o, gl.SliceLayout(1, lines))
    o_m = gl.convert_layout(o_m, gl.SliceLayout(1, lines))
    o_d = gl.arange(0, D, gl.SliceLayout(0, lines))
    p_o = p_out + b * o_sb + h * o_sh + o_o[:, None] * o_st + o_d[None, :]
    gl.store(p_o, o, mask=(o_m < end)[:, None])


def refusal(inputs: Inputs, head_dims: tuple[int, ...], key_sizes: tuple[int, ...]) -> str | None:
    """Why a kernel for these head dimensions and sizes of key blocks does not take such inputs, or None."""
    q, k, plan, key_mask = inputs.q, inputs.k, inputs.plan, inputs.key_mask
    if torch.cuda.get_device_capability(q.device)[0] != 9:
        return "needs a GPU of compute capability 9"
    if TRITON < (3, 6):
        return f"needs triton 3.6, not {triton.__version__}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {q.dtype}"
    if q.shape[-1] not in head_dims:
        dims = " and ".join(map(str, head_dims))
        return f"takes head dimension{'s' if len(head_dims) > 1 else ''} {dims}, not {q.shape[-1]}"
    if inputs.block != BLOCK:
        return f"takes blocks of {BLOCK}, not {inputs.block}"
    if inputs.key_block not in key_sizes:
        return f"takes key blocks of {' and '.join(map(str, key_sizes))}, not {inputs.key_block}"
    if key_mask is not None and key_mask.shape[1] == k.shape[2]:
        return "takes a mask of text keys, [B, text], not of all keys"
    if not all(copyable(x) for x in (q, k, inputs.v)):
        return "needs 16-byte alignment of every row"
    if plan.counts.numel() * whole_blocks(plan.key_blocks) >= 2**31:
        return "takes fewer than 2^31 pairs of blocks"
    return None


def longest_first(counts: Tensor) -> tuple[Tensor, Tensor]:
    """[B, H, N] int32 -> counts and query blocks of a head, [B * H, N] int32, those with the most keys first, so that
    programs end together, while the head's keys and values stay in the cache."""
    # Sorting keeps the strides of what it is given, such as some heads of a plan, and the kernel reads row by row.
    ordered = counts.flatten(0, 1).contiguous().sort(dim=-1, descending=True, stable=True)
    return ordered.values, ordered.indices.int()


def weights_of(
    tail: Tail, plan: BlockPlan, dtype: torch.dtype, scale: float, *, by_row: bool = False
) -> TensorDescriptor:
    """What each pooled key weighs for each query block, of as many as whole tiles have: nothing where it is listed, or
    is none."""
    width = whole_blocks(plan.key_blocks)
    return describe_line(unlisted_weights(tail, plan, dtype, scale=scale, width=width, by_row=by_row))


def whole_blocks(blocks: int) -> int:
    return triton.cdiv(blocks, BLOCK) * BLOCK


def copyable(x: Tensor) -> bool:
    """Whether the copy engine takes it: whole rows, each on a multiple of 16 bytes."""
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and not any(n * x.element_size() % 16 for n in _strides(x))


def _strides(x: Tensor) -> list[int]:
    """Strides of all but the last dimension; a dimension of one is never stepped along."""
    unit = 16 // x.element_size()
    return [unit if n == 1 else stride for n, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)]


def filled_mask(mask: Tensor) -> Tensor:
    """[B, text] bool -> [B, text filled up to whole blocks] uint8, so that two keys of a thread are one load."""
    text = mask.shape[1]
    return torch.nn.functional.pad(mask, (0, whole_blocks(text) - text)).contiguous().view(torch.uint8)


def describe(x: Tensor, rows: int, columns: int | None = None) -> TensorDescriptor:
    """[B, H, L, D] -> tiles of `rows` by D, or by as many columns."""
    shape = (1, 1, rows, columns or x.shape[-1])
    return TensorDescriptor(x, list(x.shape), [*_strides(x), 1], list(shape), _layout(shape, x.dtype))


@lru_cache
def _layout(shape: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a tile lies in shared memory."""
    kind = {
        torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.uint8: gl.uint8,
        torch.float8_e4m3fn: gl.float8e4nv,
    }[dtype]  # fmt: skip
    return gl.NVMMASharedLayout.get_default_for(list(shape), kind)


def describe_line(x: Tensor) -> TensorDescriptor:
    """Any contiguous tensor as one row -> pieces of BLOCK numbers."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=8 * x.element_size(), rank=1)
    return TensorDescriptor(x, [x.numel()], [1], [BLOCK], layout)
