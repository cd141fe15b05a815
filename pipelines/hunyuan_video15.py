"""HunyuanVideo 1.5: vision first, then image, glyph and text tokens with their padding, in double blocks only."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0
from torch import Tensor
from torch.nn import functional as F

from dit_sparse.models import Size
from dit_sparse.pipelines import hunyuan_video
from dit_sparse.pipelines.family import Forward
from dit_sparse.pipelines.swap import swapped
from dit_sparse.predict import ModelShape

# What the pipeline fills up to: text, glyphs and what stands for an image.
TEXT_TOKENS = 1000 + 256 + 729


class OneRowMaskProcessor:
    """HunyuanVideo15AttnProcessor2_0 with one row of its mask in place of a row for each token, which is gigabytes in
    every layer. Only the outputs of padding differ, and those nobody uses; else it is HunyuanVideo's."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        run = HunyuanVideoAttnProcessor2_0()
        run._attention_backend, run._parallel_config = self._attention_backend, self._parallel_config
        mask = F.pad(attention_mask.bool(), (hidden_states.shape[1], 0), value=True)[:, None, None]
        return run(attn, hidden_states, encoder_hidden_states, mask, image_rotary_emb)


def _forward(transformer: Any, call: Mapping[str, Any]) -> Forward:
    parts = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
    return replace(hunyuan_video.FAMILY.forward(transformer, call), after=sum(call[part].shape[1] for part in parts))


def _vae(told: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"spatial_compression_ratio": 16, **told}


def _size(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Size:
    return hunyuan_video.FAMILY.size(transformer, _vae(vae))


def _shape(
    transformer: Mapping[str, Any], height: int, width: int, num_frames: int, vae: Mapping[str, Any]
) -> ModelShape:
    blocks = {**transformer, "num_single_layers": 0}
    return replace(hunyuan_video.FAMILY.shape(blocks, height, width, num_frames, _vae(vae)), joint_text=TEXT_TOKENS)


FAMILY = replace(
    hunyuan_video.FAMILY,
    name="hunyuan-video-1.5",
    forward=_forward,
    processors={HunyuanVideo15AttnProcessor2_0: swapped(OneRowMaskProcessor)[OneRowMaskProcessor]},
    stock=lambda name, transformer: (
        HunyuanVideo15AttnProcessor2_0()
        if hunyuan_video.FAMILY.is_self_attention(name)
        else hunyuan_video.FAMILY.stock(name, transformer)
    ),
    size=_size,
    shape=_shape,
)
