"""Flux: text first, then the image and any reference images, in double and single blocks."""

from collections.abc import Mapping
from typing import Any

from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

from dit_sparse.layout import TokenGrid
from dit_sparse.models import Size
from dit_sparse.pipelines.family import Family, Forward, spatial_scale
from dit_sparse.pipelines.swap import swapped
from dit_sparse.predict import ModelShape


def _is_self_attention(name: str) -> bool:
    return name.startswith(("transformer_blocks.", "single_transformer_blocks.")) and name.endswith(".attn")


def forward(transformer: Any, call: Mapping[str, Any]) -> Forward:  # noqa: ARG001
    """By img_ids, rows of (image, row, column, ...) that are alike in a batch: nothing else tells the sides."""
    latents, text, ids = call["hidden_states"], call["encoder_hidden_states"], call["img_ids"]
    ids = ids if ids.dim() == 2 else ids[0]
    own = ids[ids[:, 0] == ids[0, 0]]
    grid = TokenGrid(1, *(int(side) + 1 for side in own[:, 1:3].amax(0)))
    after = latents.shape[1] - len(own)
    return Forward(grid, len(latents), latents.device, call["timestep"], text, text.shape[1], after)


def _size(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Size:  # noqa: ARG001
    return Size(2 * spatial_scale(vae))


def _shape(
    transformer: Mapping[str, Any],
    height: int,
    width: int,
    num_frames: int,  # noqa: ARG001
    vae: Mapping[str, Any],
) -> ModelShape:
    # A token is a square of 2 x 2 latents.
    side = 2 * spatial_scale(vae)
    heads, head_dim = transformer["num_attention_heads"], transformer["attention_head_dim"]
    return ModelShape(
        grid=TokenGrid(1, height // side, width // side),
        heads=heads,
        head_dim=head_dim,
        layers=transformer["num_layers"] + transformer["num_single_layers"],
        ffn_dim=4 * heads * head_dim,
        text_tokens=0,
        joint_text=512,
    )


FAMILY = Family(
    name="flux",
    is_self_attention=_is_self_attention,
    is_joint=_is_self_attention,
    forward=forward,
    processors=swapped(FluxAttnProcessor),
    stock=lambda *_: FluxAttnProcessor(),
    size=_size,
    shape=_shape,
    on_host=("img_ids",),
)
