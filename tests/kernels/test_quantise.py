"""q, k and v in 8 bits, and the order of keys that spares the Hopper kernel a shuffle."""

import pytest
import torch

from dit_sparse.kernels.quantise import BLOCK, key_order, quantise
from tests.kernels.attention_inputs import DEVICE, inputs, of_all_keys, text_mask

pytest.importorskip("triton")


def test_logits_of_a_thread_are_its_probabilities():
    # Of 32 columns the first product leaves pairs with each of four threads, the second takes fours.
    place = torch.arange(BLOCK)
    holds = place // 2 % 4
    takes = place // 4 % 4
    order = key_order()
    assert torch.equal(order.sort().values, place)
    assert torch.equal(takes[order], holds) and torch.equal(order // 32, place // 32)
    # And in the same sequence, so that nothing moves between a thread's registers.
    for thread in range(4):
        assert (order[holds == thread].diff() > 0).all()


@pytest.mark.parametrize("text", [0, 5, 128, 200])
@pytest.mark.parametrize("strided", [False, True])
def test_what_codes_stand_for(text, strided):
    vision = 2 * BLOCK + 44
    q, k, v = (x.float() for x in inputs(batch=2, heads=3, queries=vision + text, dim=128, strided=strided))
    k, v = k + 2, v * torch.arange(1, 129, device=DEVICE)
    codes = quantise(q, k, v, text, 0.25)
    blocks = -(-vision // BLOCK) + -(-text // BLOCK)
    assert codes.k.shape == (2, 3, blocks * BLOCK, 128) and codes.v.shape == (2, 3, 128, blocks * BLOCK)

    def tokens(x):
        """[B, H, padded, D] -> [B, H, L, D]"""
        start = -(-vision // BLOCK) * BLOCK
        return torch.cat([x[:, :, :vision], x[:, :, start : start + text]], 2)

    by_row = codes.k.unflatten(2, (blocks, BLOCK)).float() * codes.k_unit[..., :1, None]
    by_key = torch.empty_like(by_row)
    by_key[:, :, :, key_order(DEVICE)] = by_row
    mean = k.mean(2)
    torch.testing.assert_close(codes.k_mean, mean)
    assert (codes.k_unit == codes.k_unit[..., :1]).all()
    worst = (k - mean[:, :, None]).abs().amax() / 127
    assert (tokens(by_key.flatten(2, 3)) + mean[:, :, None] - k).abs().max() <= 0.51 * worst
    # Each row has a unit of its own, so errs by half of it at most.
    unit = q.abs().amax(-1) / 127
    torch.testing.assert_close(codes.q_unit, unit)
    assert ((codes.q.float() * unit[..., None] - q).abs() <= 0.501 * unit[..., None]).all()
    torch.testing.assert_close(codes.q_shift, 0.25 * (q * mean[:, :, None]).sum(-1), atol=1e-4, rtol=1e-4)
    # Three bits behind the leading one, down to a 2^18th of the channel's largest.
    got, unit = tokens(codes.v.float().mT), codes.v_unit[:, :, None]
    torch.testing.assert_close(codes.v_unit, v.abs().amax(2) / 448)
    near = (got * unit - v).abs() <= v.abs() / 15.9 + unit * 2**-9.9
    if DEVICE == "cpu":
        # Triton's interpreter loses the carry of numbers that round up to a power of two.
        best = (v / unit).to(torch.float8_e4m3fn).float().abs()
        near |= (best.frexp().mantissa == 0.5) & (best > (v / unit).abs())
    assert near.all()


def test_a_mean_that_is_given_is_taken():
    q, k, v = (x.float() for x in inputs(batch=2, queries=BLOCK + 3, dim=128))
    mean = torch.randn(128, 2, k.shape[1], device=DEVICE).permute(1, 2, 0)
    codes, others = quantise(q, k, v, 0, 0.25, mean), quantise(q, k - mean[:, :, None], v, 0, 0.25, mean * 0)
    assert torch.equal(codes.k_mean, mean) and torch.equal(codes.k, others.k)
    torch.testing.assert_close(codes.q_shift, 0.25 * (q * mean[:, :, None]).sum(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("given", [False, True])
def test_no_unit_knows_of_padding(given):
    text, vision = 200, BLOCK + 44
    q, k, v = (x.float() for x in inputs(batch=2, queries=vision + text, dim=128))
    mask = text_mask(2, text)
    hidden = ~of_all_keys(mask, k.shape[2])[:, None, :, None]
    mean = k[:, :, :vision].mean(2) if given else None
    some = quantise(q, k.masked_fill(hidden, 3), v.masked_fill(hidden, 0), text, 0.25, mean, mask)
    loud = quantise(q, k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.inf), text, 0.25, mean, mask)
    for name, a, b in zip(some._fields, some, loud, strict=True):
        assert torch.equal(a.float(), b.float()), name
    seen = v.masked_fill(hidden, 0).abs().amax(2)
    torch.testing.assert_close(some.v_unit, seen / 448)
    # What is seen is what it would be without a mask.
    plain = quantise(q, k.masked_fill(hidden, 0), v.masked_fill(hidden, 0), text, 0.25, some.k_mean)
    assert torch.equal(some.v.float(), plain.v.float())
    assert torch.equal(some.k[:, :, : 2 * BLOCK], plain.k[:, :, : 2 * BLOCK])
    by_key = torch.empty_like(some.k[:, :, 2 * BLOCK :])
    by_key[:, :, torch.cat([key_order(DEVICE), BLOCK + key_order(DEVICE)])] = some.k[:, :, 2 * BLOCK :]
    assert by_key[:, :, :text].any(-1)[mask[:, None].expand(-1, 2, -1)].all()
    assert not by_key[:, :, :text].any(-1)[~mask[:, None].expand(-1, 2, -1)].any()


def test_what_is_filled_up_is_zero():
    q, k, v = (x.float() for x in inputs(queries=BLOCK + 3, dim=128))
    codes = quantise(q, k, v, 0, 1.0)
    by_key = torch.empty_like(codes.k[:, :, BLOCK:])
    by_key[:, :, key_order(DEVICE)] = codes.k[:, :, BLOCK:]
    assert not by_key[:, :, 3:].any() and by_key[:, :, :3].any()
    assert not codes.v[..., BLOCK + 3 :].float().any()
