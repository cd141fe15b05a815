"""Patterns of published methods that go by where tokens lie and not by what they hold, as masks of block pairs.

Each is cut to a density: the widest window that keeps no more than this share of the block pairs. A pair of blocks is
kept where the pattern keeps a pair of their tokens. Text and the frames that `first_frame` keeps come on top.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from dit_sparse.config import Order
from dit_sparse.layout import TokenGrid
from dit_sparse.order import token_order
from dit_sparse.plan import BlockPlan

Pattern = Literal["spatial", "temporal", "sta", "radial", "ditfastattn"]

# Frames, rows and columns of a tile that is one block, for videos and for images.
TILES = {16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8)}
FLAT_TILES = {16: (1, 4, 4), 32: (1, 4, 8), 64: (1, 8, 8), 128: (1, 8, 16)}


def order_of(pattern: Pattern) -> Order:
    """The token order in which a pattern's windows are few blocks."""
    return {"temporal": "pixel", "sta": "tile"}.get(pattern, "raster")  # type: ignore[return-value]


def tile_of(grid: TokenGrid, block: int) -> tuple[int, int, int]:
    """The tile of sliding tile attention: as many tokens as a block, so that one tile is one block."""
    return (FLAT_TILES if grid.frames == 1 else TILES)[block]


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def pattern_plan(
    pattern: Pattern,
    grid: TokenGrid,
    block: int,
    density: float,
    sink: bool,
    rows: tuple[int, int],
    device: torch.device,
) -> BlockPlan:
    """`pattern_mask` for rows = (batch, heads); shared, so never write to it."""
    mask = pattern_mask(pattern, grid, block, density, sink)
    plan = BlockPlan.from_mask(mask[None, None], int(mask.sum(-1).max()))
    counts, indices = (x.expand(*rows, *x.shape[2:]).contiguous().to(device) for x in (plan.counts, plan.indices))
    return BlockPlan(counts, indices, plan.key_blocks)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def pattern_mask(pattern: Pattern, grid: TokenGrid, block: int, density: float, sink: bool = False) -> Tensor:
    """[N, N] bool on the CPU, blocks in `order_of(pattern)`; every block sees itself, whatever the density.

    sink also keeps the blocks that hold tokens of the first frame, as keys, on top of the density.
    spatial, temporal  Sparse VideoGen (arXiv 2502.01776, "Online Profiling Strategy"): a band along the diagonal with
                       the frames in order, and with the frames of each place side by side
    sta                Sliding Tile Attention (arXiv 2502.04507, "Sliding Tile Attention"): a window of whole tiles
                       around each tile, moved inwards at the edges so that all see equally many
    radial             Radial Attention (arXiv 2506.19852, "Convert the Energy Decay to Compute Density Decay"): a band
                       around the same place in other frames, half as wide with each doubling of their distance; where
                       it would be narrower than a token, the place itself in every so many frames
    ditfastattn        DiTFastAttn (arXiv 2406.08552, "Window Attention with Residual Sharing"): a band along the
                       diagonal of the sequence as the model has it
    """
    blocks = -(-grid.tokens // block)
    match pattern:
        case "sta":
            mask = _sliding_tiles(grid, block, density)
        case "radial":
            mask = _radial(grid, block, density)
        case _:
            place = torch.arange(blocks)
            apart = (place[:, None] - place).abs()
            mask = _widest(lambda radius: apart <= radius, range(blocks), density)
    if density == 1:
        mask = torch.ones_like(mask)
    mask = mask | torch.eye(blocks, dtype=torch.bool)
    if sink:
        mask[:, _holds(pattern, grid, block, torch.arange(grid.tokens) < grid.height * grid.width)] = True
    return mask


def _holds(pattern: Pattern, grid: TokenGrid, block: int, chosen: Tensor) -> Tensor:
    """Which blocks hold a token that is `chosen` [tokens], by raster index: [N] bool."""
    order = token_order(order_of(pattern), grid, tile_of(grid, block), torch.device("cpu"))
    found = torch.zeros(-(-grid.tokens // block), dtype=torch.bool)
    found[order.place[chosen] // block] = True
    return found


def _widest(mask_of: Callable[[int], Tensor], radii: range, density: float) -> Tensor:
    """The mask of the largest radius that keeps at most `density`; the first if none does. Masks grow with radii."""
    low, high = 0, len(radii)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if mask_of(radii[middle]).float().mean() <= density else (low, middle)
    return mask_of(radii[low])


def _sliding_tiles(grid: TokenGrid, block: int, density: float) -> Tensor:
    shape, tile = (grid.frames, grid.height, grid.width), tile_of(grid, block)
    counts = [-(-side // edge) for side, edge in zip(shape, tile, strict=True)]
    frame, row, column = (torch.arange(side) // edge for side, edge in zip(shape, tile, strict=True))
    tile_index = (frame[:, None, None] * counts[1] + row[:, None]) * counts[2] + column
    order = token_order("tile", grid, tile, torch.device("cpu"))
    # Past a short tile at an edge, blocks straddle tiles.
    holds = torch.zeros(-(-grid.tokens // block), math.prod(counts))
    holds[torch.arange(grid.tokens) // block, tile_index.flatten()[order.take]] = 1
    windows: dict[int, tuple[int, ...]] = {}
    for window in product(*(range(1, count + 1) for count in counts)):
        size = math.prod(window)
        if size not in windows or _lopsided(window, counts) < _lopsided(windows[size], counts):
            windows[size] = window
    for size in sorted((size for size in windows if size <= density * math.prod(counts) + 1e-9), reverse=True):
        sees = _window_of_tiles(counts, windows[size])
        mask = holds @ sees.float() @ holds.mT > 0
        if mask.float().mean() <= density + 1e-9:
            return mask
    return torch.eye(len(holds), dtype=torch.bool)


def _lopsided(window: tuple[int, ...], counts: list[int]) -> float:
    """How far a window is from a cube; a side that spans the whole grid is as long as it can be."""
    free = [side for side, count in zip(window, counts, strict=True) if side < count]
    return max(free) / min(free) if free else 1.0


def _window_of_tiles(counts: list[int], window: tuple[int, ...]) -> Tensor:
    """[T, T] bool over tiles in raster order."""
    sees = torch.ones(1, 1, dtype=torch.bool)
    for count, side in zip(counts, window, strict=True):
        place = torch.arange(count)
        first = (place - side // 2).clamp(0, count - side)[:, None]
        along = (place >= first) & (place < first + side)
        sees = (sees[:, None, :, None] & along[None, :, None, :]).flatten(2).flatten(0, 1)
    return sees


def _radial(grid: TokenGrid, block: int, density: float) -> Tensor:
    frame, tokens = grid.height * grid.width, grid.tokens
    # Segments: the part of a block that lies in one frame, from its first place there to its last.
    cuts = torch.tensor(sorted({*range(0, tokens, block), *range(0, tokens, frame), tokens}))
    first, last = cuts[:-1], cuts[1:] - 1
    home, of_frame = first // block, first // frame
    low, high = first % frame, last % frame
    gap = torch.maximum(low[:, None] - high, low - high[:, None]).clamp(min=0)
    apart = (of_frame[:, None] - of_frame).abs()
    decay = 2.0 ** apart.clamp(min=1).float().log2().floor()
    blocks = -(-tokens // block)

    def mask_of(eighths: int) -> Tensor:
        # Widths for which densities lie close together, from below a token to more than a frame.
        width = 2 ** (eighths / 8) / decay
        every = (1 / width).ceil().clamp(min=1)
        kept = torch.where(width >= 1, gap <= width, (gap == 0) & (apart % every == 0))
        mask = torch.zeros(blocks, blocks, dtype=torch.bool)
        a, b = kept.nonzero(as_tuple=True)
        mask[home[a], home[b]] = True
        return mask

    narrow = -8 * math.ceil(math.log2(grid.frames) + 1)
    wide = 8 * math.ceil(math.log2(frame) + math.log2(grid.frames) + 1)
    return _widest(mask_of, range(narrow, wide + 1), density)
