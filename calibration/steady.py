"""What steps take once nothing is compiled any more."""

from collections.abc import Sequence

import numpy as np
import torch

# Times as long as usual from which a step did more than compute: more than two forwards where most have one.
FAR = 2.5
# Seconds of transformers in a run below which what is done once shows.
SHORT = 20.0
# Steps of a run that stand for all of it, where these are alike.
SAMPLED = 4


def timed_again(device: torch.device, seconds: float) -> bool:
    """Whether a run of so many seconds is made once more to be timed: where a GPU's steps are short it shows in them
    that kernels are loaded when they are first used."""
    return device.type == "cuda" and seconds < SHORT


def waits(device: torch.device) -> bool:
    """Whether what is done beside a run makes it slower: a GPU that has nothing to do waits for launches."""
    return device.type == "cuda"


def sampled(steps: Sequence[int]) -> list[int]:
    """The steps, evenly spaced, that stand for all."""
    places = np.linspace(0, len(steps) - 1, min(SAMPLED, len(steps)))
    return [steps[round(place)] for place in places]


def steady(
    seconds: Sequence[float], known: Sequence[float] | None = None, rest: Sequence[float] | None = None
) -> float:
    """Seconds of all steps, without what is done once: a GPU compiles and loads kernels when they are first used, in
    whichever step that is, and it may take longer than all else.

    What is usual is the median. With `known` and `rest` a step is expected to take known + f * rest, and f is usually
    the median of what it was, each step counting by its rest. Steps that took FAR times longer count as usual.
    """
    took = np.asarray(seconds, float)
    if known is None or rest is None:
        usual = np.full_like(took, np.median(took)) if len(took) else took
    else:
        sure, more = np.asarray(known, float), np.asarray(rest, float)
        some = more > 0
        usual = sure
        if some.any():
            factor = (took[some] - sure[some]) / more[some]
            order = np.argsort(factor)
            passed = np.cumsum(more[some][order])
            middle = factor[order][np.searchsorted(passed, passed[-1] / 2)]
            usual = sure + max(middle, 0.0) * more
    return float(np.where(took > FAR * usual, usual, took).sum())
