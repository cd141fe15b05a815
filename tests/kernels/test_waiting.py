"""A sparse layer on a GPU never waits for it, can be captured in a graph, and takes little memory."""

from collections.abc import Callable

import pytest
import torch

from dit_sparse import attention
from dit_sparse.attention import sparse_attention
from dit_sparse.config import SparseConfig
from dit_sparse.correction import pooled_tail
from dit_sparse.kernels.block_attention import block_attention
from dit_sparse.kernels.dense_attention import dense_attention
from dit_sparse.layout import Layout, TokenGrid
from dit_sparse.plan import Correction
from dit_sparse.routing import pool, route
from dit_sparse.state import Generation, Layer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

LAYER = Layer("layer", 0, 1, 2, 64)
GRID = TokenGrid(5, 24, 24)
METHODS = {
    "none": SparseConfig("none", dense_steps=0),
    "tail": SparseConfig("tail", dense_steps=0),
    "tail, first order": SparseConfig("tail", dense_steps=0, second_order=False),
    "tail, top-p": SparseConfig("tail", dense_steps=0, top_p=0.6),
    "rectify": SparseConfig("rectify", dense_steps=0),
    "anchor": SparseConfig("anchor", dense_steps=0, block=128),
    "anchor, key blocks of 64": SparseConfig("anchor", dense_steps=0, block=128, key_block=64),
    "reshape": SparseConfig("reshape", dense_steps=0, block=128),
}


def at_step(generation: Generation, step: int) -> None:
    generation.enter(GRID, batch=1, device=torch.device("cuda"), timestep=0.0, step=step, total=10)


def qkv(text: int) -> list[torch.Tensor]:
    return [torch.randn(1, 2, GRID.tokens + text, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]


@pytest.mark.parametrize("long", [0, 1 << 20])
@pytest.mark.parametrize("text", [0, 33])
@pytest.mark.parametrize("method", METHODS)
def test_it_never_waits(method, text, long, monkeypatch):
    # Whether a long sequence's anchors visit each pair once.
    monkeypatch.setattr(attention, "LONG", long)
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


def extra_bytes(run: Callable[[], tuple[torch.Tensor, ...]]) -> int:
    """What `run` holds at once, beyond what it returns."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = run()
    return torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in found)


def test_block_attention_takes_little_memory():
    grid, heads = TokenGrid(4, 32, 64), 8
    q, k, v = (torch.randn(1, heads, grid.tokens, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    layout, config = Layout(grid), SparseConfig("tail", density=0.2, block=128)
    pooled = pool(q, k, v, layout, config)
    plan = route(pooled, layout, config, density=0.2, scale=128**-0.5).plan
    correction = Correction(tail=pooled_tail(pooled, q.dtype, second_order=True))
    extra = extra_bytes(lambda: block_attention(q, k, v, plan, correction, block=128))
    assert extra < 0.03 * (q.nbytes + k.nbytes + v.nbytes)


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_weights_of_a_tail_are_in_memory_once(impl, second_order):
    """They grow with the number of tokens squared, as nothing else does that block attention makes."""
    grid, heads, blocks = TokenGrid(16, 64, 128), 4, 1024
    q, k, v = (torch.randn(1, heads, grid.tokens, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    layout, config = Layout(grid), SparseConfig("tail", density=0.02, block=128)
    pooled = pool(q, k, v, layout, config)
    plan = route(pooled, layout, config, density=0.02, scale=128**-0.5).plan

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        tail = pooled_tail(pooled, q.dtype, second_order=second_order)
        return block_attention(q, k, v, plan, Correction(tail=tail), block=128, impl=impl)

    weights = 2 * heads * blocks**2
    assert weights < extra_bytes(run) < 1.5 * weights


@pytest.mark.parametrize("masked", [200, 32768])
def test_masked_dense_attention_makes_no_list_for_each_row(masked):
    q, k, v = (torch.randn(1, 24, 32768, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    mask = torch.rand(1, masked, device="cuda") < 0.5
    assert extra_bytes(lambda: dense_attention(q, k, v, key_mask=mask)) < 4 * 24 * 256 * 256 / 4


@pytest.mark.parametrize("text", [(0, 0), (0, 33), (33, 0)])
@pytest.mark.parametrize("method", METHODS)
def test_it_computes_what_a_cpu_does(method, text):
    """There, one op after the other permutes, pools and puts back; here they are one."""
    found = []
    inputs = [x.float().cpu() for x in qkv(sum(text))]
    for device in ("cpu", "cuda"):
        generation = Generation(METHODS[method], [LAYER])
        for step in (0, 1):
            generation.enter(GRID, batch=1, device=torch.device(device), timestep=0.0, step=step, total=10, text=text)
            out = sparse_attention(*(x.to(device) for x in inputs), LAYER, generation)
        found.append(out.cpu())
    torch.testing.assert_close(*found, rtol=2e-3, atol=2e-3)
