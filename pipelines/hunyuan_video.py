"""HunyuanVideo: vision first, then padded text, in double and single blocks; the text refiner is left alone."""

from collections.abc import Mapping
from typing import Any

from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0

from dit_sparse.layout import TokenGrid
from dit_sparse.models import Size
from dit_sparse.pipelines.family import Family, Forward
from dit_sparse.pipelines.swap import swapped
from dit_sparse.predict import ModelShape


def _is_self_attention(name: str) -> bool:
    return name.startswith(("transformer_blocks.", "single_transformer_blocks.")) and name.endswith(".attn")


def _patch(transformer: Mapping[str, Any]) -> tuple[int, int, int]:
    return transformer["patch_size_t"], transformer["patch_size"], transformer["patch_size"]


def _forward(transformer: Any, call: Mapping[str, Any]) -> Forward:
    latents, text = call["hidden_states"], call["encoder_hidden_states"]
    grid = TokenGrid(*(n // p for n, p in zip(latents.shape[2:], _patch(transformer.config), strict=True)))
    return Forward(grid, len(latents), latents.device, call["timestep"], text, after=text.shape[1])


def _size(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Size:
    frames, side, _ = _patch(transformer)
    spatial, temporal = vae.get("spatial_compression_ratio", 8), vae.get("temporal_compression_ratio", 4)
    # HunyuanVideoPipeline refuses what is no multiple of 16.
    return Size(max(16, spatial * side), temporal * frames)


def _shape(
    transformer: Mapping[str, Any], height: int, width: int, num_frames: int, vae: Mapping[str, Any]
) -> ModelShape:
    spatial, temporal = vae.get("spatial_compression_ratio", 8), vae.get("temporal_compression_ratio", 4)
    latent = ((num_frames - 1) // temporal + 1, height // spatial, width // spatial)
    heads, head_dim = transformer["num_attention_heads"], transformer["attention_head_dim"]
    return ModelShape(
        grid=TokenGrid(*(n // p for n, p in zip(latent, _patch(transformer), strict=True))),
        heads=heads,
        head_dim=head_dim,
        layers=transformer["num_layers"] + transformer["num_single_layers"],
        ffn_dim=int(transformer["mlp_ratio"] * heads * head_dim),
        text_tokens=0,
        joint_text=256,
    )


FAMILY = Family(
    name="hunyuan-video",
    is_self_attention=_is_self_attention,
    is_joint=_is_self_attention,
    forward=_forward,
    processors=swapped(HunyuanVideoAttnProcessor2_0),
    stock=lambda name, _: HunyuanVideoAttnProcessor2_0() if _is_self_attention(name) else AttnProcessor2_0(),
    size=_size,
    shape=_shape,
)
