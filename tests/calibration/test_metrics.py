import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_msssim import ms_ssim as their_ms_ssim
from pytorch_msssim import ssim as their_ssim
from torchmetrics.functional import mean_absolute_error
from torchmetrics.functional.image import peak_signal_noise_ratio

from dit_sparse.calibration.metrics import flicker, ms_ssim, ms_ssim_scales, psnr, ssim, ssim_and_ms_ssim


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


def test_both_at_once_are_each_alone(pair):
    assert ssim_and_ms_ssim(*pair) == (ssim(*pair), ms_ssim(*pair))


def test_ssim_in_closed_form_on_constant_frames():
    a, b = 0.3, 0.6
    value = ssim(np.full((1, 11, 11, 1), a), np.full((1, 11, 11, 1), b))
    assert value == pytest.approx((2 * a * b + 1e-4) / (a * a + b * b + 1e-4))


def test_ssim_is_one_for_equal_videos_and_falls_with_noise(pair):
    video, reference = pair
    assert ssim(reference, reference) == pytest.approx(1)
    more = reference + 2 * (video - reference)
    assert ssim(more, reference) < ssim(video, reference) < 1


@pytest.mark.parametrize("measure", [psnr, ssim, ms_ssim, flicker])
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


@pytest.mark.parametrize("measure", [ssim, ms_ssim])
def test_ssim_refuses_frames_smaller_than_its_window(pair, measure):
    video, reference = pair
    with pytest.raises(ValueError, match="at least 11x11, not 10x23"):
        measure(video[:, :10], reference[:, :10])


def channels_first(*videos: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(video).permute(0, 3, 1, 2) for video in videos]


def pictures(height: int, width: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Two frames with structure at every scale, and the same with noise and a change of light."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:height, :width] / 32
    waves = [0.5 + 0.4 * np.sin(f * x + c) * np.cos(f * y) for f, c in ((0.7, 0), (3, 1), (11, 2))]
    reference = np.stack([np.stack(waves, -1), np.stack(waves[::-1], -1)])
    return np.clip(0.9 * reference + noise * rng.standard_normal(reference.shape), 0, 1), reference


@pytest.mark.parametrize(("height", "width", "noise"), [(200, 184, 0.1), (64, 90, 0.3), (24, 31, 0.02)])
def test_metrics_agree_with_other_libraries(height, width, noise):
    video, reference = pictures(height, width, noise)
    x, y = channels_first(video, reference)
    assert psnr(video, reference) == pytest.approx(peak_signal_noise_ratio(x, y, data_range=1.0).item(), abs=1e-4)
    assert ssim(video, reference) == pytest.approx(their_ssim(x, y, data_range=1).item(), abs=1e-4)
    expected = mean_absolute_error((x[1:] - x[:-1]).contiguous(), (y[1:] - y[:-1]).contiguous())
    assert flicker(video, reference) == pytest.approx(expected.item(), abs=1e-7)


# Where a size is odd, that library averages in a row of zeros.
@pytest.mark.parametrize(("height", "width"), [(192, 208), (176, 352)])
def test_ms_ssim_agrees_with_another_library(height, width):
    video, reference = pictures(height, width, 0.15)
    assert ms_ssim_scales(height, width) == 5
    expected = their_ms_ssim(*channels_first(video, reference), data_range=1).item()
    assert ms_ssim(video, reference) == pytest.approx(expected, abs=1e-4) and 0.3 < expected < 0.99


@pytest.mark.parametrize(("height", "width", "scales"), [(90, 131, 4), (45, 44, 3), (31, 24, 2), (11, 21, 1)])
def test_ms_ssim_of_small_frames_is_over_the_first_scales(height, width, scales):
    """Equation 7 written with one 11x11 kernel and torch's own pooling."""
    video, reference = pictures(height, width, 0.15)
    assert ms_ssim_scales(height, width) == scales
    place = torch.arange(-5, 6, dtype=torch.float64)
    window = torch.exp(-(place[:, None] ** 2 + place**2) / (2 * 1.5**2))
    window = (window / window.sum()).expand(3, 1, 11, 11)
    x, y = channels_first(video, reference)
    weights = torch.tensor([0.0448, 0.2856, 0.3001, 0.2363, 0.1333], dtype=torch.float64)[:scales]
    product = 1.0
    for weight in weights / weights.sum():
        mean_x, mean_y, xx, yy, xy = (F.conv2d(z, window, groups=3) for z in (x, y, x * x, y * y, x * y))
        structure = (2 * (xy - mean_x * mean_y) + 9e-4) / (xx - mean_x**2 + yy - mean_y**2 + 9e-4)
        luminance = (2 * mean_x * mean_y + 1e-4) / (mean_x**2 + mean_y**2 + 1e-4)
        power = structure.mean((2, 3)).clamp(min=0) ** weight
        whole = (luminance * structure).mean((2, 3)).clamp(min=0) ** weight
        before, product = product, product * power
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    assert ms_ssim(video, reference) == pytest.approx((before * whole).mean().item(), rel=1e-9)


def test_ms_ssim_is_one_for_equal_videos_and_zero_for_inverted_ones():
    _, reference = pictures(64, 64, 0)
    assert ms_ssim(reference, reference) == pytest.approx(1)
    assert ms_ssim(1 - reference, reference) == 0


def test_flicker_is_of_changes_and_not_of_what_stays():
    still = np.full((4, 6, 6, 3), 0.5)
    assert flicker(still + 0.2, still) == 0
    blinking = still.copy()
    blinking[1::2] += 0.1
    assert flicker(blinking, still) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="only one"):
        flicker(still[:1], still[:1])
