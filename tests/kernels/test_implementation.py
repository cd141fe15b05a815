import os
import subprocess
import sys

import pytest
import torch

from dit_sparse.kernels.implementation import resolve


def run_clean(program: str) -> None:
    """Run in a fresh interpreter in which Triton compiles."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    clean["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, "-c", program], env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


CALLS = """
import torch
from dit_sparse.kernels.block_attention import block_attention
from dit_sparse.kernels.block_scores import block_scores
from dit_sparse.kernels.block_select import block_select
from dit_sparse.kernels.block_stats import block_stats
from dit_sparse.kernels.permute import permute
from dit_sparse.plan import BlockPlan, Correction, SecondOrder, Tail

x = torch.rand(1, 1, 16, 8)
of_blocks = torch.rand(1, 1, 1, 8)
tail = Tail(of_blocks, of_blocks, torch.ones(1), SecondOrder(of_blocks, of_blocks, of_blocks))
plan = BlockPlan.full(1, 1, 1, 1, "cpu")
calls = {
    "block_stats": lambda impl: block_stats(x, torch.tensor([16]), block=16, impl=impl),
    "block_scores": lambda impl: block_scores(x, x, torch.ones(16), scale=1.0, impl=impl),
    "block_select": lambda impl: block_select(x, density=0.5, impl=impl),
    "block_attention": lambda impl: block_attention(x, x, x, plan, Correction(tail=tail), block=16, impl=impl),
    "permute": lambda impl: permute([x], torch.arange(16), impl=impl),
}
for name, call in calls.items():
    call("auto")
    try:
        call("triton")
    except ValueError as error:
        assert REASON in str(error), (name, str(error))
    else:
        raise AssertionError(name)
"""


def test_named_triton_refuses_cpu_tensors() -> None:
    run_clean(CALLS.replace("REASON", "'takes CUDA tensors, not cpu ones'"))


def test_without_triton_torch_works_and_named_triton_says_what_is_missing() -> None:
    absent = "import sys\nsys.modules['triton'] = None\n"
    run_clean(absent + CALLS.replace("REASON", "'needs the triton package'"))


def test_auto_goes_by_device_and_dtype() -> None:
    assert resolve("auto", torch.empty(0)) == "torch"
    cuda = torch.empty(0, device="meta").as_subclass(_OnCuda)
    assert resolve("auto", cuda) == "triton"
    assert resolve("auto", cuda.double()) == "torch"
    assert resolve("torch", cuda) == "torch"
    with pytest.raises(ValueError, match=r"'flash'.*auto, torch, triton"):
        resolve("flash", cuda)


class _OnCuda(torch.Tensor):
    """Says that it is on a GPU, on machines with none."""

    is_cuda = True
