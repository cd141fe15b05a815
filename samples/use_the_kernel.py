"""Block-sparse attention without a diffusion model: choose key blocks for each query block, and attend to these alone.

python samples/use_the_kernel.py
python samples/use_the_kernel.py --tokens 65536 --heads 24 --density 0.05
"""

import argparse
import time

import torch
from torch.nn.functional import scaled_dot_product_attention

from dit_sparse.kernels.block_attention import block_attention
from dit_sparse.kernels.block_select import block_select
from dit_sparse.kernels.block_stats import block_stats
from dit_sparse.layout import block_lengths
from dit_sparse.plan import Correction, Tail

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--tokens", type=int, default=8192)
parser.add_argument("--heads", type=int, default=4)
parser.add_argument("--density", type=float, default=0.1)
parser.add_argument("--block", type=int, default=64)
args = parser.parse_args()

device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
torch.manual_seed(0)
# Runs of 96 tokens that resemble each other, as neighbours in a video do, and queries that look for what they are.
runs = torch.randn(2, 1, args.heads, args.tokens // 96 + 1, 64, device=device).repeat_interleave(96, 3)
like, values = runs[..., : args.tokens, :].to(dtype)
q, k, v = (like + 0.5 * torch.randn_like(like), like + 0.5 * torch.randn_like(like), values)

# Pool, score, select: [1, H, N, 64] means -> [1, H, N, N] scores -> the best blocks of each row.
lengths = block_lengths(args.tokens, args.block, device)
means = {
    name: block_stats(x, lengths, block=args.block, want="mean").mean for name, x in zip("qkv", (q, k, v), strict=True)
}
logits = means["q"] @ means["k"].mT * 64**-0.5 + lengths.log()
plan = block_select(logits.softmax(-1), density=args.density)

# Every block left out takes part as one pooled key and value.
tail = Correction(tail=Tail(means["k"].to(dtype), means["v"].to(dtype), lengths.to(torch.float32).log()))


def timed(attend):
    attend()
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    out = attend()
    if device == "cuda":
        torch.cuda.synchronize()
    return out, time.perf_counter() - start


exact, before = timed(lambda: scaled_dot_product_attention(q, k, v))
print(f"dense           {before * 1000:7.1f} ms")
for name, correction in (("blocks alone", None), ("and pooled rest", tail)):
    out, seconds = timed(lambda c=correction: block_attention(q, k, v, plan, c, block=args.block)[0])
    error = ((out - exact).float().norm() / exact.float().norm()).item()
    print(f"{name:15} {seconds * 1000:7.1f} ms, {plan.density():.1%} of the blocks, error {error:.1%}")
