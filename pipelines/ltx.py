"""LTX-Video: self-attention is `attn1`, vision tokens only; both branches of guidance in one batch."""

from collections.abc import Mapping
from typing import Any

from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor

from dit_sparse.layout import TokenGrid
from dit_sparse.models import Size
from dit_sparse.pipelines.family import Family, Forward
from dit_sparse.pipelines.swap import swapped
from dit_sparse.predict import ModelShape


def _forward(transformer: Any, call: Mapping[str, Any]) -> Forward:  # noqa: ARG001
    latents = call["hidden_states"]
    sides: list[Any] = [call.get(name) for name in ("num_frames", "height", "width")]
    if None in sides:
        raise ValueError(
            "LTX-Video was given coordinates in place of num_frames, height and width, and tokens that lie on no grid "
            "cannot be made sparse: restore() first, or use a pipeline that gives sides."
        )
    return Forward(TokenGrid(*sides), len(latents), latents.device, call["timestep"], call["encoder_hidden_states"])


def _scales(vae: Mapping[str, Any]) -> tuple[int, int]:
    return vae.get("temporal_compression_ratio") or 8, vae.get("spatial_compression_ratio") or 32


def _size(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Size:  # noqa: ARG001
    temporal, spatial = _scales(vae)
    return Size(spatial, temporal)


def _shape(
    transformer: Mapping[str, Any], height: int, width: int, num_frames: int, vae: Mapping[str, Any]
) -> ModelShape:
    temporal, spatial = _scales(vae)
    heads, head_dim = transformer["num_attention_heads"], transformer["attention_head_dim"]
    return ModelShape(
        grid=TokenGrid((num_frames - 1) // temporal + 1, height // spatial, width // spatial),
        heads=heads,
        head_dim=head_dim,
        layers=transformer["num_layers"],
        ffn_dim=4 * heads * head_dim,
        text_tokens=128,
    )


FAMILY = Family(
    name="ltx",
    is_self_attention=lambda name: name.endswith(".attn1"),
    forward=_forward,
    processors=swapped(LTXVideoAttnProcessor),
    stock=lambda *_: LTXVideoAttnProcessor(),
    size=_size,
    shape=_shape,
    one_forward=True,
)
