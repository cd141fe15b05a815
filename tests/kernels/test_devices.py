"""Kernels run where their tensors are, whichever device is the current one."""

import pytest
import torch

from dit_sparse.attention import sparse_attention
from dit_sparse.config import SparseConfig
from dit_sparse.kernels.implementation import on_device
from dit_sparse.layout import TokenGrid
from dit_sparse.report import Mark
from dit_sparse.state import Generation, Layer

GRID = TokenGrid(5, 24, 24)


def test_the_device_of_the_tensor_is_chosen_for_the_launch(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device", chosen.append)

    class Elsewhere:
        is_cuda, device = True, torch.device("cuda", 3)

    on_device(Elsewhere())
    assert chosen == [torch.device("cuda", 3)]
    with on_device(torch.ones(1)):
        assert len(chosen) == 1


def two_steps(config: SparseConfig, dim: int, device: str) -> list[torch.Tensor]:
    layer = Layer("layer", 0, 1, 2, dim)
    generation = Generation(config, [layer])
    g = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, 2, GRID.tokens + 33, dim, generator=g).to(device, torch.bfloat16) for _ in range(3))
    found = []
    for step in (0, 1):
        generation.enter(GRID, batch=1, device=torch.device(device), timestep=0.0, step=step, total=10)
        found.append(sparse_attention(q, k, v, layer, generation).cpu())
    return found


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    ("config", "dim"),
    [
        (SparseConfig("anchor", dense_steps=0, block=128), 128),
        (SparseConfig("anchor", dense_steps=0, block=128, precision="8bit"), 128),
        (SparseConfig("tail", dense_steps=0, block=64, top_p=0.6), 64),
        (SparseConfig("rectify", dense_steps=0), 40),
    ],
    ids=lambda x: "" if isinstance(x, int) else f"{x.method} {x.block} {x.precision}",
)
def test_what_runs_on_another_gpu_is_what_runs_on_the_first(config, dim):
    assert torch.cuda.current_device() == 0
    for a, b in zip(two_steps(config, dim, "cuda:0"), two_steps(config, dim, "cuda:1"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_time_is_that_of_the_other_gpu():
    device = torch.device("cuda:1")
    x = torch.randn(4096, 4096, device=device)
    x @ x
    start = Mark(device)
    for _ in range(50):
        x @ x
    seconds = start.until(Mark(device))
    # 7 TFLOP in float32: no GPU is done with them in 10 ms.
    assert 0.01 < seconds < 60
