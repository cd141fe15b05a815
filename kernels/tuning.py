"""Tile sizes of the kernels that multiply every query with keys."""

from typing import NamedTuple


class Tile(NamedTuple):
    rows: int  # queries per program; at most the block
    columns: int  # keys per step; at most the block
    warps: int
    stages: int


# Oldest compute capability -> (bytes per element, head dim padded to 64, 128 or 256) -> tile for blocks of 128;
# smaller blocks cut it down. Nothing spills: tests/kernels/test_block_attention_aot.py reads the cubins.
ATTENTION: dict[int, dict[tuple[int, int], Tile]] = {
    # No warpgroup instructions: queries and both products sit in registers. Also for 8.9 and 12.x, with 100 KB shared.
    80: {
        (2, 64): Tile(128, 64, 8, 3),
        (2, 128): Tile(128, 32, 8, 3),
        (2, 256): Tile(32, 32, 8, 2),
        (4, 64): Tile(32, 32, 8, 1),
        (4, 128): Tile(16, 16, 8, 1),
    },
    # Tried on an H200, 2026-11-23, triton 3.6; what the tile of (2, 128) reaches stands in kernels/README.md.
    90: {
        (2, 64): Tile(64, 128, 4, 2),
        (2, 128): Tile(128, 128, 8, 3),
        (2, 256): Tile(16, 32, 8, 2),
        (4, 64): Tile(32, 32, 8, 1),
        (4, 128): Tile(16, 16, 8, 1),
    },
    100: {
        (2, 64): Tile(128, 64, 8, 3),
        (2, 128): Tile(128, 64, 8, 3),
        (2, 256): Tile(64, 32, 8, 2),
        (4, 64): Tile(32, 32, 8, 1),
        (4, 128): Tile(16, 16, 8, 1),
    },
}


def attention_tile(capability: int, itemsize: int, head_dim: int, block: int) -> Tile:
    """The tile for a GPU of `capability` (80, 90, ...), inputs of `itemsize` bytes, the padded head dim, a block."""
    newest = max(oldest for oldest in ATTENTION if oldest <= capability) if capability < 120 else 80
    tile = ATTENTION[newest][itemsize, head_dim]
    return tile._replace(rows=min(tile.rows, block), columns=min(tile.columns, block))


def mass_tile(capability: int, itemsize: int, head_dim: int, block: int) -> Tile:
    """The tile of `block_mass`, rows of mean queries, for the same arguments; a step has a block of keys at least.

    Tried on an H200, 2026-11-28, triton 3.6, Wan 14B's 720p: of 64, 128 and 256 rows, 128 and 256 keys, 4 and 8 warps,
    and 1 to 4 stages this is the fastest: two programs share a multiprocessor, where one of 128 rows fills it.
    """
    if itemsize * head_dim > 256:
        keys = max(32, block)
        return Tile(32, keys, 8 if itemsize * head_dim * keys <= 32768 else 16, 1)
    # Without warpgroup instructions queries and logits take registers that four warps lack.
    return Tile(64, 128, *((4, 3) if 90 <= capability < 120 else (8, 2)))
