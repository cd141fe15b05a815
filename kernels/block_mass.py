"""How much softmax mass each key block holds for a query block, by every single key and a few mean queries."""

import torch
from torch import Tensor

from dit_sparse.kernels.implementation import Impl, check_device, on_device, resolve
from dit_sparse.kernels.tuning import mass_tile

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton has no wheel for macOS and Windows; the torch implementation needs none.
    triton = None

# Steps of a program: its mean queries are read once for them.
RUN = 32
# Mean queries and key blocks that a program of the second pass holds.
SHARED_ROWS, SHARED_BLOCKS = 64, 64
# Numbers between the two passes at a time, in float32: a fraction of what a layer's queries take.
AT_ONCE = 1 << 23


def block_mass(q: Tensor, k: Tensor, *, parts: int, key_block: int, scale: float, impl: Impl = "auto") -> Tensor:
    """ln of the softmax mass of each key block, the mean over the `parts` mean queries of a query block.

    q [B, H, Nq * parts, D] float32 or (torch) float64, mean queries, those of a block side by side; a mean of no
    query is zeros, and the last blocks may lack some. k [B, H, L, D] float16, bfloat16, float32 or (torch) float64,
    any strides with the last dimension contiguous, in blocks of key_block, of which the last may be short. Mean
    queries are rounded to k's type. Returns [B, H, ceil(rows / parts), ceil(L / key_block)] float32 (float64 for
    float64); its exponentials sum to 1 in each row. Raises ValueError where the arguments do not fit.
    """
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q [B, H, R, D] and k [B, H, L, D] must agree, but they are {tuple(q.shape)} and {tuple(k.shape)}."
        )
    if q.dtype != torch.promote_types(k.dtype, torch.float32):
        raise ValueError(f"q must be float32, or float64 for keys of float64, not {q.dtype} for keys of {k.dtype}.")
    if k.stride(-1) != 1:
        raise ValueError(f"The last dimension of k must be contiguous, but its stride is {k.stride(-1)}.")
    if parts < 1 or not 1 <= key_block <= 128:
        raise ValueError(f"parts is from 1 on and key_block from 1 to 128, not {parts} and {key_block}.")
    return _block_mass(q, k, parts, key_block, scale, resolve(impl, k))


@torch.library.custom_op("dit_sparse::block_mass", mutates_args=())
def _block_mass(q: Tensor, k: Tensor, parts: int, key_block: int, scale: float, impl: str) -> Tensor:
    batch, heads, rows, _ = q.shape
    out = _output(q, k, parts, key_block)
    blocks = out.shape[-1]
    some = max(1, AT_ONCE // (batch * rows * blocks))
    with on_device(q):
        for first in range(0, heads, some):
            own = slice(first, first + some)
            means = q[:, own].to(k.dtype)
            if impl == "triton":
                _shares_triton(_weigh_triton(means, k[:, own], key_block, scale), parts, out[:, own])
            else:
                _shares_torch(_weigh_torch(means, k[:, own], key_block, scale), parts, out[:, own])
    return out


@_block_mass.register_fake
def _(q: Tensor, k: Tensor, parts: int, key_block: int, *_: object) -> Tensor:
    return _output(q, k, parts, key_block)


def _output(q: Tensor, k: Tensor, parts: int, key_block: int) -> Tensor:
    return q.new_empty(*q.shape[:2], -(-q.shape[2] // parts), -(-k.shape[2] // key_block))


def _shares_torch(weights: Tensor, parts: int, out: Tensor) -> None:
    """weights [B, H, Nk, R] -> out [B, H, Nq, Nk]: ln of a block's mean share of its rows; weights are lost."""
    mass = weights.sub_(weights.logsumexp(2, keepdim=True)).exp_()
    missing = -mass.shape[-1] % parts
    out.copy_(torch.nn.functional.pad(mass, (0, missing)).unflatten(-1, (-1, parts)).mean(-1).mT)
    if missing:
        out[:, :, -1] *= parts / (parts - missing)
    out.log_()


def _weigh_torch(q: Tensor, k: Tensor, key_block: int, scale: float) -> Tensor:
    """[B, H, Nk, R]: ln of what the keys of each block weigh for each mean query."""
    batch, heads, keys, _ = k.shape
    blocks = -(-keys // key_block)
    found = torch.empty(
        batch, heads, blocks, q.shape[2], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device
    )
    # Logits of as many blocks as are held between the passes, too.
    some = max(1, AT_ONCE // (q.shape[2] * key_block))
    for b in range(batch):
        for h in range(heads):
            mean = q[b, h].to(found.dtype).mT
            for first in range(0, blocks, some):
                own = slice(first, min(first + some, blocks))
                logits = (k[b, h, first * key_block : own.stop * key_block].to(found.dtype) @ mean).mul_(scale)
                missing = (own.stop - first) * key_block - len(logits)
                if missing:
                    logits = torch.nn.functional.pad(logits, (0, 0, 0, missing), value=float("-inf"))
                torch.logsumexp(logits.unflatten(0, (-1, key_block)), 1, out=found[b, h, own])
    return found


if triton is not None:

    @triton.jit
    def _step_weights(
        b_q, p_k, k_st, left, scale2, b_ref,
        D: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr, RELATIVE: tl.constexpr,
    ):  # fmt: skip
        """[BR, M]: log2 of what each block of the BK keys from p_k on weighs.

        RELATIVE: exponentials are relative to b_ref [BR], and all keys are there; else to the largest of each block,
        and `left` keys are.
        """
        BR: tl.constexpr = b_q.shape[0]
        M: tl.constexpr = BK // BLOCK
        o_k, o_d = tl.arange(0, BK), tl.arange(0, BD)
        p = p_k + o_k[None, :] * k_st + o_d[:, None]
        m_d, m_k = (o_d < D)[:, None], (o_k < left)[None, :]
        # [BD, BK]
        if not RELATIVE:
            b_k = tl.load(p, mask=m_d & m_k, other=0.0)
        elif D == BD:
            b_k = tl.load(p)
        else:
            b_k = tl.load(p, mask=m_d, other=0.0)
        # Of float32 tensor cores take 10 bits, like float16: a plan needs no more.
        b_s = tl.dot(b_q, b_k, input_precision="tf32") * scale2
        # [BR, M, BLOCK]
        if RELATIVE:
            b_top = tl.broadcast_to(b_ref[:, None], [BR, M])
            b_s = tl.reshape(b_s, [BR, M, BLOCK])
        else:
            b_s = tl.reshape(tl.where(m_k, b_s, float("-inf")), [BR, M, BLOCK])
            b_top = tl.max(b_s, 2)
            # Past the last block there is nothing.
            b_top = tl.where(b_top == float("-inf"), 0.0, b_top)
        return b_top + tl.log2(tl.sum(tl.exp2(b_s - b_top[:, :, None]), 2))

    @triton.jit
    def block_weights_fwd_kernel(
        p_q, p_k, p_w,
        q_sb, q_sh, q_st, k_sb, k_sh, k_st,
        H, R, L, N, scale,
        D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr,
        RUN: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """ln of the sum over the keys of each of RUN steps' blocks of exp(scale q . k), for BR mean queries.

        Exponentials are relative to the largest sum so far, so that no block's largest logit is searched for. Where
        that did not do, because a sum is infinite, the steps are gone through again, with maxima.
        """
        LN2: tl.constexpr = 0.6931471805599453
        LOG2E: tl.constexpr = 1.4426950408889634
        M: tl.constexpr = BK // BLOCK
        i_bh = tl.program_id(2).to(tl.int64)
        i_b, i_h = i_bh // H, i_bh % H
        o_r = tl.program_id(0) * BR + tl.arange(0, BR)
        o_d, o_m = tl.arange(0, BD), tl.arange(0, M)
        m_r, m_d = o_r < R, o_d < D
        # [BR, BD]
        b_q = tl.load(p_q + i_b * q_sb + i_h * q_sh + o_r[:, None] * q_st + o_d, mask=m_r[:, None] & m_d, other=0.0)
        scale2 = scale * LOG2E
        first = tl.program_id(1) * RUN
        full, end = tl.minimum(first + RUN, L // BK), tl.minimum(first + RUN, tl.cdiv(L, BK))
        p_k += i_b * k_sb + i_h * k_sh
        # [BR, M]
        p_w += i_bh * N * R + o_m[None, :] * R + o_r[:, None]
        # The first keys stand for what comes before the first block; 16 of them are what a product takes at least.
        o_f = first * BK + tl.arange(0, 16)
        b_k = tl.load(
            p_k + o_f.to(tl.int64)[None, :] * k_st + o_d[:, None], mask=(o_f < L)[None, :] & m_d[:, None], other=0.0
        )
        b_ref = tl.max(tl.dot(b_q, b_k, input_precision="tf32"), 1) * scale2
        b_lost = tl.zeros([BR], tl.int32)
        for step in tl.range(first, full, num_stages=STAGES):
            p = p_k + tl.cast(step * BK, tl.int64) * k_st
            b_w = _step_weights(b_q, p, k_st, BK, scale2, b_ref, D, BD, BK, BLOCK, True)
            tl.store(p_w + step * M * R, b_w * LN2, mask=m_r[:, None])
            b_top = tl.max(b_w, 1)
            b_lost |= (b_top == float("inf")).to(tl.int32)
            b_ref = tl.maximum(b_ref, b_top)
        lost = tl.max(b_lost, 0) > 0
        for step in tl.range(tl.where(lost, first, tl.maximum(first, full)), end, num_stages=STAGES):
            p = p_k + tl.cast(step * BK, tl.int64) * k_st
            b_w = _step_weights(b_q, p, k_st, L - step * BK, scale2, b_ref, D, BD, BK, BLOCK, False)
            tl.store(p_w + step * M * R, b_w * LN2, mask=m_r[:, None] & (step * M + o_m < N)[None, :])

    @triton.jit
    def block_shares_fwd_kernel(
        p_w, p_o,
        o_sb, o_sh,
        H, R, N, NQ,
        PARTS: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
    ):  # fmt: skip
        """ln of the mean over a query block's PARTS rows of each key block's share of what the row weighs in all."""
        BR: tl.constexpr = BQ * PARTS
        i_bh = tl.program_id(1).to(tl.int64)
        o_r = tl.program_id(0) * BR + tl.arange(0, BR)
        o_q = tl.program_id(0) * BQ + tl.arange(0, BQ)
        m_r = o_r < R
        p_w += i_bh * N * R
        p_o += i_bh // H * o_sb + i_bh % H * o_sh
        b_m = tl.full([BR], float("-inf"), tl.float32)
        b_l = tl.zeros([BR], tl.float32)
        for n in range(0, N, BN):
            o_n = n + tl.arange(0, BN)
            # [BN, BR]
            b_w = tl.load(p_w + o_n[:, None] * R + o_r, mask=(o_n < N)[:, None] & m_r, other=float("-inf"))
            b_top = tl.maximum(b_m, tl.max(b_w, 0))
            b_ref = tl.where(b_top == float("-inf"), 0.0, b_top)
            b_l = b_l * tl.exp(b_m - b_ref) + tl.sum(tl.exp(b_w - b_ref), 0)
            b_m = b_top
        b_lse = tl.where(m_r, b_m + tl.log(b_l), 0.0)
        b_rows = tl.sum(tl.reshape(m_r.to(tl.float32), [BQ, PARTS]), 1)
        for n in range(0, N, BN):
            o_n = n + tl.arange(0, BN)
            b_w = tl.load(p_w + o_n[:, None] * R + o_r, mask=(o_n < N)[:, None] & m_r, other=float("-inf"))
            b_o = tl.log(tl.sum(tl.reshape(tl.exp(b_w - b_lse), [BN, BQ, PARTS]), 2) / b_rows)
            tl.store(p_o + o_q[None, :] * N + o_n[:, None], b_o, mask=(o_n < N)[:, None] & (o_q < NQ)[None, :])


def _weigh_triton(q: Tensor, k: Tensor, key_block: int, scale: float) -> Tensor:
    check_device(block_weights_fwd_kernel, q)
    if key_block & (key_block - 1):
        raise ValueError(f"key_block must be a power of two for impl 'triton', not {key_block}.")
    batch, heads, rows, dim = q.shape
    keys = k.shape[2]
    blocks = triton.cdiv(keys, key_block)
    found = torch.empty(batch, heads, blocks, rows, dtype=torch.float32, device=q.device)
    q = q.contiguous()
    width = max(16, triton.next_power_of_2(dim))
    capability = 10 * torch.cuda.get_device_capability(q.device)[0] if q.is_cuda else 80
    tile = mass_tile(capability, k.element_size(), width, key_block)
    programs = triton.cdiv(rows, tile.rows), triton.cdiv(keys, RUN * tile.columns), batch * heads
    block_weights_fwd_kernel[programs](
        q, k, found,
        *q.stride()[:3], *k.stride()[:3],
        heads, rows, keys, blocks, scale,
        D=dim, BD=width, BR=tile.rows, BK=tile.columns, BLOCK=key_block, RUN=RUN, STAGES=tile.stages,
        num_warps=tile.warps,
    )  # fmt: skip
    return found


def _shares_triton(weights: Tensor, parts: int, out: Tensor) -> None:
    """What `_shares_torch` does; the last two dimensions of out are contiguous."""
    if parts & (parts - 1) or parts > SHARED_ROWS:
        raise ValueError(f"parts must be a power of two up to {SHARED_ROWS} for impl 'triton', not {parts}.")
    batch, heads, blocks, rows = weights.shape
    at_once = SHARED_ROWS // parts
    block_shares_fwd_kernel[(triton.cdiv(out.shape[2], at_once), batch * heads)](
        weights, out,
        *out.stride()[:2],
        heads, rows, blocks, out.shape[2],
        PARTS=parts, BQ=at_once, BN=SHARED_BLOCKS,
        num_warps=4,
    )  # fmt: skip
