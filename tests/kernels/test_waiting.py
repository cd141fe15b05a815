"""A sparse layer on a GPU never waits for it, and can be captured in a graph."""

import pytest
import torch

from dit_sparse.attention import sparse_attention
from dit_sparse.config import SparseConfig
from dit_sparse.layout import TokenGrid
from dit_sparse.state import Generation, Layer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

LAYER = Layer("layer", 0, 1, 2, 64)
GRID = TokenGrid(5, 24, 24)
METHODS = {
    "none": SparseConfig("none", dense_steps=0),
    "tail": SparseConfig("tail", dense_steps=0),
    "tail, top-p": SparseConfig("tail", dense_steps=0, top_p=0.6),
    "rectify": SparseConfig("rectify", dense_steps=0),
    "anchor": SparseConfig("anchor", dense_steps=0, block=128),
    "reshape": SparseConfig("reshape", dense_steps=0, block=128),
}


def at_step(generation: Generation, step: int) -> None:
    generation.enter(GRID, batch=1, device=torch.device("cuda"), timestep=0.0, step=step, total=10)


def qkv(text: int) -> list[torch.Tensor]:
    return [torch.randn(1, 2, GRID.tokens + text, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]


@pytest.mark.parametrize("text", [0, 33])
@pytest.mark.parametrize("method", METHODS)
def test_it_never_waits(method, text):
    generation = Generation(METHODS[method], [LAYER])
    inputs = qkv(text)
    # Compilation, and tables that are made once, may wait.
    for step in (0, 1):
        at_step(generation, step)
        sparse_attention(*inputs, LAYER, generation)
    generation.reset()
    for step in (0, 1):
        at_step(generation, step)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            sparse_attention(*inputs, LAYER, generation)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_debug_mode_sees_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", ["tail", "anchor"])
def test_in_a_graph_it_reads_what_is_there_at_replay(method):
    generation = Generation(METHODS[method], [LAYER])
    inputs = qkv(33)
    for step in (0, 1):
        at_step(generation, step)
        sparse_attention(*inputs, LAYER, generation)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sparse_attention(*inputs, LAYER, generation)
    inputs[0].copy_(torch.randn_like(inputs[0]))
    graph.replay()
    assert torch.equal(captured, sparse_attention(*inputs, LAYER, generation))
