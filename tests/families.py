"""Of each family, a real pipeline of a few thousand random weights, with RoPE and text masks, and how to call it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLCosmos,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLQwenImage,
    ClassifierFreeGuidance,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
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
    beside   share of a block's operations that a ModelShape leaves out, at most
    """

    make: Callable[[], DiffusionPipeline]
    arguments: Arguments
    sizes: tuple[tuple[Made, tuple[int, int, int]], tuple[Made, tuple[int, int, int]]]
    modules: int
    text: tuple[int, int] = (0, 0)
    masked: bool = False
    passes: bool = False
    beside: float = 0.06


def make(name: str) -> DiffusionPipeline:
    """The family's pipeline, always with the same weights, and with gates that are open: those that are closed at
    first would hide whatever attention does."""
    torch.manual_seed(0)
    pipe = FAMILIES[name].make()
    pipe.transformer.eval()
    for weight in pipe.transformer.parameters():
        if not weight.any():
            weight.data.normal_(std=0.1)
    return pipe


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
        **(tiny.arguments(tensor, prompts, guided) | tiny.sizes[size][0] | options),
        num_inference_steps=steps,
        generator=random,
        output_type="latent",
        return_dict=False,
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


def _sd3(**options: Any) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=8,
        qk_norm="rms_norm",
        **options,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(transformer, scheduler, _image_vae(), None, None, None, None, None, None)


def _sd3_arguments(tensor: Callable[..., Tensor], rows: int, guided: bool) -> Made:
    made = dict(
        prompt_embeds=tensor(rows, 9, 16), pooled_prompt_embeds=tensor(rows, 8), guidance_scale=3.0 if guided else 1.0
    )
    if guided:
        made |= dict(negative_prompt_embeds=tensor(rows, 9, 16), negative_pooled_prompt_embeds=tensor(rows, 8))
    return made


def _qwen_image() -> QwenImagePipeline:
    vae = AutoencoderKLQwenImage(base_dim=4, z_dim=4, num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[1.5] * 4)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    return QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, transformer)


def _qwen_image_arguments(tensor: Callable[..., Tensor], rows: int, guided: bool) -> Made:
    made = dict(prompt_embeds=tensor(rows, 9, 16), prompt_embeds_mask=padded(rows, 9, 6), true_cfg_scale=1.0)
    if guided:
        made |= dict(negative_prompt_embeds=tensor(rows, 9, 16), negative_prompt_embeds_mask=padded(rows, 9, 3))
        made["true_cfg_scale"] = 3.0
    return made


def _ltx() -> LTXPipeline:
    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    transformer = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=16,
    )
    return LTXPipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, transformer)


def _ltx_arguments(tensor: Callable[..., Tensor], rows: int, guided: bool) -> Made:
    made = dict(prompt_embeds=tensor(rows, 9, 16), prompt_attention_mask=padded(rows, 9, 6))
    if guided:
        made |= dict(negative_prompt_embeds=tensor(rows, 9, 16), negative_prompt_attention_mask=padded(rows, 9, 3))
    return made | dict(guidance_scale=3.0 if guided else 1.0)


def _ltx2(**options: Any) -> LTX2Pipeline:
    vae = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    audio_vae = AutoencoderKLLTX2Audio(base_channels=4, latent_channels=2, num_res_blocks=1, mel_bins=8)
    connectors = LTX2TextConnectors(
        caption_channels=32,
        text_proj_in_factor=1,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=16,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=16,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
    )
    transformer = LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=32,
        **options,
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    return LTX2Pipeline(scheduler, vae, audio_vae, None, None, connectors, transformer, None)


def _ltx2_arguments(tensor: Callable[..., Tensor], rows: int, guided: bool) -> Made:
    made = dict(prompt_embeds=tensor(rows, 9, 32), prompt_attention_mask=padded(rows, 9, 6).flip(1))
    if guided:
        made["negative_prompt_embeds"] = tensor(rows, 9, 32)
        made["negative_prompt_attention_mask"] = padded(rows, 9, 3).flip(1)
    # Its other two kinds of guidance are forwards of their own.
    made |= dict(stg_scale=0.0, modality_scale=1.0, audio_stg_scale=0.0, audio_modality_scale=1.0)
    return made | dict(guidance_scale=3.0 if guided else 1.0, audio_guidance_scale=3.0 if guided else 1.0)


def _mochi() -> MochiPipeline:
    vae = AutoencoderKLMochi(
        latent_channels=4,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    transformer = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
    )
    # As it comes, RoPE turns nothing.
    transformer.pos_frequencies.data.normal_()
    return MochiPipeline(FlowMatchEulerDiscreteScheduler(invert_sigmas=True), vae, None, None, transformer)


def _flux2() -> Flux2KleinPipeline:
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        norm_num_groups=2,
    )
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=8,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    return Flux2KleinPipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, transformer)


def _z_image() -> ZImagePipeline:
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 64, 64],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        token.data.normal_()
    return ZImagePipeline(FlowMatchEulerDiscreteScheduler(), _image_vae(), None, None, transformer)


def _z_image_arguments(tensor: Callable[..., Tensor], rows: int, guided: bool) -> Made:
    """Texts of 64 and of 32 tokens, filled up."""
    made = dict(prompt_embeds=[tensor(40 - row, 16) for row in range(rows)], guidance_scale=3.0 if guided else 0.0)
    if guided:
        made["negative_prompt_embeds"] = [tensor(20 - row, 16) for row in range(rows)]
    return made


def _kandinsky5() -> Kandinsky5T2VPipeline:
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    )
    transformer = Kandinsky5Transformer3DModel(
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=8,
        model_dim=32,
        ff_dim=64,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
    )
    return Kandinsky5T2VPipeline(transformer, vae, None, None, None, None, FlowMatchEulerDiscreteScheduler(shift=5.0))


def _kandinsky5_arguments(tensor: Callable[..., Tensor], rows: int, guided: bool) -> Made:
    made = dict(guidance_scale=3.0 if guided else 1.0)
    for prefix in ("", "negative_") if guided else ("",):
        made[f"{prefix}prompt_embeds_qwen"] = tensor(rows, 9, 16)
        made[f"{prefix}prompt_embeds_clip"] = tensor(rows, 8)
        made[f"{prefix}prompt_cu_seqlens"] = torch.tensor([0, 9] if rows == 1 else [0, 9, 18])
    return made


class _Allows:
    """Cosmos pipelines want something that checks prompts."""

    def to(self, *_: Any) -> "_Allows":
        return self

    def check_text_safety(self, _: str) -> bool:
        return True


def _cosmos() -> CosmosTextToWorldPipeline:
    vae = AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(4, 4, 4, 4),
        decode_block_out_channels=(4, 4, 4, 4),
        num_layers=1,
    )
    transformer = CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(8, 32, 32),
        concat_padding_mask=False,
        extra_pos_embed_type="learnable",
    )
    return CosmosTextToWorldPipeline(None, None, transformer, vae, EDMEulerScheduler(), _Allows())


IMAGES = (image(224, 240, (14, 15)), image(192, 320, (12, 20)))
VIDEOS = (video(9, 112, 144, (3, 7, 9)), video(13, 96, 160, (4, 6, 10)))

LTX_VIDEOS = (video(17, 224, 288, (3, 7, 9)), video(25, 192, 320, (4, 6, 10)))
# Its autoencoder makes 8 frames one.
COSMOS_VIDEOS = (video(17, 112, 144, (3, 7, 9)), video(25, 96, 160, (4, 6, 10)))

FAMILIES: dict[str, Tiny] = {
    "hunyuan-video": Tiny(
        _hunyuan_video,
        _hunyuan_video_arguments,
        VIDEOS,
        modules=2,
        text=(0, 9),
        masked=True,
        passes=True,
    ),
    "cogvideox-2b": Tiny(
        lambda: _cogvideox(sample_width=18, sample_height=14, sample_frames=9),
        _plain_arguments(16),
        VIDEOS,
        modules=2,
        text=(9, 0),
    ),
    "cogvideox-5b": Tiny(
        lambda: _cogvideox(use_rotary_positional_embeddings=True), _plain_arguments(16), VIDEOS, modules=2, text=(9, 0)
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
        VIDEOS,
        modules=2,
        text=(0, 18),
        masked=True,
        passes=True,
    ),
    "flux": Tiny(
        _flux,
        _pooled_arguments,
        IMAGES,
        modules=2,
        text=(9, 0),
        passes=True,
    ),
    "pixart-sigma": Tiny(
        _pixart,
        _masked_arguments,
        IMAGES,
        modules=2,
    ),
    "hunyuan-dit": Tiny(
        _hunyuan_dit,
        _hunyuan_dit_arguments,
        IMAGES,
        modules=4,
    ),
    "sd3": Tiny(_sd3, _sd3_arguments, IMAGES, modules=2, text=(0, 9)),
    "sd3.5-medium": Tiny(lambda: _sd3(dual_attention_layers=(0,)), _sd3_arguments, IMAGES, modules=3, text=(0, 9)),
    "qwen-image": Tiny(_qwen_image, _qwen_image_arguments, IMAGES, modules=2, text=(9, 0), masked=True, passes=True),
    "ltx": Tiny(_ltx, _ltx_arguments, LTX_VIDEOS, modules=2),
    "ltx2": Tiny(_ltx2, _ltx2_arguments, LTX_VIDEOS, modules=2),
    "ltx2.3": Tiny(
        lambda: _ltx2(perturbed_attn=True, gated_attn=True, rope_type="split"),
        _ltx2_arguments,
        LTX_VIDEOS,
        modules=2,
        beside=0.07,
    ),
    "mochi": Tiny(
        _mochi,
        _ltx_arguments,
        (video(13, 112, 144, (3, 7, 9)), video(19, 96, 160, (4, 6, 10))),
        modules=2,
        text=(0, 9),
        masked=True,
    ),
    "flux2": Tiny(_flux2, _plain_arguments(16), IMAGES, modules=2, text=(9, 0), passes=True),
    "z-image": Tiny(
        _z_image, _z_image_arguments, (IMAGES[0], image(208, 416, (13, 26))), modules=2, text=(0, 14 + 64), masked=True
    ),
    "kandinsky5": Tiny(_kandinsky5, _kandinsky5_arguments, VIDEOS, modules=2, passes=True),
    "cosmos": Tiny(_cosmos, _plain_arguments(16), COSMOS_VIDEOS, modules=2, passes=True),
}
