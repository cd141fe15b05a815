from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dit_sparse.layout import TokenGrid
from dit_sparse.models import Size
from dit_sparse.predict import ModelShape


class Attend(Protocol):
    """The attention call a processor makes: q, k, v [B, H, L, D], key_mask [B, L] (False: padding) -> [B, H, L, D]."""

    joint: bool  # whether text is among the tokens

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor: ...

    def fall_back(self, reason: str, pairs: float) -> None: ...

    def unshardable(self, shards: int) -> str | None:
        """Why this layer cannot be sparse on one of so many processes, if it cannot; 0 are those of a ring."""

    def sharded(self, shards: int) -> "Attend":
        """The same call for tokens that lie part behind part, each with its share of text and of vision."""

    def dealt(self, device: torch.device) -> Tensor | None:
        """The order in which heads are to go to the processes, if not in their own."""


@dataclass(frozen=True)
class Forward:
    """What one forward of a transformer is about to attend over.

    grid      the vision tokens, as the model's own arguments tell; attention raises where it finds another number
    batch     rows of the batch, with both branches of guidance where they come together
    device    where it runs
    timestep  falls from step to step
    prompt    tells branches apart where the pipeline does not
    before    tokens of text that joint attention has before the vision tokens
    after     the same behind them; reference images count as text
    """

    grid: TokenGrid
    batch: int
    device: torch.device
    timestep: Tensor
    prompt: object
    before: int = 0
    after: int = 0


def spatial_scale(vae: Mapping[str, Any]) -> int:
    """Pixels along a side of a latent: image autoencoders halve between any two of their blocks."""
    return 2 ** (len(vae.get("block_out_channels", range(4))) - 1)


def image_size(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Size:
    """Of families whose tokens are square patches of an image autoencoder's latents."""
    return Size(spatial_scale(vae) * transformer["patch_size"])


def image_grid(transformer: Any, latents: Tensor) -> TokenGrid:
    """The same families' tokens of latents [B, C, H, W]."""
    side = transformer.config.patch_size
    return TokenGrid(1, latents.shape[2] // side, latents.shape[3] // side)


def image_forward(transformer: Any, call: Mapping[str, Any]) -> Forward:
    """The same, where text comes through cross-attention."""
    latents, text = call["hidden_states"], call.get("encoder_hidden_states")
    return Forward(image_grid(transformer, latents), len(latents), latents.device, call["timestep"], text)


@dataclass(frozen=True)
class Family:
    """All that differs from one model family to the next.

    name               what users call it
    is_self_attention  by module name: attention this library replaces; the rest keeps its processor
    forward            (transformer, arguments of its forward by name) -> Forward
    processors         by diffusers' processor, (attend) -> ours for a module that has that one
    stock              (module name, transformer) -> the processor diffusers gives such a module
    size               (transformer config, vae config) -> Size
    shape              (transformer config, height, width, num_frames, vae config) -> ModelShape
    is_joint           by module name: self-attention that has text among its tokens
    one_forward        whether both branches of guidance come in one batch
    beyond             whether its pipelines go guidance_scale times beyond what the prompt says, not from what it
                       does not: p + w (p - n) instead of n + w (p - n)
    heads              (attention module) -> heads, and channels of each
    on_host            arguments that `forward` reads: it is given them on the CPU
    """

    name: str
    is_self_attention: Callable[[str], bool]
    forward: Callable[[Any, Mapping[str, Any]], Forward]
    processors: Mapping[type, Callable[[Attend], Any]]
    stock: Callable[[str, Any], Any]
    size: Callable[[Mapping[str, Any], Mapping[str, Any]], Size]
    shape: Callable[[Mapping[str, Any], int, int, int, Mapping[str, Any]], ModelShape]
    is_joint: Callable[[str], bool] = lambda _: False
    one_forward: bool = False
    beyond: bool = False
    heads: Callable[[Any], tuple[int, int]] = lambda module: (module.heads, module.inner_dim // module.heads)
    on_host: tuple[str, ...] = ()
