"""A Wan pipeline of a published shape with random weights: what a run costs, before any weights are fetched.

    python samples/random_model.py --name wan2.1-1.3b --output_dir random-wan
    dit-sparse calibrate --model_id random-wan --prompts_file prompts.txt --output_file random.profile.safetensors

Text encoder, tokenizer and scheduler are the demo model's, so the transformer takes text of their size.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

from dit_sparse.models import demo_directory, published


def random_model(name: str, layers: int | None, device: str) -> WanPipeline:
    """bfloat16; `layers` fewer than published make it smaller. Raises ValueError for a model that is not a Wan."""
    model = published(name)
    if model.class_name != "WanTransformer3DModel":
        raise ValueError(f"{name!r} is a {model.class_name}, and this takes a Wan.")
    pipe = WanPipeline.from_pretrained(demo_directory(), transformer=None, vae=None, dtype=torch.bfloat16)
    shape = dict(model.transformer) | {"text_dim": pipe.text_encoder.config.d_model}
    if layers is not None:
        shape["num_layers"] = layers
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            transformer, vae = WanTransformer3DModel(**shape), AutoencoderKLWan()
    finally:
        torch.set_default_dtype(before)
    return WanPipeline(pipe.tokenizer, pipe.text_encoder, vae, pipe.scheduler, transformer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="wan2.1-1.3b", help="as dit-sparse plan knows it")
    parser.add_argument("--layers", type=int, help="fewer than published")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where they are drawn"
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    random_model(args.name, args.layers, args.device).save_pretrained(args.output_dir)
    print(args.output_dir)


if __name__ == "__main__":
    main()
