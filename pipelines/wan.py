"""Wan 2.1 and 2.2: self-attention is `attn1`, vision tokens only; text comes through cross-attention."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, _get_qkv_projections
from einops import rearrange
from torch import Tensor

from dit_sparse.layout import TokenGrid
from dit_sparse.models import Size
from dit_sparse.pipelines.family import Attend, Family, Forward
from dit_sparse.predict import ModelShape


class SparseWanAttnProcessor:
    """WanAttnProcessor's self-attention with another attention call; tests hold it to that, module by module."""

    # Where diffusers writes set_attention_backend's and enable_parallelism's choices.
    _attention_backend = None
    _parallel_config = None

    def __init__(self, attend: Attend):
        self.attend = attend

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        query, key, value = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (rearrange(x, "b l (h d) -> b l h d", h=attn.heads) for x in (query, key, value))
        if rotary_emb is not None:
            query, key = _rotate(query, *rotary_emb), _rotate(key, *rotary_emb)

        query, key, value = (rearrange(x, "b l h d -> b h l d") for x in (query, key, value))
        if attention_mask is not None:
            reason = "a mask was given to Wan's self-attention, and only text padding can be masked"
            out = self.attend.dense(query, key, value, attention_mask, self, reason)
        elif encoder_hidden_states is not None:
            out = self.attend.dense(query, key, value, None, self, "attn1 was used as cross-attention")
        elif self._parallel_config is not None:
            out = self.attend.dense(query, key, value, None, self, "context parallelism is on")
        else:
            out = self.attend(query, key, value)

        out = rearrange(out, "b h l d -> b l (h d)").type_as(query)
        return attn.to_out[1](attn.to_out[0](out))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out.type_as(x)


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
        layers=transformer["num_layers"],
        ffn_dim=transformer["ffn_dim"],
        text_tokens=512,
    )


FAMILY = Family(
    name="wan",
    is_self_attention=lambda name: name.endswith(".attn1"),
    forward=_forward,
    processors={WanAttnProcessor: SparseWanAttnProcessor},
    stock=lambda *_: WanAttnProcessor(),
    size=_size,
    shape=_shape,
)
