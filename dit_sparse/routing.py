"""Bi-level routing (BiFormer, CVPR 2023, section 3.2), per head and without training: pool, score, select."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from dit_sparse.config import Order, SparseConfig
from dit_sparse.kernels.block_mass import block_mass
from dit_sparse.kernels.block_scores import block_scores
from dit_sparse.kernels.block_select import block_select
from dit_sparse.kernels.block_stats import BlockStats, Want, block_stats
from dit_sparse.layout import Layout, TokenGrid, block_lengths
from dit_sparse.order import first_frame_blocks, neighbours
from dit_sparse.plan import BlockPlan

# Mean queries of a block whose attention to every key says how much a block of keys holds.
PARTS = 4


@dataclass(frozen=True)
class Pooled:
    """Block statistics of one attention call's vision tokens, float32 (float64 for float64): of q [B, H, Nq, D], by
    blocks of queries, of k and v [B, H, Nk, D], by those of keys.

    q is None where neither routing nor a tail takes it, and a statistic is None where the config has no use for it.
    """

    q: BlockStats | None
    k: BlockStats
    v: BlockStats
    lengths: Tensor  # [Nk] real tokens


@dataclass(frozen=True)
class Routing:
    """plan, and the logits [B, H, Nq, Nk] of pooled attention, or Nk + 1 wide, the text last, made when asked for."""

    plan: BlockPlan
    logits: Callable[[], Tensor]

    @cached_property
    def mass(self) -> Tensor:
        """Estimated softmax mass of each key block, like logits; rows sum to 1."""
        return self.logits().softmax(-1)


def pool(q: Tensor, k: Tensor, v: Tensor, layout: Layout, config: SparseConfig, *, routes: bool = True) -> Pooled:
    """q, k, v [B, H, L, D] in routing order, post-RoPE and post-normalisation -> statistics of their vision blocks.

    Unless it `routes`, only what a tail takes.
    """
    of_q, of_k, of_v = wanted(config, routes=routes)
    lengths = layout.key_lengths(k.device)

    def stats(x: Tensor, want: Want, lengths: Tensor = lengths, block: int = layout.key_size) -> BlockStats:
        return block_stats(x[:, :, : layout.grid.tokens], lengths, block=block, want=want)

    of_queries = None if of_q is None else stats(q, of_q, layout.lengths(q.device), layout.block)
    return Pooled(of_queries, stats(k, of_k), stats(v, of_v), lengths)


def pooled_of(stats: Sequence[BlockStats | None], layout: Layout, lengths: Tensor) -> Pooled:
    """The statistics of q, k and v, all by blocks of keys, lengths [Nk]; those of q are put together."""
    q, k, v = stats
    assert k is not None and v is not None
    return Pooled(None if q is None else joined(q, lengths, layout.block // layout.key_size), k, v, lengths)


def joined(stats: BlockStats, lengths: Tensor, count: int) -> BlockStats:
    """Mean and variance of blocks made of `count` blocks each, lengths [N] tokens long, the last of fewer."""
    if count == 1:
        return stats
    assert stats.mad is None, "mean deviations cannot be put together"
    missing = -len(lengths) % count
    share = torch.nn.functional.pad(lengths, (0, missing)).unflatten(0, (-1, count)).to(stats.mean.dtype)
    share = (share / share.sum(-1, keepdim=True))[..., None]

    def by_block(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, 0, 0, missing)).unflatten(-2, (-1, count))

    each = by_block(stats.mean)
    mean = (share * each).sum(-2)
    var = None
    if stats.var is not None:
        var = (share * (by_block(stats.var) + (each - mean.unsqueeze(-2)).square())).sum(-2)
    return BlockStats(mean=mean, mad=None, var=var)


def wanted(config: SparseConfig, *, routes: bool) -> tuple[Want | None, Want, Want]:
    """Which statistics of q, k and v a call takes that chooses blocks, or one that does not."""
    by_error = config.routes_by == "error" and routes
    gain = config.method == "rectify"
    second_order = config.has_tail and config.second_order
    variance = by_error or second_order
    of_q: Want | None = "mean+var" if second_order else None if not routes else "all" if gain else "mean"
    return of_q, "all" if gain else "mean+var" if variance else "mean", "mean+var" if by_error else "mean"


def route(
    pooled: Pooled,
    layout: Layout,
    config: SparseConfig,
    *,
    density: float,
    scale: float,
    text_keys: Tensor | None = None,
    text_mask: Tensor | None = None,
    fine: Callable[[], Tensor] | None = None,
    rows: Tensor | None = None,
) -> Routing:
    """Choose `density` of the key blocks for every query block, and those `config` forces.

    fine makes `fine_scores`, which only configs that route by them need. rows [n] int64 are the query blocks that
    pooled.q and fine are of, and the plan then is; None for all.

    text_keys [B, H, Lt, D] take part one by one, as in Rectified SpaAttn (section 1.3 of its code's description);
    text_mask [B, Lt] bool hides padding. The text's mass is a column of its own, kept always and not in the plan.
    """
    assert pooled.q is not None
    means = pooled.q.mean, pooled.k.mean, pooled.lengths

    def logits() -> Tensor:
        return block_scores(*means, scale=scale, text=_of_text(means[0], text_keys, text_mask, scale))

    # Text has a place among estimates of the mass only.
    if config.routes_by == "fine":
        assert fine is not None
        scores = fine()
    elif config.routes_by == "error":
        assert pooled.k.var is not None and pooled.v.var is not None
        deviations = pooled.v.var.sum(-1)
        scores = block_scores(*means, scale=scale, variances=pooled.k.var, deviations=deviations)
    else:
        scores = logits()
    made = (lambda: scores) if config.routes_by == "mass" else logits
    forced, most = forced_blocks(
        config.order, layout.grid, config.tile, layout.block, layout.key_size, config.neighbours, config.first_frame,
        scores.device,
    )  # fmt: skip
    if rows is not None:
        forced = forced[rows]
    if config.method == "topp":
        return Routing(_shared_out(scores[..., : layout.key_blocks].softmax(-1), density, forced), made)
    if scores.shape[-1] == layout.key_blocks:
        plan = block_select(
            scores, density=density, top_p=config.top_p, forced=forced, max_forced=most, logarithms=True
        )
        return Routing(plan, made)
    # The text competes for a place as in the released code, although it is kept anyway. The number of places is a
    # share of the vision blocks, and all of them where nothing is to be left out.
    places = layout.key_blocks + 1 if density == 1 else int(density * layout.key_blocks)
    forced = torch.nn.functional.pad(forced, (0, 1), value=True)
    plan = block_select(
        scores,
        density=0,
        k_min=max(places, 1),
        top_p=config.top_p,
        forced=forced,
        max_forced=most + 1,
        logarithms=True,
    )
    # Lists ascend, so the text's column is the last listed.
    return Routing(BlockPlan(plan.counts - 1, plan.indices, layout.key_blocks), made)


def fine_scores(
    q: Tensor, k: Tensor, layout: Layout, *, scale: float, blocks: tuple[int, ...] | None = None
) -> Tensor:
    """[B, H, Nq, Nk]: ln of what the mean queries of each quarter of a block find in the single keys of a block.

    q, k [B, H, L, D] in routing order; blocks are those of queries that are asked, ascending, None for all. In blocks
    of 128 it takes 1/32 of dense attention's QK^T; what it finds is compared with means of keys by
    `samples/routing_recall.py`.
    """
    vision, part = layout.grid.tokens, max(1, layout.block // PARTS)
    means = block_stats(q[:, :, :vision], block_lengths(vision, part, q.device), block=part, want="mean").mean
    parts = layout.block // part
    if blocks is not None:
        means = means[:, :, _rows_of(blocks, parts, means.shape[2], q.device)]
    return block_mass(means, k[:, :, :vision], parts=parts, key_block=layout.key_size, scale=scale)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _rows_of(blocks: tuple[int, ...], parts: int, rows: int, device: torch.device) -> Tensor:
    """The `parts` rows of each block, of so many in all: made once, a copy to a GPU waits for all before it."""
    listed = [row for block in blocks for row in range(block * parts, min((block + 1) * parts, rows))]
    return torch.tensor(listed, device=device)


def _of_text(q: Tensor, keys: Tensor | None, mask: Tensor | None, scale: float) -> Tensor | None:
    """[B, H, N]: the logarithm of what all text keys [B, H, Lt, D] weigh for the mean query of a block."""
    if keys is None:
        return None
    logits = q @ keys.to(q.dtype).mT * scale
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None], float("-inf"))
    return logits.logsumexp(-1)


def _shared_out(scores: Tensor, density: float, forced: Tensor) -> BlockPlan:
    """Block top-p with one p for a whole call, the p at which its rows and heads together keep `density` of the pairs:
    rows whose mass is spread widely get more blocks than rows whose mass is in a few. SpargeAttn (arXiv 2502.18137)
    chooses blocks so, but by a given p. scores [B, H, N, N]; `forced` [N, N] is part of the density."""
    ranked = scores.sort(dim=-1, descending=True, stable=True)
    share = ranked.values / ranked.values.sum(-1, keepdim=True)
    before = share.cumsum(-1) - share
    before.masked_fill_(forced.expand_as(scores).gather(-1, ranked.indices), -1)
    count = max(1, int(density * before[0].numel()))
    p = before.flatten(1).kthvalue(count, dim=-1).values
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, ranked.indices, before <= p[:, None, None, None])
    return BlockPlan.from_mask(mask | forced)


@lru_cache(maxsize=16)
def forced_blocks(
    order: Order,
    grid: TokenGrid,
    tile: tuple[int, int, int],
    block: int,
    key_block: int,
    with_neighbours: bool,
    with_first_frame: bool,
    device: torch.device,
) -> tuple[Tensor, int]:
    """Key blocks kept whatever their score, [Nq, Nk] bool, and the most in a row. A query block's own always are."""
    blocks, cpu = -(-grid.tokens // key_block), torch.device("cpu")
    forced = torch.eye(blocks, dtype=torch.bool)
    if with_neighbours:
        forced |= neighbours(order, grid, tile, key_block, cpu)
    if with_first_frame:
        forced |= first_frame_blocks(order, grid, tile, key_block, cpu)
    # What one of its parts keeps, a query block keeps.
    count = block // key_block
    forced = torch.nn.functional.pad(forced, (0, 0, 0, -blocks % count)).unflatten(0, (-1, count)).any(1)
    return forced.to(device), int(forced.sum(-1).max())
