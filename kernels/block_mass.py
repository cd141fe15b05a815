"""How much softmax mass each key block holds for a query block, by every single key and a few mean queries."""

import torch
from torch import Tensor

from dit_sparse.kernels.implementation import Impl, check_device, on_device, resolve

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton has no wheel for macOS and Windows; the torch implementation needs none.
    triton = None

# Mean queries of a program, keys of a step, and warps.
ROWS, KEYS, WARPS = 64, 128, 4
# Key blocks that a program goes through: its mean queries are read once for them.
RUN = 32
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
    if parts < 1 or not 1 <= key_block <= KEYS:
        raise ValueError(f"parts is from 1 on and key_block from 1 to {KEYS}, not {parts} and {key_block}.")
    return _block_mass(q, k, parts, key_block, scale, resolve(impl, k))


@torch.library.custom_op("dit_sparse::block_mass", mutates_args=())
def _block_mass(q: Tensor, k: Tensor, parts: int, key_block: int, scale: float, impl: str) -> Tensor:
    batch, heads, rows, _ = q.shape
    out = _output(q, k, parts, key_block)
    blocks = out.shape[-1]
    weigh = _weigh_triton if impl == "triton" else _weigh_torch
    some = max(1, AT_ONCE // (batch * rows * blocks))
    with on_device(q):
        for first in range(0, heads, some):
            own = slice(first, first + some)
            # [B, h, Nk, R]
            weights = weigh(q[:, own].to(k.dtype), k[:, own], key_block, scale)
            mass = weights.sub_(weights.logsumexp(2, keepdim=True)).exp_()
            missing = -rows % parts
            by_block = torch.nn.functional.pad(mass, (0, missing)).unflatten(-1, (-1, parts))
            out[:, own] = by_block.mean(-1).mT
        if missing:
            out[:, :, -1] *= parts / (parts - missing)
    return out.log_()


@_block_mass.register_fake
def _(q: Tensor, k: Tensor, parts: int, key_block: int, *_: object) -> Tensor:
    return _output(q, k, parts, key_block)


def _output(q: Tensor, k: Tensor, parts: int, key_block: int) -> Tensor:
    return q.new_empty(*q.shape[:2], -(-q.shape[2] // parts), -(-k.shape[2] // key_block))


def step_of(itemsize: int, width: int, key_block: int) -> int:
    """Keys of a step of the kernel, for `itemsize` bytes a number and so many channels."""
    return KEYS if itemsize == 2 and width <= 128 else max(32, key_block)


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
    def block_weights_fwd_kernel(
        p_q, p_k, p_w,
        q_sb, q_sh, q_st, k_sb, k_sh, k_st,
        H, R, L, N, scale,
        D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr,
        RUN: tl.constexpr,
    ):  # fmt: skip
        """ln of the sum over the keys of each of RUN steps' blocks of exp(scale q . k), for BR mean queries."""
        LN2: tl.constexpr = 0.6931471805599453
        LOG2E: tl.constexpr = 1.4426950408889634
        # Blocks of a step: short ones would leave the tensor cores idle.
        M: tl.constexpr = BK // BLOCK
        i_bh = tl.program_id(2).to(tl.int64)
        i_b, i_h = i_bh // H, i_bh % H
        o_r = tl.program_id(0) * BR + tl.arange(0, BR)
        o_d = tl.arange(0, BD)
        m_r, m_d = o_r < R, o_d < D
        # [BR, BD]
        b_q = tl.load(p_q + i_b * q_sb + i_h * q_sh + o_r[:, None] * q_st + o_d, mask=m_r[:, None] & m_d, other=0.0)
        first = tl.program_id(1) * RUN * M
        for step in range(RUN):
            o_n = first + step * M + tl.arange(0, M)
            o_t = (first + step * M) * BLOCK + tl.arange(0, BK)
            m_t = o_t < L
            # [BD, BK]
            b_k = tl.load(
                p_k + i_b * k_sb + i_h * k_sh + o_t.to(tl.int64)[None, :] * k_st + o_d[:, None],
                mask=m_t[None, :] & m_d[:, None],
                other=0.0,
            )
            # Of float32 tensor cores take 10 bits, like float16: a plan needs no more.
            b_s = tl.dot(b_q, b_k, input_precision="tf32") * (scale * LOG2E)
            b_s = tl.where(m_t[None, :], b_s, float("-inf"))
            # [BR, M, BLOCK]
            b_s = tl.reshape(b_s, [BR, M, BLOCK])
            b_top = tl.max(b_s, 2)
            # Past the last block there is nothing.
            b_ref = tl.where(b_top == float("-inf"), 0.0, b_top)
            b_w = (b_ref + tl.log2(tl.sum(tl.exp2(b_s - b_ref[:, :, None]), 2))) * LN2
            p_out = p_w + (i_bh * N + o_n[None, :]) * R + o_r[:, None]
            tl.store(p_out, b_w, mask=m_r[:, None] & (o_n < N)[None, :])


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
    step = step_of(k.element_size(), width, key_block)
    per_program = RUN * (step // key_block)
    block_weights_fwd_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(blocks, per_program), batch * heads)](
        q, k, found,
        *q.stride()[:3], *k.stride()[:3],
        heads, rows, keys, blocks, scale,
        D=dim, BD=width, BR=ROWS, BK=step, BLOCK=key_block, RUN=RUN,
        num_warps=WARPS,
    )  # fmt: skip
    return found
