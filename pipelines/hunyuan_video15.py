"""HunyuanVideo 1.5: vision first, then image, glyph and text tokens with their padding, in double blocks only."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0
from torch import Tensor
from torch.nn import functional as F

from dit_sparse.layout import TokenGrid
from dit_sparse.models import Size
from dit_sparse.pipelines.family import Family, Forward
from dit_sparse.pipelines.swap import swapped
from dit_sparse.predict import ModelShape


class OneRowMaskProcessor:
    """HunyuanVideo15AttnProcessor2_0 with one row of its mask in place of a row for each token, which is gigabytes in
    every layer. Only the outputs of padding differ, and those nobody uses; else it is HunyuanVideo's."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        run = HunyuanVideoAttnProcessor2_0()
        run._attention_backend, run._parallel_config = self._attention_backend, self._parallel_config
        mask = F.pad(attention_mask.bool(), (hidden_states.shape[1], 0), value=True)[:, None, None]
        return run(attn, hidden_states, encoder_hidden_states, mask, image_rotary_emb)


def _is_self_attention(name: str) -> bool:
    return name.startswith("transformer_blocks.") and name.endswith(".attn")


def _patch(transformer: Mapping[str, Any]) -> tuple[int, int, int]:
    return transformer["patch_size_t"], transformer["patch_size"], transformer["patch_size"]


def _forward(transformer: torch.nn.Module, call: Mapping[str, Any]) -> Forward:
    latents, text = call["hidden_states"], call["encoder_hidden_states"]
    grid = TokenGrid(*(n // p for n, p in zip(latents.shape[2:], _patch(transformer.config), strict=True)))
    after = sum(call[name].shape[1] for name in ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds"))
    return Forward(grid, len(latents), latents.device, call["timestep"], text, after=after)


def _size(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Size:
    frames, side, _ = _patch(transformer)
    return Size(vae.get("spatial_compression_ratio", 16) * side, vae.get("temporal_compression_ratio", 4) * frames)


def _shape(
    transformer: Mapping[str, Any], height: int, width: int, num_frames: int, vae: Mapping[str, Any]
) -> ModelShape:
    spatial, temporal = vae.get("spatial_compression_ratio", 16), vae.get("temporal_compression_ratio", 4)
    latent = ((num_frames - 1) // temporal + 1, height // spatial, width // spatial)
    heads, head_dim = transformer["num_attention_heads"], transformer["attention_head_dim"]
    return ModelShape(
        grid=TokenGrid(*(n // p for n, p in zip(latent, _patch(transformer), strict=True))),
        heads=heads,
        head_dim=head_dim,
        layers=transformer["num_layers"],
        ffn_dim=int(transformer["mlp_ratio"] * heads * head_dim),
        text_tokens=0,
        joint_text=1000 + 256 + 729,
    )


FAMILY = Family(
    name="hunyuan-video-1.5",
    is_self_attention=_is_self_attention,
    is_joint=_is_self_attention,
    forward=_forward,
    processors={HunyuanVideo15AttnProcessor2_0: swapped(OneRowMaskProcessor)[OneRowMaskProcessor]},
    stock=lambda name: HunyuanVideo15AttnProcessor2_0() if _is_self_attention(name) else AttnProcessor2_0(),
    size=_size,
    shape=_shape,
)
