"""LTX-2: of its attention, the video's self-attention `attn1`; sound, text and what goes between stay dense."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffusers.models.transformers.transformer_ltx2 import LTX2AudioVideoAttnProcessor, LTX2PerturbedAttnProcessor

from dit_sparse.pipelines import ltx
from dit_sparse.pipelines.swap import swapped
from dit_sparse.predict import ModelShape

TEXT_TOKENS = 1024


def _shape(
    transformer: Mapping[str, Any], height: int, width: int, num_frames: int, vae: Mapping[str, Any]
) -> ModelShape:
    shape = ltx.FAMILY.shape(transformer, height, width, num_frames, vae)
    # Sound has few tokens, which are left out. But for what goes between the two, each token of vision is projected to
    # the width of sound three times, and back once: as much as so many more channels of its feed-forward part.
    sound = transformer.get("audio_num_attention_heads", 32) * transformer.get("audio_attention_head_dim", 64)
    return replace(shape, ffn_dim=shape.ffn_dim + 2 * sound, text_tokens=TEXT_TOKENS)


FAMILY = replace(
    ltx.FAMILY,
    name="ltx2",
    processors=swapped(LTX2AudioVideoAttnProcessor, LTX2PerturbedAttnProcessor),
    stock=lambda _, transformer: (
        LTX2PerturbedAttnProcessor() if transformer.config.perturbed_attn else LTX2AudioVideoAttnProcessor()
    ),
    shape=_shape,
)
