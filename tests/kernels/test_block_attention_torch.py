"""Which query blocks the torch implementation takes together; test_block_attention.py says that it is right."""

import pytest
import torch

from dit_sparse.kernels import block_attention_torch
from dit_sparse.kernels.block_attention import block_attention
from dit_sparse.kernels.dense_attention import dense_attention
from dit_sparse.plan import BlockPlan
from tests.kernels.attention_inputs import inputs, random_plan


@pytest.fixture
def threads(monkeypatch):
    return lambda n: monkeypatch.setattr(torch, "get_num_threads", lambda: n)


def chunks(counts, block=32, text=0, token_bytes=1024):
    return list(block_attention_torch._chunks(counts, block, block, text, token_bytes))


def test_every_block_is_in_one_chunk(threads):
    threads(3)
    counts = sorted((7 * i) % 40 + 1 for i in range(100))
    found = chunks(counts)
    assert [i for first, last in found for i in range(first, last)] == list(range(100))


def test_what_differs_in_count_is_not_padded(threads):
    threads(2)
    found = chunks([13] * 20 + [14] * 40)
    assert (0, 20) in [(found[0][0], last) for _, last in found]


@pytest.mark.parametrize(("block", "fewest"), [(16, 4), (32, 4), (64, 2), (128, 1)])
def test_no_thread_is_without_rows(threads, block, fewest):
    threads(4)
    # More than a thread's share of memory for each of them.
    sizes = {last - first for first, last in chunks([12 * 8192 // block] * 6 * fewest, block, token_bytes=128)}
    assert sizes == {fewest}
    # No two are alike, and they go together all the same.
    assert all(last - first >= fewest for first, last in chunks(list(range(1, 6 * fewest + 1)), block))


def test_threads_do_not_multiply_memory_without_end(threads):
    threads(64)
    row = 8 << 20
    found = chunks([row // 1024 // 32] * 64)
    assert max(last - first for first, last in found) * row <= block_attention_torch.MOST_BYTES
    assert chunks([row] * 3) == [(0, 1), (1, 2), (2, 3)]
    assert chunks([1, 2, row, row]) == [(0, 2), (2, 3), (3, 4)]


def test_blocks_that_see_all_are_not_gathered(monkeypatch):
    q, k, v = (x.float() for x in inputs(queries=75))
    gathered = []
    gather = block_attention_torch._Keys.gather
    monkeypatch.setattr(
        block_attention_torch._Keys, "gather", lambda self, at, n: gathered.append(len(at)) or gather(self, at, n)
    )
    mask = random_plan(1, 2, 5, 5).mask()
    mask[:, :, 1:3] = True
    mask[:, :, 0, 0] = False
    out, _ = block_attention(q, k, v, BlockPlan.from_mask(mask), block=16, impl="torch")
    full = int(mask[:, :, :4].all(-1).sum())
    # Four whole blocks and a short one of two heads.
    assert full >= 4 and sum(gathered) == 2 * 5 - full
    torch.testing.assert_close(out[:, :, 16:48], dense_attention(q, k, v)[0][:, :, 16:48])
