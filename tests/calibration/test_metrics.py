import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dit_sparse.calibration.metrics import psnr, ssim


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    reference = rng.random((3, 19, 23, 3))
    return np.clip(reference + 0.1 * rng.standard_normal(reference.shape), 0, 1), reference


def test_psnr_of_a_known_error():
    reference = np.full((2, 4, 4, 3), 0.5)
    assert psnr(reference + 0.1, reference) == pytest.approx(20)
    assert psnr(reference + 0.01, reference) == pytest.approx(40)
    assert psnr(reference, reference) == math.inf


def test_psnr_takes_the_mean_before_the_logarithm():
    reference = np.zeros((2, 4, 4, 3))
    video = reference.copy()
    video[0] = 0.1
    assert psnr(video, reference) == pytest.approx(-10 * math.log10(0.005))


def test_psnr_of_low_precision_is_computed_in_float64(pair):
    video, reference = (x.astype(np.float16) for x in pair)
    assert psnr(video, reference) == psnr(video.astype(np.float64), reference.astype(np.float64))


def test_ssim_agrees_with_the_published_formula_written_as_a_convolution(pair):
    """Wang et al., equation 13, with the window as one 11x11 kernel and centred moments."""
    video, reference = (torch.from_numpy(x).permute(0, 3, 1, 2).reshape(-1, 1, 19, 23) for x in pair)
    place = torch.arange(-5, 6, dtype=torch.float64)
    window = torch.exp(-(place[:, None] ** 2 + place**2) / (2 * 1.5**2))
    window /= window.sum()
    x, y = (F.unfold(clip, 11) for clip in (video, reference))  # [F * C, 121, places]
    weight = window.reshape(1, 121, 1)
    mean_x, mean_y = (weight * x).sum(1, keepdim=True), (weight * y).sum(1, keepdim=True)
    variance_x, variance_y = ((weight * (c - m) ** 2).sum(1) for c, m in ((x, mean_x), (y, mean_y)))
    covariance = (weight * (x - mean_x) * (y - mean_y)).sum(1)
    mean_x, mean_y = mean_x[:, 0], mean_y[:, 0]
    expected = (
        (2 * mean_x * mean_y + 1e-4)
        * (2 * covariance + 9e-4)
        / ((mean_x**2 + mean_y**2 + 1e-4) * (variance_x + variance_y + 9e-4))
    ).mean()
    assert ssim(*pair) == pytest.approx(expected.item(), rel=1e-12)


def test_ssim_in_closed_form_on_constant_frames():
    a, b = 0.3, 0.6
    value = ssim(np.full((1, 11, 11, 1), a), np.full((1, 11, 11, 1), b))
    assert value == pytest.approx((2 * a * b + 1e-4) / (a * a + b * b + 1e-4))


def test_ssim_is_one_for_equal_videos_and_falls_with_noise(pair):
    video, reference = pair
    assert ssim(reference, reference) == pytest.approx(1)
    more = reference + 2 * (video - reference)
    assert ssim(more, reference) < ssim(video, reference) < 1


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_what_cannot_be_compared_is_refused(measure, pair):
    video, reference = pair
    with pytest.raises(ValueError, match=r"not \[2, 19, 23, 3\] and \[3, 19, 23, 3\]"):
        measure(video[:2], reference)
    with pytest.raises(ValueError, match="of one shape"):
        measure(video[0], reference[0])
    spoiled = reference.copy()
    spoiled[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="reference holds NaN"):
        measure(video, spoiled)


def test_ssim_refuses_frames_smaller_than_its_window(pair):
    video, reference = pair
    with pytest.raises(ValueError, match="at least 11x11, not 10x23"):
        ssim(video[:, :10], reference[:, :10])
