"""What a trial's seconds are set against."""

from types import SimpleNamespace

import pytest
import torch

from dit_sparse.calibration import trials


@pytest.mark.parametrize(
    ("device", "then", "now", "expected"), [("cpu", 0.3, 0.2, 1.5), ("cpu", 0.3, 0.0, 1.0), ("cuda", 0.3, 0.2, 1.0)]
)
def test_only_a_cpu_may_have_been_busier(device, then, now, expected):
    clock = SimpleNamespace(generation=SimpleNamespace(device=torch.device(device)), per_head=now)
    assert trials._slower_then(clock, then) == pytest.approx(expected)
