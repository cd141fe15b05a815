"""A video with CogVideoX, whose text and video tokens attend to each other: text stays dense, video becomes sparse.

python samples/generate_cogvideox.py --prompt "a panda plays a guitar in a bamboo forest"
"""

import argparse
from pathlib import Path

import torch
from diffusers import CogVideoXPipeline

from dit_sparse import SparseConfig, sparsify
from dit_sparse.video import write_video

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model_id", default="zai-org/CogVideoX-2b")
parser.add_argument("--prompt", default="a panda plays a guitar in a bamboo forest")
parser.add_argument("--height", type=int, default=480)
parser.add_argument("--width", type=int, default=720)
parser.add_argument("--num_frames", type=int, default=49)
parser.add_argument("--num_inference_steps", type=int, default=50)
parser.add_argument("--output_file", type=Path, default=Path("cogvideox.mp4"))
args = parser.parse_args()

device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
pipe = CogVideoXPipeline.from_pretrained(args.model_id, dtype=dtype).to(device)
# Long videos are decoded tile by tile; that has nothing to do with attention, and both can be on.
pipe.vae.enable_tiling()

# Reshape remembers what sparse attention lacked at a dense step, one in five, and adds it at the four after it.
config = SparseConfig(method="reshape", density=0.2, dense_steps=0.2)
with sparsify(pipe, config) as session:
    frames = pipe(
        args.prompt,
        height=args.height,
        width=args.width,
        num_frames=args.num_frames,
        num_inference_steps=args.num_inference_steps,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).frames[0]
    report = session.report()

write_video(args.output_file, frames, fps=8)
phases = [step.phase for step in report.steps]
told = ", ".join(f"{phases.count(phase)} {phase}" for phase in dict.fromkeys(phases))
print(f"{args.output_file}: {told} steps, attention work {report.work:.2f} of dense")
print(f"remembered between steps: {report.state_bytes / 2**20:.1f} MiB as {report.residual}")
