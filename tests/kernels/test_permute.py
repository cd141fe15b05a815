import pytest
import torch
from torch import Tensor

from dit_sparse.kernels import reference
from dit_sparse.kernels.block_stats import block_stats
from dit_sparse.kernels.permute import permute, permute_pooled
from dit_sparse.layout import block_lengths
from tests.kernels.strided import LAYOUTS, strided

IMPLS = ("torch", "triton")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("tokens", "moved"), [(1, 1), (61, 61), (61, 50), (61, 0), (200, 170)])
def test_is_the_reference_and_is_undone(tokens: int, moved: int, layout: str, impl: str, device: str) -> None:
    tensors = [strided(layout, 2, 3, tokens, 64, device=device) for _ in range(3)]
    index = torch.randperm(moved, device=device)
    there = permute(tensors, index, impl=impl)
    for x, y in zip(tensors, there, strict=True):
        assert torch.equal(y, reference.permute(x, index))
        # Heads that lay inside tokens still do.
        assert y.stride() == torch.empty_like(x).stride()
    back = permute(there, index.argsort(), impl=impl)
    assert all(torch.equal(x, z) for x, z in zip(tensors, back, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dim", [8, 40, 72, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_head_dimensions(dim: int, dtype: torch.dtype, impl: str, device: str) -> None:
    x = strided("BLHD", 1, 2, 45, dim, device=device).to(dtype)
    index = torch.randperm(40, device=device)
    (y,) = permute([x], index, impl=impl)
    assert torch.equal(y, reference.permute(x, index))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_tensors_each_with_its_own_strides(count: int, impl: str, device: str) -> None:
    tensors = [strided(LAYOUTS[i % 3], 2, 2, 33, 16, device=device) for i in range(count)]
    # Every other number: a view of something larger.
    index = torch.randperm(30, device=device).repeat_interleave(2).int()[::2]
    for x, y in zip(tensors, permute(tensors, index, impl=impl), strict=True):
        assert torch.equal(y, reference.permute(x, index))


def test_torch_takes_float64() -> None:
    x, index = torch.randn(1, 1, 9, 8, dtype=torch.float64), torch.randperm(9)
    assert torch.equal(permute([x], index)[0], x[:, :, index])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("tokens", "moved", "block", "dim"), [(200, 190, 64, 64), (150, 128, 128, 24), (90, 90, 32, 72), (61, 50, 16, 8)]
)
def test_pooled_is_permuting_and_then_pooling(tokens, moved, block, dim, layout, impl, device) -> None:
    tensors = [strided(layout, 2, 3, tokens, dim, device=device) for _ in range(3)]
    # Behind the vision tokens, which are pooled, others may be moved too, and others stay.
    vision = moved - 5
    index, lengths = torch.randperm(moved, device=device), block_lengths(vision, block, device)
    wants = ("all", None, "mean+var")
    there, found = permute_pooled(tensors, index, lengths, block=block, wants=wants, impl=impl)
    for y, once, want, stats in zip(there, permute(tensors, index), wants, found, strict=True):
        assert torch.equal(y, once) and y.stride() == once.stride()
        if want is None:
            assert stats is None
            continue
        for got, expected in zip(stats, block_stats(y[:, :, :vision], lengths, block=block, want=want), strict=True):
            assert (got is None) == (expected is None)
            if got is not None:
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_pooled_takes_float64() -> None:
    x, index, lengths = torch.randn(1, 1, 40, 8, dtype=torch.float64), torch.randperm(40), block_lengths(40, 32, "cpu")
    (y,), (stats,) = permute_pooled([x], index, lengths, block=32, wants=["mean"])
    assert stats is not None and stats.mean.dtype == torch.float64 and torch.equal(y, x[:, :, index])


@pytest.mark.parametrize(
    ("lengths", "wants", "message"),
    [
        (torch.tensor([4, 2]), ("median",), "'median'"),
        (torch.tensor([4, 2]), ("mean", "mean"), "'mean', 'mean'"),
        (torch.tensor([4, 2, 1]), ("mean",), r"\(3,\)"),
        (torch.tensor([[4, 2]]), ("mean",), r"\(1, 2\)"),
    ],
)
def test_pooled_refusals(lengths, wants, message) -> None:
    with pytest.raises(ValueError, match=message):
        permute_pooled([X], INDEX, lengths, block=4, wants=wants)


def test_pooled_compiles_and_is_a_sound_op(device: str) -> None:
    x, index = strided("BLHD", 2, 2, 40, 8, device=device), torch.randperm(36, device=device)
    lengths = block_lengths(33, 32, device)

    def program(x: Tensor) -> Tensor:
        (y,), (stats,) = permute_pooled([x * 2], index, lengths, block=32, wants=["mean+var"], impl="triton")
        return y.sum() + stats.mean.sum() + stats.var.sum()

    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), program(x), rtol=0, atol=0)
    torch.library.opcheck(torch.ops.dit_sparse.permute_pooled.default, ([x], index, lengths, 32, [2]))


X, INDEX = torch.zeros(1, 2, 6, 8), torch.arange(5)


@pytest.mark.parametrize(
    ("tensors", "index", "impl", "message"),
    [
        ([], INDEX, "auto", "at least one"),
        ([X[0]], INDEX, "auto", r"\(2, 6, 8\)"),
        ([X.int()], INDEX, "auto", "torch.int32"),
        ([X, X[:, :1]], INDEX, "auto", r"\(1, 1, 6, 8\)"),
        ([X, X.half()], INDEX, "auto", "torch.float16"),
        ([X, X.mT.contiguous().mT], INDEX, "auto", "stride is 6"),
        ([X], INDEX.short(), "auto", "torch.int16"),
        ([X], INDEX[None], "auto", r"\(1, 5\)"),
        ([X], torch.arange(7), "auto", "7 places"),
        ([X], INDEX.to("meta"), "auto", "meta"),
        ([X], INDEX, "cuda", "'cuda'"),
        ([X.double()], INDEX, "triton", "torch.float64"),
    ],
)
def test_refusals(tensors: list[Tensor], index: Tensor, impl: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        permute(tensors, index, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_and_is_a_sound_op(impl: str, device: str) -> None:
    q, k = strided("BLHD", 2, 2, 20, 8, device=device), strided("fused", 2, 2, 20, 8, device=device)
    index = torch.randperm(16, device=device)

    def program(q: Tensor, k: Tensor) -> Tensor:
        return torch.cat(permute([q * 2, k], index, impl=impl))

    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k), program(q, k))
    torch.library.opcheck(torch.ops.dit_sparse.permute.default, ([q, k], index, impl))
