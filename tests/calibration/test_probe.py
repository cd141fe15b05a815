import pytest
import torch

from dit_sparse.calibration.probe import Probe, Watched
from dit_sparse.config import SparseConfig
from dit_sparse.kernels.dense_attention import dense_attention
from dit_sparse.layout import TokenGrid
from dit_sparse.pipelines.session import Attention
from dit_sparse.state import Generation, Layer

GRID = TokenGrid(3, 5, 7)


def watched(method: str, rows: int = 1000, **options) -> tuple[Watched, Generation, Probe]:
    generation = Generation(SparseConfig(method, dense_steps=0, **options), [Layer("blocks.0.attn1", 0, 1, 2, 16)])
    generation.enter(GRID, batch=2, device=torch.device("cpu"), timestep=1.0, step=0, branch="cond", total=4)
    probe = Probe(generation, rows)
    return Watched(Attention(generation, 0), probe), generation, probe


def test_dense_attention_has_no_error_and_a_sparse_one_its_own():
    q, k, v = torch.randn(3, 2, 2, GRID.tokens, 16)
    attend, _, probe = watched("dense")
    assert torch.equal(attend(q, k, v), dense_attention(q, k, v)[0])
    [row] = probe.maps()
    assert row["work"] == 1 and row["error"] < 1e-5 and probe.seconds > 0
    attend, generation, probe = watched("none", density=0.4)
    out = attend(q, k, v)
    exact = dense_attention(q, k, v)[0]
    [row] = probe.maps()
    # Every row is looked at, so that the error is the whole output's.
    assert row["error"] == pytest.approx(((out - exact).norm() / exact.norm()).item(), rel=1e-4) and row["error"] > 0.1
    assert row["work"] == pytest.approx(generation.tally.work())


def test_calls_of_a_layer_and_step_go_together():
    attend, generation, probe = watched("tail", density=0.4, rows=16)
    for _ in range(2):
        attend(*torch.randn(3, 2, 2, GRID.tokens, 16))
    generation.enter(GRID, batch=2, device=torch.device("cpu"), timestep=0.5, step=1, branch="cond", total=4)
    attend(*torch.randn(3, 2, 2, GRID.tokens, 16))
    assert [(row["layer"], row["step"]) for row in probe.maps()] == [("blocks.0.attn1", 0), ("blocks.0.attn1", 1)]
    assert len(probe.calls) == 3


def test_without_rows_there_is_no_error():
    attend, _, probe = watched("none", rows=0)
    attend(*torch.randn(3, 2, 2, GRID.tokens, 16))
    assert probe.maps()[0]["error"] is None


class Masked:
    """An attention call with a mask, as exact as can be."""

    layer, joint = 0, True

    def __init__(self, generation: Generation):
        self.generation, self.fallen = generation, []

    def __call__(self, q, k, v, key_mask=None):
        self.generation.tally.dense(0, 1.0)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, key_mask[:, None, None])

    def fall_back(self, reason, pairs):
        self.fallen.append((reason, pairs))


def test_masks_count_in_what_is_exact_and_a_fallback_passes_through():
    _, generation, probe = watched("dense")
    inner = Masked(generation)
    attend = Watched(inner, probe)
    q, k, v = torch.randn(3, 2, 2, 40, 16)
    key_mask = torch.rand(2, 40) < 0.6
    attend(q, k, v, key_mask)
    assert all((call.error / call.exact).sqrt() < 1e-5 for call in probe.calls) and len(probe.calls) == 1
    assert attend.joint is inner.joint
    attend.fall_back("a reason", 7.0)
    assert inner.fallen == [("a reason", 7.0)]
