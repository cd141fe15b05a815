from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from dit_sparse.layout import TokenGrid
from dit_sparse.predict import ModelShape


class Attend(Protocol):
    """The attention call a processor makes: q, k, v [B, H, L, D], vision first, then text -> [B, H, L, D]."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...

    def dense(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, processor: Any, reason: str) -> Tensor: ...


@dataclass(frozen=True)
class Family:
    """All that differs from one model family to the next.

    name               what users call it
    is_self_attention  by module name: attention this library replaces; the rest keeps its processor
    grid               (transformer, forward's hidden_states) -> the vision tokens attention will see
    processor          (attend) -> a diffusers attention processor for one module
    stock              () -> the processor diffusers gives such a module
    shape              (transformer config, height, width, num_frames, vae config) -> ModelShape
    """

    name: str
    is_self_attention: Callable[[str], bool]
    grid: Callable[[nn.Module, Tensor], TokenGrid]
    processor: Callable[[Attend], Any]
    stock: Callable[[], Any]
    shape: Callable[[Mapping[str, Any], int, int, int, Mapping[str, Any]], ModelShape]
