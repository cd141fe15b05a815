"""Attention over listed key blocks, with everything a method adds for the rest done before the output is written."""

import math
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from dit_sparse.kernels.block_select import plan_mask
from dit_sparse.kernels.implementation import Impl, check_device, resolve
from dit_sparse.kernels.tuning import attention_tile
from dit_sparse.plan import BlockPlan, Correction, Residual, Tail
from dit_sparse.residual import unpack

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton has no wheel for macOS and Windows; the torch implementation needs none.
    triton = None

try:
    from dit_sparse.kernels import block_attention_hopper as hopper
except ImportError:  # Triton without Gluon, or none.
    hopper = None

# auto, or one of: PyTorch; Triton for any GPU; Gluon, Triton's lower-level dialect, for Hopper.
AttentionImpl = Literal[Impl, "gluon"]
# Bytes of keys and values that the torch implementation gathers at a time: about a core's share of the last cache.
GATHER_BYTES = 2 << 20


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    correction: Correction | None = None,
    *,
    block: int,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    text: int = 0,
    impl: AttentionImpl = "auto",
    check_plan: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention over the planned key blocks, then `correction`: out = scale * merge(exact, tail) + residual.

    q [B, H, Lq, D], k and v [B, H, Lk, D], float16, bfloat16 or float32 (torch also float64), D a multiple of 8 up to
    256, any strides with the last dimension contiguous. The last `text` rows of q attend to every key and the last
    `text` keys are attended to by every row; the plan covers the others in blocks of `block`. key_mask [B, Lk] bool,
    False for padding. scale is D^-1/2 unless given.

    Returns out like q, and lse [B, H, Lq] float32 (float64 for float64), natural logarithm, of the exact part; rows
    that see no key give zeros and -inf. impl "auto" is gluon on Hopper where it takes the inputs (16-bit, 64 or 128
    channels, blocks of 128, no key mask), triton on CUDA and torch elsewhere. A named one never falls back, and triton
    refuses float32 beyond 128 channels, which would not fit its registers. Raises ValueError where shapes, dtypes or
    devices do not fit together, and with check_plan, which waits for the device, where the plan is illegal; without,
    an illegal plan reads memory that is not its own.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    correction = correction or Correction()
    _check(q, k, v, plan, correction, block, key_mask, text)
    if check_plan:
        plan.check()
    tail, residual = correction.tail, correction.residual
    return _block_attention(
        q,
        k,
        v,
        plan.counts,
        plan.indices,
        plan.key_blocks,
        block,
        scale,
        key_mask,
        text,
        tail and tail.keys,
        tail and tail.values,
        tail and tail.log_weights,
        tail and tail.variances,
        tail.limit if tail else math.inf,
        correction.scale,
        residual and residual.codes,
        residual and residual.scales,
        residual.kind if residual else "full",
        impl,
    )


def chosen_impl(
    impl: AttentionImpl, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, block: int, key_mask: Tensor | None
) -> Literal["torch", "triton", "gluon"]:
    """The implementation that block_attention runs for these arguments; raises ValueError where it refuses them."""
    if impl not in get_args(AttentionImpl):
        raise ValueError(f"Unknown impl {impl!r}: choose from {', '.join(get_args(AttentionImpl))}.")
    if impl == "gluon" or (impl == "auto" and q.is_cuda):
        refused = "needs CUDA tensors and triton 3.6 or newer"
        if hopper is not None and q.is_cuda:
            refused = hopper.refusal(q, k, v, plan, block, key_mask)
        if refused is None:
            return "gluon"
        if impl == "gluon":
            raise ValueError(f"impl 'gluon' {refused}.")
    wide = q.dtype == torch.float32 and q.shape[-1] > 128
    if impl == "triton" and wide:
        raise ValueError(f"impl 'triton' takes float32 up to head dimension 128, not {q.shape[-1]}; 'torch' takes it.")
    chosen = resolve("torch" if wide else impl, q)
    if chosen == "triton" and block not in (16, 32, 64, 128):
        raise ValueError(f"block must be 16, 32, 64 or 128 for impl 'triton', not {block}.")
    return chosen


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    correction: Correction,
    block: int,
    key_mask: Tensor | None,
    text: int,
) -> None:
    if q.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q [B, H, Lq, D] and k, v [B, H, Lk, D] must agree, but they are {tuple(q.shape)}, {tuple(k.shape)} and "
            f"{tuple(v.shape)}."
        )
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64) or {k.dtype, v.dtype} != {q.dtype}:
        raise ValueError(f"q, k and v must share one float type, but they are {q.dtype}, {k.dtype} and {v.dtype}.")
    if dim % 8 or not 8 <= dim <= 256:
        raise ValueError(f"The head dimension must be a multiple of 8 up to 256, not {dim}.")
    if {q.stride(-1), k.stride(-1), v.stride(-1)} != {1}:
        raise ValueError("The last dimension of q, k and v must be contiguous.")
    if block < 1:
        raise ValueError(f"block must be at least 1, not {block}.")
    if not 0 <= text < min(queries, keys):
        raise ValueError(f"text must leave at least one vision token of {min(queries, keys)}, but it is {text}.")
    rows, key_blocks = -(-(queries - text) // block), -(-(keys - text) // block)
    if plan.counts.shape != (batch, heads, rows) or plan.key_blocks != key_blocks:
        raise ValueError(
            f"The plan covers {tuple(plan.counts.shape)} query blocks and {plan.key_blocks} key blocks, but the "
            f"inputs have {(batch, heads, rows)} and {key_blocks} of {block} tokens."
        )
    if key_mask is not None and (key_mask.shape != (batch, keys) or key_mask.dtype != torch.bool):
        raise ValueError(f"key_mask must be bool {(batch, keys)}, not {key_mask.dtype} {tuple(key_mask.shape)}.")
    per_row = ((batch, heads, queries - text), (batch, heads, rows))
    if correction.scale is not None and correction.scale.shape not in per_row:
        raise ValueError(f"scale must be one of {per_row}, not {tuple(correction.scale.shape)}.")
    if (residual := correction.residual) is not None:
        width = dim // 2 if residual.kind == "int4" else dim
        if residual.codes.shape[:-1] not in per_row or residual.codes.shape[-1] != width:
            raise ValueError(
                f"A {residual.kind} residual must be one of {per_row} by {width}, not {tuple(residual.codes.shape)}."
            )
        if residual.kind != "full" and (residual.scales is None or residual.scales.shape != residual.codes.shape[:-1]):
            raise ValueError(f"A {residual.kind} residual needs one scale a row, shape {residual.codes.shape[:-1]}.")
    if (tail := correction.tail) is not None:
        for name, x in (("keys", tail.keys), ("values", tail.values), ("variances", tail.variances)):
            if x is not None and x.shape != (batch, heads, key_blocks, dim):
                raise ValueError(f"tail.{name} must be {(batch, heads, key_blocks, dim)}, not {tuple(x.shape)}.")
        if tail.log_weights.shape not in ((key_blocks,), (batch, key_blocks)):
            raise ValueError(
                f"tail.log_weights must be {(key_blocks,)} or {(batch, key_blocks)}, "
                f"not {tuple(tail.log_weights.shape)}."
            )


@torch.library.custom_op("dit_sparse::block_attention", mutates_args=())
def _block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    key_blocks: int,
    block: int,
    scale: float,
    key_mask: Tensor | None,
    text: int,
    tail_keys: Tensor | None,
    tail_values: Tensor | None,
    tail_log_weights: Tensor | None,
    tail_variances: Tensor | None,
    tail_limit: float,
    row_scale: Tensor | None,
    residual: Tensor | None,
    residual_scales: Tensor | None,
    residual_kind: str,
    impl: str,
) -> tuple[Tensor, Tensor]:
    plan = BlockPlan(counts, indices, key_blocks)
    tail = None if tail_keys is None else Tail(tail_keys, tail_values, tail_log_weights, tail_variances, tail_limit)
    added = None if residual is None else Residual(residual, residual_scales, residual_kind)
    correction = Correction(row_scale, added, tail)
    # Here and not before, so that a compiler need not look into it.
    chosen = chosen_impl(impl, q, k, v, plan, block, key_mask)
    if chosen == "gluon":
        return hopper.attend(q, k, v, plan, correction, scale, text, _every(key_blocks, q.device))
    run = _triton if chosen == "triton" else _torch
    return run(q, k, v, plan, correction, block, scale, key_mask, text)


@_block_attention.register_fake
def _(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=_lse_dtype(q))


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


# --- torch -----------------------------------------------------------------------------------------------------------


def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    correction: Correction,
    block: int,
    scale: float,
    key_mask: Tensor | None,
    text: int,
) -> tuple[Tensor, Tensor]:
    """A few query blocks at a time: gather the blocks they list, run dense attention on those."""
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:-1], dtype=_lse_dtype(q))
    rows = q.shape[2] - text
    routed = plan.mask() if correction.tail else None
    counts = plan.counts.tolist()
    for b in range(q.shape[0]):
        mask = None if key_mask is None else key_mask[b]
        for h in range(q.shape[1]):
            keys = _Keys(k[b, h], v[b, h], mask, block, text)
            for chosen, width in _chunks(counts[b][h], rows, block, text, q.shape[-1] * q.element_size() * 2):
                at = slice(chosen[0] * block, min(chosen[-1] * block + block, rows))
                consecutive = chosen[-1] - chosen[0] + 1 == len(chosen)
                pick = (lambda x, at=at: x[at]) if consecutive else _picker(chosen, block)
                query = pick(q[b, h]).unflatten(0, (len(chosen), -1)).unsqueeze(1)
                # Views where they will do: on small chunks an index costs as much as the arithmetic.
                listed = slice(chosen[0], chosen[-1] + 1) if consecutive else torch.as_tensor(chosen, device=q.device)
                uneven = None if all(counts[b][h][i] == width for i in chosen) else plan.counts[b, h, listed]
                key, value, bias = keys.gather(plan.indices[b, h, listed, :width], uneven)
                o, l = _partial(query, key, value, bias, scale)
                if correction.tail is not None:
                    o = _merge_tail(
                        query[:, 0], o[:, 0], l[:, 0], correction.tail, (b, h), routed[b, h, listed], scale
                    )
                o, l = o.flatten(0, -2), l.flatten()
                o = _correct_rows(o, correction, (b, h), pick, listed, rows)
                if consecutive:
                    out[b, h, at], lse[b, h, at] = o, l
                else:
                    places = _rows_of(chosen, block, q.device)
                    out[b, h].index_copy_(0, places, o.to(out.dtype))
                    lse[b, h].index_copy_(0, places, l)
            if text:
                bias = None if mask is None else _bias(mask, q.dtype)[None, None, None]
                o, l = _partial(q[b, h, rows:][None, None], k[b, h][None, None], v[b, h][None, None], bias, scale)
                out[b, h, rows:], lse[b, h, rows:] = o[0, 0], l[0, 0]
    return out, lse


def _chunks(counts: list[int], rows: int, block: int, text: int, token_bytes: int):
    """Query blocks to compute together, and how many key blocks to gather for each of them.

    Blocks of like counts go together, so that little is padded; a short last block goes alone.
    """
    n = len(counts)
    last = n - 1 if rows % block else n
    order = (
        list(range(last))
        if max(counts) - min(counts) <= max(counts) // 8
        else sorted(range(last), key=counts.__getitem__)
    )
    start = 0
    while start < last:
        size = 1
        while start + size < last:
            width = max(counts[i] for i in order[start : start + size + 1])
            if (size + 1) * (width * block + text) * token_bytes > GATHER_BYTES:
                break
            size += 1
        chosen = sorted(order[start : start + size])
        yield chosen, max(counts[i] for i in chosen)
        start += size
    if last < n:
        yield [last], counts[last]


def _rows_of(blocks: list[int], block: int, device: torch.device) -> Tensor:
    return (torch.as_tensor(blocks, device=device)[:, None] * block + torch.arange(block, device=device)).flatten()


def _picker(blocks: list[int], block: int):
    def pick(x: Tensor) -> Tensor:
        return x.index_select(0, _rows_of(blocks, block, x.device))

    return pick


class _Keys:
    """The keys and values of one head, to be gathered block by block."""

    def __init__(self, k: Tensor, v: Tensor, mask: Tensor | None, block: int, text: int):
        self.k, self.v, self.mask, self.block, self.text = k, v, mask, block, text
        self.columns = k.shape[0] - text
        self.full, self.rest = divmod(self.columns, block)

    def gather(self, indices: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """indices [n, W], counts [n] or None if all are W -> keys and values [n, 1, W * block + text, D], and a bias
        where something must be masked."""
        listed = None
        if counts is not None:
            listed = torch.arange(indices.shape[1], device=indices.device) < counts[:, None]
            # Places past the count are gathered too, from block 0, and masked.
            indices = torch.where(listed, indices, 0)
        short = (indices == self.full) if self.rest else None
        if short is not None and not bool(short.any()):
            short = None
        key, value = (self._gather(x, indices, short) for x in (self.k, self.v))
        if listed is None and self.mask is None and short is None:
            return key, value, None
        tokens = indices[..., None].long() * self.block + torch.arange(self.block, device=indices.device)
        keep = tokens < self.columns
        if listed is not None:
            keep &= listed[..., None]
        if self.mask is not None:
            keep = keep & self.mask[tokens.clamp(max=self.columns - 1)]
        keep = keep.flatten(1)
        if self.text:
            text = torch.ones_like(keep[:, :1]) if self.mask is None else self.mask[self.columns :]
            keep = torch.cat([keep, text.expand(len(keep), self.text)], dim=1)
        return key, value, _bias(keep, self.k.dtype)[:, None, None]

    def _gather(self, x: Tensor, indices: Tensor, short: Tensor | None) -> Tensor:
        n, width = indices.shape
        got = x.new_empty(n, width * self.block + self.text, x.shape[-1])
        blocks = got[:, : width * self.block].unflatten(1, (width, self.block))
        if self.full:
            whole = x[: self.full * self.block].unflatten(0, (self.full, self.block))
            at = indices if short is None else indices.clamp(max=self.full - 1)
            if self.text:
                blocks.copy_(whole[at.long()])
            else:
                torch.index_select(whole, 0, at.flatten(), out=got.view(n * width, self.block, -1))
        if short is not None:
            padded = x.new_zeros(self.block, x.shape[-1])
            padded[: self.rest] = x[self.full * self.block : self.columns]
            blocks[short] = padded
        if self.text:
            got[:, width * self.block :] = x[self.columns :]
        return got.unsqueeze(1)


def _bias(keep: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill_(~keep, float("-inf"))


def _partial(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention with its log-sum-exp; out in the accumulation dtype, zero where a row sees nothing."""
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=bias, scale=scale
        )
        out = out.to(lse.dtype)
    else:
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = (q @ k.mT).to(wide) * scale
        scores = scores if bias is None else scores + bias
        lse = scores.logsumexp(-1)
        out = ((scores - lse[..., None]).exp().to(q.dtype) @ v).to(wide)
    if bias is not None:
        blind = (bias == float("-inf")).all(-1).expand(lse.shape)
        out, lse = out.masked_fill(blind[..., None], 0), lse.masked_fill(blind, float("-inf"))
    return out, lse


def _merge_tail(
    q: Tensor, out: Tensor, lse: Tensor, tail: Tail, at: tuple[int, int], routed: Tensor, scale: float
) -> Tensor:
    """q, out [n, block, D], lse [n, block], routed [n, N] -> out with the unrouted blocks' pooled keys merged in."""
    b, h = at
    wide = lse.dtype
    logits = (q @ tail.keys[b, h].to(q.dtype).mT).to(wide).mul_(scale)
    if tail.variances is not None:
        spread = ((q * scale).square() @ tail.variances[b, h].to(q.dtype).mT).to(wide).mul_(0.5)
        logits += spread.clamp_(max=tail.limit)
    weights = tail.log_weights if tail.log_weights.dim() == 1 else tail.log_weights[b]
    logits += weights.to(wide)
    logits.masked_fill_(routed[:, None], float("-inf"))
    whole = torch.logaddexp(lse, logits.logsumexp(-1))
    whole = whole.masked_fill(whole == float("-inf"), 0)[..., None]
    pooled = logits.sub_(whole).exp_().to(q.dtype) @ tail.values[b, h].to(q.dtype)
    return out.mul((lse[..., None] - whole).exp()).add_(pooled)


def _correct_rows(
    out: Tensor, correction: Correction, at: tuple[int, int], pick, listed: slice | Tensor, rows: int
) -> Tensor:
    b, h = at

    def here(x: Tensor) -> Tensor:  # the values of these rows, of a tensor with one a row or one a query block
        if x.shape[2] == rows:
            return pick(x[b, h])
        per_block = x[b, h, listed]
        return per_block.repeat_interleave(len(out) // len(per_block), 0)

    if correction.scale is not None:
        out = out * here(correction.scale)[:, None]
    if (residual := correction.residual) is not None:
        scales = None if residual.scales is None else here(residual.scales)
        out = out + unpack(Residual(here(residual.codes), scales, residual.kind)).to(out.dtype)
    return out


# --- triton ----------------------------------------------------------------------------------------------------------

if triton is not None:

    @triton.jit
    def _softmax_step(b_o, b_m, b_l, b_s, scale2, b_v, GUARD: tl.constexpr, PRECISION: tl.constexpr):
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
        return _softmax_step(b_o, b_m, b_l, b_s, scale2, b_v, True, PRECISION)

    @triton.jit
    def _block_attention_kernel(
        p_q, p_k, p_v, p_out, p_lse,
        p_counts, p_indices, p_every, p_key_mask,
        p_tail_k, p_tail_v, p_tail_log, p_tail_var, p_routed,
        p_scale, p_res, p_res_scale,
        q_sb, q_sh, q_st,
        k_sb, k_sh, k_st,
        v_sb, v_sh, v_st,
        o_sb, o_sh, o_st,
        r_sb, r_sh, r_st,
        tail_log_sb,
        H, LQ, LK, ROWS, COLUMNS, NQ, NK, W, SCALES, RESIDUALS,
        scale, tail_limit,
        D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
        BT: tl.constexpr,
        TEXT: tl.constexpr, MASKED: tl.constexpr, TAIL: tl.constexpr, SECOND: tl.constexpr,
        SCALE: tl.constexpr, RESIDUAL: tl.constexpr, PER_ROW: tl.constexpr, SCALE_PER_ROW: tl.constexpr,
        PRECISION: tl.constexpr,
    ):  # fmt: skip
        """One tile of BM query rows of one head: its listed blocks, the text, the tail, the correction, the store."""
        LOG2E: tl.constexpr = 1.4426950408889634
        # One product too many for the registers in full precision; three passes of tf32 err as little.
        SECOND_PRECISION: tl.constexpr = "tf32x3" if PRECISION == "ieee" and BD > 64 else PRECISION
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
        p_list = p_indices + i_list * W
        if TEXT:
            n = tl.where(is_text, NK, n)
            p_list = tl.where(is_text, p_every, p_list)
        # Lists ascend, so only the last listed block can be the short one.
        last = tl.load(p_list + n - 1)
        n_whole = n - ((last + 1) * BLOCK > COLUMNS).to(tl.int32)
        if MASKED:
            n_whole = n * 0

        STEPS: tl.constexpr = BLOCK // BN
        # The tile's own offsets fit 32 bits; where the tile starts may not.
        p_kt = p_k + (o_n[None, :] * k_st + o_d[:, None])
        p_vt = p_v + (o_n[:, None] * v_st + o_d)
        for i in range(0, n_whole * STEPS):
            start = (tl.load(p_list + i // STEPS) * BLOCK + (i % STEPS) * BN).to(tl.int64)
            if D < BD:
                # [BD, BN]
                b_k = tl.load(p_kt + start * k_st, mask=m_d[:, None], other=0.0)
                # [BN, BD]
                b_v = tl.load(p_vt + start * v_st, mask=m_d[None, :], other=0.0)
            else:
                b_k = tl.load(p_kt + start * k_st)
                b_v = tl.load(p_vt + start * v_st)
            b_s = tl.dot(b_q, b_k, input_precision=PRECISION)
            b_o, b_m, b_l = _softmax_step(b_o, b_m, b_l, b_s, scale2, b_v, False, PRECISION)

        # What follows is a small share of the work: narrower steps, not pipelined, leave registers to the loop above.
        o_t = tl.arange(0, BT)
        FEWER: tl.constexpr = BLOCK // BT
        for i in tl.range(n_whole * FEWER, n * FEWER, num_stages=2 if MASKED else 1):
            o_c = tl.load(p_list + i // FEWER) * BLOCK + (i % FEWER) * BT + o_t
            m_c = o_c < COLUMNS
            if MASKED:
                m_c = m_c & (tl.load(p_key_mask + i_b * LK + o_c, mask=m_c, other=0) != 0)
            b_o, b_m, b_l = _masked_step(
                b_o, b_m, b_l, b_q, p_k, p_v, o_c.to(tl.int64), m_c, k_st, v_st, o_d, m_d, scale2, PRECISION
            )

        if TEXT:
            for begin in tl.range(COLUMNS, LK, BT, num_stages=1):
                o_c = begin + o_t
                m_c = o_c < LK
                if MASKED:
                    m_c = m_c & (tl.load(p_key_mask + i_b * LK + o_c, mask=m_c, other=0) != 0)
                b_o, b_m, b_l = _masked_step(
                    b_o, b_m, b_l, b_q, p_k, p_v, o_c.to(tl.int64), m_c, k_st, v_st, o_d, m_d, scale2, PRECISION
                )

        # The log-sum-exp of the exact part, before the tail joins the sum. [BM]
        b_lse = tl.where(b_l > 0, (b_m + tl.log2(b_l)) / LOG2E, float("-inf"))
        tl.store(p_lse + (i_bh.to(tl.int64) * LQ) + o_m, b_lse, mask=m_m)

        if TAIL:
            p_tail_k += (i_b * H + i_h) * NK * D
            p_tail_v += (i_b * H + i_h) * NK * D
            p_routed += i_list * NK
            if SECOND:
                p_tail_var += (i_b * H + i_h) * NK * D
            for begin in tl.range(0, tl.where(is_text, 0, NK), BT, num_stages=1):
                o_c = begin + o_t
                m_c = o_c < NK
                b_w = tl.load(p_tail_log + i_b * tail_log_sb + o_c, mask=m_c, other=0.0)
                m_c = m_c & (tl.load(p_routed + o_c, mask=m_c, other=1) == 0)
                # [BD, BT]
                b_k = tl.load(p_tail_k + o_c[None, :] * D + o_d[:, None], mask=m_c & m_d[:, None], other=0.0)
                b_s = tl.dot(b_q, b_k.to(b_q.dtype), input_precision=PRECISION) * scale + b_w[None, :]
                if SECOND:
                    b_q2 = b_q.to(tl.float32) * scale
                    b_q2 = (b_q2 * b_q2).to(b_q.dtype)
                    # [BD, BT]
                    b_u = tl.load(p_tail_var + o_c[None, :] * D + o_d[:, None], mask=m_c & m_d[:, None], other=0.0)
                    b_u = tl.dot(b_q2, b_u.to(b_q.dtype), input_precision=SECOND_PRECISION) * 0.5
                    b_s += tl.minimum(b_u, tail_limit)
                b_s = tl.where(m_c[None, :], b_s, float("-inf"))
                # [BT, BD]
                b_v = tl.load(p_tail_v + o_c[:, None] * D + o_d, mask=m_c[:, None] & m_d, other=0.0)
                b_o, b_m, b_l = _softmax_step(b_o, b_m, b_l, b_s, LOG2E, b_v.to(b_q.dtype), True, PRECISION)

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
            if RESIDUAL == 1:
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

        p_out += i_b * o_sb + i_h * o_sh
        tl.store(
            p_out + o_m.to(tl.int64)[:, None] * o_st + o_d, b_o.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_d
        )


@lru_cache(maxsize=32)
def _every(blocks: int, device: torch.device) -> Tensor:
    """The list of a text row: all blocks."""
    return torch.arange(blocks, dtype=torch.int32, device=device)


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    correction: Correction,
    block: int,
    scale: float,
    key_mask: Tensor | None,
    text: int,
) -> tuple[Tensor, Tensor]:
    check_device(_block_attention_kernel, q)
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    tail, residual, row_scale = correction.tail, correction.residual, correction.scale
    rows = queries - text
    counts, indices = plan.counts.contiguous(), plan.indices.contiguous()
    width = max(64, triton.next_power_of_2(dim))
    capability = 10 * torch.cuda.get_device_capability(q.device)[0] if q.is_cuda else 80
    tile = attention_tile(capability, q.element_size(), width, block)
    query_blocks = counts.shape[-1]
    grid = (query_blocks * (block // tile.rows) + triton.cdiv(text, tile.rows), batch * heads)
    res_strides = residual.codes.stride()[:3] if residual else (0, 0, 0)
    _block_attention_kernel[grid](
        q, k, v, out, lse,
        counts, indices, _every(plan.key_blocks, q.device) if text else None,
        key_mask.to(torch.uint8).contiguous() if key_mask is not None else None,
        tail.keys.contiguous() if tail else None,
        tail.values.contiguous() if tail else None,
        tail.log_weights.float().contiguous() if tail else None,
        tail.variances.contiguous() if tail and tail.variances is not None else None,
        plan_mask(plan, impl="triton") if tail else None,
        row_scale.float().contiguous() if row_scale is not None else None,
        residual.codes if residual else None,
        residual.scales.contiguous() if residual and residual.scales is not None else None,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *res_strides,
        plan.key_blocks if tail and tail.log_weights.dim() == 2 else 0,
        heads, queries, keys, rows, keys - text, query_blocks, plan.key_blocks, indices.shape[-1],
        row_scale.shape[2] if row_scale is not None else 0,
        residual.codes.shape[2] if residual else 0,
        scale, tail.limit if tail else 0.0,
        D=dim, BD=width, BLOCK=block, BM=tile.rows, BN=tile.columns, BT=min(tile.columns, 32),
        TEXT=text > 0, MASKED=key_mask is not None,
        TAIL=tail is not None, SECOND=tail is not None and tail.variances is not None,
        SCALE=row_scale is not None, SCALE_PER_ROW=row_scale is not None and row_scale.shape[2] == rows,
        RESIDUAL={None: 0, "full": 1, "fp8": 2, "int4": 3}[residual and residual.kind],
        PER_ROW=residual is not None and residual.codes.shape[2] == rows,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, lse
