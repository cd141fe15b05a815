"""Tile sizes of the attention kernel, in one table."""

from typing import NamedTuple


class Tile(NamedTuple):
    rows: int  # queries per program; at most the block
    columns: int  # keys per step; at most the block
    warps: int
    stages: int


# (bytes per element, head dim padded to a power of two) -> tile for blocks of 128; smaller blocks cut it down.
# Chosen so that nothing spills on sm_80, sm_90 and sm_100 (tests/kernels/test_aot.py reads the cubins).
ATTENTION: dict[tuple[int, int], Tile] = {
    (2, 16): Tile(128, 64, 4, 3),
    (2, 32): Tile(128, 64, 4, 3),
    (2, 64): Tile(128, 64, 4, 3),
    (2, 128): Tile(128, 64, 8, 3),
    (2, 256): Tile(64, 32, 8, 2),
    (4, 16): Tile(64, 32, 4, 2),
    (4, 32): Tile(64, 32, 4, 2),
    (4, 64): Tile(64, 32, 4, 2),
    (4, 128): Tile(32, 32, 8, 1),
    (4, 256): Tile(16, 16, 8, 1),
}


def attention_tile(itemsize: int, head_dim: int, block: int) -> Tile:
    """The tile for inputs of `itemsize` bytes, head dim padded to a power of two, and blocks of `block` tokens."""
    tile = ATTENTION[itemsize, head_dim]
    return tile._replace(rows=min(tile.rows, block), columns=min(tile.columns, block))
