"""Where the tokens of one attention call lie."""

from dataclasses import dataclass

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
    """Vision tokens first, then `text` tokens; vision is cut into blocks of `block`, the last may be short."""

    grid: TokenGrid
    text: int = 0
    block: int = 128

    @property
    def tokens(self) -> int:
        return self.grid.tokens + self.text

    @property
    def blocks(self) -> int:
        return -(-self.grid.tokens // self.block)

    def lengths(self, device: torch.device | str) -> Tensor:
        """Real tokens per vision block, [N] int64; only the last can be short."""
        return block_lengths(self.grid.tokens, self.block, device)


def block_lengths(tokens: int, block: int, device: torch.device | str) -> Tensor:
    """Real tokens in each block of a sequence, [ceil(tokens / block)] int64."""
    return (tokens - torch.arange(0, tokens, block, device=device)).clamp(max=block)
