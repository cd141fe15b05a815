"""A real Wan pipeline of a few thousand random weights, made on the spot: nothing is downloaded."""

import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

WORDS = ["a", "the", "red", "green", "blue", "ball", "square", "moves", "left", "right", "up", "down", "and"]

# Little compression is the cheap way to many tokens: 9 frames of 32x32 are 12 tokens at "8x4" and 2560 at "1x1".
TEMPORAL = {"8x4": (False, True, True), "4x4": (True, True), "2x2": (True,), "2x1": (False,), "1x1": ()}


def tiny_wan(
    vae: str = "1x1",
    heads: int = 2,
    head_dim: int = 32,
    layers: int = 2,
    wan22: bool = False,
    seed: int = 0,
    text: bool = True,
) -> WanPipeline:
    """A WanPipeline that runs, saves and loads like the published ones.

    vae    spatial x temporal compression, a key of TEMPORAL; the transformer's own patch is 1x2x2
    wan22  two transformers that share the steps at boundary_ratio 0.875
    text   False leaves out tokenizer and text encoder: pass prompt_embeds [1, any, 32] yourself
    """
    torch.manual_seed(seed)
    return WanPipeline(
        tokenizer=word_tokenizer() if text else None,
        text_encoder=_text_encoder() if text else None,
        vae=_vae(vae),
        transformer=_transformer(heads, head_dim, layers),
        transformer_2=_transformer(heads, head_dim, layers) if wan22 else None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        boundary_ratio=0.875 if wan22 else None,
    )


def tiny_image_to_video(kind: str = "2.2", seed: int = 0) -> WanImageToVideoPipeline:
    """kind: "2.1" attends to an encoded image, "2.2" has two transformers, "5B" has a timestep for each token."""
    torch.manual_seed(seed)
    # The latents, the mask and the image side by side; with a timestep for each token the image is in the latents.
    channels = 16 if kind == "5B" else 33
    image = {"image_dim": 32, "added_kv_proj_dim": 64} if kind == "2.1" else {}
    return WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=_vae("1x1"),
        transformer=_transformer(2, 32, 2, in_channels=channels, **image),
        transformer_2=_transformer(2, 32, 2, in_channels=channels) if kind == "2.2" else None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        image_encoder=_image_encoder() if image else None,
        image_processor=CLIPImageProcessor(size=8, crop_size=8) if image else None,
        boundary_ratio=0.875 if kind == "2.2" else None,
        expand_timesteps=kind == "5B",
    )


def tiny_video_to_video(seed: int = 0) -> WanVideoToVideoPipeline:
    torch.manual_seed(seed)
    return WanVideoToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=_vae("1x1"),
        transformer=_transformer(2, 32, 2),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def tiny_vace(seed: int = 0) -> WanVACEPipeline:
    torch.manual_seed(seed)
    # What to keep of a video, what to make anew, and the mask.
    told = {"vace_layers": [0, 2], "vace_in_channels": 33}
    transformer = _transformer(2, 32, 3, kind=WanVACETransformer3DModel, **told)
    for block in transformer.vace_blocks:
        block.proj_out.weight.data.normal_(std=0.1)
    return WanVACEPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=_vae("1x1"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer,
    )


def generate(
    pipe: DiffusionPipeline,
    *,
    steps: int = 4,
    frames: int = 4,
    size: int = 16,
    guidance: float = 4.0,
    prompts: int = 1,
    seed: int = 1,
    **options,
) -> torch.Tensor:
    """Latents of a generation from random embeddings in place of text. "1x1" makes 4 frames 5, which it can encode."""
    pipe.set_progress_bar_config(disable=True)
    random = torch.Generator().manual_seed(seed)
    dtype = pipe.transformer.dtype
    if isinstance(pipe, WanVideoToVideoPipeline):
        options["video"] = [_image(size, i) for i in range(frames + 1)]
    else:
        options["num_frames"] = frames
    # Wan 2.1's image-to-video attention takes the last 512 tokens for the text.
    tokens = 8
    if isinstance(pipe, WanImageToVideoPipeline):
        options["image"] = _image(size, 0)
        if pipe.transformer.config.image_dim is not None:
            tokens = 512
    if isinstance(pipe, WanVACEPipeline):
        options["reference_images"] = [_image(size, 0)]
    embeds = torch.randn(2, prompts, tokens, 32, generator=random)
    return pipe(
        prompt_embeds=embeds[0].to(dtype),
        negative_prompt_embeds=embeds[1].to(dtype),
        height=size,
        width=size,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=random,
        output_type="latent",
        **options,
    ).frames


def _image(size: int, frame: int) -> Image.Image:
    rows = torch.arange(size)[:, None, None] * torch.tensor([7, 3, 1])
    columns = torch.arange(size)[None, :, None] * torch.tensor([1, 5, 9])
    return Image.fromarray(((rows + columns + 20 * frame) % 256).to(torch.uint8).numpy())


def _transformer(heads: int, head_dim: int, layers: int, kind: type = WanTransformer3DModel, **options):
    return kind(
        **{
            "patch_size": (1, 2, 2),
            "num_attention_heads": heads,
            "attention_head_dim": head_dim,
            "in_channels": 16,
            "out_channels": 16,
            "text_dim": 32,
            "freq_dim": 64,
            "ffn_dim": 2 * heads * head_dim,
            "num_layers": layers,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 256,
        }
        | options
    ).eval()


def _vae(kind: str) -> AutoencoderKLWan:
    spatial, temporal = map(int, kind.split("x"))
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=16,
        dim_mult=[1] * (len(TEMPORAL[kind]) + 1),
        num_res_blocks=1,
        temperal_downsample=list(TEMPORAL[kind]),
        scale_factor_spatial=spatial,
        scale_factor_temporal=temporal,
    ).eval()


def word_tokenizer(longest: int = 512) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=longest
    )


def _image_encoder() -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    return CLIPVisionModel(config).eval()


def _text_encoder() -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=len(WORDS) + 3,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=0,
        eos_token_id=1,
    )
    return UMT5EncoderModel(config).eval()
