"""From scores to a plan: each query block's best key blocks by number, by share of the score, and by force."""

import math

import torch
from torch import Tensor

from dit_sparse.kernels.implementation import Impl, check_device, on_device, resolve
from dit_sparse.plan import BlockPlan

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton has no wheel for macOS and Windows; the torch implementation needs none.
    triton = None

# A program holds a row, 32 scores a thread at most: up to 1024 of them no sum needs a barrier, and nothing spills.
LONGEST, SCORES_PER_WARP = 8192, 1024


def block_select(
    scores: Tensor,
    *,
    density: float,
    top_p: float | None = None,
    k_min: int = 1,
    k_max: int | None = None,
    forced: Tensor | None = None,
    max_forced: int | None = None,
    logarithms: bool = False,
    impl: Impl = "auto",
) -> BlockPlan:
    """Each row keeps its n best blocks, lower index first where scores are equal, and its forced ones beside them.

    n is the larger of max(1, int(density * Nk)), which truncates and so keeps at most that share, and of the fewest
    blocks whose scores make up at least the share top_p of the row; then it is clamped to k_min..k_max. Beyond Nk the
    clamps mean Nk. scores [B, H, Nq, Nk] >= 0, float32 or (torch) float64, any strides; NaN ranks first. With
    logarithms they are given as such, any number or -inf, and only how they differ in a row counts. forced, bool,
    broadcastable to scores, is not written out at that size. max_forced, Nk if not given, promises that no row has
    more forced blocks and narrows the plan; of a row that breaks the promise the last indices may be cut off.

    Returns a BlockPlan, whose width is known without reading the device; places past the counts hold 0. Raises
    ValueError where the arguments do not fit; impl "auto" is torch beyond 8192 key blocks. Top-k or top-p, whichever
    keeps more, is the critical mask of Rectified SpaAttn (arXiv 2511.19835).
    """
    if scores.dim() != 4 or scores.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"scores must be [B, H, Nq, Nk] float32 or float64, not {tuple(scores.shape)} {scores.dtype}."
        )
    key_blocks = scores.shape[-1]
    for name, share in (("density", density), ("top_p", 0.0 if top_p is None else top_p)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is a share from 0 to 1, not {share!r}.")
    if k_min < 1 or (k_max is not None and k_max < k_min):
        raise ValueError(f"The clamps must be 1 <= k_min <= k_max, not k_min {k_min} and k_max {k_max}.")
    if max_forced is not None and (forced is None or max_forced < 0):
        raise ValueError(f"max_forced is a number from 0 on that goes with forced blocks, not {max_forced} without.")
    if forced is not None:
        if forced.dtype != torch.bool or forced.device != scores.device:
            raise ValueError(f"forced must be bool on {scores.device}, not {forced.dtype} on {forced.device}.")
        fits = zip(forced.shape[::-1], scores.shape[::-1], strict=False)
        if forced.dim() > 4 or any(size not in (1, whole) for size, whole in fits):
            raise ValueError(f"forced {tuple(forced.shape)} does not broadcast to scores {tuple(scores.shape)}.")
    most = min(key_blocks, key_blocks if k_max is None else k_max)
    least = min(most, max(1, int(density * key_blocks), k_min))
    width = most if top_p else least
    if forced is not None:
        width = min(key_blocks, width + (key_blocks if max_forced is None else max_forced))
    name = resolve(impl, scores)
    if name == "triton" and key_blocks > LONGEST:
        if impl == "triton":
            raise ValueError(f"impl 'triton' takes up to {LONGEST} key blocks, not {key_blocks}; 'torch' takes more.")
        name = "torch"
    counts, indices = _block_select(scores, forced, least, most, top_p or 0.0, width, logarithms, name)
    return BlockPlan(counts, indices, key_blocks)


def marked(mask: Tensor) -> BlockPlan:
    """The plan of the blocks that mask [B, H, Nq, Nk] bool marks; of a row without any, as no plan has such, block 0.

    Nothing is sorted, as in block_select, and nothing waits for the device.
    """
    return block_select(mask.float(), density=0, forced=mask)


@torch.library.custom_op("dit_sparse::block_select", mutates_args=())
def _block_select(
    scores: Tensor,
    forced: Tensor | None,
    least: int,
    most: int,
    top_p: float,
    width: int,
    logarithms: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    select = _block_select_triton if impl == "triton" else _block_select_torch
    with on_device(scores):
        return select(scores, forced, least, most, top_p, width, logarithms)


@_block_select.register_fake
def _(
    scores: Tensor, _forced: Tensor | None, _least: int, _most: int, _top_p: float, width: int, *_: object
) -> tuple[Tensor, Tensor]:
    return _outputs(scores, width)


def _outputs(scores: Tensor, width: int) -> tuple[Tensor, Tensor]:
    counts = scores.new_empty(scores.shape[:-1], dtype=torch.int32)
    return counts, scores.new_empty(*scores.shape[:-1], width, dtype=torch.int32)


def _block_select_torch(
    scores: Tensor, forced: Tensor | None, least: int, most: int, top_p: float, width: int, logarithms: bool
) -> tuple[Tensor, Tensor]:
    if logarithms:
        # Relative to the largest that is a number; all of a row of -inf become NaN, and as equal as zeros.
        largest = scores.nan_to_num(-math.inf, posinf=math.inf, neginf=-math.inf).amax(-1, keepdim=True)
        scores = (scores - largest).exp_()
    # The bits of a float that is not negative, read as an integer, order as the float does, NaN above all.
    bits = torch.int32 if scores.dtype == torch.float32 else torch.int64
    key = scores.view(bits) & torch.iinfo(bits).max
    n: Tensor | int = least
    if top_p > 0:
        ranked = key.topk(most).values
        values = ranked.view(scores.dtype)
        before = values.cumsum(-1) - values
        n = (before < top_p * scores.sum(-1, keepdim=True)).sum(-1, keepdim=True).clamp(least, most)
        edge = ranked.gather(-1, n - 1)
    else:
        edge = key.topk(least, sorted=False).values.amin(-1, keepdim=True)
    above, equal = key > edge, key == edge
    keep = above | (equal & (equal.cumsum(-1) <= n - above.sum(-1, keepdim=True)))
    if forced is not None:
        keep |= forced
    place = keep.cumsum(-1)
    counts = place[..., -1].clamp(max=width).to(torch.int32)
    # A place of its own, cut off below, takes what is not kept.
    target = place.sub_(1).masked_fill_(~keep, width).clamp_(max=width)
    blocks = torch.arange(key.shape[-1], dtype=torch.int32, device=key.device).expand_as(key)
    indices = key.new_zeros(*key.shape[:-1], width + 1, dtype=torch.int32).scatter_(-1, target, blocks)
    return counts, indices[..., :width].contiguous()


if triton is not None:

    @triton.jit
    def _edge_by_count(b_key, n, N):
        """A number that n of the N keys reach, or, where equal keys allow none, the n-th largest; how many reach it.

        Bit by bit the largest number that at least n keys reach, until there are as many.
        """
        edge, bit, reached = 0, 1 << 30, N
        while (bit > 0) & (reached != n):
            count = tl.sum((b_key >= (edge | bit)).to(tl.int32))
            edge = tl.where(count >= n, edge | bit, edge)
            reached = tl.where(count >= n, count, reached)
            bit = bit >> 1
        return edge, reached

    @triton.jit
    def _sum(b_key, m):
        """The sum of the scores at m, from their keys: a second copy of the row would not fit in registers."""
        return tl.sum(tl.where(m, b_key.to(tl.float32, bitcast=True), 0.0))

    @triton.jit
    def _edge_by_sum(b_key, share):
        """The largest number such that the scores whose keys reach it add up to at least `share`."""
        edge = 0
        for i in range(31):
            trial = edge | (1 << (30 - i))
            edge = tl.where(_sum(b_key, b_key >= trial) >= share, trial, edge)
        return edge

    @triton.jit
    def block_select_fwd_kernel(
        scores,
        forced,
        counts,
        indices,
        stride_sb,
        stride_sh,
        stride_sq,
        stride_sk,
        stride_fb,
        stride_fh,
        stride_fq,
        top_p,
        least,
        most,
        H,
        Q,
        N,
        W,
        BN: tl.constexpr,
        HAS_TOP_P: tl.constexpr,
        HAS_FORCED: tl.constexpr,
        LOGARITHMS: tl.constexpr,
    ):
        i_row = tl.program_id(0).to(tl.int64)
        i_q, i_bh = i_row % Q, i_row // Q
        i_b, i_h = i_bh // H, i_bh % H
        o_n = tl.arange(0, BN)
        m_n = o_n < N
        # [BN]
        b_s = tl.load(
            scores + i_b * stride_sb + i_h * stride_sh + i_q * stride_sq + o_n.to(tl.int64) * stride_sk,
            mask=m_n,
            other=-float("inf") if LOGARITHMS else 0.0,
        )
        if LOGARITHMS:
            # Relative to the largest that is a number; all of a row of -inf become NaN, and as equal as zeros.
            b_s = tl.exp(b_s - tl.max(b_s))
        # The bits of a float that is not negative, read as an integer, order as the float does, NaN above all.
        b_key = tl.where(m_n, b_s.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)
        n = least
        if HAS_TOP_P:
            share = top_p * _sum(b_key, b_key > 0)
            edge = _edge_by_sum(b_key, share)
            b_equal = (b_key == edge).to(tl.int32)
            # Of the scores at the edge, each has the ones of lower index before it.
            b_rank = tl.cumsum(b_equal) - b_equal
            b_before = _sum(b_key, b_key > edge) + b_rank * edge.to(tl.float32, bitcast=True)
            b_enough = (b_key > edge) | ((b_equal > 0) & (b_before < share))
            n = tl.minimum(tl.maximum(tl.sum(b_enough.to(tl.int32)), least), most)
        edge, reached = _edge_by_count(b_key, n, N)
        b_keep = b_key >= edge
        if reached > n:
            b_above, b_equal = b_key > edge, (b_key == edge).to(tl.int32)
            b_rank = tl.cumsum(b_equal) - b_equal
            b_keep = b_above | ((b_equal > 0) & (b_rank < n - tl.sum(b_above.to(tl.int32))))
        if HAS_FORCED:
            p_forced = forced + i_b * stride_fb + i_h * stride_fh + i_q * stride_fq + o_n
            b_keep = b_keep | tl.load(p_forced, mask=m_n, other=0).to(tl.int1)
        b_kept = b_keep.to(tl.int32)
        b_place = tl.cumsum(b_kept) - b_kept
        count = tl.minimum(tl.sum(b_kept), W)
        tl.store(counts + i_row, count)
        tl.store(indices + i_row * W + b_place, o_n, mask=b_keep & (b_place < W))
        tl.store(indices + i_row * W + o_n, tl.zeros_like(o_n), mask=(o_n >= count) & (o_n < W))


def _block_select_triton(
    scores: Tensor, forced: Tensor | None, least: int, most: int, top_p: float, width: int, logarithms: bool
) -> tuple[Tensor, Tensor]:
    check_device(block_select_fwd_kernel, scores)
    counts, indices = _outputs(scores, width)
    row = triton.next_power_of_2(scores.shape[-1])
    if forced is not None:
        # Rows are read as they lie; where they must be written out first, batch, heads and rows stay a broadcast.
        forced = forced.expand(*forced.shape[:-1], scores.shape[-1])
        forced = (forced if forced.stride(-1) == 1 else forced.contiguous()).expand(scores.shape)
    block_select_fwd_kernel[(counts.numel(),)](
        scores,
        forced,
        counts,
        indices,
        *scores.stride(),
        *((0, 0, 0) if forced is None else forced.stride()[:3]),
        top_p,
        least,
        most,
        *scores.shape[1:],
        width,
        BN=row,
        HAS_TOP_P=top_p > 0,
        HAS_FORCED=forced is not None,
        LOGARITHMS=logarithms,
        num_warps=max(row // SCORES_PER_WARP, 1),
    )
    return counts, indices
