"""A real Wan pipeline of a few thousand random weights, made on the spot: nothing is downloaded."""

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

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
    spatial, temporal = map(int, vae.split("x"))

    def transformer() -> WanTransformer3DModel:
        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=64,
            ffn_dim=2 * heads * head_dim,
            num_layers=layers,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=256,
        ).eval()

    return WanPipeline(
        tokenizer=_tokenizer() if text else None,
        text_encoder=_text_encoder() if text else None,
        vae=AutoencoderKLWan(
            base_dim=4,
            z_dim=16,
            dim_mult=[1] * (len(TEMPORAL[vae]) + 1),
            num_res_blocks=1,
            temperal_downsample=list(TEMPORAL[vae]),
            scale_factor_spatial=spatial,
            scale_factor_temporal=temporal,
        ).eval(),
        transformer=transformer(),
        transformer_2=transformer() if wan22 else None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        boundary_ratio=0.875 if wan22 else None,
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


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
