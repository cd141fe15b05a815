"""Z-Image: the image first, then text, each filled up to a multiple of 32 tokens, in single-stream layers."""

from collections.abc import Mapping
from typing import Any

from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF, ZSingleStreamAttnProcessor

from dit_sparse.layout import TokenGrid
from dit_sparse.models import Size
from dit_sparse.pipelines.family import Family, Forward, spatial_scale
from dit_sparse.pipelines.swap import swapped
from dit_sparse.predict import ModelShape


def _filled(tokens: int) -> int:
    return -(-tokens // SEQ_MULTI_OF) * SEQ_MULTI_OF


def _forward(transformer: Any, call: Mapping[str, Any]) -> Forward:  # noqa: ARG001
    images, prompts = call["x"], call["cap_feats"]
    if isinstance(images[0], list) or len({image.shape for image in images}) > 1:
        raise ValueError(
            "Z-Image was given several images or sizes at once, which do not share a grid: restore() first."
        )
    depth, side = call.get("f_patch_size", 1), call.get("patch_size", 2)
    frames, height, width = images[0].shape[1:]
    grid = TokenGrid(frames // depth, height // side, width // side)
    # What fills up the image counts as text, and the text is as long as the longest.
    after = _filled(grid.tokens) - grid.tokens + max(_filled(len(prompt)) for prompt in prompts)
    # Its timesteps rise, and its list of prompts is a new one at each step.
    return Forward(grid, len(images), images[0].device, -call["t"], prompts[0], after=after)


def _size(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Size:  # noqa: ARG001
    return Size(2 * spatial_scale(vae))


def _shape(
    transformer: Mapping[str, Any],
    height: int,
    width: int,
    num_frames: int,  # noqa: ARG001
    vae: Mapping[str, Any],
) -> ModelShape:
    side, dim, heads = 2 * spatial_scale(vae), transformer["dim"], transformer["n_heads"]
    return ModelShape(
        grid=TokenGrid(1, height // side, width // side),
        heads=heads,
        head_dim=dim // heads,
        layers=transformer["n_layers"],
        # Three matrices of 8/3 of the width in a SwiGLU cost what two of 4 times the width do.
        ffn_dim=4 * dim,
        text_tokens=0,
        # As long as the prompt is, up to 512.
        joint_text=128,
    )


FAMILY = Family(
    name="z-image",
    is_self_attention=lambda name: name.startswith("layers.") and name.endswith(".attention"),
    is_joint=lambda name: name.startswith("layers."),
    forward=_forward,
    processors=swapped(ZSingleStreamAttnProcessor),
    stock=lambda *_: ZSingleStreamAttnProcessor(),
    size=_size,
    shape=_shape,
    one_forward=True,
)
