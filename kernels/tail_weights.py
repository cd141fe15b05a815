"""What each pooled key weighs for a query block, and the same without the blocks that a plan lists."""

import math

import torch
from torch import Tensor

from dit_sparse.kernels.implementation import check_device
from dit_sparse.plan import BlockPlan, Tail

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton has no wheel for macOS and Windows; `tail_weights` needs none.
    triton = None

# Rows and columns of a program; places of a list that one reads at a time.
TILE, PLACES = 64, 128
# Channels that a program multiplies at a time, warps and stages, by the bytes of a weight. float16 keeps as many bits
# as tf32; whole float32 is multiplied in registers, more than four warps have, and with as many channels and stages it
# would not fit the 99 KiB of shared memory that GPUs of capability 8.6, 8.9 and 12.0 have.
CHANNELS, WARPS, STAGES = {2: 64, 4: 32}, {2: 4, 4: 8}, {2: 3, 4: 2}
# What float16 holds with room to add to it.
HALF_LIMIT = 30000.0


def limit_of(tail: Tail | None, dtype: torch.dtype) -> float:
    """The most that the second order may add in attention of this dtype."""
    limit = math.inf if tail is None or tail.second is None else tail.second.limit
    # Whatever kernel it is, as float16 is what some keep the weights in.
    return min(limit, HALF_LIMIT) if dtype in (torch.float16, torch.bfloat16) else limit


def tail_weights(tail: Tail, at: tuple, *, scale: float) -> Tensor:
    """What is added to the logits of pooled keys for the query blocks `at`, an index of [B, H, Nq]: for each key m
    log_weights_m, in the second order with min(½ scale² Σ_d E_n[q_d²] variances_md, limit).

    [..., N] as tail.second.q_mean[at] is [..., D], in its dtype; without a second order one row for all, in that of
    log_weights.
    """
    batch, heads, blocks, _ = tail.keys.shape
    given = tail.log_weights.reshape(-1, 1, 1, blocks).expand(batch, heads, 1, blocks)[at[:2]]
    if (second := tail.second) is None:
        return given
    spread = ((second.q_mean[at].square() + second.q_var[at]) @ second.variances[at[:2]].mT).mul_(0.5 * scale**2)
    # What is no number is the limit, as for Triton's minimum: one bad row must not spoil all of a block.
    return torch.where(spread < second.limit, spread, second.limit).add_(given)


if triton is not None:

    @triton.jit
    def tail_weights_fwd_kernel(
        log_weights, q_mean, q_var, variances, out, factor, limit, w_sb, H, Q, N, WIDTH,
        D: tl.constexpr, SECOND: tl.constexpr, BY_ROW: tl.constexpr,
        BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        # Tiles of one batch row and head are neighbours, so that its statistics are read from memory once.
        i = tl.program_id(0).to(tl.int64)
        i_k, i = i % tl.cdiv(WIDTH, BK), i // tl.cdiv(WIDTH, BK)
        i_q, i_bh = i % tl.cdiv(Q, BQ), i // tl.cdiv(Q, BQ)
        o_q, o_w = i_q * BQ + tl.arange(0, BQ), i_k * BK + tl.arange(0, BK)
        o_k = o_w
        if BY_ROW:
            # The key of each row, see key_order.
            o_k = (o_w & ~14) | ((o_w & 8) >> 2) | ((o_w & 6) << 1)
        m_q, m_k = o_q < Q, o_k < N
        # [BQ, BK]
        b_s = tl.zeros([BQ, BK], tl.float32)
        if SECOND:
            for i_d in range(tl.cdiv(D, BD)):
                o_d = i_d * BD + tl.arange(0, BD)
                m_d = (o_d < D)[None, :]
                # [BQ, BD], [BK, BD]
                o_qd = (i_bh * Q + o_q[:, None]) * D + o_d[None, :]
                b_q = tl.load(q_mean + o_qd, mask=m_q[:, None] & m_d, other=0.0)
                b_q = b_q * b_q + tl.load(q_var + o_qd, mask=m_q[:, None] & m_d, other=0.0)
                o_kd = (i_bh * N + o_k[:, None]) * D + o_d[None, :]
                b_var = tl.load(variances + o_kd, mask=m_k[:, None] & m_d, other=0.0)
                b_s = tl.dot(b_q, b_var.T, b_s, input_precision=PRECISION)
            b_s = tl.minimum(b_s * factor, limit)
        # Behind the last block nothing weighs anything.
        b_w = tl.load(log_weights + i_bh // H * w_sb + o_k, mask=m_k, other=float("-inf")).to(tl.float32)
        p_out = out + (i_bh * Q + o_q[:, None]) * WIDTH + o_w[None, :]
        b_s = (b_s + b_w[None, :]).to(out.dtype.element_ty)
        tl.store(p_out, b_s, mask=m_q[:, None] & (o_w < WIDTH)[None, :])

    @triton.jit
    def listed_fwd_kernel(counts, indices, out, STEP, WIDTH, BY_ROW: tl.constexpr, BW: tl.constexpr):
        i = tl.program_id(0).to(tl.int64)
        n = tl.load(counts + i)
        for i_w in range(tl.cdiv(n, BW)):
            o_w = i_w * BW + tl.arange(0, BW)
            # [BW]
            b_n = tl.load(indices + i * STEP + o_w, mask=o_w < n, other=0)
            if BY_ROW:
                # Where a key lies in its tile: the inverse of key_order.
                b_n = (b_n & ~14) | ((b_n & 2) << 2) | ((b_n & 12) >> 1)
            tl.store(out + i * WIDTH + b_n, tl.full([BW], float("-inf"), out.dtype.element_ty), mask=o_w < n)


def unlisted_weights(
    tail: Tail, plan: BlockPlan, dtype: torch.dtype, *, scale: float, width: int, by_row: bool = False
) -> Tensor:
    """`tail_weights` for every query block, [B, H, Nq, width], contiguous, -inf where the plan lists the block and
    behind the last: float16 for attention in a dtype of 16 bits, else float32.

    by_row: as rows of the keys' tiles of the 8-bit kernel lie, see `dit_sparse.kernels.quantise.key_order`; width is
    then a multiple of 128. What is listed is overwritten by a launch of its own, so that memory holds this once.
    """
    check_device(tail_weights_fwd_kernel, tail.keys)
    counts, (indices, step), second = plan.counts.contiguous(), plan.lists(), tail.second
    batch, heads, rows = counts.shape
    half = dtype.itemsize == 2
    out = tail.keys.new_empty(*counts.shape, width, dtype=torch.float16 if half else torch.float32)
    given = tail.log_weights.contiguous()
    statistics = (None,) * 3 if second is None else (second.q_mean, second.q_var, second.variances)
    tail_weights_fwd_kernel[(batch * heads * triton.cdiv(rows, TILE) * triton.cdiv(width, TILE),)](
        given, *(x if x is None else x.contiguous() for x in statistics), out,
        0.5 * scale**2, 0.0 if second is None else second.limit,
        plan.key_blocks if given.dim() == 2 else 0, heads, rows, plan.key_blocks, width,
        D=tail.keys.shape[-1], SECOND=second is not None, BY_ROW=by_row,
        BQ=TILE, BK=TILE, BD=CHANNELS[out.itemsize], PRECISION="tf32" if half else "ieee",
        num_warps=WARPS[out.itemsize], num_stages=STAGES[out.itemsize],
    )  # fmt: skip
    listed_fwd_kernel[(counts.numel(),)](counts, indices, out, step, width, BY_ROW=by_row, BW=PLACES, num_warps=1)
    return out
