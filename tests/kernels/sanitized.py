"""Every kernel once on small ragged shapes, for compute-sanitizer, on a GPU; all, or those named behind:

compute-sanitizer --tool memcheck --error-exitcode 1 python tests/kernels/sanitized.py
compute-sanitizer --tool racecheck --error-exitcode 1 --num-cuda-barriers 64 python tests/kernels/sanitized.py gluon
"""

import sys

import torch

from dit_sparse.kernels.block_attention import block_attention
from dit_sparse.kernels.block_select import block_select, plan_mask
from dit_sparse.kernels.block_stats import block_stats
from dit_sparse.kernels.permute import permute, permute_pooled
from tests.kernels.attention_inputs import cast, corrected, inputs, random_plan

PARTS = ((), ("tail", "second", "scale", "residual"), ("tail", "int4"), ("block_scale", "fp8"))


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
        if impl == "gluon" and dim == 128:
            block_attention(*qkv, plan, correction, block=block, text=text, scatter=scatter, precision="8bit")


def the_rest() -> None:
    x = torch.randn(2, 700, 3, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    order = torch.randperm(667, device="cuda").int()
    lengths = torch.tensor([64] * 10 + [27], device="cuda")
    permute((x, x, x), order)
    permute_pooled((x, x, x), order, lengths, block=64, wants=("all", "mean+var", "mean"))
    block_stats(x[:, :, :667], lengths, block=64)
    scores = torch.rand(2, 3, 11, 11, device="cuda")
    forced = torch.eye(11, dtype=torch.bool, device="cuda")
    block_select(scores, density=0.3, forced=forced)
    plan_mask(block_select(scores, density=0.1, top_p=0.6, k_max=7))


def handover() -> None:
    """One warp tells another a number across an mbarrier: what racecheck says of it, it says of every such kernel."""
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier

    @gluon.jit
    def tell(told, full, empty, n):
        layout: gl.constexpr = gl.BlockedLayout([8], [32], [1], [0])
        phase = gl.to_tensor(0)
        for i in range(n):
            mbarrier.wait(empty.index(0), phase ^ 1)
            told.store(gl.arange(0, 8, layout) * 0 + i)
            mbarrier.arrive(full.index(0), count=1)
            phase ^= 1

    @gluon.jit
    def hear(p_out, told, full, empty, n):
        layout: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
        phase = gl.to_tensor(0)
        total = gl.zeros([8], gl.int32, layout)
        for _ in range(n):
            mbarrier.wait(full.index(0), phase)
            total += told.load(layout)
            mbarrier.arrive(empty.index(0))
            phase ^= 1
        gl.store(p_out + gl.arange(0, 8, layout), total)

    @gluon.jit
    def kernel(p_out, n, tell: gl.constexpr, hear: gl.constexpr):
        told = gl.allocate_shared_memory(gl.int32, [8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
        mbarrier.init(full.index(0), count=1)
        mbarrier.init(empty.index(0), count=1)
        gl.warp_specialize([(hear, (p_out, told, full, empty, n)), (tell, (told, full, empty, n))], [1], [24])

    out = torch.zeros(8, dtype=torch.int32, device="cuda")
    kernel[(1,)](out, 5, tell, hear, num_warps=4)
    assert out.tolist() == [10] * 8


if __name__ == "__main__":
    kinds = {"triton": (64, 128), "gluon": (128,)}
    if torch.cuda.get_device_capability()[0] != 9:
        del kinds["gluon"]
    wanted = sys.argv[1:] or [*kinds, "rest"]
    for impl in wanted:
        for block in kinds.get(impl, ()):
            for dim in (64, 128):
                for text in (0, 33):
                    attention(impl, dim, block, text)
    if "rest" in wanted:
        the_rest()
    if "handover" in wanted:
        handover()
    torch.cuda.synchronize()
    print("done")
