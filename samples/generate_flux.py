"""An image with Flux. Attention is a large share of the work only for large images, so this asks `plan` first.

python samples/generate_flux.py --prompt "a lighthouse in a storm, oil on canvas" --height 2048 --width 2048
"""

import argparse
from pathlib import Path

import torch
from diffusers import FluxPipeline

from dit_sparse import SparseConfig, sparsify
from dit_sparse.pipelines.session import FAMILIES
from dit_sparse.predict import predict
from dit_sparse.video import write_video

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model_id", default="black-forest-labs/FLUX.1-dev")
parser.add_argument("--prompt", default="a lighthouse in a storm, oil on canvas")
parser.add_argument("--height", type=int, default=2048)
parser.add_argument("--width", type=int, default=2048)
parser.add_argument("--num_inference_steps", type=int, default=28)
parser.add_argument("--output_file", type=Path, default=Path("flux.png"))
args = parser.parse_args()

device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
pipe = FluxPipeline.from_pretrained(args.model_id, dtype=dtype).to(device)

# Tail remembers nothing from step to step: the blocks left out take part as their pooled keys and values.
config = SparseConfig(method="tail", density=0.15, dense_steps=2)
family = FAMILIES[type(pipe.transformer).__name__]
shape = family.shape(pipe.transformer.config, args.height, args.width, 1, pipe.vae.config)
said = predict(shape, config, args.num_inference_steps)
print(f"{said.tokens} tokens, attention is {said.attention_share:.0%} of a forward: {said.expected:.2f}x expected")
if not said.pays:
    print("Sparse attention does not pay at this size; it is on all the same, to show how.")

with sparsify(pipe, config) as session:
    image = pipe(
        args.prompt,
        height=args.height,
        width=args.width,
        num_inference_steps=args.num_inference_steps,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    report = session.report()

write_video(args.output_file, image, fps=1)
print(f"{args.output_file}: density {report.density:.2f}, attention work {report.work:.2f} of dense")
