"""Some heads of tensors [B, H, ...]: read, and written to."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def picks(heads: Sequence[int]) -> slice | list[int]:
    """What picks these ascending heads: a slice, which needs no copy, if they are equally far apart."""
    first, last = heads[0], heads[-1]
    every = range(first, last + 1, max(1, (last - first) // max(1, len(heads) - 1)))
    return slice(first, last + 1, every.step) if tuple(every) == tuple(heads) else list(heads)


def take(x: Tensor, heads: slice | list[int]) -> Tensor:
    """x [B, H, ...] -> [B, picked, ...]"""
    return x[:, heads] if isinstance(heads, slice) else x.index_select(1, _index(tuple(heads), x.device))


def put(x: Tensor, heads: slice | list[int], some: Tensor) -> None:
    """Write `some` [B, picked, ...] to those heads of x [B, H, ...]."""
    if isinstance(heads, slice):
        x[:, heads] = some
    else:
        x.index_copy_(1, _index(tuple(heads), x.device), some)


@lru_cache(maxsize=4096)
@torch.inference_mode(False)
def _index(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """Made once: to bring it to a GPU takes longer than to use it there, and cannot be captured in a graph."""
    return torch.tensor(heads, device=device)
