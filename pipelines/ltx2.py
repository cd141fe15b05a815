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
    # Sound has few tokens, and is left out.
    return replace(ltx.FAMILY.shape(transformer, height, width, num_frames, vae), text_tokens=TEXT_TOKENS)


FAMILY = replace(
    ltx.FAMILY,
    name="ltx2",
    processors=swapped(LTX2AudioVideoAttnProcessor, LTX2PerturbedAttnProcessor),
    stock=lambda _, transformer: (
        LTX2PerturbedAttnProcessor() if transformer.config.perturbed_attn else LTX2AudioVideoAttnProcessor()
    ),
    shape=_shape,
)
