"""Every measure of one video against its reference, those that cannot be taken left out by name."""

import numpy as np

from dit_sparse.calibration import metrics
from dit_sparse.calibration.perceptual import Distance

# Name -> what a table calls it, and whether more is better.
MEASURES = {
    "psnr_db": ("PSNR dB", True),
    "ssim": ("SSIM", True),
    "ms_ssim": ("MS-SSIM", True),
    "lpips": ("LPIPS", False),
    "flicker": ("flicker", False),
}


def check_pair(name: str, video: np.ndarray, of: str, reference: np.ndarray) -> None:
    """Raise ValueError, in a user's words, unless two [F, H, W, 3] can be compared."""
    if len(video) != len(reference):
        raise ValueError(f"{name} has {len(video)} frames and {of} has {len(reference)}: compare equally many.")
    (height, width), (wanted_height, wanted_width) = video.shape[1:3], reference.shape[1:3]
    if (height, width) != (wanted_height, wanted_width):
        raise ValueError(
            f"{name} is {height}x{width} pixels and {of} is {wanted_height}x{wanted_width}: compare equal sizes."
        )


def scores(video: np.ndarray, reference: np.ndarray, lpips: Distance | None) -> dict[str, float | None]:
    """MEASURES of [F, H, W, 3] floats from 0 to 1. None is what a single frame, a frame below 11x11 pixels or a
    missing `lpips` has no measure for. Raises ValueError if shapes differ or a value is NaN or Inf."""
    wide = min(video.shape[1:3]) >= 11
    ssim, ms_ssim = metrics.ssim_and_ms_ssim(video, reference) if wide else (None, None)
    found = {
        "psnr_db": metrics.psnr(video, reference),
        "ssim": ssim,
        "ms_ssim": ms_ssim,
        "lpips": lpips(video, reference) if lpips is not None else None,
        "flicker": metrics.flicker(video, reference) if len(video) > 1 else None,
    }
    # Where an array lies in memory decides the order of a sum, and with it the last digits.
    return {name: None if value is None else float(f"{value:.9g}") for name, value in found.items()}
