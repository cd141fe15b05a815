"""Each pattern against a mask over pairs of tokens, built pair by pair from the paper's words."""

import math

import pytest
import torch

from dit_sparse.layout import TokenGrid
from dit_sparse.order import token_order
from dit_sparse.patterns import order_of, pattern_mask, pattern_plan, tile_of

PATTERNS = ["spatial", "temporal", "sta", "radial", "ditfastattn"]
# Frames of 24 tokens, which are 3 blocks of 8 or straddled by blocks of 16; whole tiles of 2 x 2 x 4; ragged.
GRIDS = [TokenGrid(4, 4, 8), TokenGrid(4, 4, 6), TokenGrid(3, 5, 7), TokenGrid(1, 12, 8)]
CPU = torch.device("cpu")


def places(pattern: str, grid: TokenGrid, block: int) -> list[tuple[int, int, int]]:
    """Frame, row, column of the token at each place of the pattern's order."""
    take = token_order(order_of(pattern), grid, tile_of(grid, block), CPU).take.tolist()
    frame = grid.height * grid.width
    return [(t // frame, t % frame // grid.width, t % grid.width) for t in take]


def by_pairs(pattern: str, grid: TokenGrid, block: int, sees) -> torch.Tensor:
    """Blocks that hold a pair of tokens for which `sees` (place and coordinates of both) holds."""
    where = torch.tensor(places(pattern, grid, block))
    place, blocks = torch.arange(grid.tokens), -(-grid.tokens // block)
    pairs = sees(place[:, None], where.T[:, :, None], place, where.T[:, None]).expand(grid.tokens, grid.tokens)
    i, j = pairs.nonzero(as_tuple=True)
    mask = torch.eye(blocks, dtype=torch.bool)
    mask[i // block, j // block] = True
    return mask


def window(position: torch.Tensor, other: torch.Tensor, count: int, side: int) -> torch.Tensor:
    """Whether `other` is in the window of `side` around `position`, which is moved inwards at the edges."""
    first = (position - side // 2).clamp(0, count - side)
    return (other >= first) & (other < first + side)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("pattern", ["spatial", "temporal", "ditfastattn"])
def test_bands_are_of_places_that_lie_close(pattern, grid):
    for density in (0.2, 0.5, 0.8):
        mask = pattern_mask(pattern, grid, 16, density)
        matches = [
            radius
            for radius in range(len(mask))
            # Of whole blocks: two tokens are never further apart than this in blocks that touch.
            if torch.equal(mask, by_pairs(pattern, grid, 16, lambda i, a, j, b, r=radius: abs(i // 16 - j // 16) <= r))
        ]
        assert matches, (pattern, density)


def test_temporal_neighbours_share_a_place_and_spatial_ones_a_frame():
    """Frames of 32 tokens, of 2 blocks; at each place 4 frames side by side, so a block is 4 places."""
    grid = TokenGrid(4, 4, 8)
    for pattern, of in (("spatial", lambda a: a[0]), ("temporal", lambda a: (a[1], a[2] // 4))):
        where = places(pattern, grid, 16)
        groups = [{of(a) for a in where[n * 16 : (n + 1) * 16]} for n in range(8)]
        assert all(len(group) == 1 for group in groups)
        mask = pattern_mask(pattern, grid, 16, 0.4)
        assert mask.float().mean() == 22 / 64


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_sliding_tiles_are_a_window_of_tiles_around_each(grid):
    tile = tile_of(grid, 16)
    shape = (grid.frames, grid.height, grid.width)
    counts = [-(-side // edge) for side, edge in zip(shape, tile, strict=True)]
    for density in (0.3, 0.6, 0.9):
        mask = pattern_mask("sta", grid, 16, density)

        def sees(i, a, j, b, size):
            axes = zip(a, b, tile, counts, size, strict=True)
            return math.prod(window(x // edge, y // edge, count, side) for x, y, edge, count, side in axes) > 0

        sizes = [(f, r, c) for f in range(1, counts[0] + 1) for r in range(1, counts[1] + 1)
                 for c in range(1, counts[2] + 1)]  # fmt: skip
        matches = [
            size for size in sizes
            if torch.equal(mask, by_pairs("sta", grid, 16, lambda i, a, j, b, s=size: sees(i, a, j, b, s)))
        ]  # fmt: skip
        own = torch.eye(len(mask), dtype=torch.bool)
        assert matches or torch.equal(mask, own), (density, mask.float().mean())
        assert matches or density < 0.6


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_radial_bands_halve_with_each_doubling_of_the_distance_in_frames(grid):
    def sees(a, b, at_hand):
        apart = (a[0] - b[0]).abs()
        width = at_hand / 2 ** apart.clamp(min=1).double().log2().floor()
        off = ((a[1] - b[1]) * grid.width + a[2] - b[2]).abs()
        return torch.where(width >= 1, off <= width, (off == 0) & (apart % (1 / width).ceil() == 0))

    widths = [2 ** (eighths / 8) for eighths in range(-24, 65)]
    for density in (0.2, 0.5, 0.9):
        mask = pattern_mask("radial", grid, 16, density)
        assert any(
            torch.equal(mask, by_pairs("radial", grid, 16, lambda i, a, j, b, w=width: sees(a, b, w)))
            for width in widths
        ), density


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("grid", [*GRIDS, TokenGrid(13, 18, 20)], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_density_is_kept_and_grows_to_everything(pattern, grid, block):
    before, blocks = 0.0, -(-grid.tokens // block)
    for density in (0.01, 0.1, 0.25, 0.5, 0.75, 1.0):
        mask = pattern_mask(pattern, grid, block, density)
        assert mask.shape == (blocks, blocks) and mask.diagonal().all()
        kept = mask.float().mean().item()
        assert before <= kept <= max(density, 1 / blocks) + 1 / blocks
        before = kept
    assert before == 1
    if blocks > 60:
        # Fine enough that little of what may be computed is left over.
        assert pattern_mask(pattern, grid, block, 0.3).float().mean() > (0.2 if pattern == "sta" else 0.27)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_sink_is_every_block_of_the_first_frame(pattern):
    grid = TokenGrid(4, 4, 6)
    plain, sunk = (pattern_mask(pattern, grid, 16, 0.2, sink) for sink in (False, True))
    first = [any(a[0] == 0 for a in places(pattern, grid, 16)[n * 16 : (n + 1) * 16]) for n in range(6)]
    assert torch.equal(sunk, plain | torch.tensor(first))


def test_the_plan_is_the_mask_for_every_head():
    grid = TokenGrid(3, 5, 7)
    plan = pattern_plan("radial", grid, 16, 0.4, False, (2, 3), CPU)
    plan.check()
    assert torch.equal(plan.mask(), pattern_mask("radial", grid, 16, 0.4).expand(2, 3, 7, 7))
