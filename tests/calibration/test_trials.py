"""What a trial's seconds are set against."""

from types import SimpleNamespace

import pytest
import torch

from dit_sparse.calibration import trials


def test_one_slow_step_is_not_the_pace():
    header = SimpleNamespace(costs={"other": 20.0}, levels=range(10))
    steps = dict.fromkeys(range(10), 3.0) | {4: 23.0}
    took = trials._seconds(steps, dict.fromkeys(range(10), 1.0), header, torch.device("cpu"))
    assert took == pytest.approx(dict.fromkeys(range(10), 3.0))


@pytest.mark.parametrize("other", [0.0, -0.1])
def test_no_pace_is_told_by_nothing(other):
    header = SimpleNamespace(costs={"other": other}, levels=range(10))
    assert trials._seconds({9: 1.0}, {9: 0.9}, header, torch.device("cpu")) == {9: other / 10 + 0.9}


@pytest.mark.parametrize(("device", "pace"), [("cpu", 2.0), ("cuda", 1.0)])
def test_a_cpu_is_as_busy_as_what_is_not_attention_says(device, pace):
    """Of ten steps, the last two in a trial; elsewhere in 4 seconds of 20 each, here in 2."""
    header = SimpleNamespace(costs={"other": 20.0}, levels=range(10))
    took = trials._seconds({8: 1.5, 9: 2.5}, {8: 0.7, 9: 1.3}, header, torch.device(device))
    assert took == pytest.approx({8: 2 + 0.7 * pace, 9: 2 + 1.3 * pace})
