"""A forward, one of its self-attention modules, and what some of its heads do in it."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dit_sparse.choices import Phase
from dit_sparse.config import SparseConfig, Storage
from dit_sparse.correction import Learned


@dataclass(frozen=True)
class Moment:
    """One forward of a transformer inside a generation."""

    step: int
    branch: str  # "cond", "uncond", ... as the pipeline says, else "branch 0", "branch 1", ...
    timestep: float
    total: int | None  # steps of the whole run, where known


@dataclass(frozen=True)
class Layer:
    """One self-attention module of a transformer."""

    name: str  # "transformer_2.blocks.0.attn1"
    index: int  # among the self-attention modules of its transformer
    of: int  # how many there are
    heads: int  # that this process has
    head_dim: int
    joint: bool = True  # whether text is among its tokens
    share: int = 0  # which of `shares` equal parts of the module's heads these are
    shares: int = 1
    dealt: tuple[int, ...] = ()  # all of the module's heads in the order they are shared out, if not in their own

    @property
    def held(self) -> Sequence[int]:
        """Which of the module's heads these are."""
        order = self.dealt or range(self.heads * self.shares)
        return order[self.share * self.heads : (self.share + 1) * self.heads]


@dataclass(frozen=True)
class Part:
    """Heads of a layer that do the same in this forward; `layer` is these heads alone, named for their memory.

    heads   which of the layer's, None for all
    rho     [heads, query blocks] float32, a profile's share of softmax mass in the routed blocks; None elsewhere
    fade    [heads] float32, how much of an anchor's residual a profile has added after it; None is all of it
    learned what these heads remember, if it is not what the generation knows by the layer's name
    """

    layer: Layer
    heads: slice | list[int] | None
    phase: Phase
    config: SparseConfig
    storage: Storage | None
    rho: Tensor | None = None
    fade: Tensor | None = None
    learned: Learned | None = None
