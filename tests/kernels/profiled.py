"""Both Hopper kernels at the size of Wan 14B, 720p, twice each, for Nsight Compute, on a GPU:

ncu --clock-control none --set full -k regex:block_attention_hopper --launch-skip 2 -f -o report python \
tests/kernels/profiled.py
ncu --import report.ncu-rep --page source --csv
"""

import torch

from dit_sparse.bench import CASES, Bench, BenchOptions, random_plan
from dit_sparse.kernels.block_attention import block_attention

if __name__ == "__main__":
    bench, case = Bench(BenchOptions()), CASES["wan-14b-720p"]
    q, k, v = bench.qkv(case)
    plan = random_plan(case, 0.1, bench.device)
    for _ in range(2):
        block_attention(q, k, v, plan, block=128, impl="gluon")
        block_attention(q, k, v, plan, block=128, precision="8bit")
    torch.cuda.synchronize()
