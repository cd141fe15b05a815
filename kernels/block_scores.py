"""How much each key block matters to each query block, from their statistics: what routing ranks blocks by."""

import math

import torch
from torch import Tensor

from dit_sparse.kernels.implementation import Impl, check_device, on_device, resolve

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton has no wheel for macOS and Windows; the torch implementation needs none.
    triton = None

# Query and key blocks of a program, and channels of a step: three sums of a tile take 96 registers a thread, and what
# they are made of most of the rest.
TILE, CHANNELS, WARPS = 64, 16, 4
# Rows lie this many numbers apart or a multiple, so that each begins a line of memory for whoever reads it.
ALIGNED = 16


def block_scores(
    q: Tensor,
    k: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    variances: Tensor | None = None,
    deviations: Tensor | None = None,
    text: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """ln of what key block m weighs for query block n, up to a constant of the row: z = scale q_n . k_m + ln n_m.

    With variances and deviations, that times how far the pair may be from the tokens behind it:
    z + ½ ln(scale² Σ_d q_nd² variances_md) + ½ ln deviations_m. The softmax of a row is the pooled attention mass.

    q [B, H, Nq, D] and k [B, H, Nk, D] means of blocks, float32 or (torch) float64, D up to 256; lengths [Nk] tokens
    behind each key block; variances [B, H, Nk, D] of the keys, deviations [B, H, Nk] mean squared distance of values
    from their mean. text [B, H, Nq], ln of what the text weighs, becomes a last column. Returns [B, H, Nq, Nk] or one
    column more, in q's dtype; a row may be longer in memory. Raises ValueError where the arguments do not fit.
    """
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q [B, H, Nq, D] and k [B, H, Nk, D] must agree, but they are {tuple(q.shape)} and {tuple(k.shape)}."
        )
    if q.dtype not in (torch.float32, torch.float64) or k.dtype != q.dtype:
        raise ValueError(f"q and k must both be float32 or float64, not {q.dtype} and {k.dtype}.")
    if (variances is None) != (deviations is None):
        raise ValueError("variances and deviations go together.")
    fitting = (
        ("lengths", lengths, k.shape[2:3]),
        ("variances", variances, k.shape),
        ("deviations", deviations, k.shape[:3]),
        ("text", text, q.shape[:3]),
    )
    for name, x, shape in fitting:
        if x is not None and (x.shape != shape or x.device != q.device):
            raise ValueError(f"{name} must be {tuple(shape)} on {q.device}, not {tuple(x.shape)} on {x.device}.")
        if x is not None and name != "lengths" and x.dtype != q.dtype:
            raise ValueError(f"{name} must be {q.dtype} like q, not {x.dtype}.")
    return _block_scores(q, k, lengths, scale, variances, deviations, text, resolve(impl, q))


@torch.library.custom_op("dit_sparse::block_scores", mutates_args=())
def _block_scores(
    q: Tensor,
    k: Tensor,
    lengths: Tensor,
    scale: float,
    variances: Tensor | None,
    deviations: Tensor | None,
    text: Tensor | None,
    impl: str,
) -> Tensor:
    score = _block_scores_triton if impl == "triton" else _block_scores_torch
    with on_device(q):
        return score(q, k, lengths, scale, variances, deviations, text)


@_block_scores.register_fake
def _(
    q: Tensor,
    k: Tensor,
    _lengths: Tensor,
    _scale: float,
    _variances: Tensor | None,
    _deviations: Tensor | None,
    text: Tensor | None,
    *_: object,
) -> Tensor:
    return _output(q, k, text)


def _output(q: Tensor, k: Tensor, text: Tensor | None) -> Tensor:
    # A bool would do, were it not for torch 2.11, whose symbolic sizes take none.
    columns = k.shape[2] + int(text is not None)
    return q.new_empty(*q.shape[:3], -(-columns // ALIGNED) * ALIGNED)[..., :columns]


def _block_scores_torch(
    q: Tensor,
    k: Tensor,
    lengths: Tensor,
    scale: float,
    variances: Tensor | None,
    deviations: Tensor | None,
    text: Tensor | None,
) -> Tensor:
    out = _output(q, k, text)
    vision = out[..., : k.shape[2]]
    torch.matmul(q, k.mT, out=vision)
    vision.mul_(scale).add_(lengths.to(q.dtype).log())
    if variances is not None and deviations is not None:
        square = (q.square() @ variances.mT).mul_(scale**2).mul_(deviations.unsqueeze(-2))
        vision.add_(square.log_(), alpha=0.5)
    if text is not None:
        out[..., -1] = text
    return out


if triton is not None:
    LN2 = tl.constexpr(math.log(2))

    @triton.jit
    def block_scores_fwd_kernel(
        q,
        k,
        lengths,
        variances,
        deviations,
        text,
        scores,
        scale,
        Q,
        N,
        COLUMNS,
        stride_s,
        D: tl.constexpr,
        BQ: tl.constexpr,
        BK: tl.constexpr,
        BD: tl.constexpr,
    ):
        # Tiles of one batch row and head are neighbours, so that its statistics are read from memory once.
        i = tl.program_id(0).to(tl.int64)
        i_k, i = i % tl.cdiv(COLUMNS, BK), i // tl.cdiv(COLUMNS, BK)
        i_q, i_bh = i % tl.cdiv(Q, BQ), i // tl.cdiv(Q, BQ)
        o_q, o_k = i_q * BQ + tl.arange(0, BQ), i_k * BK + tl.arange(0, BK)
        m_q, m_k = o_q < Q, o_k < N
        # [BQ, BK]
        b_z = tl.zeros([BQ, BK], tl.float32)
        b_square = tl.zeros([BQ, BK], tl.float32)
        # Half of the channels at a time: a sum of shorter sums errs less.
        for half in tl.static_range(2):
            b_half = tl.zeros([BQ, BK], tl.float32)
            for i_d in range(tl.cdiv(D, 2 * BD)):
                o_d = (half * tl.cdiv(D, 2 * BD) + i_d) * BD + tl.arange(0, BD)
                m_d = (o_d < D)[None, :]
                # [BQ, BD], [BK, BD]
                b_q = tl.load(q + (i_bh * Q + o_q[:, None]) * D + o_d[None, :], mask=m_q[:, None] & m_d, other=0.0)
                o_kd = (i_bh * N + o_k[:, None]) * D + o_d[None, :]
                b_k = tl.load(k + o_kd, mask=m_k[:, None] & m_d, other=0.0)
                # Tensor cores round float32 to ten bits, and sums of three such products err more than this one.
                b_half = tl.dot(b_q, b_k.T, b_half, input_precision="ieee")
                if variances is not None:
                    b_var = tl.load(variances + o_kd, mask=m_k[:, None] & m_d, other=0.0)
                    b_square = tl.dot(b_q * b_q, b_var.T, b_square, input_precision="ieee")
            b_z += b_half
        b_z = b_z * scale + LN2 * tl.log2(tl.load(lengths + o_k, mask=m_k, other=1).to(tl.float32))[None, :]
        if variances is not None:
            b_dev = tl.load(deviations + i_bh * N + o_k, mask=m_k, other=1.0)
            b_z += 0.5 * LN2 * tl.log2(b_square * (scale * scale) * b_dev[None, :])
        if text is not None:
            b_text = tl.load(text + i_bh * Q + o_q, mask=m_q, other=0.0)
            b_z = tl.where((o_k == N)[None, :], b_text[:, None], b_z)
        p_s = scores + (i_bh * Q + o_q[:, None]) * stride_s + o_k[None, :]
        tl.store(p_s, b_z, mask=m_q[:, None] & (o_k < COLUMNS)[None, :])


def _block_scores_triton(
    q: Tensor,
    k: Tensor,
    lengths: Tensor,
    scale: float,
    variances: Tensor | None,
    deviations: Tensor | None,
    text: Tensor | None,
) -> Tensor:
    check_device(block_scores_fwd_kernel, q)
    out = _output(q, k, text)
    batch, heads, rows, dim = q.shape
    columns = out.shape[-1]
    block_scores_fwd_kernel[(batch * heads * triton.cdiv(rows, TILE) * triton.cdiv(columns, TILE),)](
        *(x if x is None else x.contiguous() for x in (q, k, lengths, variances, deviations, text)),
        out,
        scale,
        rows,
        k.shape[2],
        columns,
        out.stride(2),
        D=dim,
        BQ=TILE,
        BK=TILE,
        BD=CHANNELS,
        num_warps=WARPS,
    )
    return out
