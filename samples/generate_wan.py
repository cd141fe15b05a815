"""A video with Wan, once dense and once sparse from the same noise, and what sparse attention saved and cost.

python samples/generate_wan.py
python samples/generate_wan.py --model_id Wan-AI/Wan2.1-T2V-1.3B-Diffusers --height 480 --width 832 \
    --prompt "a red fox crosses a frozen river" --num_frames 81 --num_inference_steps 50
"""

import argparse
from pathlib import Path

import torch
from diffusers import WanPipeline

from dit_sparse import sparsify
from dit_sparse.calibration.metrics import psnr
from dit_sparse.generate import DEMO
from dit_sparse.models import demo_directory
from dit_sparse.video import write_video

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model_id", default=str(demo_directory()), help="the demo model, if not given")
parser.add_argument("--prompt", default=DEMO.prompt)
parser.add_argument("--height", type=int, default=DEMO.height)
parser.add_argument("--width", type=int, default=DEMO.width)
parser.add_argument("--num_frames", type=int, default=DEMO.num_frames)
parser.add_argument("--num_inference_steps", type=int, default=DEMO.num_inference_steps)
parser.add_argument("--density", type=float, default=0.1)
args = parser.parse_args()

device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
pipe = WanPipeline.from_pretrained(args.model_id, dtype={"default": dtype, "vae": torch.float32}).to(device)


def video():
    # The demo's autoencoder keeps every frame, and then WanPipeline makes one more than it is asked for.
    asked = args.num_frames - (pipe.vae_scale_factor_temporal == 1)
    return pipe(
        args.prompt,
        height=args.height,
        width=args.width,
        num_frames=asked,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=DEMO.guidance_scale,
        generator=torch.Generator().manual_seed(0),
    ).frames[0]


dense = video()
with sparsify(pipe, method="anchor", density=args.density) as session:
    sparse = video()
    report = session.report()

write_video(Path("dense.mp4"), dense, fps=16)
write_video(Path("sparse.mp4"), sparse, fps=16)
print(f"attention work {report.work:.2f} of dense, PSNR {psnr(sparse, dense):.1f} dB against dense.mp4")
print("steps: " + ", ".join(f"{step.phase} {step.seconds:.2f} s" for step in report.steps))
