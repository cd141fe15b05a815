import threading
import time

import pytest
import torch

from dit_sparse.calibration import costs
from dit_sparse.choices import Rung
from dit_sparse.config import SparseConfig
from dit_sparse.layout import TokenGrid
from dit_sparse.state import Layer

GRID, LAYER = TokenGrid(4, 16, 16), Layer("transformer.blocks.0.attn1", 0, 1, 2, 32)


def test_every_choice_has_a_cost_and_more_blocks_cost_more():
    q, k, v = torch.randn(3, 1, 2, GRID.tokens, 32)
    ladder = (Rung(0.02), Rung(0.9))
    found = costs.measure(LAYER, (q, k, v), GRID, ladder, SparseConfig("tail", block=16), repeats=5)
    methods = ("none", "rectify", "tail", "calibrated", "anchor", "reshape")
    assert set(found) == {"dense", *methods, "anchor at anchor", "reshape at anchor", "kernel"}
    assert found["kernel"] == "torch"
    for name in methods:
        low, high = found[name]
        assert 0 < low < high, name
    # Every rung routes for itself, for methods that learn at the same step, too.
    assert found["anchor"][1] > 1.5 * found["anchor"][0] and found["reshape"][1] > 1.5 * found["reshape"][0]
    # An anchor is dense besides.
    assert found["anchor at anchor"][0] > found["dense"]


def test_every_choice_is_timed_behind_queued_work(monkeypatch):
    dense, least = [], []
    monkeypatch.setattr(costs, "fastest_dense", lambda *_: dense.append(1))

    def spy(call, repeats, device, before):
        before()
        least.append(repeats)
        return 1.0

    monkeypatch.setattr(costs, "_least", spy)
    q = torch.randn(1, 2, GRID.tokens, 32)
    costs.measure(LAYER, (q, q, q), GRID, (Rung(0.1),), SparseConfig("tail", block=16))
    # A CPU queues nothing. Dense, six methods and two anchors.
    assert least == [2] * 9 and not dense


@pytest.mark.parametrize(("seconds", "calls"), [(1.0, 1), (2e-3, 3), (1e-7, 100), (0.0, 100)])
def test_as_many_dense_calls_as_keep_a_gpu_busy(seconds, calls):
    assert costs._ahead(seconds) == calls


def test_what_is_queued_before_a_call_is_not_counted():
    seconds = costs._least(lambda: time.sleep(0.01), 2, torch.device("cpu"), lambda: time.sleep(0.3))
    assert 0.01 <= seconds < 0.2


def test_kernels_are_compiled_side_by_side_before_anything_is_timed(monkeypatch):
    q = torch.randn(1, 2, GRID.tokens, 32)
    said, own = [], costs.attend_part

    def spy(q, k, v, part, generation, mask):
        said.append((threading.current_thread() is threading.main_thread(), part.config.method, part.phase))
        return own(q, k, v, part, generation, mask)

    monkeypatch.setattr(costs, "attend_part", spy)
    monkeypatch.setattr(costs, "_compiles", lambda device: True)
    costs.measure(LAYER, (q, q, q), GRID, (Rung(0.1), Rung(0.5)), SparseConfig("tail", block=16), repeats=1)
    apart = [(method, phase) for main, method, phase in said if not main]
    assert [main for main, _, _ in said] == [False] * len(apart) + [True] * (len(said) - len(apart))
    assert sorted(set(apart)) == sorted({(method, phase) for main, method, phase in said if main})


def test_what_goes_wrong_while_compiling_is_raised():
    ran = []
    with pytest.raises(ZeroDivisionError):
        costs._side_by_side([lambda: 1 / 0, lambda: ran.append(1)], 0.3)
    assert ran == [1]
