"""Tokens in another order, and statistics of their blocks: q, k and v in one launch, read once."""

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from dit_sparse.kernels.block_stats import Want, block_stats
from dit_sparse.kernels.implementation import Impl, check_device, on_device, resolve
from dit_sparse.kernels.reference import BlockStats

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton has no wheel for macOS and Windows; the torch implementation needs none.
    triton = None

# Numbers a program moves for each tensor: 64 a thread, which keeps three tensors' loads in flight without spilling.
TILE, WARPS = 8192, 4
# Blocks that permute_pooled reads once: a program holds one, over as many channels as fit.
ONE_PASS = (32, 64, 128)


def permute(tensors: Sequence[Tensor], index: Tensor, *, impl: Impl = "auto") -> tuple[Tensor, ...]:
    """out[..., i, :] = x[..., index[i], :] for i < n; the tokens behind the first n stay as they are.

    tensors [B, H, L, D], all of one shape and of one float type (float64 in torch only), any strides with the last
    dimension contiguous; index [n] int32 or int64, a permutation of 0..n-1, which is not checked on the device. Each
    output has the memory layout of its input, so a view of [B, L, H, D] gives one. The inverse index undoes it.
    Raises ValueError where these do not fit together.
    """
    tensors = list(tensors)
    _check(tensors, index)
    return tuple(_permute(tensors, index, resolve(impl, tensors[0])))


def permute_pooled(
    tensors: Sequence[Tensor],
    index: Tensor,
    lengths: Tensor,
    *,
    block: int,
    wants: Sequence[Want | None],
    impl: Impl = "auto",
) -> tuple[tuple[Tensor, ...], tuple[BlockStats | None, ...]]:
    """`permute`, and the `block_stats` of what comes out: of each tensor what `wants` names, or None.

    lengths [N] are those of block_stats, for the first N blocks of `block` tokens; tokens behind them are only moved.
    Raises ValueError as permute and block_stats do.
    """
    tensors = list(tensors)
    _check(tensors, index)
    if len(wants) != len(tensors) or any(want not in (None, *get_args(Want)) for want in wants):
        raise ValueError(f"wants names one of {', '.join(get_args(Want))} or None for each tensor, not {wants!r}.")
    first = tensors[0]
    blocks = lengths.shape[-1]
    if lengths.dim() != 1 or (blocks - 1) * block >= first.shape[-2]:
        raise ValueError(f"lengths {tuple(lengths.shape)} do not fit {first.shape[-2]} tokens in blocks of {block}.")
    chosen = resolve(impl, first)
    if chosen == "torch" or block not in ONE_PASS:
        moved = tuple(_permute(tensors, index, chosen))
        heads = [x[:, :, : blocks * block] for x in moved]
        return moved, tuple(
            None if want is None else block_stats(x, lengths, block=block, want=want, impl=impl)
            for x, want in zip(heads, wants, strict=True)
        )
    fields = [0 if want is None else 1 + get_args(Want).index(want) for want in wants]
    found = _permute_pooled(tensors, index, lengths, block, fields)
    moved, rest = tuple(found[: len(tensors)]), iter(found[len(tensors) :])
    pooled: list[BlockStats | None] = []
    for count in fields:
        mean, var, mad = [*(next(rest) for _ in range(count)), None, None, None][:3]
        pooled.append(BlockStats(mean=mean, mad=mad, var=var) if count else None)
    return moved, tuple(pooled)


def _check(tensors: list[Tensor], index: Tensor) -> None:
    if not tensors:
        raise ValueError("permute takes at least one tensor, not none.")
    first = tensors[0]
    if first.dim() != 4 or first.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"tensors must be [B, H, L, D] of a float type, not {tuple(first.shape)} of {first.dtype}.")
    for x in tensors:
        if x.shape != first.shape or x.dtype != first.dtype or x.device != first.device:
            raise ValueError(
                f"All tensors must be like the first, {tuple(first.shape)} {first.dtype} on {first.device}, not "
                f"{tuple(x.shape)} {x.dtype} on {x.device}."
            )
        if x.stride(-1) != 1:
            raise ValueError(
                f"The last dimension of each tensor must be contiguous, but its stride is {x.stride(-1)}."
            )
    if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64) or index.device != first.device:
        raise ValueError(
            f"index must be [n] int32 or int64 on {first.device}, not {tuple(index.shape)} {index.dtype} on "
            f"{index.device}."
        )
    if index.numel() > first.shape[-2]:
        raise ValueError(f"index has {index.numel()} places, but there are {first.shape[-2]} tokens.")


@torch.library.custom_op("dit_sparse::permute", mutates_args=())
def _permute(tensors: list[Tensor], index: Tensor, impl: str) -> list[Tensor]:
    with on_device(index):
        return (_permute_triton if impl == "triton" else _permute_torch)(tensors, index)


@_permute.register_fake
def _(tensors: list[Tensor], *_: object) -> list[Tensor]:
    return [torch.empty_like(x) for x in tensors]


def _permute_torch(tensors: list[Tensor], index: Tensor) -> list[Tensor]:
    n = index.numel()
    out = [torch.empty_like(x) for x in tensors]
    for pair in zip(tensors, out, strict=True):
        # Rows are copied fastest along the outermost dimension in memory: whole tokens where heads lie inside them.
        if pair[0].stride(1) < pair[0].stride(2):
            rows = zip(*(x.transpose(1, 2) for x in pair), strict=True)
        else:
            rows = zip(*([head for item in x for head in item] for x in pair), strict=True)
        for x, y in rows:
            torch.index_select(x, 0, index, out=y[:n])
            y[n:] = x[n:]
    return out


if triton is not None:

    @triton.jit
    def permute_fwd_kernel(
        xs,
        ys,
        x_strides,
        y_strides,
        index,
        n,
        L,
        H,
        D: tl.constexpr,
        BT: tl.constexpr,
        BD: tl.constexpr,
    ):
        # Heads go fastest: with [B, L, H, D] underneath, neighbouring programs read one stretch of memory.
        i = tl.program_id(0).to(tl.int64)
        i_h, i = i % H, i // H
        i_t, i_b = i % tl.cdiv(L, BT), i // tl.cdiv(L, BT)
        o_t = i_t * BT + tl.arange(0, BT)
        o_d = tl.arange(0, BD)
        # [BT]
        b_from = tl.load(index + o_t, mask=o_t < n, other=0).to(tl.int64)
        b_from = tl.where(o_t < n, b_from, o_t)
        m = (o_t < L)[:, None] & (o_d < D)[None, :]
        for j in tl.static_range(len(xs)):
            # [BT, BD]
            p_x = xs[j] + i_b * x_strides[j][0] + i_h * x_strides[j][1] + b_from[:, None] * x_strides[j][2]
            b_x = tl.load(p_x + o_d[None, :], mask=m)
            p_y = ys[j] + i_b * y_strides[j][0] + i_h * y_strides[j][1] + o_t[:, None] * y_strides[j][2]
            tl.store(p_y + o_d[None, :], b_x, mask=m)


def _permute_triton(tensors: list[Tensor], index: Tensor) -> list[Tensor]:
    check_device(permute_fwd_kernel, index)
    out = [torch.empty_like(x) for x in tensors]
    batch, heads, tokens, dim = tensors[0].shape
    channels = triton.next_power_of_2(dim)
    rows = max(TILE // channels, 1)
    permute_fwd_kernel[(batch * heads * triton.cdiv(tokens, rows),)](
        tuple(tensors),
        tuple(out),
        tuple(x.stride()[:3] for x in tensors),
        tuple(y.stride()[:3] for y in out),
        index.contiguous(),
        index.numel(),
        tokens,
        heads,
        D=dim,
        BT=rows,
        BD=channels,
        num_warps=WARPS,
    )
    return out


@torch.library.custom_op("dit_sparse::permute_pooled", mutates_args=())
def _permute_pooled(
    tensors: list[Tensor], index: Tensor, lengths: Tensor, block: int, fields: list[int]
) -> list[Tensor]:
    check_device(permute_pooled_fwd_kernel, index)
    found = _permute_pooled_outputs(tensors, index, lengths, block, fields)
    moved, rest = found[: len(tensors)], iter(found[len(tensors) :])
    # Mean, variance and deviation, those that are not wanted in the place of one that is never written to.
    stats = tuple((*(next(rest) for _ in range(count)), index, index, index)[:3] for count in fields)
    batch, heads, tokens, dim = tensors[0].shape
    channels = min(triton.next_power_of_2(dim), TILE // block)
    tiles = triton.cdiv(tokens, block) * triton.cdiv(dim, channels)
    with on_device(index):
        permute_pooled_fwd_kernel[(batch * heads * len(tensors) * tiles,)](
            tuple(tensors),
            tuple(moved),
            stats,
            tuple(x.stride()[:3] for x in tensors),
            tuple(y.stride()[:3] for y in moved),
            index.contiguous(),
            lengths.contiguous(),
            index.numel(),
            tokens,
            heads,
            lengths.shape[0],
            D=dim,
            BT=block,
            BD=channels,
            FIELDS=tuple(fields),
            num_warps=WARPS,
        )
    return found


@_permute_pooled.register_fake
def _permute_pooled_outputs(
    tensors: list[Tensor], _index: Tensor, lengths: Tensor, _block: int, fields: list[int]
) -> list[Tensor]:
    batch, heads, _, dim = tensors[0].shape
    pooled = (batch, heads, lengths.shape[0], dim)
    moved = [torch.empty_like(x) for x in tensors]
    return moved + [tensors[0].new_empty(pooled, dtype=torch.float32) for _ in range(sum(fields))]


if triton is not None:

    @triton.jit
    def permute_pooled_fwd_kernel(
        xs,
        ys,
        stats,
        x_strides,
        y_strides,
        index,
        lengths,
        n,
        L,
        H,
        N,
        D: tl.constexpr,
        BT: tl.constexpr,
        BD: tl.constexpr,
        FIELDS: tl.constexpr,
    ):
        # Channels go fastest, then heads: with [B, L, H, D] underneath, neighbours write one stretch of memory. A
        # program has one tensor: the fewer registers it takes, the more load while others wait for their sums.
        i = tl.program_id(0).to(tl.int64)
        i_d, i = i % tl.cdiv(D, BD), i // tl.cdiv(D, BD)
        i_h, i = i % H, i // H
        i_x, i = i % len(xs), i // len(xs)
        i_n, i_b = i % tl.cdiv(L, BT), i // tl.cdiv(L, BT)
        o_t = i_n * BT + tl.arange(0, BT)
        o_d = i_d * BD + tl.arange(0, BD)
        # [BT]
        b_from = tl.load(index + o_t, mask=o_t < n, other=0).to(tl.int64)
        b_from = tl.where(o_t < n, b_from, o_t)
        m_d = o_d < D
        m = (o_t < L)[:, None] & m_d[None, :]
        # Tokens behind the last block are only moved.
        length = tl.load(lengths + tl.minimum(i_n, N - 1))
        m_t = (tl.arange(0, BT) < length)[:, None]
        count = tl.maximum(length, 1).to(tl.float32)
        o_out = ((i_b * H + i_h) * N + i_n) * D + o_d
        m_out = m_d & (i_n + tl.zeros_like(o_d) < N)
        for j in tl.static_range(len(xs)):
            if i_x == j:
                # [BT, BD]
                p_x = xs[j] + i_b * x_strides[j][0] + i_h * x_strides[j][1] + b_from[:, None] * x_strides[j][2]
                b_x = tl.load(p_x + o_d[None, :], mask=m, other=0.0)
                p_y = ys[j] + i_b * y_strides[j][0] + i_h * y_strides[j][1] + o_t[:, None] * y_strides[j][2]
                tl.store(p_y + o_d[None, :], b_x, mask=m)
                if FIELDS[j] > 0:
                    # [BD]
                    b_mean = tl.sum(tl.where(m_t, b_x.to(tl.float32), 0.0), 0) / count
                    tl.store(stats[j][0] + o_out, b_mean, mask=m_out)
                    if FIELDS[j] > 1:
                        # [BT, BD]
                        b_off = tl.where(m_t, b_x.to(tl.float32) - b_mean[None, :], 0.0)
                        tl.store(stats[j][1] + o_out, tl.sum(b_off * b_off, 0) / count, mask=m_out)
                        if FIELDS[j] > 2:
                            tl.store(stats[j][2] + o_out, tl.sum(tl.abs(b_off), 0) / count, mask=m_out)
