"""How far one video is from another of the same seed: PSNR and SSIM of [F, H, W, C] floats from 0 to 1."""

import math

import numpy as np

# SSIM's window and constants, as published: 11 taps of a Gaussian of 1.5 pixels, K1 = 0.01, K2 = 0.03.
_RADIUS, _SIGMA = 5, 1.5
_C1, _C2 = 0.01**2, 0.03**2


def psnr(video: np.ndarray, reference: np.ndarray) -> float:
    """-10 log10 of the mean squared error over all frames, pixels and channels, in dB; inf if they are equal.

    The mean is taken before the logarithm, so one bad frame counts in full. Raises ValueError if shapes differ or a
    value is NaN or Inf.
    """
    _check(video, reference)
    error = np.mean(np.square(video.astype(np.float64) - reference.astype(np.float64)))
    return math.inf if error == 0 else float(-10 * np.log10(error))


def ssim(video: np.ndarray, reference: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004, equation 13, with its Gaussian window), at most 1.

    The mean over frames, channels and every place where the 11x11 window lies inside the frame. Raises ValueError if
    shapes differ, a frame is smaller than the window, or a value is NaN or Inf.
    """
    _check(video, reference)
    side = 2 * _RADIUS + 1
    if min(video.shape[1:3]) < side:
        raise ValueError(f"SSIM needs frames of at least {side}x{side}, not {video.shape[1]}x{video.shape[2]}.")
    return float(np.mean([_ssim_frame(x, y) for x, y in zip(video, reference, strict=True)]))


def _ssim_frame(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x.astype(np.float64), y.astype(np.float64)
    mean_x, mean_y = _blur(x), _blur(y)
    # Differences of large sums can fall below zero by rounding; a variance cannot.
    variance_x = np.maximum(_blur(x * x) - mean_x**2, 0)
    variance_y = np.maximum(_blur(y * y) - mean_y**2, 0)
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
    return float(np.mean(luminance * structure))


def _blur(x: np.ndarray) -> np.ndarray:
    """[H, W, C] -> [H - 10, W - 10, C], the window's weighted mean at each place where it fits."""
    taps = np.exp(-0.5 * (np.arange(-_RADIUS, _RADIUS + 1) / _SIGMA) ** 2)
    taps /= taps.sum()
    for axis in (0, 1):
        x = np.tensordot(np.lib.stride_tricks.sliding_window_view(x, len(taps), axis), taps, 1)
    return x


def _check(video: np.ndarray, reference: np.ndarray) -> None:
    if video.shape != reference.shape or video.ndim != 4:
        raise ValueError(
            f"Videos to compare are [F, H, W, C] of one shape, not {list(video.shape)} and {list(reference.shape)}."
        )
    for name, x in (("video", video), ("reference", reference)):
        if not np.isfinite(x).all():
            raise ValueError(f"The {name} holds NaN or Inf; all values must be from 0 to 1.")
