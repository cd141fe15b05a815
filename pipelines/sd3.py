"""SD3 and SD3.5: `attn` has the image first, then text; `attn2`, in SD3.5 medium, the image alone."""

from collections.abc import Mapping
from typing import Any

from diffusers.models.attention_processor import FusedJointAttnProcessor2_0, JointAttnProcessor2_0

from dit_sparse.layout import TokenGrid
from dit_sparse.pipelines.family import Family, Forward, image_grid, image_size, spatial_scale
from dit_sparse.pipelines.swap import swapped
from dit_sparse.predict import ModelShape


def _forward(transformer: Any, call: Mapping[str, Any]) -> Forward:
    latents, text = call["hidden_states"], call["encoder_hidden_states"]
    return Forward(
        image_grid(transformer, latents), len(latents), latents.device, call["timestep"], text, after=text.shape[1]
    )


def _shape(
    transformer: Mapping[str, Any],
    height: int,
    width: int,
    num_frames: int,  # noqa: ARG001
    vae: Mapping[str, Any],
) -> ModelShape:
    side = spatial_scale(vae) * transformer["patch_size"]
    heads, head_dim, blocks = (transformer[n] for n in ("num_attention_heads", "attention_head_dim", "num_layers"))
    # A second attention is counted as a layer, and the feed-forward parts are spread over all of them.
    layers = blocks + len(transformer.get("dual_attention_layers", ()))
    return ModelShape(
        grid=TokenGrid(1, height // side, width // side),
        heads=heads,
        head_dim=head_dim,
        layers=layers,
        ffn_dim=4 * heads * head_dim * blocks // layers,
        text_tokens=0,
        joint_text=77 + 256,
    )


FAMILY = Family(
    name="sd3",
    is_self_attention=lambda name: name.startswith("transformer_blocks.") and name.endswith((".attn", ".attn2")),
    is_joint=lambda name: name.endswith(".attn"),
    forward=_forward,
    processors=swapped(JointAttnProcessor2_0, FusedJointAttnProcessor2_0),
    stock=lambda *_: JointAttnProcessor2_0(),
    size=image_size,
    shape=_shape,
    one_forward=True,
)
