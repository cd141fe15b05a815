"""CogVideoX 2B, 5B and 1.5: text first, both branches of guidance in one batch."""

from collections.abc import Mapping
from typing import Any

from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0

from dit_sparse.layout import TokenGrid
from dit_sparse.models import Size
from dit_sparse.pipelines.family import Family, Forward, spatial_scale
from dit_sparse.pipelines.swap import swapped
from dit_sparse.predict import ModelShape


def _is_self_attention(name: str) -> bool:
    return name.endswith(".attn1")


def _forward(transformer: Any, call: Mapping[str, Any]) -> Forward:
    latents, text = call["hidden_states"], call["encoder_hidden_states"]
    _, frames, _, height, width = latents.shape
    side, depth = transformer.config.patch_size, transformer.config.patch_size_t or 1
    grid = TokenGrid(frames // depth, height // side, width // side)
    return Forward(grid, len(latents), latents.device, call["timestep"], text, before=text.shape[1])


def _size(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Size:
    return Size(spatial_scale(vae) * transformer["patch_size"], vae.get("temporal_compression_ratio", 4))


def _shape(
    transformer: Mapping[str, Any], height: int, width: int, num_frames: int, vae: Mapping[str, Any]
) -> ModelShape:
    spatial, temporal = spatial_scale(vae), vae.get("temporal_compression_ratio", 4)
    side, depth = transformer["patch_size"], transformer.get("patch_size_t") or 1
    # 1.5 pads the latent frames to whole patches.
    frames = -(-((num_frames - 1) // temporal + 1) // depth)
    heads, head_dim = transformer["num_attention_heads"], transformer["attention_head_dim"]
    return ModelShape(
        grid=TokenGrid(frames, height // spatial // side, width // spatial // side),
        heads=heads,
        head_dim=head_dim,
        layers=transformer["num_layers"],
        ffn_dim=4 * heads * head_dim,
        text_tokens=0,
        joint_text=transformer.get("max_text_seq_length", 226),
    )


FAMILY = Family(
    name="cogvideox",
    is_self_attention=_is_self_attention,
    is_joint=_is_self_attention,
    forward=_forward,
    processors=swapped(CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0),
    stock=lambda *_: CogVideoXAttnProcessor2_0(),
    size=_size,
    shape=_shape,
    one_forward=True,
)
