"""What a trial's seconds are set against."""

from types import SimpleNamespace

import pytest
import torch

from dit_sparse.calibration import trials


@pytest.mark.parametrize(
    ("device", "then", "now", "expected"),
    [("cpu", 3e-4, 2e-4, 1.5), ("cpu", 0.3, 0.0, 1.0), ("cuda", 0.3, 0.2, 1.0)],
)
def test_a_cpu_is_as_busy_as_its_dense_calls_say(device, then, now, expected):
    clock = SimpleNamespace(generation=SimpleNamespace(device=torch.device(device)), per_head=now)
    assert trials._slower_then(clock, then) == pytest.approx(expected)
