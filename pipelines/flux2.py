"""Flux.2: text first, then the image and any reference images; single blocks project attention and MLP in one."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffusers.models.transformers.transformer_flux2 import Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor

from dit_sparse.models import Size
from dit_sparse.pipelines import flux
from dit_sparse.pipelines.swap import swapped
from dit_sparse.predict import ModelShape


def _side(vae: Mapping[str, Any]) -> int:
    return 2 * 2 ** (len(vae.get("block_out_channels", range(4))) - 1)


def _size(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Size:  # noqa: ARG001
    return Size(_side(vae))


def _shape(
    transformer: Mapping[str, Any], height: int, width: int, num_frames: int, vae: Mapping[str, Any]
) -> ModelShape:
    shape = flux.FAMILY.shape(transformer, height, width, num_frames, vae)
    # A SwiGLU has three matrices where a plain feed-forward part has two.
    return replace(shape, ffn_dim=int(1.5 * transformer["mlp_ratio"] * shape.heads * shape.head_dim))


FAMILY = replace(
    flux.FAMILY,
    name="flux2",
    processors=swapped(Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor),
    stock=lambda name, _: Flux2ParallelSelfAttnProcessor() if name.startswith("single") else Flux2AttnProcessor(),
    size=_size,
    shape=_shape,
)
