"""How far one video is from another of the same seed, both [F, H, W, C] floats from 0 to 1."""

import math
from collections.abc import Iterator

import numpy as np

# SSIM's window and constants, as published: 11 taps of a Gaussian of 1.5 pixels, K1 = 0.01, K2 = 0.03.
_RADIUS, _SIGMA = 5, 1.5
_SIDE = 2 * _RADIUS + 1
_C1, _C2 = 0.01**2, 0.03**2
# MS-SSIM's weights of its scales, the largest picture first, as published.
_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


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
    _check_side("SSIM", video)
    return float(np.mean([_similarity(x, y)[0] for x, y in _frames(video, reference)]))


def ms_ssim(video: np.ndarray, reference: np.ndarray) -> float:
    """Multi-scale structural similarity (Wang, Simoncelli and Bovik 2003, equation 7), from 0 to 1.

    The mean over frames and channels of the product over scales, each half as large as the one before. A frame whose
    shorter side is below 176 pixels has no room for all five scales: it gets the first that fit, their weights scaled
    to sum to 1.
    Raises ValueError as `ssim` does.
    """
    return ssim_and_ms_ssim(video, reference)[1]


def ssim_and_ms_ssim(video: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Both at little more than the price of the second, whose first scale is the first."""
    _check(video, reference)
    _check_side("MS-SSIM", video)
    weights = np.array(_SCALES[: ms_ssim_scales(*video.shape[1:3])])
    weights /= weights.sum()
    found = [_across_scales(x, y, weights) for x, y in _frames(video, reference)]
    return float(np.mean([first for first, _ in found])), float(np.mean([product for _, product in found]))


def ms_ssim_scales(height: int, width: int) -> int:
    """How many of MS-SSIM's five scales a frame has room for; 0 where not even the first fits."""
    return sum(min(height, width) >> scale >= _SIDE for scale in range(len(_SCALES)))


def flicker(video: np.ndarray, reference: np.ndarray) -> float:
    """Mean |(x[t+1] - x[t]) - (y[t+1] - y[t])| over frames, pixels and channels: change over time that the reference
    has not, or the other way round, as a share of the range of a pixel.

    Raises ValueError if shapes differ, there is only one frame, or a value is NaN or Inf.
    """
    _check(video, reference)
    if len(video) < 2:
        raise ValueError("Flicker is between frames, and these videos have only one.")
    # Frame by frame, because a whole video in float64 may not fit in memory.
    error, before = 0.0, None
    for x, y in _frames(video, reference):
        gap = x - y
        if before is not None:
            error += np.abs(gap - before).mean()
        before = gap
    return float(error / (len(video) - 1))


def _across_scales(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """SSIM of the first scale, and the product over all, each [C]."""
    first, product = None, np.ones(x.shape[-1])
    for scale, weight in enumerate(weights):
        whole, structure = _similarity(x, y)
        first = whole if first is None else first
        last = scale == len(weights) - 1
        # Structure that runs against the reference's is negative, and a negative number has no such power.
        product *= np.maximum(whole if last else structure, 0) ** weight
        if not last:
            x, y = _halved(x), _halved(y)
    assert first is not None
    return first, product


def _halved(x: np.ndarray) -> np.ndarray:
    """[H, W, C] -> [H // 2, W // 2, C], the mean of each 2x2 pixels; an odd last row or column is left out."""
    x = x[: len(x) // 2 * 2, : x.shape[1] // 2 * 2]
    return (x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4


def _similarity(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """SSIM of one frame, and its contrast and structure without luminance, each [C]."""
    mean_x, mean_y = _blur(x), _blur(y)
    # Differences of large sums can fall below zero by rounding; a variance cannot.
    variance_x = np.maximum(_blur(x * x) - mean_x**2, 0)
    variance_y = np.maximum(_blur(y * y) - mean_y**2, 0)
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
    return (luminance * structure).mean((0, 1)), structure.mean((0, 1))


def _blur(x: np.ndarray) -> np.ndarray:
    """[H, W, C] -> [H - 10, W - 10, C], the window's weighted mean at each place where it fits."""
    taps = np.exp(-0.5 * (np.arange(-_RADIUS, _RADIUS + 1) / _SIGMA) ** 2)
    taps /= taps.sum()
    rows, columns = len(x) - 2 * _RADIUS, x.shape[1] - 2 * _RADIUS
    # The window is symmetric, so equal taps go together.
    down = taps[_RADIUS] * x[_RADIUS : _RADIUS + rows]
    for i, tap in enumerate(taps[:_RADIUS]):
        pair = x[i : i + rows] + x[_SIDE - 1 - i : _SIDE - 1 - i + rows]
        down += np.multiply(pair, tap, out=pair)
    across = taps[_RADIUS] * down[:, _RADIUS : _RADIUS + columns]
    for i, tap in enumerate(taps[:_RADIUS]):
        pair = down[:, i : i + columns] + down[:, _SIDE - 1 - i : _SIDE - 1 - i + columns]
        across += np.multiply(pair, tap, out=pair)
    return across


def _frames(video: np.ndarray, reference: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for x, y in zip(video, reference, strict=True):
        yield x.astype(np.float64), y.astype(np.float64)


def _check_side(name: str, video: np.ndarray) -> None:
    if min(video.shape[1:3]) < _SIDE:
        raise ValueError(f"{name} needs frames of at least {_SIDE}x{_SIDE}, not {video.shape[1]}x{video.shape[2]}.")


def _check(video: np.ndarray, reference: np.ndarray) -> None:
    if video.shape != reference.shape or video.ndim != 4:
        raise ValueError(
            f"Videos to compare are [F, H, W, C] of one shape, not {list(video.shape)} and {list(reference.shape)}."
        )
    for name, x in (("video", video), ("reference", reference)):
        if not np.isfinite(x).all():
            raise ValueError(f"The {name} holds NaN or Inf; all values must be from 0 to 1.")
