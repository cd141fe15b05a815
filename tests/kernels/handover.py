"""One warp tells others numbers across an mbarrier, on a GPU: what racecheck says of it, it says of all such kernels.

compute-sanitizer --tool racecheck python tests/kernels/handover.py
"""

import torch
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
def kernel(p_out, n):
    told = gl.allocate_shared_memory(gl.int32, [8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(full.index(0), count=1)
    mbarrier.init(empty.index(0), count=1)
    gl.warp_specialize([(hear, (p_out, told, full, empty, n)), (tell, (told, full, empty, n))], [1], [24])


if __name__ == "__main__":
    out = torch.zeros(8, dtype=torch.int32, device="cuda")
    kernel[(1,)](out, 5, num_warps=4)
    assert out.tolist() == [10] * 8
