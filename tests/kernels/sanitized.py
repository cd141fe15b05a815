"""Every kernel once on small ragged shapes, for compute-sanitizer, on a GPU; all, or those named behind:

compute-sanitizer --tool memcheck --error-exitcode 1 python tests/kernels/sanitized.py
compute-sanitizer --tool racecheck --error-exitcode 1 --num-cuda-barriers 64 python tests/kernels/sanitized.py gluon

Most of the time goes into compiling, so run it without the tool before.
"""

import sys
import time

import torch

from dit_sparse.kernels.block_attention import block_attention
from dit_sparse.kernels.block_mass import block_mass
from dit_sparse.kernels.block_scores import block_scores
from dit_sparse.kernels.block_select import block_select
from dit_sparse.kernels.block_stats import block_stats
from dit_sparse.kernels.merge import merge_into, with_tail
from dit_sparse.kernels.permute import permute, permute_pooled
from dit_sparse.kernels.tail_weights import unlisted_weights
from dit_sparse.plan import SecondOrder, Tail
from tests.kernels.attention_inputs import cast, corrected, inputs, random_plan, text_mask

PARTS = ((), ("tail", "second", "scale", "weighed"), ("tail", "int4"), ("block_scale", "fp8"))


def attention(impl: str, dim: int, block: int, text: int) -> None:
    q, k, v = inputs(batch=2, heads=2, queries=5 * block - 53 + text, dim=dim, strided=True)
    rows = -(-(q.shape[2] - text) // block)
    plan = random_plan(2, 2, rows, rows)
    for parts in PARTS:
        correction = cast(corrected(q, k, v, plan, block, text, parts), torch.bfloat16)
        qkv = [x.bfloat16() for x in (q, k, v)]
        block_attention(*qkv, plan, correction, block=block, text=text, impl=impl)
        scatter = torch.randperm(q.shape[2] - text, device="cuda").int()
        block_attention(*qkv, plan, correction, block=block, text=text, impl=impl, scatter=scatter)
        mask = text_mask(2, text) if text else None
        block_attention(*qkv, plan, correction, block=block, text=text, impl=impl, key_mask=mask)
        if impl == "gluon" and dim == 128:
            block_attention(
                *qkv, plan, correction, block=block, text=text, scatter=scatter, key_mask=mask, precision="8bit"
            )
        halves = random_plan(2, 2, rows, -(-2 * (q.shape[2] - text) // block))
        correction = cast(corrected(q, k, v, halves, block, text, parts, block // 2), torch.bfloat16)
        block_attention(*qkv, halves, correction, block=block, key_block=block // 2, text=text, impl=impl)


def the_rest() -> None:
    x = torch.randn(2, 700, 3, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    order = torch.randperm(667, device="cuda").int()
    lengths = torch.tensor([64] * 10 + [27], device="cuda")
    permute((x, x, x), order)
    permute_pooled((x, x, x), order, lengths, block=64, wants=("all", "mean+var", "mean"))
    block_stats(x[:, :, :667], lengths, block=64)
    scores = torch.rand(2, 3, 11, 11, device="cuda")
    means, weights = torch.randn(2, 3, 70, 40, device="cuda"), torch.rand(2, 3, 70, device="cuda")
    ones = torch.ones(70, dtype=torch.int64, device="cuda")
    found = block_scores(means, means, ones, scale=1, variances=means**2, deviations=weights, text=weights)
    block_select(found, density=0.3, logarithms=True)
    for block in (32, 128):
        block_mass(means[..., :40].float(), x[:, :, :, :40], parts=4, key_block=block, scale=0.2)
    forced = torch.eye(11, dtype=torch.bool, device="cuda")
    block_select(scores, density=0.3, forced=forced)
    plan = block_select(scores, density=0.1, top_p=0.6, k_max=7)
    some = torch.randn(2, 3, 11, 40, device="cuda").square()
    for second in (None, SecondOrder(some, some, some)):
        for by_row in (False, True):
            tail = Tail(some, some, lengths.log(), second)
            unlisted_weights(tail, plan, torch.bfloat16, scale=1, width=128, by_row=by_row)
    lse = torch.randn(2, 3, 700, device="cuda")
    merge_into(x[:, :, :667], lse[:, :, :667], x[:, :, 33:].clone(), lse[:, :, 33:].clone())
    for block in (64, 128):
        rows = -(-700 // block)
        pooled = torch.randn(2, 3, 11, 64, device="cuda")
        tail = Tail(pooled, pooled, lengths.log())
        with_tail(x, x, lse, random_plan(2, 3, rows, 11), tail, block=block)


if __name__ == "__main__":
    start = time.perf_counter()
    kinds = {"triton": (64, 128), "gluon": (128,)}
    if torch.cuda.get_device_capability()[0] != 9:
        del kinds["gluon"]
    wanted = sys.argv[1:] or [*kinds, "rest"]
    for impl in wanted:
        for block in kinds.get(impl, ()):
            for dim in (64, 128):
                for text in (0, 33):
                    attention(impl, dim, block, text)
                    # A tool that makes a kernel a thousand times slower looks like one that hangs.
                    torch.cuda.synchronize()
                    print(f"{time.perf_counter() - start:.0f} s: {impl}, {block=}, {dim=}, {text=}", flush=True)
    if "rest" in wanted:
        the_rest()
    torch.cuda.synchronize()
    print("done")
