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


@settings(deadline=None)
@given(grids, st.sampled_from((None, 16, 32, 64)))
def test_keys_have_blocks_of_their_own_size_or_those_of_queries(grid, key_block):
    layout = Layout(grid, 7, 64, key_block)
    assert layout.key_size == (64 if key_block is None else key_block)
    lengths = layout.key_lengths("cpu")
    assert len(lengths) == layout.key_blocks and lengths.sum() == grid.tokens
    assert lengths.max() == min(layout.key_size, grid.tokens)


@pytest.mark.parametrize("key_block", [0, -16, 24, 128])
def test_blocks_of_keys_that_do_not_divide_those_of_queries_raise(key_block):
    with pytest.raises(ValueError, match=f"key_block must divide a block of 64 tokens, not {key_block}"):
        Layout(TokenGrid(1, 8, 8), block=64, key_block=key_block)
