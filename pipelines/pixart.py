"""PixArt-alpha and -Sigma: self-attention is `attn1`, image tokens only; both branches of guidance in one batch."""

from collections.abc import Mapping
from typing import Any

from diffusers.models.attention_processor import AttnProcessor2_0, FusedAttnProcessor2_0

from dit_sparse.layout import TokenGrid
from dit_sparse.pipelines.family import Family, image_forward, image_size, spatial_scale
from dit_sparse.pipelines.swap import swapped
from dit_sparse.predict import ModelShape


def _shape(
    transformer: Mapping[str, Any],
    height: int,
    width: int,
    num_frames: int,  # noqa: ARG001
    vae: Mapping[str, Any],
) -> ModelShape:
    side = spatial_scale(vae) * transformer["patch_size"]
    heads, head_dim = transformer["num_attention_heads"], transformer["attention_head_dim"]
    return ModelShape(
        grid=TokenGrid(1, height // side, width // side),
        heads=heads,
        head_dim=head_dim,
        layers=transformer["num_layers"],
        ffn_dim=4 * heads * head_dim,
        text_tokens=300,
    )


FAMILY = Family(
    name="pixart",
    is_self_attention=lambda name: name.endswith(".attn1"),
    forward=image_forward,
    processors=swapped(AttnProcessor2_0, FusedAttnProcessor2_0),
    stock=lambda *_: AttnProcessor2_0(),
    size=image_size,
    shape=_shape,
    one_forward=True,
)
