"""Qwen-Image: padded text first, then the image and any images to edit, in double blocks."""

from collections.abc import Mapping
from itertools import takewhile
from math import prod
from typing import Any

from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0

from dit_sparse.layout import TokenGrid
from dit_sparse.models import Size
from dit_sparse.pipelines.family import Family, Forward
from dit_sparse.pipelines.swap import swapped
from dit_sparse.predict import ModelShape


def _is_self_attention(name: str) -> bool:
    return name.startswith("transformer_blocks.") and name.endswith(".attn")


def _forward(transformer: Any, call: Mapping[str, Any]) -> Forward:  # noqa: ARG001
    latents, text = call["hidden_states"], call["encoder_hidden_states"]
    # One list of shapes for each row of the batch, all alike; images of the same shape are frames of one grid.
    images = call["img_shapes"][0]
    images = [images] if isinstance(images, tuple) else images
    alike = list(takewhile(lambda shape: shape[1:] == images[0][1:], images))
    grid = TokenGrid(sum(frames for frames, _, _ in alike), *images[0][1:])
    after = sum(map(prod, images[len(alike) :]))
    return Forward(grid, len(latents), latents.device, call["timestep"], text, text.shape[1], after)


def _side(vae: Mapping[str, Any]) -> int:
    # A token is a square of 2 x 2 latents.
    return 2 * 2 ** len(vae.get("temperal_downsample", range(3)))


def _size(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Size:  # noqa: ARG001
    return Size(_side(vae))


def _shape(
    transformer: Mapping[str, Any],
    height: int,
    width: int,
    num_frames: int,  # noqa: ARG001
    vae: Mapping[str, Any],
) -> ModelShape:
    heads, head_dim = transformer["num_attention_heads"], transformer["attention_head_dim"]
    return ModelShape(
        grid=TokenGrid(1, height // _side(vae), width // _side(vae)),
        heads=heads,
        head_dim=head_dim,
        layers=transformer["num_layers"],
        ffn_dim=4 * heads * head_dim,
        text_tokens=0,
        # As long as the prompt is, up to 1024.
        joint_text=128,
    )


FAMILY = Family(
    name="qwen-image",
    is_self_attention=_is_self_attention,
    is_joint=_is_self_attention,
    forward=_forward,
    processors=swapped(QwenDoubleStreamAttnProcessor2_0),
    stock=lambda *_: QwenDoubleStreamAttnProcessor2_0(),
    size=_size,
    shape=_shape,
)
