"""Mochi: vision first, then padded text; diffusers' processor drops the padding row by row, this one masks it."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import MochiAttention, MochiAttnProcessor2_0
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from dit_sparse.layout import TokenGrid
from dit_sparse.models import Size
from dit_sparse.pipelines.family import Attend, Family, Forward
from dit_sparse.predict import ModelShape


class SparseMochiAttnProcessor:
    """MochiAttnProcessor2_0 with one attention call for the batch; tests hold it to that, module by module."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, attend: Attend):
        self.attend = attend

    def __call__(
        self,
        attn: MochiAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        of_vision, of_text = (attn.to_q, attn.to_k, attn.to_v), (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        q, k, v = (project(hidden_states).unflatten(2, (attn.heads, -1)) for project in of_vision)
        text_q, text_k, text_v = (project(encoder_hidden_states).unflatten(2, (attn.heads, -1)) for project in of_text)
        q, k, text_q, text_k = attn.norm_q(q), attn.norm_k(k), attn.norm_added_q(text_q), attn.norm_added_k(text_k)
        if image_rotary_emb is not None:
            q, k = _rotate(q, *image_rotary_emb), _rotate(k, *image_rotary_emb)
        pairs = ((q, text_q), (k, text_k), (v, text_v))
        q, k, v = (rearrange(torch.cat(pair, dim=1), "b l h d -> b h l d") for pair in pairs)
        real = F.pad(attention_mask.bool(), (hidden_states.shape[1], 0), value=True)
        out = rearrange(self.attend(q, k, v, real), "b h l d -> b l (h d)")
        vision, text = out.masked_fill(~real[..., None], 0).tensor_split([hidden_states.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](vision)), attn.to_add_out(text) if hasattr(attn, "to_add_out") else text


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


def _forward(transformer: Any, call: Mapping[str, Any]) -> Forward:
    latents, text, side = call["hidden_states"], call["encoder_hidden_states"], transformer.config.patch_size
    grid = TokenGrid(latents.shape[2], latents.shape[3] // side, latents.shape[4] // side)
    # Its timesteps rise.
    return Forward(grid, len(latents), latents.device, -call["timestep"], text, after=text.shape[1])


def _shape(transformer: Mapping[str, Any], height: int, width: int, frames: int, _: Mapping[str, Any]) -> ModelShape:
    side, heads, head_dim = (transformer[n] for n in ("patch_size", "num_attention_heads", "attention_head_dim"))
    grid = TokenGrid((frames - 1) // 6 + 1, height // (8 * side), width // (8 * side))
    # Three matrices of 8/3 of the width in a SwiGLU cost what two of 4 times the width do.
    return ModelShape(grid, heads, head_dim, transformer["num_layers"], 4 * heads * head_dim, 0, joint_text=256)


FAMILY = Family(
    name="mochi",
    is_self_attention=lambda name: name.endswith(".attn1"),
    is_joint=lambda name: name.endswith(".attn1"),
    forward=_forward,
    processors={MochiAttnProcessor2_0: SparseMochiAttnProcessor},
    stock=lambda *_: MochiAttnProcessor2_0(),
    size=lambda transformer, _: Size(8 * transformer["patch_size"], 6),
    shape=_shape,
    one_forward=True,
)
