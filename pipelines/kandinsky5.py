"""Kandinsky 5: self-attention of the visual blocks, vision tokens only; text comes through cross-attention."""

from collections.abc import Mapping
from typing import Any

from diffusers.models.transformers.transformer_kandinsky import Kandinsky5AttnProcessor

from dit_sparse.layout import TokenGrid
from dit_sparse.models import Size
from dit_sparse.pipelines.family import Family, Forward
from dit_sparse.pipelines.swap import swapped
from dit_sparse.predict import ModelShape


def _forward(transformer: Any, call: Mapping[str, Any]) -> Forward:
    if call.get("sparse_params") is not None:
        raise ValueError(
            "This Kandinsky 5 model is sparse already, by NABLA, for which it was trained: restore() first, or use a "
            "model whose attention_type is 'regular'."
        )
    latents = call["hidden_states"]
    # Channels last.
    grid = TokenGrid(*(n // p for n, p in zip(latents.shape[1:4], transformer.config.patch_size, strict=True)))
    return Forward(grid, len(latents), latents.device, call["timestep"], call["encoder_hidden_states"])


def _size(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Size:
    frames, side, _ = transformer["patch_size"]
    spatial, temporal = vae.get("spatial_compression_ratio", 8), vae.get("temporal_compression_ratio", 4)
    return Size(spatial * side, temporal * frames)


def _shape(
    transformer: Mapping[str, Any], height: int, width: int, num_frames: int, vae: Mapping[str, Any]
) -> ModelShape:
    spatial, temporal = vae.get("spatial_compression_ratio", 8), vae.get("temporal_compression_ratio", 4)
    latent = ((num_frames - 1) // temporal + 1, height // spatial, width // spatial)
    head_dim = sum(transformer["axes_dims"])
    return ModelShape(
        grid=TokenGrid(*(n // p for n, p in zip(latent, transformer["patch_size"], strict=True))),
        heads=transformer["model_dim"] // head_dim,
        head_dim=head_dim,
        layers=transformer["num_visual_blocks"],
        ffn_dim=transformer["ff_dim"],
        text_tokens=256,
    )


FAMILY = Family(
    name="kandinsky5",
    is_self_attention=lambda name: name.startswith("visual_") and name.endswith(".self_attention"),
    forward=_forward,
    processors=swapped(Kandinsky5AttnProcessor),
    stock=lambda *_: Kandinsky5AttnProcessor(),
    size=_size,
    shape=_shape,
    heads=lambda module: (module.num_heads, module.query_norm.normalized_shape[0]),
)
