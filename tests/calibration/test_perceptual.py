import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from dit_sparse.calibration.perceptual import lpips_or_reason


@pytest.fixture(autouse=True)
def asked_anew():
    lpips_or_reason.cache_clear()
    yield
    lpips_or_reason.cache_clear()


def stand_in(monkeypatch, network) -> None:
    package = ModuleType("lpips")
    package.LPIPS = network
    monkeypatch.setitem(sys.modules, "lpips", package)


def test_without_the_package_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    distance, reason = lpips_or_reason()
    assert distance is None and reason.startswith("LPIPS is left out, because the package lpips is not at hand: ")


def test_without_weights_it_says_so_and_asks_once(monkeypatch):
    asked = []

    def network(**options):
        asked.append(options)
        raise OSError("no route to host\nmore")

    stand_in(monkeypatch, network)
    assert lpips_or_reason() == lpips_or_reason()
    assert lpips_or_reason()[1] == "LPIPS is left out, because its weights are not at hand: no route to host."
    assert asked == [{"net": "alex", "verbose": False}]


def test_frames_reach_the_network_from_minus_one_to_one(monkeypatch):
    seen = []

    class Network(torch.nn.Module):
        def __init__(self, net: str, verbose: bool):
            super().__init__()

        def forward(self, x, y):
            seen.append((x.shape, x.min().item(), x.max().item()))
            return (x - y).abs().mean().reshape(1, 1, 1, 1)

    stand_in(monkeypatch, Network)
    distance, reason = lpips_or_reason()
    video = np.zeros((3, 4, 5, 3))
    video[:, 0] = 1
    assert distance(video, np.zeros_like(video)) == pytest.approx(2 / 4) and reason == ""
    assert seen == [((1, 3, 4, 5), -1.0, 1.0)] * 3


def test_the_package_itself_where_it_is_installed():
    pytest.importorskip("lpips", reason="lpips needs torchvision")
    distance, reason = lpips_or_reason()
    if distance is None:
        pytest.skip(reason)
    frames = np.random.default_rng(0).random((1, 64, 64, 3))
    assert distance(frames, frames) == pytest.approx(0, abs=1e-6)
    assert distance(frames, 1 - frames) > 0.05
