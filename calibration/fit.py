"""From measurements to choices: what each head does at each step, for the least error in the time and memory allowed.

`Problem` finds the cheapest way for given prices on cost and on bytes at each step; here the prices are moved until
the targets are met.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dit_sparse.calibration.measured import AT_ONCE, Cost
from dit_sparse.calibration.paths import Problem, Solution
from dit_sparse.calibration.steady import steady
from dit_sparse.choices import LEARNING, ChoiceMethod
from dit_sparse.config import SparseConfig
from dit_sparse.profile import Profile
from dit_sparse.state import GIB


@dataclass(frozen=True)
class Targets:
    """At least this PSNR in dB and this speed-up of the transformers against dense, at most this share of the work of
    dense attention and this much memory. by: what is spent as little of as possible, or up to the limit."""

    psnr: float | None = None
    speedup: float | None = None
    work: float | None = None
    max_state_gib: float | None = None
    by: Cost = "seconds"

    def __post_init__(self) -> None:
        for name in ("psnr", "speedup", "work", "max_state_gib"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"target_{name} is a positive number, not {value!r}.".replace("target_max", "max"))
        if self.psnr is None and self.speedup is None and self.work is None and self.max_state_gib is None:
            raise ValueError(
                "Give a target: --target_psnr, --target_speedup, --target_work or --max_state_gib, or several."
            )
        if self.speedup is not None and self.counts_work:
            raise ValueError("target_speedup is about seconds: leave out target_work, or count by seconds.")

    @property
    def counts_work(self) -> bool:
        return self.by == "work" or self.work is not None

    def to_dict(self) -> dict[str, float]:
        named = ("psnr", "speedup", "work", "max_state_gib")
        return {name: getattr(self, name) for name in named if getattr(self, name) is not None}


def solve(problem: Problem, targets: Targets) -> Solution:
    """The best path for the targets. Raises ValueError, with the best there is, where they are out of reach."""
    limit = math.inf if targets.max_state_gib is None else targets.max_state_gib * GIB
    rent = np.zeros(problem.steps)
    unit = None
    for _ in range(60):
        path = _solve_at(problem, targets, rent)
        over = path.state / limit
        if over.max() <= 1:
            return path
        if unit is None:
            # Where memory begins to cost what it saves: the error of a run per byte.
            unit = max(path.added, 1e-12) / max(path.state.max(), 1.0) / problem.steps
            rent = np.where(over > 1, unit * 1e-3, 0.0)
        else:
            rent = np.where(over > 1, np.maximum(rent, unit * 1e-3) * np.clip(over, 1.05, 2.0) ** 2, rent * 0.97)
    raise ValueError(f"No choice was found that remembers at most {targets.max_state_gib} GiB.")


def _solve_at(problem: Problem, targets: Targets, rent: np.ndarray) -> Solution:
    """For given rents: the least error at the cost asked for, else the least cost at the quality asked for."""
    whole = problem.header.seconds["transformers"]

    def told(path: Solution) -> str:
        return f"{path.work:.3f} of dense work" if targets.counts_work else f"{whole / path.seconds:.2f} times dense"

    # Rounding must not put dense itself out of reach.
    allowed = None if targets.work is None else targets.work * (1 + 1e-9)
    asked = f"target_work {targets.work}"
    if not targets.counts_work and (targets.speedup is not None or targets.psnr is None):
        speedup = targets.speedup or default_speedup(problem)
        allowed, asked = whole / speedup * (1 + 1e-9), f"target_speedup {speedup:g}"
    if allowed is None:
        assert targets.psnr is not None
        return _search(problem, rent, lambda path: path.psnr < targets.psnr, last_false=True)
    fastest = problem.cheapest(1e9, rent)
    if fastest.cost > allowed:
        raise ValueError(f"{asked} is out of reach: {told(fastest)} is the most, at {fastest.psnr:.1f} dB.")
    path = _search(problem, rent, lambda path: path.cost <= allowed)
    if targets.psnr is not None and path.psnr < targets.psnr:
        slower = _search(problem, rent, lambda path: path.psnr < targets.psnr, last_false=True)
        raise ValueError(
            f"target_psnr {targets.psnr:g} and {asked} are out of reach together: {path.psnr:.1f} dB is the best "
            f"there, and {told(slower)} the most at that quality."
        )
    return path


def _search(problem: Problem, rent: np.ndarray, enough, last_false: bool = False) -> Solution:
    """The path at the least price of cost for which `enough` holds, or the last before that."""
    low, high = -40.0, 20.0
    least, most = problem.cheapest(math.exp(low), rent), problem.cheapest(math.exp(high), rent)
    if enough(least):
        return least
    if not enough(most):
        return most
    before = most.biased
    while high - low > 1e-3:
        middle = (low + high) / 2
        path = problem.cheapest(math.exp(middle), rent, biased=before)
        before = path.biased
        if enough(path):
            high, most = middle, path
        else:
            low, least = middle, path
    return _mixed(problem, most, least, enough, last_false)


def _mixed(problem: Problem, cheap: Solution, dear: Solution, enough, last_false: bool) -> Solution:
    """Between two paths whose prices hardly differ, heads that go from one to the other, by what each gains for what
    it costs: where there are few heads, the two may be far apart."""
    gain, cost = cheap.apart - dear.apart, dear.price - cheap.price
    other = np.flatnonzero((cheap.option != dear.option).any(1) | (cheap.anchor != dear.anchor).any(1))
    order = other[np.argsort(-(gain / np.maximum(cost, 1e-12))[other], kind="stable")]
    within, beyond = cheap, dear
    few, many = 0, len(order)
    while many - few > 1:
        count = (few + many) // 2
        path = problem.mixed(cheap, dear, np.isin(np.arange(len(gain)), order[:count]))
        if enough(path):
            few, within = count, path
        else:
            many, beyond = count, path
    return beyond if last_false else within


def default_speedup(problem: Problem) -> float:
    """Where only memory is limited: the speed of the default uniform setting, at the rung nearest to its density."""
    ladder = problem.header.ladder
    plain = [k for k, rung in enumerate(ladder) if not rung.top_p]
    k = min(plain, key=lambda k: abs(ladder[k].density - SparseConfig.density))
    every = Problem(problem.profile)
    return problem.header.seconds["transformers"] / every.uniform(SparseConfig(), k).seconds


def try_out(profile: Profile, psnr: float, band: range | None = None) -> tuple[Profile, dict[str, Any]]:
    """Choices of the least work for `psnr`, or of the least there is, to be tried, and what is predicted of them: the
    error that each step adds, the step of the first that is not dense, and from it on the seconds, and how many of
    these are not of sparse attention. With a band all but its steps are dense."""
    problem = Problem(profile, by="work")
    targets = Targets(psnr=psnr, by="work")
    path = solve(problem, targets)
    if band is not None:
        path = problem.within(path, band)
    return _written(profile, problem, path, targets), _expected(problem, path)


def _expected(problem: Problem, path: Solution) -> dict[str, Any]:
    """What a trial is compared with, see `try_out`."""
    start, (known, rest) = _start(problem, path), _steps(problem, path)
    return {
        "work": path.work,
        "direct": path.direct.tolist(),
        "start": start,
        "predicted_seconds": float((known + rest)[start:].sum()),
        "seconds_known": float(known[start:].sum()),
    }


def _start(problem: Problem, path: Solution) -> int:
    """The first step that is not dense, or the last."""
    sparse = (path.option > 0).any(0)
    return int(sparse.argmax()) if sparse.any() else problem.steps - 1


def _steps(problem: Problem, path: Solution) -> tuple[np.ndarray, np.ndarray]:
    """[steps] seconds of what is not sparse attention, and of sparse attention as it was timed alone."""
    dense = np.where(problem.ran & (path.option == 0), problem.single[1][..., 0], 0.0).sum(0)
    return dense + problem.header.costs["other"] / problem.steps, (path.spent - dense) / problem.slower


def lasted(problem: Problem, path: Solution, seconds: Mapping[int, float]) -> float:
    """What a run of this path took from the first step on that is not dense, by its seconds at each step."""
    start = _start(problem, path)
    steps = [step for step in seconds if step >= start]
    return steady([seconds[step] for step in steps], *(x[steps] for x in _steps(problem, path)))


@dataclass(frozen=True)
class Verified:
    """A prompt made dense and with a fitted profile, of the steps that were calibrated.

    error    mean squared error of the frames, 0 where they are the same
    seconds  of the transformers at each step; dense_seconds those of all steps of the dense run
    alike    whether on such a device and in such a precision as was calibrated: if not, the seconds say nothing
    """

    prompt: str
    error: float
    seconds: Sequence[float]
    dense_seconds: float
    alike: bool = True


def learned(profile: Profile, made: Sequence[Verified]) -> Profile:
    """The fitted profile with what its choices came to on more prompts, each a trial for the fits after it. What is
    predicted of these choices stays as it was. A prompt whose frames are the same as dense ones says nothing."""
    problem = Problem(profile, by="work")
    path, first = problem.chosen(), len(profile.header.prompts)
    expected, whole = _expected(problem, path), problem.header.seconds["transformers"]
    before = profile.header.seen[first:]
    made = [one for one in made if one.error > 0]
    # A prompt made again, with other noise, is not one more.
    numbers = {
        prompt: first + number for number, prompt in enumerate(dict.fromkeys([*before, *(x.prompt for x in made)]))
    }
    trials = [
        expected
        | {
            "verified": one.prompt,
            "prompt": numbers[one.prompt],
            "error": one.error,
            # The machine may have been busier or freer than in the calibration.
            "seconds": lasted(problem, path, dict(enumerate(one.seconds))) * whole / one.dense_seconds
            if one.alike
            else None,
            "found": [None] * problem.steps,
        }
        for one in made
    ]
    effects = profile.header.effects | {"trials": [*profile.header.effects["trials"], *trials]}
    return replace(profile, header=replace(profile.header, effects=effects))


def fit(profile: Profile, targets: Targets, methods: Sequence[ChoiceMethod] = (*AT_ONCE, *LEARNING)) -> Profile:
    """The profile with choices for these targets, and what is predicted of them."""
    problem = Problem(profile, methods, "work" if targets.counts_work else "seconds")
    return _written(profile, problem, solve(problem, targets), targets)


def _written(profile: Profile, problem: Problem, path: Solution, targets: Targets) -> Profile:
    used = sorted(set(path.option.flatten().tolist()) | {0})
    index = np.zeros(len(problem.options), np.uint8)
    index[used] = np.arange(len(used))
    branches = len(profile.header.branches)

    def spread(x: np.ndarray) -> torch.Tensor:
        """In every branch the same."""
        return torch.from_numpy(np.repeat(x[:, None].astype(np.uint8), branches, 1))

    predicted = {
        "psnr_db": min(path.psnr, 200.0),
        "psnr_spread_db": problem.spread,
        "speedup": profile.header.seconds["transformers"] / path.seconds,
        "work": path.work,
        "seconds": path.seconds,
        "state_gib": float(path.state.max()) / GIB,
    }
    chosen, choices = spread(index[path.option]), [problem.options[i] for i in used]
    return profile.with_choices(chosen, spread(path.anchor), choices, targets.to_dict(), predicted)
