"""What an attention kernel is given besides q, k and v: which blocks to visit, and what to add for the rest."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockPlan:
    """Which key blocks each query block attends to.

    counts      [B, H, Nq]     int32, from 1 to W
    indices     [B, H, Nq, W]  int32, ascending in the first counts[...] places, anything in the others
    key_blocks  the number of key blocks the indices choose from
    """

    counts: Tensor
    indices: Tensor
    key_blocks: int

    @classmethod
    def from_mask(cls, mask: Tensor, width: int | None = None) -> "BlockPlan":
        """mask [B, H, Nq, Nk] bool, at least one True a row; width W is the longest list allowed, else Nk."""
        counts = mask.sum(-1, dtype=torch.int32)
        indices = torch.argsort((~mask).to(torch.int8), dim=-1, stable=True).to(torch.int32)
        return cls(counts, indices[..., : width or mask.shape[-1]].contiguous(), mask.shape[-1])

    @classmethod
    def full(
        cls, batch: int, heads: int, query_blocks: int, key_blocks: int, device: torch.device | str
    ) -> "BlockPlan":
        """Every row lists every block; in memory there is one list."""
        counts = torch.full((batch, heads, query_blocks), key_blocks, dtype=torch.int32, device=device)
        indices = torch.arange(key_blocks, dtype=torch.int32, device=device)
        return cls(counts, indices.expand(*counts.shape, key_blocks), key_blocks)

    def lists(self) -> tuple[Tensor, int]:
        """The indices as a kernel reads them, and the step from one row's list to the next: 0 where all share one."""
        *leading, step = self.indices.stride()
        shared = step == 1 and all(n == 1 or x == 0 for n, x in zip(self.indices.shape, leading, strict=False))
        return (self.indices, 0) if shared else (self.indices.contiguous(), self.indices.shape[-1])

    def mask(self) -> Tensor:
        """[B, H, Nq, Nk] bool."""
        place = torch.arange(self.indices.shape[-1], device=self.indices.device)
        listed = place < self.counts[..., None]
        mask = self.indices.new_zeros(*self.indices.shape[:-1], self.key_blocks + 1, dtype=torch.bool)
        # Places past the count go to a column of their own, which is cut off.
        return mask.scatter_(-1, torch.where(listed, self.indices, self.key_blocks).long(), True)[..., :-1]

    def density(self) -> float:
        """Share of (query block, key block) pairs visited. Reads the device."""
        return self.counts.double().mean().item() / self.key_blocks

    def check(self) -> None:
        """Raise ValueError unless the plan is legal. Reads the device, so not for the hot path."""
        width = self.indices.shape[-1]
        if self.counts.dtype != torch.int32 or self.indices.dtype != torch.int32:
            raise ValueError(f"A plan is int32, not {self.counts.dtype} counts and {self.indices.dtype} indices.")
        if self.counts.shape != self.indices.shape[:-1]:
            raise ValueError(f"Counts {tuple(self.counts.shape)} do not fit indices {tuple(self.indices.shape)}.")
        low, high = self.counts.min().item(), self.counts.max().item()
        if low < 1 or high > width:
            raise ValueError(f"Counts must lie in 1..{width}, but they span {low}..{high}.")
        listed = torch.arange(width, device=self.indices.device) < self.counts[..., None]
        inside = (self.indices >= 0) & (self.indices < self.key_blocks)
        if not (inside | ~listed).all():
            bad = self.indices[listed & ~inside][0].item()
            raise ValueError(f"Key block {bad} is out of range: there are {self.key_blocks}.")
        rising = self.indices[..., 1:] > self.indices[..., :-1]
        if not (rising | ~listed[..., 1:]).all():
            raise ValueError("The indices of a row must ascend without repeats in its first counts[...] places.")


@dataclass(frozen=True)
class SecondOrder:
    """What the spread of a pooled key's tokens adds to its logits: for key block m and query block n
    min(½ scale² Σ_d E_n[q_d²] variances_md, limit), scale being the attention's own.

    q_mean, q_var  [B, H, Nq, D]  mean and variance of each block's queries, float32 (float64 for float64)
    variances      [B, H, N, D]   those of each block's keys, likewise
    """

    q_mean: Tensor
    q_var: Tensor
    variances: Tensor
    limit: float = math.inf


@dataclass(frozen=True)
class Tail:
    """The blocks a plan leaves out, each as one pseudo-key that stands for all its tokens.

    keys, values  [B, H, N, D]   block means
    log_weights   [N] or [B, N]  what is added to their logits, ln of the number of real tokens, a float type
    second        what is added besides; the kernels make of it what each query block adds
    """

    keys: Tensor
    values: Tensor
    log_weights: Tensor
    second: SecondOrder | None = None


@dataclass(frozen=True)
class Residual:
    """What is added to the output, per row ([B, H, L, ...]) or per query block ([B, H, Nq, ...]).

    kind   codes                            scales
    full   [..., D] any float type          None, or [...] float32
    fp8    [..., D] uint8, bits of e4m3     [...] float32, one a row
    int4   [..., D/2] uint8, two a byte     [...] float32, one a row
    """

    codes: Tensor
    scales: Tensor | None = None
    kind: Literal["full", "fp8", "int4"] = "full"


@dataclass(frozen=True)
class Correction:
    """out = scale * merge(exact, tail) + residual, the one form every method here takes.

    scale  [B, H, L] or [B, H, Nq], float32; None is 1
    """

    scale: Tensor | None = None
    residual: Residual | None = None
    tail: Tail | None = None
