import importlib.metadata

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from torch.nn import functional as F

from dit_sparse import SparseConfig
from dit_sparse.pipelines.backend import NAME, SparseBackend
from tests.families import FAMILIES as TINY
from tests.families import generate
from tests.tiny import generate as generate_wan
from tests.tiny import tiny_wan


@pytest.fixture
def register():
    made = []

    def make(*args, **kwargs):
        made.append(SparseBackend(*args, **kwargs))
        return made[-1]

    before = set(AttentionBackendName)
    yield make
    for backend in made:
        backend.remove()
    assert set(AttentionBackendName) == before and NAME not in AttentionBackendName._value2member_map_


def config(density):
    return SparseConfig("tail", density=density, order="raster", dense_steps=0)


def test_a_model_that_chooses_it_is_sparse_in_self_attention(register):
    backend = register(config(0.15), tokens=64)
    pipe = tiny_wan(text=False)
    stock = generate_wan(pipe)
    pipe.transformer.set_attention_backend(NAME)
    out = generate_wan(pipe)
    assert (out - stock).abs().max() > 1e-4 and out.isfinite().all()
    # Cross-attention was never its business.
    assert 0 < backend.work < 0.6 and not backend.fallbacks
    pipe.transformer.set_attention_backend("native")
    assert torch.equal(generate_wan(pipe), stock)


@pytest.mark.parametrize("density", [1.0, 0.2])
def test_its_output_is_that_of_the_method(register, density):
    register(config(density), tokens=64)
    q, k, v = torch.randn(3, 2, 200, 2, 16, generator=torch.Generator().manual_seed(0))
    with attention_backend(NAME):
        out = dispatch_attention_fn(q, k, v)
    dense = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    assert out.shape == dense.shape
    error = (out - dense).abs().max()
    assert error < 1e-5 if density == 1 else 1e-3 < error < 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(attn_mask=torch.ones(1, 1, 1, 200, dtype=torch.bool)), "a mask, dropout"),
        (dict(scale=1.0), "another scale"),
    ],
    ids=["mask", "scale"],
)
def test_what_it_cannot_do_is_native_and_counted(register, options, reason):
    backend = register(config(0.15), tokens=64)
    q, k, v = torch.randn(3, 1, 200, 2, 16)
    with attention_backend(NAME):
        out = dispatch_attention_fn(q, k, v, **options)
        short = dispatch_attention_fn(q[:, :50], k[:, :50], v[:, :50])
    torch.testing.assert_close(out, dispatch_attention_fn(q, k, v, **options))
    torch.testing.assert_close(short, dispatch_attention_fn(q[:, :50], k[:, :50], v[:, :50]))
    ((said, count),) = backend.fallbacks.items()
    assert reason in said and count == 1


def test_a_model_without_a_dispatcher_never_reaches_it(register):
    """CogVideoX calls torch itself: a reason why processors are the main way."""
    register(config(0.15), tokens=64)
    pipe = TINY["cogvideox-1.5"].make()
    stock = generate("cogvideox-1.5", pipe)
    with attention_backend(NAME):
        assert torch.equal(generate("cogvideox-1.5", pipe), stock)


def test_what_it_refuses(register, monkeypatch):
    for bad in (SparseConfig("anchor"), SparseConfig("tail"), SparseConfig("sta", dense_steps=0)):
        with pytest.raises(ValueError, match="A backend knows no grid and no steps, so method="):
            register(bad)
    register()
    with pytest.raises(ValueError, match="registered already"):
        register()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.50.1")
    with pytest.raises(ValueError, match="is for diffusers 0.42, not 0.50.1: use sparsify"):
        register()
