"""What a run is said to have cost."""

from collections import Counter

import pytest
import torch

from dit_sparse.report import Mark, RunReport, Tally

CPU = torch.device("cpu")


def test_nothing_done_is_dense():
    tally = Tally()
    assert (tally.work(), tally.density(), tally.steps()) == (1.0, 1.0, ())


def test_work_and_density_are_pairs_over_pairs():
    tally = Tally()
    tally.dense(0, 100.0)
    for step in (1, 2):
        # 10 pairs known, 5 block pairs of 4 tokens each visited, 3 of 25 of them in the plan
        tally.sparse(step, "sparse", 100.0, 10.0, torch.tensor(20), torch.tensor(3), 25.0)
    assert tally.work() == (100 + 2 * 30) / 300
    assert tally.density() == 6 / 50


def test_a_count_that_float32_cannot_hold_is_exact():
    tally = Tally()
    for _ in range(3):
        tally.sparse(0, "sparse", 2.0**40, 1.0, torch.tensor(2**30 + 1), torch.tensor(2**30 + 1), 2.0**40)
    assert tally.work() == (3 + 3 * (2**30 + 1)) / (3 * 2**40)
    assert tally.density() == (2**30 + 1) / 2**40


def test_a_step_is_what_most_layers_did():
    tally = Tally()
    tally.dense(3, 1.0)
    for _ in range(2):
        tally.sparse(3, "anchor", 1.0, 0.0, torch.tensor(1), torch.tensor(1), 1.0)
    tally.dense(1, 1.0)
    assert [(record.step, record.phase) for record in tally.steps()] == [(1, "dense"), (3, "anchor")]


def test_seconds_are_of_all_the_forwards_of_a_step_that_ended():
    tally = Tally()
    tally.dense(0, 1.0)
    for start, end in ((1.0, 1.5), (2.0, 2.25), (9.0, None)):
        marks = [Mark(CPU), None if end is None else Mark(CPU)]
        for mark, seconds in zip(marks, (start, end), strict=True):
            if mark is not None:
                mark.seconds = seconds
        tally.marks.append((0, *marks))
    assert tally.steps()[0].seconds == 0.75


def test_time_passes():
    start = Mark(CPU)
    assert 0 <= start.until(Mark(CPU)) < 60


@pytest.mark.gpu
def test_time_passes_on_the_gpu():
    device = torch.device("cuda")
    start = Mark(device)
    torch.randn(1000, 1000, device=device).square_()
    assert 0 < start.until(Mark(device)) < 60


def test_a_report_is_plain_data():
    report = RunReport((), 0.1, 0.3, 12, "fp8", dict(Counter({"why": 2})), "cpu", "torch")
    assert report.to_dict() == {
        "steps": (), "density": 0.1, "work": 0.3, "state_bytes": 12, "residual": "fp8", "fallbacks": {"why": 2},
        "dense_backend": "cpu", "kernel": "torch", "precision": "full", "precision_error": None,
        "precision_error_worst": None,
    }  # fmt: skip
