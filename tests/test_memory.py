"""The memory there is; what is remembered is counted in test_state.py."""

import math

import pytest
import torch

from dit_sparse import memory
from dit_sparse.correction import Learned
from dit_sparse.head_kinds import HeadKinds
from dit_sparse.plan import BlockPlan, Residual

CPU = torch.device("cpu")


def test_free_memory_is_what_could_be_used_without_swapping(monkeypatch, tmp_path):
    told = "MemTotal:  1000 kB\nMemFree:  10 kB\nMemAvailable:  700 kB\nHugePages_Total:  0\n"
    monkeypatch.setattr(memory.Path, "read_text", lambda *args, **kwargs: told)
    assert memory.free_bytes(CPU) == pytest.approx((700 - 0.15 * 1000) * 1024)
    monkeypatch.setattr(memory.Path, "read_text", lambda *args, **kwargs: told.replace("700", "100"))
    assert memory.free_bytes(CPU) == 0

    def missing(*args, **kwargs):
        raise FileNotFoundError

    monkeypatch.setattr(memory.Path, "read_text", missing)
    assert memory.free_bytes(CPU) == math.inf


def test_free_memory_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 40)
    assert memory.free_bytes(torch.device("cuda")) == pytest.approx(25)


def test_a_plan_that_branches_share_counts_once():
    def learned(plan):
        return Learned(plan, Residual(torch.zeros(1, 2, 64, 8).bfloat16()), None, 0, torch.tensor(8))

    one, other = (BlockPlan.full(1, 2, 4, 4, CPU) for _ in range(2))
    row, plan = 2 * 64 * 8 * 2, 2 * 4 * 4 + 2 * 4 * 4 * 4
    assert memory.size([learned(one)]) == row + plan
    assert memory.size([learned(one), learned(one)]) == 2 * row + plan
    assert memory.size([learned(one), learned(other), HeadKinds(((0,), (1,)), 0)]) == 2 * (row + plan)
