"""Bi-level routing (BiFormer, CVPR 2023, section 3.2), per head and without training: pool, score, select."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dit_sparse.config import Order, SparseConfig
from dit_sparse.kernels.block_select import block_select
from dit_sparse.kernels.block_stats import BlockStats, block_stats
from dit_sparse.layout import Layout, TokenGrid
from dit_sparse.order import first_frame_blocks, neighbours
from dit_sparse.plan import BlockPlan


@dataclass(frozen=True)
class Pooled:
    """Block statistics of one attention call's vision tokens, float32, each [B, H, N, D]; None where not needed."""

    q: BlockStats
    k: BlockStats
    v: BlockStats
    lengths: Tensor  # [N] real tokens


@dataclass(frozen=True)
class Routing:
    """mass [B, H, N, N], or N + 1 wide, the text last: estimated softmax mass of each key block; rows sum to 1."""

    plan: BlockPlan
    mass: Tensor


def pool(q: Tensor, k: Tensor, v: Tensor, layout: Layout, config: SparseConfig) -> Pooled:
    """q, k, v [B, H, L, D] in routing order, post-RoPE and post-normalisation -> their block statistics."""
    lengths = layout.lengths(q.device)
    q, k, v = (x[:, :, : layout.grid.tokens] for x in (q, k, v))
    gain = config.method == "rectify"
    return Pooled(
        block_stats(q, lengths, block=layout.block, want="all" if gain else "mean"),
        block_stats(k, lengths, block=layout.block, want="all" if gain else "mean+var"),
        block_stats(v, lengths, block=layout.block, want="mean+var" if config.by_error else "mean"),
        lengths,
    )


def route(
    pooled: Pooled,
    layout: Layout,
    config: SparseConfig,
    *,
    density: float,
    scale: float,
    text_keys: Tensor | None = None,
    text_mask: Tensor | None = None,
) -> Routing:
    """Choose `density` of the key blocks for every query block, and those `config` forces.

    text_keys [B, H, Lt, D] take part one by one, as in Rectified SpaAttn (section 1.3 of its code's description);
    text_mask [B, Lt] bool hides padding. The text's mass is a column of its own, kept always and not in the plan.
    """
    logits = pooled.q.mean @ pooled.k.mean.mT * scale + pooled.lengths.to(pooled.k.mean.dtype).log()
    if text_keys is not None:
        of_text = pooled.q.mean @ text_keys.to(logits.dtype).mT * scale
        if text_mask is not None:
            of_text = of_text.masked_fill(~text_mask[:, None, None], float("-inf"))
        logits = torch.cat([logits, of_text.logsumexp(-1, keepdim=True)], dim=-1)
    mass = logits.softmax(-1)
    blocks = layout.blocks
    scores = mass
    if config.by_error:
        # What a pooled key misses grows with the spread of the logits inside its block and with that of its values.
        spread = (pooled.q.mean.square() @ pooled.k.var.mT).mul_(scale**2)
        spread = spread.mul_(pooled.v.var.sum(-1).unsqueeze(-2)).sqrt_()
        scores = mass[..., :blocks] * spread
    forced, most = forced_blocks(
        config.order, layout.grid, config.tile, layout.block, config.neighbours, config.first_frame, logits.device
    )
    with_text = scores.shape[-1] > blocks
    if with_text:
        # The text competes for a place as in the released code, although it is kept anyway.
        forced, most = torch.nn.functional.pad(forced, (0, 1), value=True), most + 1
    plan = block_select(scores, density=density, top_p=config.top_p, forced=forced, max_forced=most)
    if with_text:
        plan = BlockPlan(
            plan.counts - 1, plan.indices, blocks
        )  # Lists ascend, so the text's column is the last listed.
    return Routing(plan, mass)


@lru_cache(maxsize=16)
def forced_blocks(
    order: Order,
    grid: TokenGrid,
    tile: tuple[int, int, int],
    block: int,
    with_neighbours: bool,
    with_first_frame: bool,
    device: torch.device,
) -> tuple[Tensor, int]:
    """Key blocks kept whatever their score, [N, N] bool, and the most in a row. A query block's own always is."""
    blocks = -(-grid.tokens // block)
    forced = torch.eye(blocks, dtype=torch.bool)
    if with_neighbours:
        forced |= neighbours(order, grid, tile, block, torch.device("cpu"))
    if with_first_frame:
        forced |= first_frame_blocks(order, grid, tile, block, torch.device("cpu"))
    return forced.to(device), int(forced.sum(-1).max())
