"""HunyuanDiT: self-attention is `attn1`, image tokens only; both branches of guidance in one batch."""

from collections.abc import Mapping
from typing import Any

from diffusers.models.attention_processor import FusedHunyuanAttnProcessor2_0, HunyuanAttnProcessor2_0

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
    heads, head_dim, layers = (transformer[n] for n in ("num_attention_heads", "attention_head_dim", "num_layers"))
    # A layer of the second half first joins its input with that of its twin, which costs as much as `width` more
    # channels in its feed-forward part.
    joined = (layers - layers // 2 - 1) / layers
    return ModelShape(
        grid=TokenGrid(1, height // side, width // side),
        heads=heads,
        head_dim=head_dim,
        layers=layers,
        ffn_dim=int((transformer["mlp_ratio"] + joined) * heads * head_dim),
        text_tokens=transformer.get("text_len", 77) + transformer.get("text_len_t5", 256),
    )


FAMILY = Family(
    name="hunyuan-dit",
    is_self_attention=lambda name: name.endswith(".attn1"),
    forward=image_forward,
    processors=swapped(HunyuanAttnProcessor2_0, FusedHunyuanAttnProcessor2_0),
    stock=lambda *_: HunyuanAttnProcessor2_0(),
    size=image_size,
    shape=_shape,
    one_forward=True,
)
