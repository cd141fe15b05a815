"""Measure a model once, choose by the quality wanted, and generate with what was chosen.

python samples/calibrate_then_generate.py --target_psnr 30
python samples/calibrate_then_generate.py --model_id ./wan2.1-1.3b --prompts_file prompts.txt --target_speedup 1.5
"""

import argparse
from pathlib import Path

import torch
from diffusers import WanPipeline

from dit_sparse import sparsify
from dit_sparse.calibrate import CalibrateOptions, FitOptions, calibrate, fit
from dit_sparse.generate import DEMO
from dit_sparse.models import demo_directory
from dit_sparse.video import write_video

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model_id", help="the demo model, if not given")
parser.add_argument("--prompts_file", type=Path, help="one to eight prompts, one a line; the demo's own, if not given")
parser.add_argument("--height", type=int, default=DEMO.height)
parser.add_argument("--width", type=int, default=DEMO.width)
parser.add_argument("--num_frames", type=int, default=DEMO.num_frames)
parser.add_argument("--num_inference_steps", type=int, default=DEMO.num_inference_steps)
parser.add_argument("--target_psnr", type=float, help="dB against the dense video")
parser.add_argument("--target_speedup", type=float, help="of the transformer")
args = parser.parse_args()
if args.prompts_file is None:
    args.prompts_file = Path("prompts.txt")
    args.prompts_file.write_text(DEMO.prompt + "\n", encoding="utf-8")
size = dict(height=args.height, width=args.width, num_frames=args.num_frames)
size |= dict(num_inference_steps=args.num_inference_steps, guidance_scale=DEMO.guidance_scale)

# A dense run in which every method is tried on the side, head by head and step by step.
measured = Path("measured.profile.safetensors")
calibrate(CalibrateOptions(args.model_id, prompts_file=args.prompts_file, output_file=measured, **size))

# The cheapest choice that meets the target. Measured once, it can be fitted to many.
chosen = Path("chosen.profile.safetensors")
fit(FitOptions(measured, chosen, target_psnr=args.target_psnr, target_speedup=args.target_speedup))

pipe = WanPipeline.from_pretrained(args.model_id or demo_directory())
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
# The demo's autoencoder keeps every frame, and then WanPipeline makes one more than it is asked for.
size["num_frames"] -= pipe.vae_scale_factor_temporal == 1
prompt = args.prompts_file.read_text(encoding="utf-8").splitlines()[0]
with sparsify(pipe, profile=str(chosen)) as session:
    frames = pipe(prompt, generator=torch.Generator().manual_seed(0), **size).frames[0]
    print(f"calibrated.mp4: attention work {session.report().work:.2f} of dense")
write_video(Path("calibrated.mp4"), frames, fps=16)
