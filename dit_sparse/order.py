"""The order in which vision tokens are laid out before they are cut into blocks, and which blocks then touch.

All tensors returned here are cached and shared: never write to them.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from dit_sparse.config import Order
from dit_sparse.hilbert import hilbert_curve
from dit_sparse.layout import TokenGrid

Tile = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class TokenOrder:
    """A bijection of the vision tokens.

    take       [tokens] int64, the raster index of the token at each place
    place      [tokens] int64, the place of each raster index
    is_raster  whether every token stays where it is, so that nothing need be permuted
    """

    take: Tensor
    place: Tensor
    is_raster: bool = False


# In the cached functions inference mode is off: a tensor made under it could not serve a later pass with gradients.


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def token_order(kind: Order, grid: TokenGrid, tile: Tile, device: torch.device) -> TokenOrder:
    """The order called `kind`; `tile` (frames, rows, columns) is the size of the tiles of kind "tile" alone.

    hilbert  the generalised Hilbert curve, as in Rectified SpaAttn (arXiv 2511.19835)
    tile     tiles in raster order, raster order within each, the last tile along each side short. Blocks are cut from
             the flat sequence, so after the first short tile they straddle tiles.
    raster   frame, row, column: as the model has them
    pixel    row, column, frame: the frames of one pixel side by side
    Raises ValueError for any other kind.
    """
    take = _take(kind, grid, tile)
    place = np.empty_like(take)
    place[take] = np.arange(grid.tokens)
    return TokenOrder(torch.from_numpy(take).to(device), torch.from_numpy(place).to(device), kind == "raster")


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def vision_first(kind: Order, grid: TokenGrid, tile: Tile, device: torch.device, before: int) -> TokenOrder:
    """`token_order` of the vision tokens of a sequence that has `before` other tokens first; these follow them."""
    order = token_order(kind, grid, tile, device)
    if not before:
        return order
    take = torch.cat([order.take + before, torch.arange(before, device=device)])
    place = torch.cat([torch.arange(before, device=device) + grid.tokens, order.place])
    return TokenOrder(take, place)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def neighbours(kind: Order, grid: TokenGrid, tile: Tile, block: int, device: torch.device) -> Tensor:
    """Which blocks touch in space and time, [N, N] bool: symmetric, and every block touches itself.

    Blocks n and m touch if a token of n has one of m among the 26 around it (Rectified SpaAttn, arXiv 2511.19835).
    """
    home = _block_of(kind, grid, tile, block)
    touch = np.eye(-(-grid.tokens // block), dtype=bool)
    # 13 of the 26 directions; the others are their opposites, and follow by symmetry.
    for step in list(product((-1, 0, 1), repeat=3))[14:]:
        here = home[tuple(slice(max(-by, 0), side - max(by, 0)) for by, side in zip(step, home.shape, strict=True))]
        there = home[tuple(slice(max(by, 0), side - max(-by, 0)) for by, side in zip(step, home.shape, strict=True))]
        touch[here, there] = True
    return torch.from_numpy(touch | touch.T).to(device)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def first_frame_blocks(kind: Order, grid: TokenGrid, tile: Tile, block: int, device: torch.device) -> Tensor:
    """Which blocks hold at least one token of the first frame, [N] bool."""
    holds = np.zeros(-(-grid.tokens // block), dtype=bool)
    holds[_block_of(kind, grid, tile, block)[0]] = True
    return torch.from_numpy(holds).to(device)


def padding(grid: TokenGrid, tile: Tile, block: int) -> float:
    """Padded slots for each real token, if every tile were filled up to whole blocks of its own.

    On a grid of 33 x 45 x 80 that is 16% for tiles of 4 x 4 x 4 in blocks of 64, and 0.09% for a flat curve in blocks
    of 128, which is one tile as large as the grid. Hence no order here pads anything but the last block.
    """
    shape = (grid.frames, grid.height, grid.width)
    frames, rows, columns = (
        np.minimum(side, whole - np.arange(0, whole, side)) for whole, side in zip(shape, tile, strict=True)
    )
    tokens = frames[:, None, None] * rows[:, None] * columns
    return float((-(-tokens // block) * block).sum() / grid.tokens - 1)


def _take(kind: Order, grid: TokenGrid, tile: Tile) -> np.ndarray:
    frame, row, column = np.indices((grid.frames, grid.height, grid.width), dtype=np.int64).reshape(3, -1)
    match kind:
        case "hilbert":
            return hilbert_curve(grid.frames, grid.height, grid.width)
        case "tile":
            return np.lexsort((column // tile[2], row // tile[1], frame // tile[0]))
        case "raster":
            return np.arange(grid.tokens)
        case "pixel":
            return np.lexsort((frame, column, row))
    raise ValueError(f"Unknown order {kind!r}: choose from {', '.join(get_args(Order))}.")


def _block_of(kind: Order, grid: TokenGrid, tile: Tile, block: int) -> np.ndarray:
    """The block of each token, [frames, height, width]."""
    place = token_order(kind, grid, tile, torch.device("cpu")).place
    return (place // block).reshape(grid.frames, grid.height, grid.width).numpy()
