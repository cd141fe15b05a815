"""Sparse attention and one of diffusers' step caches on one pipeline: alone, together, and what each costs in quality.

The cache skips the blocks after the first where the first one's output has hardly changed since the step before;
sparse attention makes the steps cheaper that are left.

python samples/compose_with_a_cache.py
python samples/compose_with_a_cache.py --model_id Wan-AI/Wan2.1-T2V-1.3B-Diffusers --height 480 --width 832 \
    --num_frames 81 --threshold 0.05
"""

import argparse
import time

import torch
from diffusers import FirstBlockCacheConfig, WanPipeline

from dit_sparse import sparsify
from dit_sparse.calibration.metrics import psnr
from dit_sparse.generate import DEMO
from dit_sparse.models import demo_directory

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model_id", default=str(demo_directory()), help="the demo model, if not given")
parser.add_argument("--prompt", default=DEMO.prompt)
parser.add_argument("--height", type=int, default=DEMO.height)
parser.add_argument("--width", type=int, default=DEMO.width)
parser.add_argument("--num_frames", type=int, default=DEMO.num_frames)
parser.add_argument("--num_inference_steps", type=int, default=DEMO.num_inference_steps)
parser.add_argument("--threshold", type=float, default=0.1, help="change of the first block below which to skip")
args = parser.parse_args()

device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
pipe = WanPipeline.from_pretrained(args.model_id, dtype={"default": dtype, "vae": torch.float32}).to(device)
cache = FirstBlockCacheConfig(threshold=args.threshold)


def run(cached, method):
    if cached:
        pipe.transformer.enable_cache(cache)
    with sparsify(pipe, method):
        start = time.perf_counter()
        frames = pipe(
            args.prompt,
            height=args.height,
            width=args.width,
            num_frames=args.num_frames,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=DEMO.guidance_scale,
            generator=torch.Generator().manual_seed(0),
        ).frames[0]
        seconds = time.perf_counter() - start
    if cached:
        pipe.transformer.disable_cache()
    return frames, seconds


reference, before = run(cached=False, method="dense")
print(f"{'dense':16} {before:6.1f} s")
for name, cached, method in (("cache", True, "dense"), ("sparse", False, "tail"), ("cache and sparse", True, "tail")):
    frames, seconds = run(cached, method)
    print(f"{name:16} {seconds:6.1f} s, {before / seconds:.2f}x, PSNR {psnr(frames, reference):.1f} dB")
