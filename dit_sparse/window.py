"""The static window of Re-ttention (arXiv 2505.22918), on tokens and on blocks."""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_sparse.layout import TokenGrid
from dit_sparse.order import TokenOrder


def window_radius(tokens: int, kept: float) -> int:
    """How many places to either side a token sees among `tokens` of a frame, so that it sees a share `kept` of them.

    Raises ValueError unless `kept` is a share above 0 and at most 1.
    """
    if not 0 < kept <= 1:
        raise ValueError(f"The share kept lies above 0 and is at most 1, but it is {kept!r}.")
    # Without the small term, float products such as 0.29 * 100 would lose a whole token.
    return int(tokens * kept + 1e-9) // 2


def band_density(grid: TokenGrid, kept: float, text: int = 0) -> float:
    """Share of all pairs of tokens that the window keeps, from 0 to 1.

    In every frame, a token sees those within `window_radius` of its own raster place, fewer at the ends of the frame;
    an image is one frame. The `text` tokens see everything and are seen by everything.
    """
    frame, tokens = grid.height * grid.width, grid.tokens + text
    radius = window_radius(frame, kept)
    band = frame * (2 * radius + 1) - radius * (radius + 1)
    return (grid.frames**2 * band + tokens**2 - grid.tokens**2) / tokens**2


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def window_plan(grid: TokenGrid, kept: float, text: int, order: TokenOrder, block: int) -> Tensor:
    """Which pairs of blocks hold a pair of tokens that the window of `band_density` keeps, [N, N] bool; shared.

    The sequence is vision in the given order, then `text` tokens, cut into blocks wherever text begins. The plan of
    block_attention leaves text out: for it, give text = 0.
    """
    frame, device = grid.height * grid.width, order.take.device
    radius = window_radius(frame, kept)
    holds = torch.zeros(-(-(grid.tokens + text) // block), frame, device=device)
    holds[torch.arange(grid.tokens, device=device) // block, order.take % frame] = 1
    sees = F.max_pool1d(holds[None], 2 * radius + 1, stride=1, padding=radius)[0]
    mask = sees @ holds.mT > 0
    if text:
        mask[grid.tokens // block :] = True
        mask[:, grid.tokens // block :] = True
    return mask
