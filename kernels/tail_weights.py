"""What each pooled key weighs for a query block, and the same without the blocks that a plan lists."""

import math

import torch
from torch import Tensor

from dit_sparse.kernels.implementation import Impl, check_device, resolve
from dit_sparse.plan import BlockPlan

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton has no wheel for macOS and Windows; the torch implementation needs none.
    triton = None

# Rows and columns of a program of tail_weights, and channels it multiplies at a time.
TILE, CHANNELS = 64, 64
# What float16 holds with room to add to it.
HALF_LIMIT = 30000.0
# Keys of a tile of the kernel in 8 bits, in whose order `unlisted` may leave its columns.
KEYS = 128


def tail_weights(
    q_mean: Tensor,
    q_var: Tensor,
    variances: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    limit: float = math.inf,
    half: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """The second-order weight of every pooled key m for a query block n, whose mean square stands for those of its
    rows: ln lengths_m + min(½ scale² Σ_d E_n[q_d²] variances_md, limit).

    q_mean, q_var [B, H, Nq, D] mean and variance of the queries of each block, variances [B, H, Nk, D] those of the
    keys, all float32 or float64; lengths [Nk] real tokens, any integer type. Returns [B, H, Nq, Nk] in their dtype or,
    with `half`, in float16, with limit at most 30000. Raises ValueError where the arguments do not fit together.
    """
    if q_mean.dtype not in (torch.float32, torch.float64) or {q_var.dtype, variances.dtype} != {q_mean.dtype}:
        raise ValueError(
            f"q_mean, q_var and variances must all be float32 or float64, not {q_mean.dtype}, {q_var.dtype} and "
            f"{variances.dtype}."
        )
    fits = q_mean.dim() == variances.dim() == 4 and q_var.shape == q_mean.shape
    if not fits or q_mean.shape[:2] != variances.shape[:2] or q_mean.shape[-1] != variances.shape[-1]:
        raise ValueError(
            f"q_mean and q_var [B, H, Nq, D] and variances [B, H, Nk, D] must agree, but they are "
            f"{tuple(q_mean.shape)}, {tuple(q_var.shape)} and {tuple(variances.shape)}."
        )
    if lengths.shape != variances.shape[2:3] or lengths.dtype.is_floating_point:
        raise ValueError(
            f"lengths must be integers of shape {tuple(variances.shape[2:3])}, not {lengths.dtype} "
            f"{tuple(lengths.shape)}."
        )
    if not limit > 0:
        raise ValueError(f"limit is a positive number, or inf, not {limit!r}.")
    limit = min(limit, HALF_LIMIT) if half else limit
    return _tail_weights(q_mean, q_var, variances, lengths, scale, limit, half, resolve(impl, q_mean))


def unlisted(log_weights: Tensor, plan: BlockPlan, *, width: int, by_row: bool = False, impl: Impl = "auto") -> Tensor:
    """log_weights [N], [B, N] or [B, H, Nq, N] of pooled keys -> [B, H, Nq, width], contiguous, -inf where the plan
    lists the block and behind the last; float16 for float16, else float32. N is plan.key_blocks, width at least that.

    by_row: as rows of the keys' tiles of the 8-bit kernel lie, see `dit_sparse.kernels.quantise.key_order`; width is
    then a multiple of 128.
    """
    rows = (*plan.counts.shape, plan.key_blocks)
    shapes = rows[-1:], (rows[0], rows[-1]), rows
    if log_weights.shape not in shapes:
        raise ValueError(f"log_weights must be one of {shapes}, not {tuple(log_weights.shape)}.")
    if by_row and width % KEYS:
        raise ValueError(f"width must be a multiple of {KEYS} by row, not {width}.")
    if width < plan.key_blocks:
        raise ValueError(f"width must be at least {plan.key_blocks}, not {width}.")
    given = log_weights if log_weights.dtype == torch.float16 else log_weights.float()
    return _unlisted(given, plan.counts, plan.indices, plan.key_blocks, width, by_row, resolve(impl, given))


@torch.library.custom_op("dit_sparse::tail_weights", mutates_args=())
def _tail_weights(
    q_mean: Tensor,
    q_var: Tensor,
    variances: Tensor,
    lengths: Tensor,
    scale: float,
    limit: float,
    half: bool,
    impl: str,
) -> Tensor:
    if impl == "triton":
        return _tail_weights_triton(q_mean, q_var, variances, lengths, scale, limit, half)
    spread = ((q_mean.square() + q_var) @ variances.mT).mul_(0.5 * scale**2)
    # What is no number is the limit, as for Triton's minimum: one bad row must not spoil all of a block.
    spread = torch.where(spread < limit, spread, limit)
    return spread.add_(lengths.to(spread.dtype).log()).to(_kind(q_mean, half))


@_tail_weights.register_fake
def _(q_mean: Tensor, _q_var: Tensor, variances: Tensor, *rest: object) -> Tensor:
    return q_mean.new_empty(*q_mean.shape[:3], variances.shape[2], dtype=_kind(q_mean, bool(rest[3])))


def _kind(q: Tensor, half: bool) -> torch.dtype:
    return torch.float16 if half else q.dtype


@torch.library.custom_op("dit_sparse::unlisted", mutates_args=())
def _unlisted(
    log_weights: Tensor, counts: Tensor, indices: Tensor, key_blocks: int, width: int, by_row: bool, impl: str
) -> Tensor:
    if impl == "triton":
        return _unlisted_triton(log_weights, counts, indices, key_blocks, width, by_row)
    listed = BlockPlan(counts, indices, key_blocks).mask()
    weights = _four(log_weights).expand(listed.shape).masked_fill(listed, float("-inf"))
    weights = torch.nn.functional.pad(weights, (0, width - key_blocks), value=float("-inf"))
    if by_row:
        # Row r of a tile holds key (r & ~14) | (r & 8) >> 2 | (r & 6) << 1.
        row = torch.arange(width, device=weights.device)
        weights = weights[..., (row & ~14) | ((row & 8) >> 2) | ((row & 6) << 1)]
    return weights.contiguous()


@_unlisted.register_fake
def _(log_weights: Tensor, counts: Tensor, _indices: Tensor, _key_blocks: int, width: int, *_: object) -> Tensor:
    return log_weights.new_empty(*counts.shape, width)


def _four(log_weights: Tensor) -> Tensor:
    """[N], [B, N] or [B, H, Nq, N] -> four dimensions that broadcast."""
    if log_weights.dim() == 4:
        return log_weights
    return log_weights.reshape(-1, 1, 1, log_weights.shape[-1])


if triton is not None:
    LN2 = tl.constexpr(math.log(2))

    @triton.jit
    def tail_weights_fwd_kernel(
        q_mean, q_var, variances, lengths, weights, factor, limit, Q, N,
        D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        # Tiles of one batch row and head are neighbours, so that its statistics are read from memory once.
        i = tl.program_id(0).to(tl.int64)
        i_k, i = i % tl.cdiv(N, BK), i // tl.cdiv(N, BK)
        i_q, i_bh = i % tl.cdiv(Q, BQ), i // tl.cdiv(Q, BQ)
        o_q, o_k = i_q * BQ + tl.arange(0, BQ), i_k * BK + tl.arange(0, BK)
        m_q, m_k = o_q < Q, o_k < N
        # [BQ, BK]
        b_s = tl.zeros([BQ, BK], tl.float32)
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
        b_n = tl.load(lengths + o_k, mask=m_k, other=1).to(tl.float32)
        b_s = tl.minimum(b_s * factor, limit) + LN2 * tl.log2(b_n)[None, :]
        p_w = weights + (i_bh * Q + o_q[:, None]) * N + o_k[None, :]
        tl.store(p_w, b_s.to(weights.dtype.element_ty), mask=m_q[:, None] & m_k[None, :])

    @triton.jit
    def unlisted_fwd_kernel(
        log_weights, counts, indices, out, w_sb, w_sh, w_sq, H, Q, N, W, WIDTH,
        BN: tl.constexpr, BW: tl.constexpr, BY_ROW: tl.constexpr,
    ):  # fmt: skip
        i = tl.program_id(0).to(tl.int64)
        i_q, i_h, i_b = i % Q, i // Q % H, i // (Q * H)
        o_n = tl.arange(0, BN)
        p_w = log_weights + i_b * w_sb + i_h * w_sh + i_q * w_sq
        # [BN]
        b_w = tl.load(p_w + o_n, mask=o_n < N, other=float("-inf"))
        o_w = tl.arange(0, BW)
        m_w = o_w < tl.load(counts + i)
        # [BW]
        b_n = tl.load(indices + i * W + o_w, mask=m_w, other=0)
        if BY_ROW:
            # Where a key lies in its tile: the inverse of key_order.
            o_n = (o_n & ~14) | ((o_n & 2) << 2) | ((o_n & 12) >> 1)
            b_n = (b_n & ~14) | ((b_n & 2) << 2) | ((b_n & 12) >> 1)
        tl.store(out + i * WIDTH + o_n, b_w, mask=tl.arange(0, BN) < WIDTH)
        # What was listed is written after what it weighs.
        tl.debug_barrier()
        tl.store(out + i * WIDTH + b_n, tl.full([BW], float("-inf"), out.dtype.element_ty), mask=m_w)


def _tail_weights_triton(
    q_mean: Tensor, q_var: Tensor, variances: Tensor, lengths: Tensor, scale: float, limit: float, half: bool
) -> Tensor:
    check_device(tail_weights_fwd_kernel, q_mean)
    batch, heads, rows, dim = q_mean.shape
    columns = variances.shape[2]
    out = q_mean.new_empty(batch, heads, rows, columns, dtype=_kind(q_mean, half))
    tail_weights_fwd_kernel[(batch * heads * triton.cdiv(rows, TILE) * triton.cdiv(columns, TILE),)](
        *(x.contiguous() for x in (q_mean, q_var, variances, lengths)),
        out, 0.5 * scale**2, limit, rows, columns, D=dim, BQ=TILE, BK=TILE, BD=CHANNELS,
        # float16 keeps as many bits as tf32.
        PRECISION="tf32" if half else "ieee", num_warps=4,
    )  # fmt: skip
    return out


def _unlisted_triton(
    log_weights: Tensor, counts: Tensor, indices: Tensor, key_blocks: int, width: int, by_row: bool
) -> Tensor:
    check_device(unlisted_fwd_kernel, counts)
    out = log_weights.new_empty(*counts.shape, width)
    four = _four(log_weights)
    four = four if four.stride(-1) == 1 else four.contiguous()
    steps = [0 if n == 1 else stride for n, stride in zip(four.shape[:3], four.stride()[:3], strict=True)]
    columns, listed = triton.next_power_of_2(width), triton.next_power_of_2(indices.shape[-1])
    unlisted_fwd_kernel[(counts.numel(),)](
        four, counts.contiguous(), indices.contiguous(), out,
        *steps, counts.shape[1], counts.shape[2], key_blocks, indices.shape[-1], width,
        BN=columns, BW=listed, BY_ROW=by_row, num_warps=max(1, min(8, columns // 256)),
    )  # fmt: skip
    return out
