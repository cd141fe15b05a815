"""LPIPS, the distance of two pictures in the features of a network, through the `lpips` package."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

Distance = Callable[[np.ndarray, np.ndarray], float]


@lru_cache(maxsize=1)
def lpips_or_reason() -> tuple[Distance | None, str]:
    """(video, reference -> LPIPS), or None and why there is none, in a sentence.

    LPIPS (Zhang et al. 2018) with its AlexNet and weights of version 0.1, the mean over frames; both videos
    [F, H, W, 3] floats from 0 to 1. Asked once per process, since it reads the weights.
    """
    try:
        import lpips  # type: ignore[import-not-found]
    except ImportError as error:
        return None, f"LPIPS is left out, because the package lpips is not at hand: {_first_line(error)}."
    try:
        network = lpips.LPIPS(net="alex", verbose=False).eval()
    except Exception as error:
        # Whatever a download of weights can raise: URLError, a wrong hash, a full disk.
        return None, f"LPIPS is left out, because its weights are not at hand: {_first_line(error)}."

    import torch

    @torch.no_grad()
    def distance(video: np.ndarray, reference: np.ndarray) -> float:
        # One frame at a time, from -1 to 1 as the network wants it.
        pairs = (
            [torch.from_numpy(np.ascontiguousarray(x)).permute(2, 0, 1)[None].float() * 2 - 1 for x in pair]
            for pair in zip(video, reference, strict=True)
        )
        return float(np.mean([network(x, y).item() for x, y in pairs]))

    return distance, ""


def _first_line(error: Exception) -> str:
    return (str(error).strip().partition("\n")[0] or type(error).__name__).rstrip(".")
