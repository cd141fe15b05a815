"""Three methods at one density on one prompt, from the same noise: quality against dense, and attention work.

For more methods, prompts and measures, and a page that shows the videos, there is `dit-sparse compare`.

python samples/compare_three_methods.py --methods anchor rectify none --density 0.1
"""

import argparse

import torch
from diffusers import WanPipeline
from rich.console import Console
from rich.table import Table

from dit_sparse import SparseConfig, sparsify
from dit_sparse.calibration.metrics import psnr, ssim
from dit_sparse.generate import DEMO
from dit_sparse.models import demo_directory

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model_id", default=str(demo_directory()), help="the demo model, if not given")
parser.add_argument("--prompt", default=DEMO.prompt)
parser.add_argument("--methods", nargs="+", default=["anchor", "tail", "none"])
parser.add_argument("--density", type=float, default=0.1)
parser.add_argument("--height", type=int, default=DEMO.height)
parser.add_argument("--width", type=int, default=DEMO.width)
parser.add_argument("--num_frames", type=int, default=DEMO.num_frames)
parser.add_argument("--num_inference_steps", type=int, default=DEMO.num_inference_steps)
args = parser.parse_args()

device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
pipe = WanPipeline.from_pretrained(args.model_id, dtype={"default": dtype, "vae": torch.float32}).to(device)

table = Table("method", "density", "work", "DiT s", "PSNR dB", "SSIM")
reference = None
with sparsify(pipe, "dense") as session:
    for method in ("dense", *args.methods):
        # One session serves them all: while it lasts, the pipeline can be told another method between runs.
        pipe.set_attn_processor("dense" if method == "dense" else SparseConfig(method, density=args.density))
        frames = pipe(
            args.prompt,
            height=args.height,
            width=args.width,
            num_frames=args.num_frames,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=DEMO.guidance_scale,
            generator=torch.Generator().manual_seed(0),
        ).frames[0]
        report = session.report()
        row = [method, f"{report.density:.3f}", f"{report.work:.3f}", f"{sum(s.seconds for s in report.steps):.2f}"]
        if reference is None:
            reference, scores = frames, ["-", "-"]
        else:
            scores = [f"{psnr(frames, reference):.2f}", f"{ssim(frames, reference):.4f}"]
        table.add_row(*row, *scores)
Console(width=100).print(table)
