"""Wan 2.1 and 2.2, and VACE: self-attention is `attn1`, vision tokens only; text comes through cross-attention."""

import math
from collections.abc import Mapping
from typing import Any

from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from dit_sparse.layout import TokenGrid
from dit_sparse.models import Size
from dit_sparse.pipelines.family import Family, Forward
from dit_sparse.pipelines.swap import swapped
from dit_sparse.predict import ModelShape


def _forward(transformer: Any, call: Mapping[str, Any]) -> Forward:
    latents = call["hidden_states"]
    grid = TokenGrid(*(n // p for n, p in zip(latents.shape[2:], transformer.config.patch_size, strict=True)))
    return Forward(grid, len(latents), latents.device, call["timestep"], call.get("encoder_hidden_states"))


def _size(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Size:
    frames, *sides = transformer["patch_size"]
    spatial, temporal = vae.get("scale_factor_spatial", 8), vae.get("scale_factor_temporal", 4)
    # WanPipeline refuses what is no multiple of 16, whatever the autoencoder and the patches are.
    return Size(math.lcm(16, *(spatial * side for side in sides)), temporal * frames)


def _shape(
    transformer: Mapping[str, Any], height: int, width: int, num_frames: int, vae: Mapping[str, Any]
) -> ModelShape:
    temporal, spatial = vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8)
    latent = ((num_frames - 1) // temporal + 1, height // spatial, width // spatial)
    return ModelShape(
        grid=TokenGrid(*(n // p for n, p in zip(latent, transformer["patch_size"], strict=True))),
        heads=transformer["num_attention_heads"],
        head_dim=transformer["attention_head_dim"],
        # VACE has blocks beside, which go over what it is to be controlled by.
        layers=transformer["num_layers"] + len(transformer.get("vace_layers", ())),
        ffn_dim=transformer["ffn_dim"],
        text_tokens=512,
    )


FAMILY = Family(
    name="wan",
    is_self_attention=lambda name: name.endswith(".attn1"),
    forward=_forward,
    processors=swapped(WanAttnProcessor),
    stock=lambda *_: WanAttnProcessor(),
    size=_size,
    shape=_shape,
)
