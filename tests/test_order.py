from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.hilbert import hilbert_curve
from dit_sparse.layout import TokenGrid
from dit_sparse.order import first_frame_blocks, neighbours, padding, token_order

CPU = torch.device("cpu")
KINDS = ("hilbert", "tile", "raster", "pixel")

kinds = st.sampled_from(KINDS)
grids = st.builds(TokenGrid, st.integers(1, 5), st.integers(1, 7), st.integers(1, 7))
tiles = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
blocks = st.integers(1, 12)

HUNYUAN = TokenGrid(32, 45, 80)
WAN = TokenGrid(21, 45, 80)


def points(grid: TokenGrid, order: torch.Tensor) -> np.ndarray:
    """(frame, row, column) at each place, [tokens, 3]."""
    return np.stack(np.unravel_index(order.numpy(), (grid.frames, grid.height, grid.width)), axis=-1)


def step_lengths(grid: TokenGrid) -> np.ndarray:
    return np.abs(np.diff(points(grid, token_order("hilbert", grid, (1, 1, 1), CPU).take), axis=0)).sum(-1)


@settings(deadline=None)
@given(kinds, grids, tiles)
def test_every_order_is_a_bijection_and_its_own_undoing(kind, grid, tile):
    order = token_order(kind, grid, tile, CPU)
    raster = torch.arange(grid.tokens)
    assert order.take.dtype == order.place.dtype == torch.int64
    assert torch.equal(order.take.sort().values, raster)
    assert torch.equal(raster[order.take][order.place], raster)
    assert torch.equal(order.take[order.place], raster)
    assert order.is_raster == (kind == "raster")


@settings(deadline=None)
@given(grids)
def test_raster_moves_nothing(grid):
    assert torch.equal(token_order("raster", grid, (1, 1, 1), CPU).take, torch.arange(grid.tokens))


@settings(deadline=None)
@given(grids)
def test_pixel_order_sorts_by_row_column_frame(grid):
    expected = [
        (f * grid.height + h) * grid.width + w
        for h in range(grid.height)
        for w in range(grid.width)
        for f in range(grid.frames)
    ]
    assert token_order("pixel", grid, (1, 1, 1), CPU).take.tolist() == expected


@settings(deadline=None)
@given(grids, tiles)
def test_tile_order_walks_tiles_in_raster_order_and_raster_within(grid, tile):
    places = points(grid, token_order("tile", grid, tile, CPU).take)
    keys = np.concatenate([places // tile, places], axis=-1).tolist()
    assert keys == sorted(keys)


@settings(deadline=None)
@given(st.integers(1, 7), st.integers(1, 24), st.integers(1, 24))
def test_hilbert_curve_visits_every_token_once(frames, height, width):
    curve = hilbert_curve(frames, height, width)
    assert curve.dtype == np.int64
    assert np.array_equal(np.sort(curve), np.arange(frames * height * width))


@pytest.mark.parametrize("sides", list(product((1, 2, 4, 8, 16), repeat=3)))
def test_hilbert_steps_are_unit_where_sides_are_powers_of_two(sides):
    assert (step_lengths(TokenGrid(*sides)) == 1).all()


def test_hilbert_steps_longer_than_one_are_as_rare_as_in_the_reference():
    steps = step_lengths(HUNYUAN)
    assert len(steps) == 115_199
    assert (steps != 1).sum() == 208
    assert steps.max() == 2


# Rectified SpaAttn's curve gives these figures: blocks, tokens in the last block, and how many neighbours a block has.
NEIGHBOURS = {
    "hunyuan": (HUNYUAN, 900, 0, 18.7, 6, 32, 0.021),
    "wan": (WAN, 591, 80, 17.3, 5, 29, 0.029),
    "wan 5b": (TokenGrid(31, 22, 40), 214, 16, 16.7, 5, 30, 0.078),
    "cogvideox 1.5": (TokenGrid(11, 48, 80), 330, 0, 14.6, 5, 22, 0.044),
    "flux 4096": (TokenGrid(1, 256, 256), 512, 0, 8.1, 3, 10, 0.016),
}


@pytest.mark.parametrize(
    ("grid", "count", "rest", "mean", "low", "high", "density"), NEIGHBOURS.values(), ids=NEIGHBOURS
)
def test_hilbert_neighbours_are_those_of_the_reference(grid, count, rest, mean, low, high, density):
    touch = neighbours("hilbert", grid, (1, 1, 1), 128, CPU)
    each = touch.sum(-1)
    assert touch.shape == (count, count)
    assert grid.tokens % 128 == rest
    assert round(each.double().mean().item(), 1) == mean
    assert (each.min(), each.max()) == (low, high)
    assert round(touch.double().mean().item(), 3) == density


@settings(deadline=None)
@given(kinds, grids, tiles, blocks)
def test_neighbours_are_blocks_with_tokens_at_most_one_apart(kind, grid, tile, block):
    places = points(grid, token_order(kind, grid, tile, CPU).take)
    close = (np.abs(places[:, None] - places[None]) <= 1).all(-1)
    home = np.arange(grid.tokens) // block
    expected = torch.zeros(home[-1] + 1, home[-1] + 1, dtype=torch.bool)
    one, other = np.nonzero(close)
    expected[home[one], home[other]] = True
    assert torch.equal(neighbours(kind, grid, tile, block, CPU), expected)


@settings(deadline=None)
@given(kinds, grids, tiles, blocks)
def test_first_frame_blocks_hold_a_token_of_frame_zero(kind, grid, tile, block):
    places = points(grid, token_order(kind, grid, tile, CPU).take)
    expected = [(chunk[:, 0] == 0).any() for chunk in np.split(places, range(block, grid.tokens, block))]
    assert first_frame_blocks(kind, grid, tile, block, CPU).tolist() == expected


def test_the_first_blocks_of_a_curve_are_not_the_first_frame():
    first = 45 * 80
    leading = WAN.tokens // 128 // WAN.frames + 1  # as many blocks as the first frame would fill, were it contiguous
    frames = points(WAN, token_order("hilbert", WAN, (1, 1, 1), CPU).take)[: leading * 128, 0]
    assert (frames == 0).sum() / first < 0.04
    assert set(frames) == set(range(WAN.frames))
    assert first_frame_blocks("raster", WAN, (1, 1, 1), 128, CPU).sum() == leading


# Slots added for each real token, in percent. The flat curve is one tile as large as the grid.
@pytest.mark.parametrize(
    ("grid", "tile_444", "tile_448", "tile_288", "flat"),
    [
        (TokenGrid(13, 30, 45), 40.0, 40.0, 22.5, 0.65),
        (TokenGrid(21, 30, 52), 21.9, 31.3, 20.3, 0.02),
        (WAN, 21.9, 21.9, 11.7, 0.06),
        (TokenGrid(33, 45, 80), 16.4, 16.4, 9.9, 0.09),
    ],
)
def test_padding_tiles_costs_what_the_default_order_saves(grid, tile_444, tile_448, tile_288, flat):
    assert 100 * padding(grid, (4, 4, 4), 64) == pytest.approx(tile_444, abs=0.06)
    assert 100 * padding(grid, (4, 4, 8), 128) == pytest.approx(tile_448, abs=0.06)
    assert 100 * padding(grid, (2, 8, 8), 128) == pytest.approx(tile_288, abs=0.06)
    assert 100 * padding(grid, (grid.frames, grid.height, grid.width), 128) == pytest.approx(flat, abs=0.006)


@settings(deadline=None)
@given(grids, tiles, blocks)
def test_padding_fills_each_tile_to_whole_blocks(grid, tile, block):
    places = points(grid, torch.arange(grid.tokens))
    _, sizes = np.unique(places // tile, axis=0, return_counts=True)
    slots = sum(-(-size // block) * block for size in sizes)
    assert padding(grid, tile, block) == pytest.approx(slots / grid.tokens - 1)


def test_an_unknown_order_raises():
    with pytest.raises(ValueError, match="'zigzag'.*hilbert, tile, raster, pixel"):
        token_order("zigzag", WAN, (4, 4, 8), CPU)


def test_orders_made_in_inference_mode_serve_a_backward_pass():
    token_order.cache_clear()
    neighbours.cache_clear()
    first_frame_blocks.cache_clear()
    grid = TokenGrid(2, 3, 3)
    with torch.inference_mode():
        order = token_order("hilbert", grid, (1, 1, 1), CPU)
        tables = neighbours("hilbert", grid, (1, 1, 1), 4, CPU), first_frame_blocks("hilbert", grid, (1, 1, 1), 4, CPU)
    assert not any(table.is_inference() for table in tables)
    x = torch.arange(18.0, requires_grad=True)
    (x.index_select(0, order.take) * torch.arange(18.0)).sum().backward()
    assert torch.equal(x.grad, order.place.float())


def test_a_second_call_returns_the_same_tensors():
    first = token_order("hilbert", WAN, (4, 4, 8), CPU)
    assert token_order("hilbert", TokenGrid(21, 45, 80), (4, 4, 8), torch.device("cpu")) is first
