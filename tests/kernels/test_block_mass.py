import re

import pytest
import torch

from dit_sparse.kernels import reference
from dit_sparse.kernels.block_mass import block_mass
from tests.close import assert_no_worse

IMPLS = ("torch", "triton")
# Batch, heads, mean queries, keys, channels, mean queries a block, keys a block; the last blocks are short.
SHAPES = [
    (2, 3, 37, 300, 40, 4, 16),
    (1, 2, 65, 515, 128, 4, 128),
    (1, 1, 8, 33, 64, 2, 32),
    (2, 1, 3, 64, 72, 4, 64),
    (1, 1, 130, 2300, 8, 1, 16),
]


def inputs(shape, dtype, device):
    batch, heads, rows, keys, dim = shape[:5]
    q = torch.randn(batch, heads, rows, dim, device=device) * 2
    # Heads side by side, as the projections leave them.
    k = torch.randn(batch, keys, heads, dim, device=device).transpose(1, 2).to(dtype)
    return q, k, {"parts": shape[5], "key_block": shape[6], "scale": dim**-0.5}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_reference(shape, dtype, impl, device):
    if impl == "triton" and dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices as integers")
    q, k, options = inputs(shape, dtype, device)
    got = block_mass(q, k, **options, impl=impl)
    assert got.shape == (*shape[:2], -(-shape[2] // shape[5]), -(-shape[3] // shape[6])) and got.dtype == torch.float32
    # Mean queries are rounded to the type of keys, which is not the sum's error.
    exact = reference.block_mass(q.to(dtype).double(), k.double(), **options)
    if impl == "triton" and dtype == torch.float32 and device == "cuda":
        # Tensor cores take 10 bits of each number.
        assert (got - exact).abs().max() < 2e-2
        return
    plain = reference.block_mass(q.to(dtype).float(), k.float(), **options)
    # A block's ln less that of all blocks, where plain PyTorch divides: negative, so further from 0 before.
    whole = (q.to(dtype).double() @ k.double().mT * options["scale"]).logsumexp(-1).max().item()
    assert_no_worse(got, plain, exact, through=-max(whole, 1.0))
    torch.testing.assert_close(got.double().exp().sum(-1), torch.ones_like(exact[..., 0]), atol=1e-5, rtol=0)


def test_float64_is_exact(device):
    q, k, options = inputs(SHAPES[0], torch.float64, device)
    torch.testing.assert_close(block_mass(q.double(), k, **options), reference.block_mass(q.double(), k, **options))


@pytest.mark.parametrize("impl", IMPLS)
def test_heads_some_at_a_time_are_heads_at_once(impl, device, monkeypatch):
    q, k, options = inputs(SHAPES[0], torch.float32, device)
    whole = block_mass(q, k, **options, impl=impl)
    monkeypatch.setattr("dit_sparse.kernels.block_mass.AT_ONCE", 1)
    apart = block_mass(q, k, **options, impl=impl)
    if impl == "torch" and device == "cuda":
        # A GPU's library adds up a product of other sizes in another order.
        torch.testing.assert_close(apart, whole, atol=4e-6, rtol=0)
    else:
        assert torch.equal(apart, whole)


@pytest.mark.parametrize("impl", IMPLS)
def test_far_keys_weigh_nothing_and_nothing_is_nan(impl, device):
    """Logits of hundreds: what a row's best block hides is below what float32 has."""
    q = torch.full((1, 1, 4, 16), 30.0, device=device)
    k = torch.randn(1, 1, 64, 16, device=device)
    k[..., :16, :] += 9
    got = block_mass(q, k, parts=4, key_block=16, scale=0.25, impl=impl)
    assert not got.isnan().any() and got[0, 0, 0, 0] == 0 and (got[0, 0, 0, 1:] < -80).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("before", [60.0, -60.0], ids=["falls", "rises"])
def test_a_block_far_above_those_before_it_counts_exactly(before, impl, device):
    """Sums relative to the largest so far are infinite where it jumps by more than float32's range."""
    q = torch.zeros(1, 1, 70, 16, device=device)
    q[..., 0] = 4
    q[:, :, 3, 0] = 0.1
    k = torch.randn(1, 1, 700, 16, device=device)
    k[..., 0] = before * (1 - 2 * (torch.arange(700, device=device) // 256 == 1).float())
    options = {"parts": 1, "key_block": 32, "scale": 1.0}
    got = block_mass(q, k, **options, impl=impl)
    exact = reference.block_mass(q.double(), k.double(), **options)
    here = exact > -80
    torch.testing.assert_close(got[here].double(), exact[here], atol=0.1 if device == "cuda" else 1e-4, rtol=0)
    assert (got[~here] < -80).all()


def test_the_kernel_wants_powers_of_two(device):
    q, k, options = inputs(SHAPES[0], torch.float32, device)
    with pytest.raises(ValueError, match="parts must be a power of two up to 64 for impl 'triton', not 3"):
        block_mass(q, k, **(options | {"parts": 3}), impl="triton")
    with pytest.raises(ValueError, match="key_block must be a power of two for impl 'triton', not 24"):
        block_mass(q, k, **(options | {"key_block": 24}), impl="triton")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"k": torch.randn(2, 3, 8, 16)}, "must agree, but they are (1, 3, 4, 16) and (2, 3, 8, 16)."),
        ({"q": torch.randn(1, 3, 4, 16).double()}, "q must be float32"),
        ({"k": torch.randn(1, 3, 16, 8).mT}, "must be contiguous"),
        ({"parts": 0}, "parts is from 1 on"),
        ({"key_block": 256}, "key_block from 1 to 128"),
    ],
)
def test_what_does_not_fit_is_refused(changed, said):
    given = {"q": torch.randn(1, 3, 4, 16), "k": torch.randn(1, 3, 8, 16), "parts": 4, "key_block": 16}
    with pytest.raises(ValueError, match=re.escape(said)):
        block_mass(**(given | changed), scale=1.0)


@pytest.mark.parametrize("impl", IMPLS)
def test_it_is_an_op(impl, device):
    q, k, options = inputs(SHAPES[2], torch.float32, device)
    arguments = (q, k, options["parts"], options["key_block"], options["scale"], impl)
    torch.library.opcheck(torch.ops.dit_sparse.block_mass.default, arguments)
