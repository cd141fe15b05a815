import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.layout import Layout, TokenGrid, block_lengths

grids = st.builds(TokenGrid, st.integers(1, 9), st.integers(1, 40), st.integers(1, 40))


@pytest.mark.parametrize("sides", [(0, 4, 4), (4, 0, 4), (4, 4, -1)])
def test_an_empty_grid_raises(sides):
    with pytest.raises(ValueError, match="at least one frame, row and column"):
        TokenGrid(*sides)


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 200))
def test_block_lengths_are_full_but_for_the_last(tokens, block):
    lengths = block_lengths(tokens, block, "cpu")
    assert lengths.dtype == torch.int64
    assert lengths.sum() == tokens
    assert (lengths[:-1] == block).all()
    assert 1 <= lengths[-1] <= block


@settings(deadline=None)
@given(grids, st.integers(0, 300), st.sampled_from((16, 32, 64, 128)))
def test_text_comes_on_top_of_the_blocks_of_vision(grid, text, block):
    layout = Layout(grid, text, block)
    assert grid.tokens == grid.frames * grid.height * grid.width
    assert layout.tokens == grid.tokens + text
    lengths = layout.lengths("cpu")
    assert len(lengths) == layout.blocks
    assert lengths.sum() == grid.tokens
