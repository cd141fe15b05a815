"""Cosmos Predict 1, 2 and 2.5: self-attention is `attn1`, vision tokens only; text comes through cross-attention."""

from collections.abc import Mapping
from typing import Any

from diffusers.models.transformers.transformer_cosmos import CosmosAttnProcessor2_0, CosmosAttnProcessor2_5

from dit_sparse.layout import TokenGrid
from dit_sparse.models import Size
from dit_sparse.pipelines.family import Family, Forward
from dit_sparse.pipelines.swap import swapped
from dit_sparse.predict import ModelShape


def _forward(transformer: Any, call: Mapping[str, Any]) -> Forward:
    latents, prompt = call["hidden_states"], call["encoder_hidden_states"]
    grid = TokenGrid(*(n // p for n, p in zip(latents.shape[2:], transformer.config.patch_size, strict=True)))
    prompt = prompt[0] if isinstance(prompt, tuple) else prompt
    return Forward(grid, len(latents), latents.device, call["timestep"], prompt)


def _scales(vae: Mapping[str, Any]) -> tuple[int, int]:
    # Cosmos 1 has an autoencoder of its own, the others have Wan's.
    temporal = vae.get("temporal_compression_ratio") or vae.get("scale_factor_temporal") or 4
    return temporal, vae.get("spatial_compression_ratio") or vae.get("scale_factor_spatial") or 8


def _size(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Size:
    temporal, spatial = _scales(vae)
    return Size(spatial * transformer["patch_size"][1], temporal * transformer["patch_size"][0])


def _shape(
    transformer: Mapping[str, Any], height: int, width: int, num_frames: int, vae: Mapping[str, Any]
) -> ModelShape:
    temporal, spatial = _scales(vae)
    latent = ((num_frames - 1) // temporal + 1, height // spatial, width // spatial)
    heads, head_dim = transformer["num_attention_heads"], transformer["attention_head_dim"]
    return ModelShape(
        grid=TokenGrid(*(n // p for n, p in zip(latent, transformer["patch_size"], strict=True))),
        heads=heads,
        head_dim=head_dim,
        layers=transformer["num_layers"],
        ffn_dim=int(transformer.get("mlp_ratio", 4) * heads * head_dim),
        text_tokens=512,
    )


FAMILY = Family(
    name="cosmos",
    is_self_attention=lambda name: name.endswith(".attn1"),
    forward=_forward,
    processors=swapped(CosmosAttnProcessor2_0),
    # Only 2.5 attends to an image, too.
    stock=lambda name, transformer: (
        CosmosAttnProcessor2_5()
        if name.endswith(".attn2") and transformer.config.img_context_dim_in
        else CosmosAttnProcessor2_0()
    ),
    size=_size,
    shape=_shape,
    beyond=True,
)
