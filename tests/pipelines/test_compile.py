import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from dit_sparse import SparseConfig, sparsify
from tests.tiny import generate, tiny_wan

CONFIGS = {
    "anchor": SparseConfig("anchor", density=0.15, dense_steps=1, refresh_every=2),
    "reshape": SparseConfig("reshape", density=0.15, dense_steps=1, refresh_every=2),
    "rectify": SparseConfig("rectify", density=0.15, dense_steps=1),
}


@pytest.fixture(autouse=True)
def cold():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make():
    return tiny_wan(text=False, layers=3)


def eager(config, steps):
    pipe = make()
    with sparsify(pipe, config):
        return generate(pipe, steps=steps)


@pytest.mark.parametrize(
    ("method", "backend"), [("anchor", None), ("anchor", "native"), ("reshape", None), ("rectify", None)]
)
def test_one_graph_serves_all_layers_steps_and_phases(method, backend):
    """Also where the user chose the kernel of the dense steps, and in a second generation."""
    pipe, counter = make(), CompileCounterWithBackend("eager")
    with sparsify(pipe, CONFIGS[method]) as session:
        if backend:
            pipe.transformer.set_attention_backend(backend)
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
        for _ in range(2):
            out = generate(pipe, steps=6)
            phases = {record.phase for record in session.report().steps}
            torch.testing.assert_close(out, eager(CONFIGS[method], steps=6), atol=1e-6, rtol=1e-6)
        assert phases == {"dense", "sparse"} | ({"anchor"} if session.config.learns else set())
        assert len(session.generation.layers) == 3
    assert counter.frame_count == 1


def test_blocks_compiled_before_sparsify_are_compiled_once_more():
    pipe, counter = make(), CompileCounterWithBackend("eager")
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    stock = generate(pipe)
    assert counter.frame_count == 1
    with sparsify(pipe, CONFIGS["anchor"]):
        torch.testing.assert_close(generate(pipe), eager(CONFIGS["anchor"], steps=4), atol=1e-6, rtol=1e-6)
    assert counter.frame_count == 2
    assert torch.equal(generate(pipe), stock)
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    "how",
    ["in place", *(pytest.param(how, marks=pytest.mark.slow) for how in ("wrapped before", "wrapped after"))],
)
def test_a_whole_transformer_compiles_to_one_graph(how):
    config, counter = CONFIGS["anchor"], CompileCounterWithBackend("eager")
    pipe = make()
    if how == "wrapped before":
        pipe.transformer = torch.compile(pipe.transformer, backend=counter)
    with sparsify(pipe, config) as session:
        if how == "in place":
            pipe.transformer.compile(backend=counter)
        elif how == "wrapped after":
            pipe.transformer = torch.compile(pipe.transformer, backend=counter)
        out = generate(pipe, steps=6)
        assert [r.phase for r in session.report().steps] == ["dense", "anchor", "sparse", "anchor", "sparse", "anchor"]
    # The hook runs outside of it, or there would be one more at each step.
    assert counter.frame_count == 1
    torch.testing.assert_close(out, eager(config, steps=6), atol=1e-6, rtol=1e-6)
    plain = getattr(pipe.transformer, "_orig_mod", pipe.transformer)
    assert not plain._diffusers_hook.hooks


@pytest.mark.slow
def test_inductor_gives_what_eager_gives():
    pipe = make()
    with sparsify(pipe, CONFIGS["anchor"]):
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
        out = generate(pipe, steps=4)
    torch.testing.assert_close(out, eager(CONFIGS["anchor"], steps=4), atol=1e-4, rtol=1e-4)
