import pytest
import torch
from torch import Tensor

from dit_sparse.kernels import block_stats as module
from dit_sparse.kernels import reference
from dit_sparse.kernels.block_stats import block_stats
from dit_sparse.layout import block_lengths
from tests.close import assert_no_worse
from tests.kernels.strided import LAYOUTS, strided

IMPLS = ("torch", "triton")


def check(x: Tensor, lengths: Tensor, block: int, impl: str) -> None:
    stats = block_stats(x, lengths, block=block, impl=impl)
    low, exact = (reference.block_stats(x.to(dtype), lengths, block) for dtype in (torch.float32, torch.float64))
    # The interpreter adds a block's tokens one after the other; PyTorch and the compiled kernel add them in a tree.
    factor = 4.0 if impl == "triton" and not x.is_cuda else 2.0
    for got, eager, truth in zip(stats, low, exact, strict=True):
        assert got.dtype == torch.float32
        assert_no_worse(got, eager, truth, factor=factor)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dim", [8, 40, 64, 72, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_head_dimensions(dim: int, dtype: torch.dtype, impl: str, device: str) -> None:
    x = torch.randn(1, 2, 37, dim, device=device).to(dtype) + 1
    check(x, block_lengths(37, 16, device), 16, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("tokens", "block"), [(1, 16), (63, 16), (64, 16), (111, 37), (130, 128)])
def test_ragged_and_strided(tokens: int, block: int, layout: str, impl: str, device: str) -> None:
    x = strided(layout, 2, 3, tokens, 24, device=device)
    check(x, block_lengths(tokens, block, device), block, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_of_each_batch_row(dtype: torch.dtype, impl: str, device: str) -> None:
    lengths = torch.tensor([[16, 3, 0, 5], [7, 16, 16, 1]], dtype=dtype, device=device)
    x = torch.randn(2, 2, 53, 16, device=device)
    check(x, lengths, 16, impl)
    # A view of something larger, as a slice over steps would be.
    check(x, lengths.repeat(1, 2).reshape(2, 2, 4)[:, 0], 16, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_tokens_past_the_length_may_hold_anything(impl: str, device: str) -> None:
    x = torch.randn(1, 1, 48, 8, device=device)
    lengths = torch.tensor([16, 9, 0], device=device)
    clean = block_stats(x, lengths, block=16, impl=impl)
    x[:, :, 25:32], x[:, :, 32:] = float("nan"), float("inf")
    for got, expected in zip(block_stats(x, lengths, block=16, impl=impl), clean, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        assert (got[:, :, 2] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_far_from_zero_the_variance_keeps_its_digits(impl: str, device: str) -> None:
    # E[x^2] - E[x]^2 would lose them all here.
    x = torch.randn(1, 1, 64, 8, device=device) + 4096
    check(x, block_lengths(64, 32, device), 32, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_only_what_is_wanted(impl: str, device: str) -> None:
    x, lengths = torch.randn(1, 2, 40, 8, device=device), block_lengths(40, 16, device)
    whole = block_stats(x, lengths, block=16, impl=impl)
    mean = block_stats(x, lengths, block=16, want="mean", impl=impl)
    both = block_stats(x, lengths, block=16, want="mean+var", impl=impl)
    assert (mean.mad, mean.var, both.mad) == (None, None, None)
    for got, expected in ((mean.mean, whole.mean), (both.mean, whole.mean), (both.var, whole.var)):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("chunk", [1, 3 * 2 * 16 * 8])
def test_torch_in_float64_and_in_pieces(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    x, lengths = torch.randn(1, 2, 122, 8, dtype=torch.float64), block_lengths(122, 16, "cpu")
    stats = block_stats(x, lengths, block=16)
    for got, expected in zip(stats, reference.block_stats(x, lengths, 16), strict=True):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


X, LENGTHS = torch.zeros(2, 1, 20, 8), torch.tensor([16, 4])


@pytest.mark.parametrize(
    ("x", "lengths", "options", "message"),
    [
        (X[0], LENGTHS, {}, r"\[B, H, L, D\]"),
        (X.int(), LENGTHS, {}, "torch.int32"),
        (X[..., :7], LENGTHS, {}, "not 7"),
        (X.mT.contiguous().mT, LENGTHS, {}, "stride is 20"),
        (X, LENGTHS, {"block": 0}, "not 0"),
        (X, LENGTHS, {"block": 8}, r"\(3,\) or \(2, 3\)"),
        (X, LENGTHS.float(), {}, "torch.float32"),
        (X, LENGTHS.expand(3, 2), {}, r"\(3, 2\)"),
        (X, LENGTHS.to("meta"), {}, "not on meta"),
        (X, LENGTHS, {"want": "median"}, "'median'"),
        (X, LENGTHS, {"impl": "cuda"}, "'cuda'"),
        (X.double(), LENGTHS, {"impl": "triton"}, "torch.float64"),
    ],
)
def test_refusals(x: Tensor, lengths: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block_stats(x, lengths, **{"block": 16, **options})


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("want", ["mean", "all"])
def test_compiles_and_is_a_sound_op(want: str, impl: str, device: str) -> None:
    x, lengths = strided("BLHD", 2, 2, 20, 8, device=device), block_lengths(20, 16, device)

    def program(x: Tensor) -> Tensor:
        return sum(field for field in block_stats(x * 2, lengths, block=16, want=want, impl=impl) if field is not None)

    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), program(x), rtol=0, atol=0)
    torch.library.opcheck(torch.ops.dit_sparse.block_stats.default, (x, lengths, 16, want, impl))
