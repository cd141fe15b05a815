import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.layout import TokenGrid
from dit_sparse.order import token_order
from dit_sparse.window import band_density, window_plan, window_radius

CPU = torch.device("cpu")
IMAGE = TokenGrid(1, 64, 64)
COG = TokenGrid(13, 30, 45)
COG_TEXT = 226

grids = st.builds(TokenGrid, st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))
shares = st.floats(0.01, 1)
texts = st.integers(0, 9)


def token_mask(grid: TokenGrid, kept: float, text: int, take: torch.Tensor) -> torch.Tensor:
    """The window token by token, straight from its definition, [tokens, tokens] bool."""
    frame, tokens = grid.height * grid.width, grid.tokens + text
    pixel = (take % frame).tolist()
    rows = [
        [
            i >= grid.tokens or j >= grid.tokens or abs(pixel[i] - pixel[j]) <= int(frame * kept) // 2
            for j in range(tokens)
        ]
        for i in range(tokens)
    ]
    return torch.tensor(rows)


def test_radii_are_those_of_the_paper():
    assert window_radius(64 * 64, 1 / 32) == 64
    assert window_radius(30 * 45, 1 / 32) == 21
    assert window_radius(100, 0.58) == 29  # 0.58 * 100 is 57.99... in floats


@pytest.mark.parametrize("kept", [0, -0.1, 1.5, float("nan")])
def test_a_share_outside_zero_to_one_raises(kept):
    with pytest.raises(ValueError, match="above 0 and is at most 1"):
        window_radius(100, kept)


@pytest.mark.parametrize(
    ("grid", "kept", "text", "percent"),
    [
        (IMAGE, 1 / 32, 0, 3.1246),
        (COG, 1 / 32, 0, 3.1598),
        (COG, 1 / 32, COG_TEXT, 5.61),
        (COG, 1 / 16, COG_TEXT, 8.57),
    ],
)
def test_token_densities_are_those_of_the_released_masks(grid, kept, text, percent):
    digits = len(str(percent).split(".")[1])
    assert round(100 * band_density(grid, kept, text), digits) == percent


def test_a_video_row_away_from_the_borders_sees_785_keys():
    frame = TokenGrid(1, COG.height, COG.width)
    mask = window_plan(frame, 1 / 32, 0, token_order("raster", frame, (1, 1, 1), CPU), 1)
    assert COG.frames * mask[frame.tokens // 2].sum() + COG_TEXT == 785


@settings(deadline=None)
@given(grids, shares, texts)
def test_band_density_counts_the_token_mask(grid, kept, text):
    mask = token_mask(grid, kept, text, torch.arange(grid.tokens))
    assert band_density(grid, kept, text) == pytest.approx(mask.double().mean().item())


# Of the mask of Re-ttention on CogVideoX and on a 64 x 64 image, the share of blocks that hold anything, in percent.
@pytest.mark.parametrize(
    ("kind", "grid", "text", "block", "percent"),
    [
        ("raster", COG, COG_TEXT, 128, 23.8),
        ("raster", COG, COG_TEXT, 64, 15.0),
        ("raster", COG, COG_TEXT, 32, 10.45),
        ("pixel", COG, COG_TEXT, 128, 7.8),
        ("pixel", COG, COG_TEXT, 64, 6.7),
        ("raster", IMAGE, 0, 128, 9.2),
        ("raster", IMAGE, 0, 64, 4.6),
    ],
)
def test_block_occupancy(kind, grid, text, block, percent):
    mask = window_plan(grid, 1 / 32, text, token_order(kind, grid, (1, 1, 1), CPU), block)
    assert 100 * mask.double().mean().item() == pytest.approx(percent, abs=0.05)


@settings(deadline=None)
@given(
    grids, shares, texts, st.sampled_from(("hilbert", "tile", "raster", "pixel")), st.sampled_from((1, 2, 3, 4, 7, 16))
)
def test_blocks_are_kept_if_any_pair_of_their_tokens_is(grid, kept, text, kind, block):
    order = token_order(kind, grid, (2, 2, 3), CPU)
    tokens = token_mask(grid, kept, text, order.take)
    blocks = -(-len(tokens) // block)
    padded = torch.zeros(blocks * block, blocks * block, dtype=torch.bool)
    padded[: len(tokens), : len(tokens)] = tokens
    expected = padded.view(blocks, block, blocks, block).any(3).any(1)
    assert torch.equal(window_plan(grid, kept, text, order, block), expected)
