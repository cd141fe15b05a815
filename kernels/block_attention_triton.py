"""block_attention for any GPU in Triton: a program takes a tile of query rows and loops over the blocks it lists."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_sparse.kernels.implementation import check_device, residual_kind
from dit_sparse.kernels.tail_weights import unlisted_weights
from dit_sparse.kernels.tuning import attention_tile
from dit_sparse.plan import BlockPlan, Correction


@triton.jit
def softmax_step(b_o, b_m, b_l, b_s, scale2, b_v, GUARD: tl.constexpr, PRECISION: tl.constexpr):
    """Fold logits b_s [BM, BN], to be scaled into base 2, and values b_v [BN, BD] into the running softmax."""
    b_top = tl.maximum(b_m, tl.max(b_s, 1) * scale2)
    b_ref = b_top
    if GUARD:
        # A row that has seen nothing yet must not compute inf - inf.
        b_ref = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_p = tl.exp2(b_s * scale2 - b_ref[:, None])
    b_shrink = tl.exp2(b_m - b_ref)
    b_l = b_l * b_shrink + tl.sum(b_p, 1)
    b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_shrink[:, None], input_precision=PRECISION)
    return b_o, b_top, b_l


@triton.jit
def _masked_step(
    b_o, b_m, b_l, b_q, p_k, p_v, o_c, m_c, k_st, v_st, o_d, m_d, scale2, PRECISION: tl.constexpr
):  # fmt: skip
    """Attend to the keys at o_c [BT], int64, where m_c."""
    # [BD, BT]
    b_k = tl.load(p_k + o_c[None, :] * k_st + o_d[:, None], mask=m_c & m_d[:, None], other=0.0)
    b_s = tl.dot(b_q, b_k, input_precision=PRECISION)
    b_s = tl.where(m_c[None, :], b_s, float("-inf"))
    # [BT, BD]
    b_v = tl.load(p_v + o_c[:, None] * v_st + o_d, mask=m_c[:, None] & m_d, other=0.0)
    return softmax_step(b_o, b_m, b_l, b_s, scale2, b_v, True, PRECISION)


@triton.jit
def block_attention_fwd_kernel(
    p_q, p_k, p_v, p_out, p_lse,
    p_counts, p_indices, p_every, p_key_mask,
    p_tail_k, p_tail_v, p_weights,
    p_scatter, p_scale, p_res, p_res_scale,
    q_sb, q_sh, q_st,
    k_sb, k_sh, k_st,
    v_sb, v_sh, v_st,
    o_sb, o_sh, o_st,
    r_sb, r_sh, r_st,
    H, LQ, LK, ROWS, COLUMNS, NQ, NK, STEP, SCALES, RESIDUALS, SCATTERED,
    scale,
    D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
    TEXT: tl.constexpr, MASKED: tl.constexpr, TAIL: tl.constexpr,
    SCATTER: tl.constexpr, SCALE: tl.constexpr, SCALE_PER_ROW: tl.constexpr,
    RESIDUAL: tl.constexpr, PER_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of BM query rows of one head: its listed blocks, the text, the tail, the correction, the store.

    MASKED: 1 if p_key_mask is of the text keys, 2 if it is of all keys."""
    LOG2E: tl.constexpr = 1.4426950408889634
    i_tile = tl.program_id(0)
    i_bh = tl.program_id(1)
    i_b = (i_bh // H).to(tl.int64)
    i_h = (i_bh % H).to(tl.int64)

    vision_tiles = NQ * (BLOCK // BM)
    is_text = i_tile >= vision_tiles
    i_row = tl.where(is_text, ROWS + (i_tile - vision_tiles) * BM, i_tile * BM)
    end_row = tl.where(is_text, LQ, ROWS)
    i_block = tl.minimum(i_tile // (BLOCK // BM), NQ - 1)
    i_list = i_bh.to(tl.int64) * NQ + i_block

    o_m = i_row + tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    m_m = o_m < end_row
    # All true, and known to be while compiling, where the head dimension needs no padding.
    m_d = o_d < D if D < BD else tl.full([BD], 1, tl.int1)

    p_k += i_b * k_sb + i_h * k_sh
    p_v += i_b * v_sb + i_h * v_sh
    # [BM, BD]
    p_q += i_b * q_sb + i_h * q_sh
    b_q = tl.load(p_q + o_m.to(tl.int64)[:, None] * q_st + o_d, mask=m_m[:, None] & m_d, other=0.0)

    b_o = tl.zeros([BM, BD], dtype=tl.float32)
    b_l = tl.zeros([BM], dtype=tl.float32)
    b_m = tl.full([BM], float("-inf"), dtype=tl.float32)
    scale2 = scale * LOG2E

    n = tl.load(p_counts + i_list)
    p_list = p_indices + i_list * STEP
    if TEXT:
        n = tl.where(is_text, NK, n)
        p_list = tl.where(is_text, p_every, p_list)
    # Lists ascend, so only the last listed block can be the short one.
    last = tl.load(p_list + n - 1)
    n_whole = n - ((last + 1) * KEY_BLOCK > COLUMNS).to(tl.int32)
    if MASKED == 2:
        n_whole = n * 0

    STEPS: tl.constexpr = KEY_BLOCK // BN
    # The tile's own offsets fit 32 bits; where the tile starts may not.
    p_kt = p_k + (o_n[None, :] * k_st + o_d[:, None])
    p_vt = p_v + (o_n[:, None] * v_st + o_d)
    for i in range(0, n_whole * STEPS):
        start = (tl.load(p_list + i // STEPS) * KEY_BLOCK + (i % STEPS) * BN).to(tl.int64)
        if D < BD:
            # [BD, BN]
            b_k = tl.load(p_kt + start * k_st, mask=m_d[:, None], other=0.0)
            # [BN, BD]
            b_v = tl.load(p_vt + start * v_st, mask=m_d[None, :], other=0.0)
        else:
            b_k = tl.load(p_kt + start * k_st)
            b_v = tl.load(p_vt + start * v_st)
        b_s = tl.dot(b_q, b_k, input_precision=PRECISION)
        b_o, b_m, b_l = softmax_step(b_o, b_m, b_l, b_s, scale2, b_v, False, PRECISION)

    # What follows is a small share of the work: narrower steps, not pipelined, leave registers to the loop above.
    o_t = tl.arange(0, BT)
    FEWER: tl.constexpr = KEY_BLOCK // BT
    for i in tl.range(n_whole * FEWER, n * FEWER, num_stages=2 if MASKED == 2 else 1):
        o_c = tl.load(p_list + i // FEWER) * KEY_BLOCK + (i % FEWER) * BT + o_t
        m_c = o_c < COLUMNS
        if MASKED == 2:
            m_c = m_c & (tl.load(p_key_mask + i_b * LK + o_c, mask=m_c, other=0) != 0)
        b_o, b_m, b_l = _masked_step(
            b_o, b_m, b_l, b_q, p_k, p_v, o_c.to(tl.int64), m_c, k_st, v_st, o_d, m_d, scale2, PRECISION
        )

    if TEXT:
        for begin in tl.range(COLUMNS, LK, BT, num_stages=1):
            o_c = begin + o_t
            m_c = o_c < LK
            if MASKED > 0:
                # The numbers of a mask fit 32 bits.
                row = (i_bh // H) * (LK - COLUMNS) - COLUMNS if MASKED == 1 else (i_bh // H) * LK
                m_c = m_c & (tl.load(p_key_mask + (row + o_c), mask=m_c, other=0) != 0)
            b_o, b_m, b_l = _masked_step(
                b_o, b_m, b_l, b_q, p_k, p_v, o_c.to(tl.int64), m_c, k_st, v_st, o_d, m_d, scale2, PRECISION
            )

    # The log-sum-exp of the exact part, before the tail joins the sum. [BM]
    b_lse = tl.where(b_l > 0, (b_m + tl.log2(b_l)) / LOG2E, float("-inf"))
    tl.store(p_lse + (i_bh.to(tl.int64) * LQ) + o_m, b_lse, mask=m_m)

    if TAIL:
        p_tail_k += (i_b * H + i_h) * NK * D
        p_tail_v += (i_b * H + i_h) * NK * D
        p_weights += i_list * NK
        for begin in tl.range(0, tl.where(is_text, 0, NK), BT, num_stages=1):
            o_c = begin + o_t
            m_c = o_c < NK
            b_w = tl.load(p_weights + o_c, mask=m_c, other=float("-inf")).to(tl.float32)
            m_c = b_w > float("-inf")
            # [BD, BT]
            b_k = tl.load(p_tail_k + o_c[None, :] * D + o_d[:, None], mask=m_c & m_d[:, None], other=0.0)
            b_s = tl.dot(b_q, b_k.to(b_q.dtype), input_precision=PRECISION) * scale + b_w[None, :]
            # [BT, BD]
            b_v = tl.load(p_tail_v + o_c[:, None] * D + o_d, mask=m_c[:, None] & m_d, other=0.0)
            b_o, b_m, b_l = softmax_step(b_o, b_m, b_l, b_s, LOG2E, b_v.to(b_q.dtype), True, PRECISION)

    b_o = b_o / tl.where(b_l > 0, b_l, 1.0)[:, None]

    m_r = m_m & (o_m < ROWS)
    if SCALE:
        o_r = o_m if SCALE_PER_ROW else o_m // BLOCK
        b_scale = tl.load(p_scale + i_bh.to(tl.int64) * SCALES + o_r, mask=m_r, other=1.0)
        b_o = b_o * b_scale[:, None]
    if RESIDUAL > 0:
        o_r = (o_m if PER_ROW else o_m // BLOCK).to(tl.int64)
        p_res += i_b * r_sb + i_h * r_sh
        m_rd = m_r[:, None] & m_d
        if RESIDUAL == 1 or RESIDUAL == 4:
            # [BM, BD]
            b_r = tl.load(p_res + o_r[:, None] * r_st + o_d, mask=m_rd, other=0.0).to(tl.float32)
        elif RESIDUAL == 2:
            # e4m3 has half's layout but for four fewer exponent steps on each side and three missing mantissa
            # bits, so moved into place its bits are the number times 2^-8: exact, and without hardware support.
            b_c = tl.load(p_res + o_r[:, None] * r_st + o_d, mask=m_rd, other=0).to(tl.uint16)
            b_c = ((b_c & 0x80) << 8) | ((b_c & 0x7F) << 7)
            b_r = b_c.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        else:
            # A byte holds channel d in its low half and channel d + D/2 in its high half.
            b_c = tl.load(p_res + o_r[:, None] * r_st + (o_d % (D // 2)), mask=m_rd, other=0).to(tl.int32)
            b_r = ((b_c >> (4 * (o_d // (D // 2)))[None, :]) & 15).to(tl.float32) - 8.0
        if RESIDUAL > 1:
            b_rs = tl.load(p_res_scale + i_bh.to(tl.int64) * RESIDUALS + o_r, mask=m_r, other=0.0)
            b_r = b_r * b_rs[:, None]
        b_o += b_r

    o_o = o_m.to(tl.int64)
    if SCATTER:
        o_o = tl.where(o_m < SCATTERED, tl.load(p_scatter + o_m, mask=o_m < SCATTERED, other=0).to(tl.int64), o_o)
    p_out += i_b * o_sb + i_h * o_sh
    tl.store(p_out + o_o[:, None] * o_st + o_d, b_o.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_d)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    correction: Correction,
    block: int,
    key_block: int,
    scale: float,
    key_mask: Tensor | None,
    text: int,
    every: Tensor,
    scatter: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """block_attention; every [key_blocks] int32 is the list of a text row."""
    check_device(block_attention_fwd_kernel, q)
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    tail, residual, row_scale = correction.tail, correction.residual, correction.scale
    rows = queries - text
    counts, (indices, step) = plan.counts.contiguous(), plan.lists()
    width = max(64, triton.next_power_of_2(dim))
    capability = 10 * torch.cuda.get_device_capability(q.device)[0] if q.is_cuda else 80
    tile = attention_tile(capability, q.element_size(), width, block)
    columns = min(tile.columns, key_block)
    query_blocks = counts.shape[-1]
    grid = (query_blocks * (block // tile.rows) + triton.cdiv(text, tile.rows), batch * heads)
    res_strides = residual.codes.stride()[:3] if residual else (0, 0, 0)
    weights = unlisted_weights(tail, plan, q.dtype, scale=scale, width=plan.key_blocks) if tail else None
    block_attention_fwd_kernel[grid](
        q, k, v, out, lse,
        counts, indices, every if text else None,
        key_mask.to(torch.uint8).contiguous() if key_mask is not None else None,
        tail.keys.contiguous() if tail else None,
        tail.values.contiguous() if tail else None,
        weights,
        scatter,
        row_scale.float().contiguous() if row_scale is not None else None,
        residual.codes if residual else None,
        residual.scales.contiguous() if residual and residual.scales is not None else None,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *res_strides,
        heads, queries, keys, rows, keys - text, query_blocks, plan.key_blocks, step,
        row_scale.shape[2] if row_scale is not None else 0,
        residual.codes.shape[2] if residual else 0,
        0 if scatter is None else scatter.numel(),
        scale,
        D=dim, BD=width, BLOCK=block, KEY_BLOCK=key_block, BM=tile.rows, BN=columns, BT=min(columns, 32),
        TEXT=text > 0, MASKED=0 if key_mask is None else 1 if key_mask.shape[1] < keys else 2,
        TAIL=tail is not None,
        SCATTER=scatter is not None,
        SCALE=row_scale is not None, SCALE_PER_ROW=row_scale is not None and row_scale.shape[2] == rows,
        RESIDUAL=residual_kind(residual),
        PER_ROW=residual is not None and residual.codes.shape[2] == rows,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, lse
