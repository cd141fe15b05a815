"""Mean, mean absolute deviation and variance of every block of tokens, in one pass over them."""

from typing import Literal, get_args

import torch
from torch import Tensor

from dit_sparse.kernels.implementation import Impl, check_device, on_device, resolve
from dit_sparse.kernels.reference import BlockStats

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton has no wheel for macOS and Windows; the torch implementation needs none.
    triton = None

Want = Literal["mean", "mean+var", "all"]

# Numbers a program holds: 64 a thread, which leaves room for the deviations. Statistics are per channel, so a tile
# may be cut across the channels; below 64 of them a row is less than one 128-byte line.
TILE, CHANNELS, WARPS = 8192, 64, 4
# Numbers the torch implementation holds at a time, 1 MiB of float32: fewer waste time in calls, more leave the cache.
CHUNK = 1 << 18


def block_stats(x: Tensor, lengths: Tensor, *, block: int, want: Want = "all", impl: Impl = "auto") -> BlockStats:
    """Statistics of each block of `block` tokens over its first `lengths` tokens; the others may hold anything.

    x [B, H, L, D] float16, bfloat16, float32 or (torch) float64, D a multiple of 8 up to 256, any strides with the
    last dimension contiguous; lengths [N] or [B, N], any integer type, each from 0 to block, N = ceil(L / block).
    Returns mean, mad and var, each [B, H, N, D] float32 (float64 for float64); those not wanted are None. A block of
    length 0 gives zeros. Raises ValueError where these do not fit together. Rectified SpaAttn (arXiv 2511.19835) uses
    mean and mad.
    """
    if x.dim() != 4 or x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"x must be [B, H, L, D] of a float type, not {tuple(x.shape)} of {x.dtype}.")
    batch, _, tokens, dim = x.shape
    if dim % 8 or not 8 <= dim <= 256:
        raise ValueError(f"The head dimension must be a multiple of 8 up to 256, not {dim}.")
    if x.stride(-1) != 1:
        raise ValueError(f"The last dimension of x must be contiguous, but its stride is {x.stride(-1)}.")
    if not 1 <= block <= 1024:
        raise ValueError(f"block must be from 1 to 1024 tokens, not {block}.")
    blocks = -(-tokens // block)
    if lengths.shape not in ((blocks,), (batch, blocks)) or lengths.dtype.is_floating_point:
        raise ValueError(
            f"lengths must be integers of shape {(blocks,)} or {(batch, blocks)} for {tokens} tokens in blocks of "
            f"{block}, not {lengths.dtype} {tuple(lengths.shape)}."
        )
    if lengths.device != x.device:
        raise ValueError(f"lengths must be on {x.device} like x, not on {lengths.device}.")
    if want not in get_args(Want):
        raise ValueError(f"Unknown want {want!r}: choose from {', '.join(get_args(Want))}.")
    found = _block_stats(x, lengths, block, want, resolve(impl, x))
    mean, var, mad = [*found, None, None][:3]
    return BlockStats(mean=mean, mad=mad, var=var)


# The fields in the order they are computed, so that fewer of them are a prefix: mean, var, mad.
@torch.library.custom_op("dit_sparse::block_stats", mutates_args=())
def _block_stats(x: Tensor, lengths: Tensor, block: int, want: str, impl: str) -> list[Tensor]:
    with on_device(x):
        return (_block_stats_triton if impl == "triton" else _block_stats_torch)(x, lengths, block, want)


@_block_stats.register_fake
def _(x: Tensor, lengths: Tensor, _block: int, want: str, *_: object) -> list[Tensor]:
    return _outputs(x, lengths.shape[-1], want)


def _outputs(x: Tensor, blocks: int, want: str) -> list[Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    number = 1 + get_args(Want).index(want)
    return [x.new_empty(*x.shape[:2], blocks, x.shape[-1], dtype=dtype) for _ in range(number)]


def _block_stats_torch(x: Tensor, lengths: Tensor, block: int, want: str) -> list[Tensor]:
    batch, heads, tokens, dim = x.shape
    blocks = lengths.shape[-1]
    out = _outputs(x, blocks, want)
    lengths = lengths.reshape(-1, 1, blocks, 1)
    # [1 or B, 1, N, block, 1]
    unreal = (torch.arange(block, device=x.device) >= lengths).unsqueeze(-1)
    count = lengths.clamp(min=1).to(out[0].dtype)
    step = max(1, CHUNK // (batch * heads * block * dim))
    for start in range(0, blocks, step):
        stop = min(start + step, blocks)
        here = slice(start, stop)
        tile = x[:, :, start * block : stop * block]
        if (missing := (stop - start) * block - tile.shape[-2]) > 0:
            tile = torch.nn.functional.pad(tile, (0, 0, 0, missing))
        tile = tile.unflatten(-2, (stop - start, block))
        # Nearly always only the last block is short; on a GPU asking whether it is would wait for the device.
        short = x.is_cuda or bool((lengths[:, :, here] < block).any())
        if short:
            tile = tile.masked_fill(unreal[:, :, here], 0)
        mean = tile.sum(-2, dtype=out[0].dtype) / count[:, :, here]
        out[0][:, :, here] = mean
        if len(out) > 1:
            off = tile - mean.unsqueeze(-2)
            if short:
                off.masked_fill_(unreal[:, :, here], 0)
            out[1][:, :, here] = off.square().sum(-2) / count[:, :, here]
        if len(out) > 2:
            out[2][:, :, here] = off.abs_().sum(-2) / count[:, :, here]
    return out


if triton is not None:

    @triton.jit
    def block_stats_fwd_kernel(
        x,
        lengths,
        mean,
        var,
        mad,
        stride_xb,
        stride_xh,
        stride_xl,
        stride_lb,
        stride_ln,
        L,
        H,
        N,
        D: tl.constexpr,
        BLOCK: tl.constexpr,
        BT: tl.constexpr,
        BD: tl.constexpr,
        FIELDS: tl.constexpr,
    ):
        # One axis, because the others end at 65535 programs.
        i = tl.program_id(0).to(tl.int64)
        i_d = i % tl.cdiv(D, BD)
        i_row = i // tl.cdiv(D, BD)
        i_n, i_bh = i_row % N, i_row // N
        i_b, i_h = i_bh // H, i_bh % H
        length = tl.load(lengths + i_b * stride_lb + i_n * stride_ln)
        count = tl.maximum(length, 1).to(tl.float32)

        o_t = tl.arange(0, BT)
        o_l = i_n * BLOCK + o_t
        o_d = i_d * BD + tl.arange(0, BD)
        m_t = (o_t < length) & (o_l < L)
        p_x = x + i_b * stride_xb + i_h * stride_xh + o_l[:, None] * stride_xl + o_d[None, :]
        # [BT, BD]
        b_x = tl.load(p_x, mask=m_t[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)
        # [BD]
        b_mean = tl.sum(b_x, 0) / count
        o_out = i_row * D + o_d
        tl.store(mean + o_out, b_mean, mask=o_d < D)
        if FIELDS > 1:
            # [BT, BD]
            b_off = tl.where(m_t[:, None], b_x - b_mean[None, :], 0.0)
            tl.store(var + o_out, tl.sum(b_off * b_off, 0) / count, mask=o_d < D)
            if FIELDS > 2:
                tl.store(mad + o_out, tl.sum(tl.abs(b_off), 0) / count, mask=o_d < D)


def _block_stats_triton(x: Tensor, lengths: Tensor, block: int, want: str) -> list[Tensor]:
    check_device(block_stats_fwd_kernel, x)
    batch, heads, tokens, dim = x.shape
    blocks = lengths.shape[-1]
    out = _outputs(x, blocks, want)
    rows = triton.next_power_of_2(block)
    channels = min(triton.next_power_of_2(dim), CHANNELS, max(TILE // rows, 8))
    lengths = lengths.expand(batch, blocks)
    block_stats_fwd_kernel[(batch * heads * blocks * triton.cdiv(dim, channels),)](
        x,
        lengths,
        *(out + out[:1] * 2)[:3],
        *x.stride()[:3],
        *lengths.stride(),
        tokens,
        heads,
        blocks,
        D=dim,
        BLOCK=block,
        BT=rows,
        BD=channels,
        FIELDS=len(out),
        num_warps=WARPS,
    )
    return out
