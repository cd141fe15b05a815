import pytest
import torch
from torch import Tensor

from dit_sparse.kernels import reference
from dit_sparse.kernels.permute import permute
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
