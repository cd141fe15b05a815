"""Inputs as models hand them over."""

import torch
from torch import Tensor

LAYOUTS = ("BHLD", "BLHD", "fused")


def strided(layout: str, batch: int, heads: int, tokens: int, dim: int, **options) -> Tensor:
    """[B, H, L, D] of random numbers: contiguous, on top of [B, L, H, D], or the middle of a fused projection."""
    if layout == "BHLD":
        return torch.randn(batch, heads, tokens, dim, **options)
    if layout == "BLHD":
        return torch.randn(batch, tokens, heads, dim, **options).transpose(1, 2)
    return torch.randn(batch, tokens, 3, heads, dim, **options)[:, :, 1].transpose(1, 2)
