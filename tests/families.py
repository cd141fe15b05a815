"""Of each family, a real pipeline of a few thousand random weights, with RoPE and text masks, and how to call it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from torch import Tensor

Made = dict[str, Any]
Arguments = Callable[[Callable[..., Tensor], int, bool], Made]


@dataclass(frozen=True)
class Tiny:
    """make: () -> the pipeline. arguments: (random tensors by shape, prompts, guided) -> the text of a call.

    sizes    options of two calls, and the grid of tokens that each has
    text     tokens of text before and after the vision tokens
    masked   whether some of the text is padding, in joint attention
    passes   branches of guidance in forwards of their own
    modules  attention modules made sparse
    """

    make: Callable[[], DiffusionPipeline]
    arguments: Arguments
    sizes: tuple[tuple[Made, tuple[int, int, int]], tuple[Made, tuple[int, int, int]]]
    modules: int
    text: tuple[int, int] = (0, 0)
    masked: bool = False
    passes: bool = False


def generate(
    name: str,
    pipe: DiffusionPipeline,
    *,
    size: int = 0,
    steps: int = 3,
    prompts: int = 1,
    guided: bool = True,
    seed: int = 1,
    **options: Any,
) -> Tensor:
    """Latents from random embeddings in place of text."""
    tiny = FAMILIES[name]
    pipe.set_progress_bar_config(disable=True)
    random = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    return pipe(
        **tiny.arguments(tensor, prompts, guided),
        **tiny.sizes[size][0],
        num_inference_steps=steps,
        generator=random,
        output_type="latent",
        return_dict=False,
        **options,
    )[0]


def padded(rows: int, tokens: int, real: int) -> Tensor:
    """[rows, tokens]: 1 for the first `real` tokens, and one fewer in each further row."""
    return torch.stack([(torch.arange(tokens) < real - row).long() for row in range(rows)])


def video(frames: int, height: int, width: int, grid: tuple[int, int, int]) -> tuple[Made, tuple[int, int, int]]:
    return dict(num_frames=frames, height=height, width=width), grid


def _hunyuan_video() -> HunyuanVideoPipeline:
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    )
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    return HunyuanVideoPipeline(None, None, transformer, vae, FlowMatchEulerDiscreteScheduler(shift=7.0), None, None)


def _hunyuan_video_arguments(tensor: Callable[..., Tensor], rows: int, guided: bool) -> Made:
    made = dict(
        prompt_embeds=tensor(rows, 9, 16),
        pooled_prompt_embeds=tensor(rows, 8),
        prompt_attention_mask=padded(rows, 9, 6),
    )
    if guided:
        made |= dict(
            negative_prompt_embeds=tensor(rows, 9, 16),
            negative_pooled_prompt_embeds=tensor(rows, 8),
            negative_prompt_attention_mask=padded(rows, 9, 3),
            true_cfg_scale=3.0,
        )
    return made


def _hunyuan_video15() -> HunyuanVideo15Pipeline:
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(4, 4, 4, 4, 4), layers_per_block=1, downsample_match_channel=False
    )
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=8,
        image_embed_dim=12,
        rope_axes_dim=(4, 6, 6),
        target_size=64,
        task_type="t2v",
    )
    pipe = HunyuanVideo15Pipeline(
        None, None, transformer, vae, FlowMatchEulerDiscreteScheduler(shift=7.0), None, None, ClassifierFreeGuidance()
    )
    pipe.vision_num_semantic_tokens = 4
    return pipe


def _hunyuan_video15_arguments(tensor: Callable[..., Tensor], rows: int, guided: bool) -> Made:
    made = {}
    for prefix, real in (("", 6), *((("negative_", 3),) if guided else ())):
        made[f"{prefix}prompt_embeds"] = tensor(rows, 9, 16)
        made[f"{prefix}prompt_embeds_mask"] = padded(rows, 9, real)
        made[f"{prefix}prompt_embeds_2"] = tensor(rows, 5, 8)
        made[f"{prefix}prompt_embeds_mask_2"] = padded(rows, 5, 2)
    return made


def _image_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        norm_num_groups=2,
    )


def _flux() -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
    )
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), _image_vae(), None, None, None, None, transformer)


def _pooled_arguments(tensor: Callable[..., Tensor], rows: int, guided: bool) -> Made:
    made = dict(prompt_embeds=tensor(rows, 9, 16), pooled_prompt_embeds=tensor(rows, 8))
    if guided:
        made |= dict(negative_prompt_embeds=tensor(rows, 9, 16), negative_pooled_prompt_embeds=tensor(rows, 8))
        made["true_cfg_scale"] = 3.0
    return made


def _pixart() -> PixArtSigmaPipeline:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=16,
        caption_channels=16,
        use_additional_conditions=False,
    )
    return PixArtSigmaPipeline(None, None, _image_vae(), transformer, DPMSolverMultistepScheduler())


def _masked_arguments(tensor: Callable[..., Tensor], rows: int, guided: bool) -> Made:
    made = dict(prompt_embeds=tensor(rows, 9, 16), prompt_attention_mask=padded(rows, 9, 6), negative_prompt=None)
    if guided:
        made |= dict(negative_prompt_embeds=tensor(rows, 9, 16), negative_prompt_attention_mask=padded(rows, 9, 3))
    return made | dict(use_resolution_binning=False, guidance_scale=3.0 if guided else 1.0)


def _hunyuan_dit() -> HunyuanDiTPipeline:
    transformer = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        hidden_size=32,
        in_channels=4,
        patch_size=2,
        num_layers=4,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=8,
        text_len=9,
        text_len_t5=5,
        use_style_cond_and_image_meta_size=False,
    )
    return HunyuanDiTPipeline(
        _image_vae(), None, None, transformer, DDPMScheduler(), None, None, requires_safety_checker=False
    )


def _hunyuan_dit_arguments(tensor: Callable[..., Tensor], rows: int, guided: bool) -> Made:
    made = dict(use_resolution_binning=False, guidance_scale=3.0 if guided else 1.0)
    for prefix, real in (("", 6), *((("negative_", 3),) if guided else ())):
        made[f"{prefix}prompt_embeds"] = tensor(rows, 9, 16)
        made[f"{prefix}prompt_attention_mask"] = padded(rows, 9, real)
        made[f"{prefix}prompt_embeds_2"] = tensor(rows, 5, 16)
        made[f"{prefix}prompt_attention_mask_2"] = padded(rows, 5, 3)
    return made


def image(height: int, width: int, grid: tuple[int, int]) -> tuple[Made, tuple[int, int, int]]:
    return dict(height=height, width=width), (1, *grid)


def _cogvideox(**options: Any) -> CogVideoXPipeline:
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        max_text_seq_length=9,
        **options,
    )
    return CogVideoXPipeline(None, None, vae, transformer, CogVideoXDDIMScheduler())


def _plain_arguments(channels: int, tokens: int = 9, **more: Any) -> Arguments:
    def arguments(tensor: Callable[..., Tensor], rows: int, guided: bool) -> Made:
        made = dict(prompt_embeds=tensor(rows, tokens, channels), guidance_scale=3.0 if guided else 1.0) | more
        if guided:
            made["negative_prompt_embeds"] = tensor(rows, tokens, channels)
        return made

    return arguments


FAMILIES: dict[str, Tiny] = {
    "hunyuan-video": Tiny(
        _hunyuan_video,
        _hunyuan_video_arguments,
        (video(9, 112, 144, (3, 7, 9)), video(13, 96, 160, (4, 6, 10))),
        modules=2,
        text=(0, 9),
        masked=True,
        passes=True,
    ),
    "cogvideox-2b": Tiny(
        lambda: _cogvideox(sample_width=18, sample_height=14, sample_frames=9),
        _plain_arguments(16),
        (video(9, 112, 144, (3, 7, 9)), video(13, 96, 160, (4, 6, 10))),
        modules=2,
        text=(9, 0),
    ),
    "cogvideox-1.5": Tiny(
        lambda: _cogvideox(use_rotary_positional_embeddings=True, patch_size_t=2, patch_bias=False),
        _plain_arguments(16),
        (video(17, 112, 144, (3, 7, 9)), video(25, 96, 160, (4, 6, 10))),
        modules=2,
        text=(9, 0),
    ),
    "hunyuan-video-1.5": Tiny(
        _hunyuan_video15,
        _hunyuan_video15_arguments,
        (video(9, 112, 144, (3, 7, 9)), video(13, 96, 160, (4, 6, 10))),
        modules=2,
        text=(0, 18),
        masked=True,
        passes=True,
    ),
    "flux": Tiny(
        _flux,
        _pooled_arguments,
        (image(224, 240, (14, 15)), image(192, 320, (12, 20))),
        modules=2,
        text=(9, 0),
        passes=True,
    ),
    "pixart-sigma": Tiny(
        _pixart,
        _masked_arguments,
        (image(224, 240, (14, 15)), image(192, 320, (12, 20))),
        modules=2,
    ),
    "hunyuan-dit": Tiny(
        _hunyuan_dit,
        _hunyuan_dit_arguments,
        (image(224, 240, (14, 15)), image(192, 320, (12, 20))),
        modules=4,
    ),
}
