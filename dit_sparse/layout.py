"""Where the tokens of one attention call lie."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenGrid:
    """Vision tokens after patchify, raster order (frame, row, column)."""

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.frames, self.height, self.width) < 1:
            raise ValueError(f"A token grid needs at least one frame, row and column, not {self}.")

    @property
    def tokens(self) -> int:
        return self.frames * self.height * self.width


@dataclass(frozen=True)
class Layout:
    """Vision tokens first, then `text` tokens; vision is cut into blocks of `block`, the last may be short, and for
    keys into those of `key_block`, which divides it and is the same unless given."""

    grid: TokenGrid
    text: int = 0
    block: int = 128
    key_block: int | None = None

    def __post_init__(self) -> None:
        if self.key_block is not None and (self.key_block < 1 or self.block % self.key_block):
            raise ValueError(f"key_block must divide a block of {self.block} tokens, not {self.key_block}.")

    @property
    def tokens(self) -> int:
        return self.grid.tokens + self.text

    @property
    def key_size(self) -> int:
        """Tokens per block of keys."""
        return self.block if self.key_block is None else self.key_block

    @property
    def blocks(self) -> int:
        return -(-self.grid.tokens // self.block)

    @property
    def key_blocks(self) -> int:
        return -(-self.grid.tokens // self.key_size)

    def lengths(self, device: torch.device | str) -> Tensor:
        """Real tokens per vision block, [N] int64; only the last can be short."""
        return block_lengths(self.grid.tokens, self.block, device)

    def key_lengths(self, device: torch.device | str) -> Tensor:
        """The same of blocks of keys."""
        return block_lengths(self.grid.tokens, self.key_size, device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def block_lengths(tokens: int, block: int, device: torch.device | str) -> Tensor:
    """Real tokens in each block of a sequence, [ceil(tokens / block)] int64; not to be written to, nor to be asked for
    first under a fake mode or in a graph's capture: it is made once."""
    return (tokens - torch.arange(0, tokens, block, device="cpu")).clamp(max=block).to(device)
