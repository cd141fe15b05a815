"""q, k and v in 8 bits as the Hopper kernel reads them: int8 queries and keys, e4m3 values with keys contiguous."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Keys of one block, as the kernel takes them.
BLOCK = 128
# A thread holds 64 numbers of a block: with twice as many, half the programs would fit a multiprocessor.
WARPS = 8


class Quantised(NamedTuple):
    """What stands for q, k and v; padded is the vision keys and then the text keys, each filled up to whole blocks."""

    q: Tensor  # [B, H, Lq, D] int8
    q_unit: Tensor  # [B, H, Lq] float32: what a code stands for
    q_shift: Tensor  # [B, H, Lq] float32: scale * q . mean of the keys, which the log-sum-exp lacks
    k: Tensor  # [B, H, padded, D] int8, mean subtracted, each block's rows in the order of key_order
    k_unit: Tensor  # [B, H, padded / BLOCK, 32] float32, one number a block, 32 times: copies lie on 128 bytes
    k_mean: Tensor  # [B, H, D] float32
    v: Tensor  # [B, H, D, padded] e4m3
    v_unit: Tensor  # [B, H, D] float32


def key_order(device: torch.device | str = "cpu") -> Tensor:
    """[BLOCK] int64: the key that stands in each row of a block.

    A thread holds of every 32 logits four pairs, of every 32 probabilities two fours: in this order they are the same.
    """
    row = torch.arange(BLOCK, device=device)
    return row & ~14 | (row & 8) >> 2 | (row & 6) << 1


@triton.jit
def _key_of(row):
    return (row & ~14) | ((row & 8) >> 2) | ((row & 6) << 1)


@triton.jit
def _rounded(x):
    # The last byte of x + 1.5 * 2^23: a conversion to integers would take four times as long as an addition.
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _queries_kernel(
    p_q, p_mean, p_codes, p_unit, p_shift, s_b, s_h, s_t, H, L, scale, D: tl.constexpr, BLOCK: tl.constexpr
):
    i_bh = tl.program_id(1).to(tl.int64)
    o_t = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    o_d = tl.arange(0, D)
    m_t = o_t < L
    p = p_q + i_bh // H * s_b + i_bh % H * s_h + o_t[:, None] * s_t + o_d[None, :]
    x = tl.load(p, mask=m_t[:, None], other=0.0).to(tl.float32)
    mean = tl.load(p_mean + i_bh * D + o_d)
    unit = tl.maximum(tl.max(tl.abs(x), 1), 1e-20) / 127
    codes = _rounded(x * (1 / unit)[:, None])
    tl.store(p_codes + (i_bh * L + o_t[:, None]) * D + o_d[None, :], codes, mask=m_t[:, None])
    tl.store(p_unit + i_bh * L + o_t, unit, mask=m_t)
    tl.store(p_shift + i_bh * L + o_t, tl.sum(x * mean[None, :], 1) * scale, mask=m_t)


@triton.jit
def _keys_kernel(
    p_k, p_mean, p_mask, p_codes, p_unit, s_b, s_h, s_t, H, VISION, L, blocks,
    D: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0)
    o_t, m_t = _tokens(i, _key_of(tl.arange(0, BLOCK)), i_bh // H, p_mask, VISION, L, MASKED, BLOCK)
    o_d = tl.arange(0, D)
    p = p_k + i_bh // H * s_b + i_bh % H * s_h + o_t[:, None] * s_t + o_d[None, :]
    x = tl.load(p, mask=m_t[:, None], other=0.0).to(tl.float32)
    x = tl.where(m_t[:, None], x - tl.load(p_mean + i_bh * D + o_d)[None, :], 0.0)
    # Times a query's unit, at least 1e-22, it must not vanish: what is hidden is -inf times that.
    unit = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), 1e-10) / 127
    o_out = (i_bh * blocks + i) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_codes + o_out[:, None] * D + o_d[None, :], _rounded(x * (1 / unit)))
    tl.store(p_unit + (i_bh * blocks + i) * 32 + tl.arange(0, 32), unit + tl.zeros([32], tl.float32))


@triton.jit
def _values_kernel(
    p_v, p_unit, p_mask, p_codes, s_b, s_h, s_t, H, VISION, L, blocks,
    D: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0)
    o_t, m_t = _tokens(i, tl.arange(0, BLOCK), i_bh // H, p_mask, VISION, L, MASKED, BLOCK)
    o_d = tl.arange(0, D)
    p = p_v + i_bh // H * s_b + i_bh % H * s_h + o_t[:, None] * s_t + o_d[None, :]
    unit = tl.load(p_unit + i_bh * D + o_d)
    x = tl.load(p, mask=m_t[:, None], other=0.0).to(tl.float32) * (1 / unit)[None, :]
    x = tl.trans(x.to(tl.float8e4nv))
    o_out = i * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_codes + (i_bh * D + o_d[:, None]) * (blocks * BLOCK) + o_out[None, :], x)


@triton.jit
def _tokens(i, place, i_b, p_mask, VISION, L, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens at these places of block i, and whether they exist: blocks of text begin behind the vision tokens, and
    what is MASKED there is as good as not there."""
    vision_blocks = tl.cdiv(VISION, BLOCK)
    is_text = i >= vision_blocks
    start = tl.where(is_text, VISION + (i - vision_blocks) * BLOCK, i * BLOCK)
    o_t = start + place
    m_t = o_t < tl.where(is_text, L, VISION)
    if MASKED:
        m_t = m_t & (tl.load(p_mask + i_b * (L - VISION) + o_t - VISION, mask=m_t & (o_t >= VISION), other=1) != 0)
    return o_t.to(tl.int64), m_t


def quantise_keys(k: Tensor, mean: Tensor, text: int, text_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Keys [B, H, L, D], the last `text` of them text, of which those where text_mask [B, text] bool is False are
    zeros -> codes [B, H, padded, D] int8 and units [B, H, blocks, 32]."""
    batch, heads, length, dim = k.shape
    blocks = triton.cdiv(length - text, BLOCK) + triton.cdiv(text, BLOCK)
    codes = k.new_empty((batch, heads, blocks * BLOCK, dim), dtype=torch.int8)
    unit = k.new_empty((batch, heads, blocks, 32), dtype=torch.float32)
    _keys_kernel[(blocks, batch * heads)](
        k, mean, _bytes(text_mask), codes, unit, *k.stride()[:3], heads, length - text, length, blocks,
        D=dim, MASKED=text_mask is not None, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return codes, unit


def quantise_values(v: Tensor, unit: Tensor, text: int, text_mask: Tensor | None = None) -> Tensor:
    """Values [B, H, L, D], masked like keys, and what a code of each channel stands for, [B, H, D] ->
    [B, H, D, padded] e4m3."""
    batch, heads, length, dim = v.shape
    blocks = triton.cdiv(length - text, BLOCK) + triton.cdiv(text, BLOCK)
    codes = v.new_empty((batch, heads, dim, blocks * BLOCK), dtype=torch.float8_e4m3fn)
    _values_kernel[(blocks, batch * heads)](
        v, unit, _bytes(text_mask), codes, *v.stride()[:3], heads, length - text, length, blocks,
        D=dim, MASKED=text_mask is not None, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return codes


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def quantise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text: int,
    scale: float,
    mean: Tensor | None = None,
    text_mask: Tensor | None = None,
) -> Quantised:
    """q, k and v [B, H, L, D], any strides with D contiguous, in 8 bits: queries with a unit a row, keys without their
    mean and with a unit a block, values with a unit a channel (SageAttention2, arXiv 2411.10958, section 3).

    mean [B, H, D] float32 saves a pass over the keys; what is close to their mean does as well. Keys and values where
    text_mask [B, text] bool is False may be anything, and no unit knows of them."""
    batch, heads, queries, dim = q.shape
    vision = k.shape[2] - text
    if mean is None:
        mean = k[:, :, : vision if text_mask is not None else None].mean(2, dtype=torch.float32)
    mean = mean.contiguous()
    if text_mask is None:
        least, most = v.aminmax(dim=2)
    else:
        shown = v[:, :, vision:].masked_fill(~text_mask[:, None, :, None], 0)
        (least, most), (of_text, of_text_too) = v[:, :, :vision].aminmax(dim=2), shown.aminmax(dim=2)
        least, most = torch.minimum(least, of_text), torch.maximum(most, of_text_too)
    v_unit = torch.maximum(-least, most).float().clamp(min=1e-20) / 448
    codes = torch.empty((batch, heads, queries, dim), device=q.device, dtype=torch.int8)
    unit, shift = (q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2))
    _queries_kernel[(triton.cdiv(queries, BLOCK), batch * heads)](
        q, mean, codes, unit, shift, *q.stride()[:3], heads, queries, scale, D=dim, BLOCK=BLOCK, num_warps=WARPS
    )
    k_codes, k_unit = quantise_keys(k, mean, text, text_mask)
    v_codes = quantise_values(v, v_unit, text, text_mask)
    return Quantised(codes, unit, shift, k_codes, k_unit, mean, v_codes, v_unit)
