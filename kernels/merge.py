"""Exact attention to some keys, put together with attention to the others: exact, or the pooled tail."""

import torch
from torch import Tensor

from dit_sparse.kernels.block_attention import check_tail
from dit_sparse.kernels.block_attention_torch import correct_head
from dit_sparse.kernels.implementation import Impl, check_device, on_device, resolve
from dit_sparse.kernels.tail_weights import limit_of
from dit_sparse.plan import BlockPlan, Correction, SecondOrder, Tail

try:
    import triton
    import triton.language as tl

    from dit_sparse.kernels.block_attention_triton import softmax_step
    from dit_sparse.kernels.tail_weights import unlisted_weights
    from dit_sparse.kernels.tuning import attention_tile
except ImportError:  # Triton has no wheel for macOS and Windows; the torch implementations need none.
    triton = None

# Numbers of a tile that a program merges, and its warps.
TILE, WARPS = 8192, 4


def merge_into(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor, *, impl: Impl = "auto") -> None:
    """Make of attention to some keys, and of that of the same rows to others, attention to all of them, in place.

    out and other [B, H, L, D] float16, bfloat16, float32 or (torch) float64, any strides with the last dimension
    contiguous; lse and other_lse [B, H, L], natural logarithm, float32 (float64 for float64), -inf in rows that saw no
    key. What is other stays as it is. Raises ValueError where these do not fit together.
    """
    _check(out, lse)
    if other.shape != out.shape or other_lse.shape != lse.shape or other.dtype != out.dtype:
        raise ValueError(
            f"Both parts must have the same rows and type, but one is {tuple(out.shape)} {out.dtype} with lse "
            f"{tuple(lse.shape)} and the other {tuple(other.shape)} {other.dtype} with {tuple(other_lse.shape)}."
        )
    _merge_into(out, lse, other, other_lse.to(lse.dtype), resolve(impl, out))


def with_tail(
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: BlockPlan,
    tail: Tail,
    *,
    block: int,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """block_attention's exact part out and lse of the plan, with the tail of what the plan leaves out.

    q and out [B, H, L, D] vision rows as in block_attention, lse [B, H, L]; block of queries, 16 to 128 and a power of
    two for triton. scale is D^-1/2 unless given. Returns [B, H, L, D] like out. Raises ValueError where these do not
    fit together.
    """
    _check(out, lse)
    rows = -(-q.shape[2] // block)
    if q.shape != out.shape or q.dtype != out.dtype or plan.counts.shape != (*q.shape[:2], rows):
        raise ValueError(
            f"q {tuple(q.shape)} {q.dtype}, out {tuple(out.shape)} {out.dtype} and the plan's "
            f"{tuple(plan.counts.shape)} rows do not fit in blocks of {block}."
        )
    if q.stride(-1) != 1:
        raise ValueError(f"The last dimension of q must be contiguous, but its stride is {q.stride(-1)}.")
    check_tail(tail, q, rows, plan.key_blocks)
    second = tail.second
    return _with_tail(
        q, out, lse, plan.counts, plan.indices, plan.key_blocks, block,
        q.shape[-1] ** -0.5 if scale is None else scale,
        tail.keys, tail.values, tail.log_weights,
        second and second.q_mean, second and second.q_var, second and second.variances, limit_of(tail, q.dtype),
        resolve("torch" if impl == "auto" and q.dtype == torch.float32 and q.shape[-1] > 128 else impl, q),
    )  # fmt: skip


def _check(out: Tensor, lse: Tensor) -> None:
    if lse.dtype != torch.promote_types(out.dtype, torch.float32):
        raise ValueError(
            f"lse of {out.dtype} must be {torch.promote_types(out.dtype, torch.float32)}, not {lse.dtype}."
        )
    if out.dim() != 4 or out.stride(-1) != 1 or lse.shape != out.shape[:-1]:
        raise ValueError(
            f"out must be [B, H, L, D] with channels side by side, and lse [B, H, L], not {tuple(out.shape)} of "
            f"strides {out.stride()} and {tuple(lse.shape)}."
        )


@torch.library.custom_op("dit_sparse::merge_into", mutates_args=("out", "lse"))
def _merge_into(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor, impl: str) -> None:
    with on_device(out):
        (_merge_into_triton if impl == "triton" else _merge_into_torch)(out, lse, other, other_lse)


@torch.library.custom_op("dit_sparse::with_tail", mutates_args=())
def _with_tail(
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    counts: Tensor,
    indices: Tensor,
    key_blocks: int,
    block: int,
    scale: float,
    tail_keys: Tensor,
    tail_values: Tensor,
    tail_log_weights: Tensor,
    tail_q_mean: Tensor | None,
    tail_q_var: Tensor | None,
    tail_variances: Tensor | None,
    tail_limit: float,
    impl: str,
) -> Tensor:
    plan = BlockPlan(counts, indices, key_blocks)
    second = None if tail_q_mean is None else SecondOrder(tail_q_mean, tail_q_var, tail_variances, tail_limit)
    tail = Tail(tail_keys, tail_values, tail_log_weights, second)
    with on_device(q):
        return (_with_tail_triton if impl == "triton" else _with_tail_torch)(q, out, lse, plan, tail, block, scale)


@_with_tail.register_fake
def _(_q: Tensor, out: Tensor, *_: object) -> Tensor:
    return torch.empty_like(out)


def _merge_into_torch(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    for h in range(out.shape[1]):
        first, second = lse[:, h], other_lse[:, h]
        both = torch.logaddexp(first, second)
        seen = both.masked_fill(both.isneginf(), 0)
        share, rest = ((x - seen).exp_()[..., None] for x in (first, second))
        out[:, h] = (share * out[:, h] + rest * other[:, h]).to(out.dtype)
        lse[:, h] = both


def _with_tail_torch(
    q: Tensor, out: Tensor, lse: Tensor, plan: BlockPlan, tail: Tail, block: int, scale: float
) -> Tensor:
    found, routed, correction = out.clone(), plan.mask(), Correction(tail=tail)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            correct_head(q[b, h], found[b, h], lse[b, h], correction, (b, h), block, routed, scale)
    return found


if triton is not None:

    @triton.jit
    def merge_fwd_kernel(
        p_o, p_l, p_other, p_other_l,
        o_sb, o_sh, o_st, l_sb, l_sh, x_sb, x_sh, x_st, y_sb, y_sh,
        H, L,
        D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    ):  # fmt: skip
        i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
        o_m = tl.program_id(0) * BM + tl.arange(0, BM)
        o_d = tl.arange(0, BD)
        m_m = o_m < L
        m_md = m_m[:, None] & (o_d < D)
        o_t = o_m.to(tl.int64)
        p_l += i_b * l_sb + i_h * l_sh + o_t
        p_o += i_b * o_sb + i_h * o_sh + o_t[:, None] * o_st + o_d
        # [BM]
        b_l = tl.load(p_l, mask=m_m, other=0.0)
        b_y = tl.load(p_other_l + i_b * y_sb + i_h * y_sh + o_t, mask=m_m, other=0.0)
        b_top = tl.maximum(b_l, b_y)
        # A row that has seen nothing must not compute inf - inf.
        b_ref = tl.where(b_top == float("-inf"), 0.0, b_top)
        b_l, b_y = tl.exp(b_l - b_ref), tl.exp(b_y - b_ref)
        b_sum = b_l + b_y
        b_unit = 1.0 / tl.where(b_sum > 0, b_sum, 1.0)
        # [BM, BD]
        b_o = tl.load(p_o, mask=m_md, other=0.0).to(tl.float32)
        p_other += i_b * x_sb + i_h * x_sh + o_t[:, None] * x_st + o_d
        b_x = tl.load(p_other, mask=m_md, other=0.0).to(tl.float32)
        b_o = b_o * (b_l * b_unit)[:, None] + b_x * (b_y * b_unit)[:, None]
        tl.store(p_o, b_o.to(p_o.dtype.element_ty), mask=m_md)
        tl.store(p_l, tl.where(b_sum > 0, b_ref + tl.log(b_sum), float("-inf")), mask=m_m)

    @triton.jit
    def with_tail_fwd_kernel(
        p_q, p_o, p_l, p_tail_k, p_tail_v, p_weights, p_found,
        q_sb, q_sh, q_st, o_sb, o_sh, o_st, l_sb, l_sh, f_sb, f_sh, f_st,
        H, L, NQ, NK, scale,
        D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
        PRECISION: tl.constexpr,
    ):  # fmt: skip
        """The exact part of BM rows is a first step of the softmax, and pooled keys are those after it."""
        LOG2E: tl.constexpr = 1.4426950408889634
        i_tile, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
        i_b, i_h = i_bh // H, i_bh % H
        o_m = i_tile * BM + tl.arange(0, BM)
        o_n, o_d = tl.arange(0, BN), tl.arange(0, BD)
        m_m = o_m < L
        m_d = o_d < D
        m_md = m_m[:, None] & m_d
        o_t = o_m.to(tl.int64)
        # [BM, BD]
        b_q = tl.load(p_q + i_b * q_sb + i_h * q_sh + o_t[:, None] * q_st + o_d, mask=m_md, other=0.0)
        b_o = tl.load(p_o + i_b * o_sb + i_h * o_sh + o_t[:, None] * o_st + o_d, mask=m_md, other=0.0).to(tl.float32)
        # [BM]
        b_m = tl.load(p_l + i_b * l_sb + i_h * l_sh + o_t, mask=m_m, other=0.0) * LOG2E
        b_l = tl.where(b_m > float("-inf"), 1.0, 0.0)
        p_tail_k += i_bh * NK * D
        p_tail_v += i_bh * NK * D
        p_weights += (i_bh * NQ + i_tile // (BLOCK // BM)) * NK
        for begin in range(0, NK, BN):
            o_c = begin + o_n
            b_w = tl.load(p_weights + o_c, mask=o_c < NK, other=float("-inf")).to(tl.float32)
            m_c = o_c < NK
            # [BD, BN]
            b_k = tl.load(p_tail_k + o_c[None, :] * D + o_d[:, None], mask=m_c[None, :] & m_d[:, None], other=0.0)
            b_s = tl.dot(b_q, b_k.to(b_q.dtype), input_precision=PRECISION) * scale + b_w[None, :]
            # [BN, BD]
            b_v = tl.load(p_tail_v + o_c[:, None] * D + o_d, mask=m_c[:, None] & m_d, other=0.0)
            b_o, b_m, b_l = softmax_step(b_o, b_m, b_l, b_s, LOG2E, b_v.to(b_q.dtype), True, PRECISION)
        b_o = b_o / tl.where(b_l > 0, b_l, 1.0)[:, None]
        p_found += i_b * f_sb + i_h * f_sh + o_t[:, None] * f_st + o_d
        tl.store(p_found, b_o.to(p_found.dtype.element_ty), mask=m_md)


def _merge_into_triton(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    check_device(merge_fwd_kernel, out)
    batch, heads, rows, dim = out.shape
    if lse.stride(-1) != 1:
        raise ValueError(f"The rows of lse must lie side by side, but their stride is {lse.stride(-1)}.")
    if other.stride(-1) != 1:
        other = other.contiguous()
    if other_lse.stride(-1) != 1:
        other_lse = other_lse.contiguous()
    width = triton.next_power_of_2(dim)
    tile = TILE // width
    merge_fwd_kernel[(triton.cdiv(rows, tile), batch * heads)](
        out, lse, other, other_lse,
        *out.stride()[:3], *lse.stride()[:2], *other.stride()[:3], *other_lse.stride()[:2],
        heads, rows, D=dim, BD=width, BM=tile, num_warps=WARPS,
    )  # fmt: skip


def _with_tail_triton(
    q: Tensor, out: Tensor, lse: Tensor, plan: BlockPlan, tail: Tail, block: int, scale: float
) -> Tensor:
    check_device(with_tail_fwd_kernel, q)
    if block not in (16, 32, 64, 128):
        raise ValueError(f"block must be 16, 32, 64 or 128 for impl 'triton', not {block}.")
    batch, heads, rows, dim = q.shape
    found, lse = torch.empty_like(out), lse.contiguous()
    width = max(64, triton.next_power_of_2(dim))
    capability = 10 * torch.cuda.get_device_capability(q.device)[0] if q.is_cuda else 80
    tile = attention_tile(capability, q.element_size(), width, block)
    with_tail_fwd_kernel[(triton.cdiv(rows, tile.rows), batch * heads)](
        q, out, lse, tail.keys.contiguous(), tail.values.contiguous(),
        unlisted_weights(tail, plan, q.dtype, scale=scale, width=plan.key_blocks), found,
        *q.stride()[:3], *out.stride()[:3], *lse.stride()[:2], *found.stride()[:3],
        heads, rows, plan.counts.shape[-1], plan.key_blocks, scale,
        D=dim, BD=width, BLOCK=block, BM=tile.rows, BN=min(tile.columns, block),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return found
