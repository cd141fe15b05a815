"""Every op of this folder in plain PyTorch, a page of formulas: the specification the kernels are tested against.

Nothing here is fast. Every function works in the dtype it is given; the tests give it float64.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dit_sparse.plan import BlockPlan, Correction, Tail
from dit_sparse.residual import unpack


class BlockStats(NamedTuple):
    """Statistics over each block's real tokens, each [B, H, N, D]."""

    mean: Tensor
    mad: Tensor  # mean |x - mean|
    var: Tensor  # mean (x - mean)^2


def block_stats(x: Tensor, lengths: Tensor, block: int) -> BlockStats:
    """x [B, H, L, D], lengths [N] or [B, N]: the first `lengths` tokens of each block count."""
    n = lengths.shape[-1]
    x = torch.nn.functional.pad(x, (0, 0, 0, n * block - x.shape[-2])).unflatten(-2, (n, block))
    lengths = lengths.reshape(-1, 1, n, 1)
    real = (torch.arange(block, device=x.device) < lengths).unsqueeze(-1)
    count = lengths.clamp(min=1).to(x.dtype)
    mean = x.masked_fill(~real, 0).sum(-2) / count
    off = (x - mean.unsqueeze(-2)).masked_fill(~real, 0)
    return BlockStats(mean, off.abs().sum(-2) / count, off.square().sum(-2) / count)


def block_scores(
    q: Tensor,
    k: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    variances: Tensor | None = None,
    deviations: Tensor | None = None,
    text: Tensor | None = None,
) -> Tensor:
    """The pooled attention mass of every pair of blocks, without each row's denominator, q [B, H, Nq, D], k
    [B, H, Nk, D] and lengths [Nk]; times the spread of its logits and of its values, which variances [B, H, Nk, D] and
    deviations [B, H, Nk] tell; as logarithms. text [B, H, Nq] is a column more."""
    scores = lengths * (q @ k.mT * scale).exp()
    if variances is not None and deviations is not None:
        of_logits = scale**2 * q.square() @ variances.mT
        scores = scores * of_logits.sqrt() * deviations.sqrt().unsqueeze(-2)
    return scores.log() if text is None else torch.cat([scores.log(), text.unsqueeze(-1)], dim=-1)


def tail_weights(tail: Tail, *, scale: float) -> Tensor:
    """What each pooled key weighs for each query block, [B, H, Nq, N] or what broadcasts to it: the logarithm of its
    length and, in the second order, half the variance of its keys' logits, with the mean square of a block's queries
    for that of each."""
    first = tail.log_weights.reshape(-1, 1, 1, tail.log_weights.shape[-1])
    if (second := tail.second) is None:
        return first
    spread = 0.5 * scale**2 * (second.q_mean.square() + second.q_var) @ second.variances.mT
    return first + spread.clamp(max=second.limit)


def block_mass(q: Tensor, k: Tensor, *, parts: int, key_block: int, scale: float) -> Tensor:
    """ln of the softmax mass of blocks of keys, the mean over mean queries q [B, H, R, D] of `parts` a block."""
    mass = (q @ k.mT * scale).softmax(-1)
    by_key = torch.stack([block.sum(-1) for block in mass.split(key_block, -1)], -1)
    return torch.stack([block.mean(-2) for block in by_key.split(parts, -2)], -2).log()


def block_select(
    scores: Tensor, *, top_k: int, top_p: float, k_min: int, k_max: int, forced: Tensor | None
) -> BlockPlan:
    """scores [..., N] >= 0. A row keeps its n best, n = max(top_k, fewest whose share of the row is >= top_p),
    clamped to k_min..k_max; of equal scores the lower index comes first. `forced` [..., N] bool is added to that."""
    ranked = scores.sort(dim=-1, descending=True, stable=True)
    before = ranked.values.cumsum(-1) - ranked.values
    enough = (before < top_p * scores.sum(-1, keepdim=True)).sum(-1, keepdim=True) if top_p > 0 else 0
    n = torch.as_tensor(enough, device=scores.device).clamp(min=top_k).clamp(min=k_min, max=k_max)
    place = torch.arange(scores.shape[-1], device=scores.device)
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, ranked.indices, place < n)
    return BlockPlan.from_mask(mask if forced is None else mask | forced)


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    correction: Correction | None,
    *,
    block: int,
    key_block: int | None = None,
    scale: float,
    key_mask: Tensor | None = None,
    text: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention over the planned key blocks, of `block` keys if not of key_block, then the correction.

    q [B, H, Lq, D], k and v [B, H, Lk, D], key_mask [B, Lk] or [B, text] bool. The last `text` rows of q attend every
    key, and the last `text` keys are attended by every row; neither is in the plan, and text rows are not corrected.
    lse [B, H, Lq] is the log-sum-exp of the exact part: planned blocks and text.
    """
    rows, columns = q.shape[-2] - text, k.shape[-2] - text
    allowed = torch.ones(*q.shape[:-1], k.shape[-2], dtype=torch.bool, device=q.device)
    allowed[..., :rows, :columns] = (
        plan.mask().repeat_interleave(key_block or block, -1).repeat_interleave(block, -2)[..., :rows, :columns]
    )
    if key_mask is not None:
        allowed[..., k.shape[-2] - key_mask.shape[-1] :] &= key_mask[:, None, None]
    scores = (q @ k.mT * scale).masked_fill(~allowed, float("-inf"))
    lse = scores.logsumexp(-1)
    out = torch.where(lse.isinf()[..., None], 0, scores.softmax(-1)) @ v
    if correction is not None:
        vision = correct(q[..., :rows, :], out[..., :rows, :], lse[..., :rows], plan, correction, block, scale)
        out = torch.cat([vision, out[..., rows:, :]], dim=-2)
    return out, lse


def correct(
    q: Tensor, out: Tensor, lse: Tensor, plan: BlockPlan, correction: Correction, block: int, scale: float
) -> Tensor:
    """scale * merge(out, tail) + residual, for vision rows q, out [B, H, L, D] and lse [B, H, L] of the exact part."""
    rows = q.shape[-2]
    if (tail := correction.tail) is not None:
        keys, values = tail.keys.to(q.dtype), tail.values.to(q.dtype)
        logits = q @ keys.mT * scale
        weights = tail_weights(tail, scale=scale).to(q.dtype).expand(*plan.counts.shape, -1)
        logits = logits + per_row(weights, rows, -2, block)
        routed = plan.mask().repeat_interleave(block, -2)[..., :rows, :]
        logits = logits.masked_fill(routed, float("-inf"))
        whole = torch.logaddexp(lse, logits.logsumexp(-1))[..., None]
        out = out * (lse[..., None] - whole).exp() + (logits - whole).exp() @ values
    if correction.scale is not None:
        out = out * per_row(correction.scale, rows, -1, block)[..., None].to(out.dtype)
    if correction.residual is not None:
        out = out + per_row(unpack(correction.residual), rows, -2, block).to(out.dtype)
    return out


def per_row(x: Tensor, rows: int, dim: int, block: int) -> Tensor:
    """A value per query block, repeated for its rows; a value per row as it is."""
    return x if x.shape[dim] == rows else x.repeat_interleave(block, dim).narrow(dim, 0, rows)


def permute(x: Tensor, index: Tensor) -> Tensor:
    """x [B, H, L, D], index [n] -> the first n tokens in the order of `index`, the others behind them as they are."""
    n = index.numel()
    return torch.cat([x[..., :n, :].index_select(-2, index), x[..., n:, :]], dim=-2)
