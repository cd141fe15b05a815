"""Tiny pipelines of other families than Wan's that take prompts: with tokenizers and text encoders."""

from diffusers import DiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from tests.families import FAMILIES
from tests.tiny import WORDS, word_tokenizer


def worded(name: str) -> DiffusionPipeline:
    """name: "flux", "pixart-sigma" or "cogvideox-2b"."""
    pipe = FAMILIES[name].make()
    match name:
        case "flux":
            pipe.register_modules(
                tokenizer=word_tokenizer(77), text_encoder=_clip(8), tokenizer_2=word_tokenizer(), text_encoder_2=_t5()
            )
            pipe.vae.register_to_config(shift_factor=0.0)
        case "pixart-sigma":
            pipe.register_modules(tokenizer=word_tokenizer(), text_encoder=_t5())
        case "cogvideox-2b":
            pipe.register_modules(tokenizer=word_tokenizer(), text_encoder=_t5())
            # As long a text as the pipeline pads prompts to.
            config = dict(pipe.transformer.config) | {"max_text_seq_length": 226}
            pipe.transformer = type(pipe.transformer).from_config(config)
    return pipe


def _t5() -> T5EncoderModel:
    config = T5Config(vocab_size=len(WORDS) + 3, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def _clip(width: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(WORDS) + 3, hidden_size=width, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=77, pad_token_id=0, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    return CLIPTextModel(config).eval()
