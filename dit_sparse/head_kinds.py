"""Which of two patterns fits each head, found on a sample of rows (Sparse VideoGen, arXiv 2502.01776, "Online
Profiling Strategy for Sparsity Identification")."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.layout import Layout
from dit_sparse.order import token_order
from dit_sparse.patterns import Pattern, order_of, pattern_mask, tile_of

KINDS: tuple[Pattern, Pattern] = ("spatial", "temporal")
# Query rows that decide; the paper looks at 1 % of them.
SAMPLED_ROWS = 64


@dataclass(frozen=True)
class HeadKinds:
    """heads: of each of KINDS, the heads it fits better; step: where that was found."""

    heads: tuple[tuple[int, ...], tuple[int, ...]]
    step: int


def head_kinds(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, density: float, sink: bool, text_mask: Tensor | None, step: int
) -> HeadKinds:
    """q, k, v [B, H, L, D] in raster order, text last. A head is of the kind that leaves the smaller squared error on
    evenly spaced vision rows, spatial where they are equal. Reads the device."""
    vision, device = layout.grid.tokens, q.device
    rows = torch.linspace(0, vision - 1, min(SAMPLED_ROWS, vision), device=device).round().long()
    logits = q[:, :, rows].float() @ k.float().mT * q.shape[-1] ** -0.5
    if text_mask is not None:
        logits[..., vision:].masked_fill_(~text_mask[:, None, None], float("-inf"))
    exact = logits.softmax(-1) @ v.float()
    errors = []
    for kind in KINDS:
        place = token_order(order_of(kind), layout.grid, tile_of(layout.grid, layout.block), device).place
        block = place // layout.block
        mask = pattern_mask(kind, layout.grid, layout.block, density, sink).to(device)
        hidden = torch.zeros(len(rows), k.shape[2], dtype=torch.bool, device=device)
        hidden[:, :vision] = ~mask[block[rows]][:, block]
        part = logits.masked_fill(hidden, float("-inf")).softmax(-1) @ v.float()
        errors.append((part - exact).square().sum((0, 2, 3)))
    temporal = (errors[1] < errors[0]).tolist()
    spatial_heads = tuple(head for head, is_temporal in enumerate(temporal) if not is_temporal)
    return HeadKinds((spatial_heads, tuple(head for head, is_temporal in enumerate(temporal) if is_temporal)), step)
