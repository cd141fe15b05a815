"""How an error made at one step grows until the end of a run.

A sampler follows a flow whose scale is that of the noise at first and that of the video at last, so what is put into
it at noise level s, from 1 to 0, ends up about 1 / (1 - s) times as large; guidance adds to that. Here the logarithm
of the growth is piecewise linear in -log(1 - s), and its slopes are fitted to runs whose error was measured at every
step. Runs that were dense but for a part of the steps correct it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Levels where the slope may change: a run has spent most of its steps before the last, and most of its way after the
# first.
KNOTS = (0.6, 0.92)
# What slopes are without any measurement: about those of single errors that were put into the demo model at each step.
USUAL = (0.8, 1.6, 1.3)
# How far off the usual slopes are expected to be, beside how far off the error of a step, as a logarithm.
WIDTH = 0.35
NOISE = 0.7
# How far, as logarithms, bands are off for other reasons than growth and the prompt, and how far growth may be off.
BAND_NOISE, BAND_WIDTH = 1.0, 0.7
# Levels closer to 1 are taken to be here, where growth stops: nothing of a video has formed yet.
FIRST = 0.99


@dataclass(frozen=True)
class Run:
    """direct [steps]: mean squared error that each step adds to the latents, as predicted; found [steps]: mean squared
    error of the latents after each step, as measured, NaN where it is not known."""

    direct: np.ndarray
    found: np.ndarray


def lasting(levels: Sequence[float], slopes: Sequence[float] | np.ndarray = USUAL) -> np.ndarray:
    """[steps]: by what factor the length of an error made in a step has grown at the end."""
    after = np.minimum(np.append(np.asarray(levels, float)[1:], 0.0), FIRST)
    way, knots = -np.log1p(-after), [0.0, *(-math.log1p(-level) for level in KNOTS), math.inf]
    parts = [np.clip(way - low, 0, high - low) for low, high in zip(knots[:-1], knots[1:], strict=True)]
    return np.exp(np.asarray(slopes) @ np.stack(parts))


def fit_slopes(levels: Sequence[float], runs: Sequence[Run]) -> tuple[float, ...]:
    """The slopes that explain best how errors grew in the runs, each of which may be off as a whole."""

    def misses(slopes: np.ndarray) -> np.ndarray:
        told = [(slopes - USUAL) / WIDTH]
        for run in runs:
            gap = _gap(levels, slopes, run)
            if gap.size:
                told.append((gap - gap.mean()) / NOISE / math.sqrt(gap.size / 4))
        return np.concatenate(told)

    slopes = np.array(USUAL)
    for _ in range(30):
        now = misses(slopes)
        steps = np.eye(len(slopes)) * 1e-4
        jacobian = np.stack([(misses(slopes + step) - now) / 1e-4 for step in steps], 1)
        move = np.linalg.lstsq(jacobian, -now, rcond=None)[0]
        slopes = np.clip(slopes + np.clip(move, -0.3, 0.3), 0.0, 4.0)
    return tuple(float(slope) for slope in slopes)


@dataclass(frozen=True)
class Band:
    """A run that was dense but for a few steps in a row. direct as in `Run`, 0 outside of them; error: mean squared
    error of the frames, as measured; prompt and part: numbers of the prompt and of the part of all steps."""

    direct: np.ndarray
    error: float
    prompt: int
    part: int


def corrected(grown: np.ndarray, bands: Sequence[Band]) -> np.ndarray:
    """[steps]: growth of squares such that it explains the errors of bands.

    Its logarithm moves by what the bands of a part are off, as far as their number makes that certain; between their
    middles, each the mean of its steps by what they add, it is linear in the step. How much all bands of a prompt are
    off together is left as it is: that is not growth, but how easily the prompt is changed.
    """
    steps, told = np.arange(len(grown)), []
    for band in bands:
        added = band.direct * grown
        if added.sum() > 0 and band.error > 0:
            middle = float((steps * added).sum() / added.sum())
            told.append((band.part, band.prompt, middle, math.log(band.error / added.sum())))
    parts = sorted({part for part, *_ in told})
    if len(parts) < 2:
        return grown
    prompts = sorted({prompt for _, prompt, *_ in told})
    # Least squares: a column for each part, which is expected to be 0, and one for each prompt.
    rows, ratios = np.zeros((len(told), len(parts) + len(prompts))), np.array([ratio for *_, ratio in told])
    for row, (part, prompt, *_) in zip(rows, told, strict=True):
        row[parts.index(part)] = row[len(parts) + prompts.index(prompt)] = 1 / BAND_NOISE
    expected = np.eye(len(parts), rows.shape[1]) / BAND_WIDTH
    target = np.append(ratios / BAND_NOISE, np.zeros(len(parts)))
    off = np.linalg.lstsq(np.concatenate([rows, expected]), target, rcond=None)[0][: len(parts)]
    middles = np.array([np.mean([middle for p, _, middle, _ in told if p == part]) for part in parts])
    return grown * np.exp(np.interp(steps, middles, off))


def _gap(levels: Sequence[float], slopes: np.ndarray, run: Run) -> np.ndarray:
    """Logarithms of found over predicted error after each step at which there is one."""
    grown = lasting(levels, slopes) ** 2
    predicted = np.cumsum(run.direct * grown) / grown
    known = (predicted > 0) & np.isfinite(run.found) & (run.found > 0)
    return np.log(run.found[known] / predicted[known])
