"""What storing a residual may cost, and how the codes lie in memory."""

import pytest
import torch

from dit_sparse.plan import Residual
from dit_sparse.residual import bytes_per_row, pack, unpack, weighed

TINY = torch.finfo(torch.float32).tiny
SCALES = [1e-44, 1e-38, 1e-30, 1e-3, 1.0, 1e4, 1e30, 3e38]


def largest(x):
    return x.double().abs().amax(-1, keepdim=True)


@pytest.mark.parametrize("size", SCALES)
def test_fp8_is_within_half_a_step(size):
    x = torch.randn(50, 16).clamp(-1, 1) * size
    error = (unpack(pack(x, "fp8")).double() - x.double()).abs()
    # e4m3 has three mantissa bits, so half a step is 2^-4 of a number, and 2^-10 at the bottom of its range, whose top
    # is 448. A scale is never below the smallest normal float32.
    scale = (largest(x) / 448).clamp(min=TINY)
    assert (error <= (x.double().abs() * 2**-4).clamp(min=2**-10 * scale) * 1.001).all()


@pytest.mark.parametrize("size", SCALES)
def test_int4_is_within_half_a_step(size):
    x = torch.randn(50, 16).clamp(-1, 1) * size
    error = (unpack(pack(x, "int4")).double() - x.double()).abs()
    assert (error <= 0.5001 * (largest(x) / 7).clamp(min=TINY)).all()


@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_the_largest_of_a_row_comes_back(kind):
    x = torch.randn(50, 16)
    there = x.abs() == largest(x).float()
    torch.testing.assert_close(unpack(pack(x, kind))[there], x[there], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["bf16", "fp8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_input_types(kind, dtype):
    x = torch.randn(2, 3, 5, 16).to(dtype)
    back = unpack(pack(x, kind)).double()
    bound = {"bf16": 2**-8, "fp8": 2**-4, "int4": 0.51 / 7}[kind]
    assert ((back - x.double()).abs() <= bound * largest(x)).all()


def test_bf16_is_plain_rounding():
    x = torch.randn(7, 16, dtype=torch.float64)
    stored = pack(x, "bf16")
    assert stored.kind == "full" and stored.scales is None
    assert torch.equal(stored.codes, x.to(torch.bfloat16)) and torch.equal(unpack(stored), stored.codes)


@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_a_row_of_zeros_stays_zero(kind):
    x = torch.randn(4, 16)
    x[2] = 0
    stored = pack(x, kind)
    assert torch.equal(unpack(stored)[2], torch.zeros(16)) and (stored.scales > 0).all()


@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_rows_do_not_share_a_scale(kind):
    x = torch.randn(2, 16)
    alone = unpack(pack(x[:1], kind))
    assert torch.equal(unpack(pack(torch.stack([x[0], 1e6 * x[1]]), kind))[:1], alone)


def test_int4_holds_the_first_half_of_the_channels_in_the_low_bits():
    x = torch.tensor([[7.0, -7.0, 0.0, 3.0, 1.0, -1.0, 2.0, -5.0]])
    stored = pack(x, "int4")
    assert stored.codes.dtype == torch.uint8 and stored.codes.tolist() == [
        [15 + 16 * 9, 1 + 16 * 7, 8 + 16 * 10, 11 + 16 * 3]
    ]
    assert stored.scales.tolist() == [1.0] and torch.equal(unpack(stored), x)


def test_fp8_holds_the_bits_of_e4m3():
    stored = pack(torch.tensor([[448.0, -1.0, 0.5, 0.0]]), "fp8")
    assert stored.codes.tolist() == [[0x7E, 0xB8, 0x30, 0x00]] and stored.scales.tolist() == [1.0]


def test_every_code_of_fp8_and_int4_survives():
    """All numbers that the codes can say, packed again, give the same numbers."""
    codes = torch.arange(256, dtype=torch.uint8)
    fp8 = unpack(Residual(codes[(codes & 127) != 127][None], torch.ones(1), "fp8"))
    assert torch.equal(unpack(pack(fp8, "fp8")), fp8)
    int4 = torch.arange(-7.0, 8.0)[None].repeat(1, 2)
    assert torch.equal(unpack(pack(int4, "int4")), int4)


@pytest.mark.parametrize("kind", ["bf16", "fp8", "int4"])
def test_bytes_per_row(kind):
    stored = pack(torch.randn(3, 5, 64), kind)
    tensors = [x for x in (stored.codes, stored.scales) if x is not None]
    assert sum(x.numel() * x.element_size() for x in tensors) == 15 * bytes_per_row(64, kind)


@pytest.mark.parametrize("storage", ["bf16", "fp8", "int4"])
def test_a_weight_a_row_is_a_factor_of_what_is_stored(storage):
    stored = pack(torch.randn(2, 3, 5, 8), storage)
    weight = torch.rand(3, 1)
    by_head = weighed(stored, weight)
    torch.testing.assert_close(unpack(by_head), unpack(stored).float() * weight[..., None])
    assert by_head.codes is stored.codes and by_head.kind == stored.kind
    assert by_head.scales.shape == (2, 3, 5) and by_head.scales.is_contiguous()
    # Once more, as reshape may.
    twice = weighed(by_head, torch.full((2, 3, 5), 0.5))
    torch.testing.assert_close(unpack(twice), unpack(by_head) / 2)
