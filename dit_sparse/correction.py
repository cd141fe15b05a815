"""What each method adds for the blocks left out, as one Correction: out = scale * merge(exact, tail) + residual."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.config import SparseConfig, Storage
from dit_sparse.kernels.tail_weights import tail_weights
from dit_sparse.plan import BlockPlan, Correction, Residual, SecondOrder, Tail
from dit_sparse.residual import pack, weighed
from dit_sparse.routing import Pooled, Routing

# Softmax mass outside the plan below which keep_mass leaves the residual as it is: a step of bfloat16 at 1.
LEAST_REST = 2**-8
# Logits of `calibrated` that are in memory at a time.
AT_ONCE = 1 << 24


def pooled_tail(pooled: Pooled, dtype: torch.dtype, *, second_order: bool, limit: float = math.inf) -> Tail:
    """Every block as one pseudo-key; the kernel leaves out the routed ones. dtype is that of q, k and v.

    The second order takes the mean square of a block's queries for that of each of them, which kernels/README.md
    compares: by row it would be a product for every row and pooled key.
    """
    q, k, second = pooled.q, pooled.k, None
    if second_order:
        assert q is not None and q.var is not None and k.var is not None
        second = SecondOrder(q.mean, q.var, k.var, limit)
    return Tail(k.mean.to(dtype), pooled.v.mean.to(dtype), pooled.lengths.to(k.mean.dtype).log(), second)


def rectify(routing: Routing, pooled: Pooled, *, critical_mass: bool = False) -> Correction:
    """Rectified SpaAttn (arXiv 2511.19835): a dropped block that passes the gain test gives its pooled mass times its
    mean value (GAPR); the exact part is scaled to what is left (IPAR), or, with `critical_mass`, to the kept mass."""
    blocks = len(pooled.lengths)
    kept = routing.plan.mask()
    mass = routing.mass[..., :blocks]
    compensated = mass.masked_fill(kept | ~gain(pooled), 0)
    if critical_mass:
        scale = mass.masked_fill(~kept, 0).sum(-1) + routing.mass[..., blocks:].sum(-1)
    else:
        scale = 1 - compensated.sum(-1)
    return Correction(scale=scale, residual=Residual(compensated @ pooled.v.mean))


def gain(pooled: Pooled) -> Tensor:
    """GAPR's test (Rectified SpaAttn, section 3 of its code's description): [B, H, N, N], True where pooling gains."""
    q, k = pooled.q, pooled.k
    assert q is not None and q.mad is not None and k.mad is not None
    error = (q.mad @ k.mean.mT).abs() + (q.mean @ k.mad.mT).abs()
    return (q.mean @ k.mean.mT).abs() > error


@dataclass(frozen=True)
class Learned:
    """What a refresh leaves for the steps after it; residual and rho are right only with the plan they were made on.

    plan      the blocks it was made on
    residual  what the sparse output of that step lacked, [B, H, L, D] over vision rows
    rho       [B, H, L] float32, Re-ttention's share of softmax mass inside the plan; None for anchor
    step      the step it was learned at
    visited   () int64, query-key block pairs in the plan
    config    what it was routed by
    """

    plan: BlockPlan
    residual: Residual
    rho: Tensor | None
    step: int
    visited: Tensor
    config: SparseConfig | None = None


def learn_anchor(dense: Tensor, approximate: Tensor, storage: Storage) -> Residual:
    """What the tail got wrong at an anchor, [B, H, L, D] (spec: R = O - tail)."""
    return _difference(dense, approximate, None, storage)


def learn_reshape(
    dense: Tensor, dense_lse: Tensor, sparse: Tensor, sparse_lse: Tensor, storage: Storage
) -> tuple[Residual, Tensor]:
    """Re-ttention (arXiv 2505.22918, section 4.2): rho [B, H, L] = exp(lse_S - lse) and R = O - rho O_S."""
    rho = (sparse_lse - dense_lse).exp()
    return _difference(dense, sparse, rho, storage), rho


def _difference(dense: Tensor, part: Tensor, rho: Tensor | None, storage: Storage) -> Residual:
    """dense - rho * part in `storage`, one head at a time: a whole one in float32 would take twice the memory of q."""

    def head(h: int) -> Residual:
        known = part[:, h] if rho is None else rho[:, h, :, None] * part[:, h]
        return pack(dense[:, h] - known, storage)

    first = head(0)
    room = (dense.shape[0], dense.shape[1])
    codes = first.codes.new_empty(*room, *first.codes.shape[1:])
    scales = None if first.scales is None else first.scales.new_empty(*room, *first.scales.shape[1:])
    for h in range(dense.shape[1]):
        one = first if h == 0 else head(h)
        codes[:, h] = one.codes
        if scales is not None and one.scales is not None:
            scales[:, h] = one.scales
    return Residual(codes, scales, first.kind)


def reshape(learned: Learned, nth: int, *, ramp: float, clamp: bool, keep_mass: bool) -> Correction:
    """Re-ttention's correction at the nth step after its refresh, n from 1: rho + ramp (n - 1), and the residual.

    clamp keeps rho at most 1. keep_mass weighs the residual by (1 - ramped rho) / (1 - rho), so rows sum to 1.
    """
    assert learned.rho is not None and nth >= 1
    ramped = learned.rho + ramp * (nth - 1)
    if clamp:
        ramped = ramped.clamp(max=1)
    residual = learned.residual
    if keep_mass:
        rest = 1 - learned.rho
        # A residual of next to no mass is mostly rounding, which a ratio of two small numbers would blow up.
        weight = torch.where(rest > LEAST_REST, (1 - ramped) / rest, 1)
        residual = weighed(residual, weight)
    return Correction(scale=ramped, residual=residual)


def calibrated(q: Tensor, plan: BlockPlan, tail: Tail, rho: Tensor, *, block: int, scale: float) -> Correction:
    """Re-ttention with rho known beforehand: out = rho O_S + (1 - rho) O_T, where O_T is the attention of each row to
    the pooled keys of the blocks that the plan leaves out, the direction of what is missing.

    q [B, H, L, D] vision rows, rho [H, Nq] float32 from 0 to 1; query blocks that leave nothing out have 1.
    """
    routed, rows = plan.mask(), q.shape[2]
    rho = torch.where(routed.all(-1), 1.0, rho)
    rest = torch.empty_like(q)
    # The logits of all heads and rows would be as large as a dense attention map over the block.
    at_once = max(block, AT_ONCE // max(1, q.shape[0] * q.shape[1] * routed.shape[-1]) // block * block)
    for first in range(0, rows, at_once):
        some = slice(first, min(first + at_once, rows))
        blocks = slice(first // block, -(-some.stop // block))
        logits = (q[:, :, some] @ tail.keys.mT).float().mul_(scale)
        weights = tail_weights(tail, (slice(None), slice(None), blocks), scale=scale)
        hidden = weights.masked_fill(routed[:, :, blocks], float("-inf"))
        logits += hidden.repeat_interleave(block, 2)[:, :, : some.stop - first]
        share = logits.softmax(-1).nan_to_num_()
        share *= (1 - rho[:, :, blocks]).repeat_interleave(block, 2)[:, :, : some.stop - first, None]
        rest[:, :, some] = share.to(q.dtype) @ tail.values
    return Correction(scale=rho, residual=Residual(rest))
