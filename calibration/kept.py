"""Which key blocks the heads of one attention call keep, and where in the frames these lie."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dit_sparse.attention import Call
from dit_sparse.head_kinds import KINDS, HeadKinds
from dit_sparse.kernels.permute import permute
from dit_sparse.layout import Layout, TokenGrid
from dit_sparse.order import token_order, vision_first
from dit_sparse.patterns import order_of, pattern_mask, tile_of
from dit_sparse.state import Generation, Part

Token = tuple[int, int, int]


@dataclass(frozen=True)
class Kept:
    """One call, of the last row of its batch.

    grid    the vision tokens
    blocks  [H, N, N] bool, query blocks by key blocks in the order in which the head has its tokens
    home    [H, tokens] int32, the block of each vision token by raster index
    dense   [H] bool, heads that computed every block
    """

    grid: TokenGrid
    blocks: np.ndarray
    home: np.ndarray
    dense: np.ndarray

    def frames(self, query: Token, heads: Sequence[int] | slice = slice(None)) -> np.ndarray:
        """[heads, frames, height, width] bool: the keys that a query token (frame, row, column) attends to.

        Raises ValueError for a token that is not in the grid.
        """
        shape = (self.grid.frames, self.grid.height, self.grid.width)
        if not all(0 <= at < side for at, side in zip(query, shape, strict=True)):
            raise ValueError(
                f"There is no token {' '.join(map(str, query))}: frames go to {shape[0] - 1}, rows to {shape[1] - 1} "
                f"and columns to {shape[2] - 1}."
            )
        token = np.ravel_multi_index(query, shape)
        blocks, home = self.blocks[heads], self.home[heads]
        rows = np.take_along_axis(blocks, home[:, token, None, None], 1)[:, 0]
        return np.take_along_axis(rows, home, 1).reshape(len(home), *shape)


def kept(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, generation: Generation, index: int) -> Kept | None:
    """What the call of layer `index` that was made last kept, with the same arguments; None if all of it was dense.

    Of an anchor: what the steps after it go by. Reads the device.
    """
    layer, grid = generation.layers[index], generation.grid
    if generation.moment is None or grid is None:
        return None
    before, behind = generation.around(layer, q.shape[2])
    text_mask = None if key_mask is None else generation.text_of(layer, key_mask)
    parts = generation.parts(layer)
    if all(part.phase == "dense" for part in parts):
        return None
    text = before + behind
    layout = next(part.config.layout(grid, text) for part in parts if part.phase != "dense")
    blocks = np.ones((layer.heads, layout.key_blocks, layout.key_blocks), dtype=bool)
    home = np.tile(np.arange(grid.tokens, dtype=np.int32) // layout.key_size, (layer.heads, 1))
    dense = np.zeros(layer.heads, dtype=bool)
    for part in parts:
        heads = np.arange(layer.heads)[slice(None) if part.heads is None else part.heads]
        if part.phase == "dense":
            dense[heads] = True
            continue
        if part.config.layout(grid, text) != layout:
            raise ValueError(f"{layer.name} has heads with blocks of different sizes, which share no map.")
        if part.config.method == "svg":
            _by_kind(part, layout, generation, heads, blocks, home)
            continue
        some = [x if part.heads is None else x[:, part.heads] for x in (q, k, v)]
        mask, place = _of_part(part, layout, generation, some, text_mask, before)
        # A query block is as many rows of the map as it is blocks of keys.
        blocks[heads] = mask.repeat(layout.block // layout.key_size, 1)[:, : layout.key_blocks]
        home[heads] = place // layout.key_size
    return Kept(grid, blocks, home, dense)


def _of_part(
    part: Part, layout: Layout, generation: Generation, some: list[Tensor], text_mask: Tensor | None, before: int
) -> tuple[np.ndarray, np.ndarray]:
    config, device = part.config, some[0].device
    pattern = config.method if config.has_pattern else None
    order = config.order if pattern is None else order_of(pattern)  # type: ignore[arg-type]
    tile = config.tile if pattern is None else tile_of(layout.grid, layout.block)
    place = token_order(order, layout.grid, tile, torch.device("cpu")).place.numpy()
    if config.learns:
        plan = generation.recall(part.layer).plan  # type: ignore[union-attr]  # recorded when it was an anchor
    else:
        q, k, v = permute(some, vision_first(order, layout.grid, tile, device, before).take)
        plan = Call(q, k, v, layout, config, text_mask, routes=True).plan(config.density)
    return plan.mask()[-1].cpu().numpy(), place


def _by_kind(
    part: Part, layout: Layout, generation: Generation, heads: np.ndarray, blocks: np.ndarray, home: np.ndarray
) -> None:
    kinds, config = generation.recall(part.layer), part.config
    assert isinstance(kinds, HeadKinds)
    for kind, own in zip(KINDS, kinds.heads, strict=True):
        mask = pattern_mask(kind, layout.grid, layout.block, config.density, config.first_frame)
        tile = tile_of(layout.grid, layout.block)
        place = token_order(order_of(kind), layout.grid, tile, torch.device("cpu")).place
        blocks[heads[list(own)]], home[heads[list(own)]] = mask.numpy(), place.numpy() // layout.block
