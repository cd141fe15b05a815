"""From measurements to choices: what each head does at each step, for the least error in the time and memory allowed.

An error inside attention counts by what it was measured to do to the output (see `Problem.weight`), errors add up as
squares, and costs add up as they are. With a price on seconds and on bytes at each step, every head of each branch is
a shortest path of its own through the steps; the prices are then moved until the targets are met.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from dit_sparse.choices import DENSE, LEARNING, Choice, ChoiceMethod
from dit_sparse.config import SparseConfig, Storage
from dit_sparse.layout import TokenGrid
from dit_sparse.profile import LEARNERS, METHODS, ROUTINGS, STORAGES, Profile
from dit_sparse.state import GIB, Generation, Layer

AT_ONCE: tuple[ChoiceMethod, ...] = ("none", "rectify", "tail", "calibrated")
KEPT: tuple[Storage, ...] = ("bf16", "fp8", "int4")
# Of the error that pilots find, the least that is put down to a range of steps: differences of runs are noisy.
LEAST_SHARE = 0.05


@dataclass(frozen=True)
class Targets:
    """At least this PSNR in dB and this speed-up of the transformers against dense, with at most this much memory."""

    psnr: float | None = None
    speedup: float | None = None
    max_state_gib: float | None = None

    def __post_init__(self) -> None:
        for name in ("psnr", "speedup", "max_state_gib"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"target_{name} is a positive number, not {value!r}.".replace("target_max", "max"))
        if self.psnr is None and self.speedup is None and self.max_state_gib is None:
            raise ValueError("Give a target: --target_psnr, --target_speedup or --max_state_gib, or several.")

    def to_dict(self) -> dict[str, float]:
        told = {"psnr": self.psnr, "speedup": self.speedup, "max_state_gib": self.max_state_gib}
        return {name: value for name, value in told.items() if value is not None}


def _lasting(by_step: np.ndarray, starts: Sequence[int], shares: Sequence[float]) -> np.ndarray:
    """[t]: the logarithm of how much of a step's own error is in the frames at the end. From one start of a pilot to
    the next it is linear in the step, after the last one constant; the steps in between make up their share of the
    error that the pilots found."""
    found = np.full(len(by_step), math.log(shares[-1] / max(by_step[starts[-1] :].sum(), 1e-30)))
    for start, end, share in reversed(list(zip(starts[:-1], starts[1:], shares[:-1], strict=True))):
        way = 1 - np.arange(end - start) / (end - start)
        low, high = -60.0, 60.0
        for _ in range(60):
            slope = (low + high) / 2
            if (np.exp(found[end] + slope * way) * by_step[start:end]).sum() < share:
                low = slope
            else:
                high = slope
        found[start:end] = found[end] + low * way
    return found


@dataclass(frozen=True)
class Solution:
    """One solution; heads and branches are one axis, x.

    option  [x, steps] index into `Problem.options`; anchor [x, steps] bool, where a memory begins
    error   mean squared error of the frames; seconds in the transformers; state [steps] bytes
    """

    option: np.ndarray
    anchor: np.ndarray
    error: float
    seconds: float
    state: np.ndarray

    @property
    def psnr(self) -> float:
        return math.inf if self.error <= 0 else -10 * math.log10(self.error)


class Problem:
    """Error, cost and memory of every option, from a profile. methods: which may be chosen, besides dense."""

    def __init__(self, profile: Profile, methods: Sequence[ChoiceMethod] = (*AT_ONCE, *LEARNING)):
        self.profile, self.header = profile, profile.header
        h = self.header
        self.steps, self.rungs = len(h.levels), len(h.ladder)
        flat = {
            name: np.nan_to_num(x.float().numpy().reshape(-1, *x.shape[2:]), nan=np.nan)
            for name, x in profile.tensors.items()
            if name not in ("choice", "anchor", "rho")
        }
        self.ran = ~np.isnan(flat["energy"])
        self.energy = np.where(self.ran, flat["energy"], 0.0)
        self.stats = flat
        self.at_once: list[ChoiceMethod] = [m for m in AT_ONCE if m in methods]
        self.learners: list[ChoiceMethod] = [m for m in LEARNING if m in methods]
        self.options: list[Choice] = [DENSE]
        self.options += [Choice(m, rung) for m in self.at_once for rung in h.ladder]
        self.singles = len(self.options)
        self.options += [Choice(m, rung, s) for m in self.learners for rung in h.ladder for s in KEPT]
        self.longest = min(h.distances[-1], self.steps - 1)

    @cached_property
    def trial(self) -> tuple[float, float]:
        """By how much a fitted choice did worse than predicted, in squared error and in the seconds of what is not
        dense: a choice falls on what was measured too well, and errors of layers are not independent."""
        tried = self.header.effects.get("trial")
        if tried is None or tried["predicted_error"] <= 0:
            return 1.0, 1.0
        known = tried["seconds_known"]
        slower = (tried["seconds"] - known) / max(tried["predicted_seconds"] - known, 1e-9)
        return max(tried["error"] / tried["predicted_error"], 1e-3), min(max(slower, 0.5), 2.0)

    @cached_property
    def weight(self) -> np.ndarray:
        """[x, t]: mean squared error of the frames for a unit of squared error in one head's part of the attention
        output at one step."""
        before, after = self._gained(), self.header.effects["pilots"]
        middle = self.rungs // 2
        tail = self.stats["error"][..., METHODS.index("tail"), middle] ** 2
        by_step = np.nansum(before * tail * self.energy, 0)
        starts = sorted(int(start) for start in after)
        shares = [
            max(after[str(start)] - after.get(str(end), 0.0), LEAST_SHARE * after[str(start)])
            for start, end in zip(starts, [*starts[1:], self.steps], strict=True)
        ]
        return before * np.exp(_lasting(by_step, starts, shares)) * self.trial[0]

    def _gained(self) -> np.ndarray:
        """[x, t]: what a unit of squared error does to the latents in that step alone: probes, guidance, step size."""
        h = self.header
        levels = np.array(h.levels)
        sizes = levels - np.append(levels[1:], 0.0)
        guided = h.guidance_scale > 1 and len(h.branches) > 1
        scale = {"cond": h.guidance_scale**2, "uncond": (h.guidance_scale - 1) ** 2} if guided else {}
        branch = np.array([scale.get(name, 1.0) for name in h.branches])
        gains = []
        for name, heads, _ in h.layers:
            known = h.effects["gain"][name]
            probed = sorted((levels[int(step)], math.log(max(gain, 1e-30))) for step, gain in known.items())
            if not probed:
                raise ValueError(f"{self.profile.source} has no probe of {name}: calibrate again.")
            at, value = zip(*probed, strict=True)
            gains += [np.exp(np.interp(levels, at, value))] * heads
        return (np.stack(gains)[:, None] * branch[:, None] * sizes**2).reshape(-1, self.steps)

    @cached_property
    def single(self) -> tuple[np.ndarray, np.ndarray]:
        """Error and seconds of each option that learns nothing, [x, t, options]."""
        error = np.zeros((*self.energy.shape, self.singles))
        cost = np.zeros_like(error)
        cost[..., 0] = self.header.costs["dense"]
        for i, method in enumerate(self.at_once):
            at = slice(1 + i * self.rungs, 1 + (i + 1) * self.rungs)
            told = self.stats["error"][..., METHODS.index(method), :]
            error[..., at] = (self.weight * self.energy)[..., None] * np.nan_to_num(told) ** 2
            cost[..., at] = self._cost(method, method)
        cost[~self.ran] = 0
        return error, cost

    def _cost(self, name: str, method: ChoiceMethod) -> np.ndarray:
        """[x, t, k] seconds, by the share of blocks that each head kept: a rung with top_p costs more where it kept
        more. Between the rungs that were timed it is linear."""
        rungs = self.header.ladder
        routing = ROUTINGS.index("error" if method in ("tail", "anchor") else "mass")
        kept = np.nan_to_num(self.stats["kept"][..., routing, :])
        plain = sorted((rung.density, self.header.costs[name][k]) for k, rung in enumerate(rungs) if not rung.top_p)
        shares, seconds = (np.array(x) for x in zip(*plain, strict=True))
        if len(plain) == 1:
            return np.full(kept.shape, seconds[0] * self.trial[1])
        slopes = np.diff(seconds) / np.diff(shares)
        place = np.clip(np.searchsorted(shares, kept) - 1, 0, len(slopes) - 1)
        return np.maximum(seconds[place] + slopes[place] * (kept - shares[place]), seconds[0] * 0.5) * self.trial[1]

    @cached_property
    def followed(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """For the options that learn, q: error at age 1, 2, ... [age, x, t, q] without that of storage; squared error
        of storage [x, t, q], by the step of the anchor; seconds after an anchor and at it [x, t, q]; bytes [q]."""
        k = self.rungs
        error, coarse, after, at = [], [], [], []
        for method in self.learners:
            m = LEARNERS.index(method)
            aged = np.stack([self._aged(m, age) for age in range(1, self.longest + 1)])
            error.append(np.nan_to_num(aged) ** 2 * (self.weight * self.energy)[..., None])
            lacks = self.stats["error"][..., METHODS.index("tail" if method == "anchor" else "remainder"), :]
            lacks = np.nan_to_num(lacks) ** 2 * self.energy[..., None]
            stored = [np.zeros((*self.energy.shape, k))]
            for s in range(len(STORAGES)):
                stored.append(lacks * np.nan_to_num(self.stats["coarse"][..., m, s])[..., None] ** 2)
            coarse.append(np.stack(stored, -1).reshape(*self.energy.shape, -1))
            after.append(np.repeat(self._cost(method, method), len(KEPT), -1))
            at.append(np.repeat(self._cost(f"{method} at anchor", method), len(KEPT), -1))
        if not self.learners:
            none = np.zeros((*self.energy.shape, 0))
            return none[None], none, none, none, np.zeros(0)
        return (
            np.repeat(np.concatenate(error, -1), len(KEPT), -1),
            np.concatenate(coarse, -1),
            np.concatenate(after, -1),
            np.concatenate(at, -1),
            np.array([self._bytes(choice) for choice in self.options[self.singles :]]),
        )

    def _aged(self, m: int, age: int) -> np.ndarray:
        """[x, t, k] relative error at an age between those measured: it grows linearly from one to the next."""
        distances = self.header.distances
        stale = self.stats["stale"][..., m, :, :]
        above = next(i for i, distance in enumerate(distances) if distance >= age)
        high = stale[..., above, :]
        if above == 0 or distances[above] == age:
            low, share = high * age / distances[above], 1.0
        else:
            low = stale[..., above - 1, :]
            share = (age - distances[above - 1]) / (distances[above] - distances[above - 1])
            # Early in a run nothing is as old as the next distance.
            high = np.where(np.isnan(high), low * distances[above] / distances[above - 1], high)
        return low + share * (high - low)

    def _bytes(self, choice: Choice) -> float:
        assert choice.residual is not None
        generation = Generation(SparseConfig("dense"))
        generation.enter(
            TokenGrid(*self.header.grid), batch=1, device=torch.device("cpu"), timestep=0.0, step=0, total=1
        )
        _, _, dim = self.header.layers[0]
        base = SparseConfig.from_dict(self.header.config)
        return generation.state_bytes(Layer("", 0, 1, 1, dim), choice.residual, choice.config(base), branches=1)

    def dense(self) -> Solution:
        return self.cheapest(0.0, np.zeros(self.steps), only_dense=True)

    def cheapest(self, price: float, rent: np.ndarray, only_dense: bool = False) -> Solution:
        """The least of error + price * seconds + sum over steps of rent * bytes, for each head by itself."""
        single_error, single_cost = self.single
        aged, coarse, after, at, size = self.followed
        x, steps = self.energy.shape
        rows = np.arange(x)
        ahead = np.zeros((steps + 1, x))
        option, length = np.zeros((steps, x), int), np.ones((steps, x), int)
        for t in reversed(range(steps)):
            value = single_error[:, t] + price * single_cost[:, t]
            option[t] = 0 if only_dense else value.argmin(1)
            best = value[rows, option[t]] + ahead[t + 1]
            if size.size and not only_dense:
                sum_ = price * at[:, t] + rent[t] * size
                for age in range(1, min(self.longest, steps - 1 - t) + 1):
                    now = t + age
                    sum_ = sum_ + (
                        aged[age - 1][:, now]
                        + self.weight[:, now, None] * coarse[:, t]
                        + price * after[:, now]
                        + rent[now] * size
                    )
                    # A component that does not run at a step can neither learn nor use anything there.
                    total = np.where((self.ran[:, t] & self.ran[:, now])[:, None], sum_, np.inf)
                    total = total + ahead[now + 1][:, None]
                    least = total.argmin(1)
                    better = total[rows, least] < best
                    best = np.where(better, total[rows, least], best)
                    option[t] = np.where(better, self.singles + least, option[t])
                    length[t] = np.where(better, age + 1, length[t])
            ahead[t] = best
        return self._walk(option, length)

    def _walk(self, option: np.ndarray, length: np.ndarray) -> Solution:
        """Follow each head from its first step, and add up."""
        x, steps = self.energy.shape
        chosen, anchor = np.zeros((x, steps), int), np.zeros((x, steps), bool)
        begin = np.zeros((x, steps), int)
        here = np.zeros(x, int)
        for t in range(steps):
            starts = here == t
            chosen[:, t] = np.where(starts, option[t], chosen[:, t - 1] if t else 0)
            begin[:, t] = np.where(starts, t, begin[:, t - 1] if t else 0)
            anchor[:, t] = starts & (chosen[:, t] >= self.singles)
            here = np.where(starts, t + length[t], here)
        return self.account(chosen, anchor, begin)

    def account(self, chosen: np.ndarray, anchor: np.ndarray, begin: np.ndarray) -> Solution:
        """Error, seconds and memory of given options; begin [x, t] is the step that each memory is from."""
        single_error, single_cost = self.single
        aged, coarse, after, at, size = self.followed
        x, steps = chosen.shape
        rows, times = np.arange(x)[:, None], np.arange(steps)[None]
        learns = chosen >= self.singles
        plain = np.where(learns, 0, chosen)
        error = np.where(learns, 0.0, single_error[rows, times, plain])
        cost = np.where(learns, 0.0, single_cost[rows, times, plain])
        state = np.zeros(steps)
        if learns.any():
            q = np.where(learns, chosen - self.singles, 0)
            age = np.where(learns, times - begin, 0)
            old = aged[np.maximum(age, 1) - 1, rows, times, q] + self.weight * coarse[rows, begin, q]
            error = error + np.where(learns & ~anchor, old, 0.0)
            cost = cost + np.where(learns, np.where(anchor, at[rows, times, q], after[rows, times, q]), 0.0)
            state = np.where(learns, size[q], 0.0).sum(0)
        return Solution(chosen, anchor, float(error.sum()), float(cost.sum() + self.header.costs["other"]), state)

    def uniform(self, config: SparseConfig, k: int) -> Solution:
        """What a uniform config at rung k would do, staggering aside."""
        x, steps = self.energy.shape
        phases = [Generation(config).phase_at(step, steps) for step in range(steps)]
        storage = "bf16" if config.residual == "auto" else config.residual
        choice = Choice(config.method, self.header.ladder[k], storage if config.learns else None)
        index, begin, last = self.options.index(choice), np.zeros(steps, int), 0
        for step, phase in enumerate(phases):
            last = step if phase == "anchor" or not config.learns else last
            begin[step] = last
        chosen = np.array([0 if phase == "dense" else index for phase in phases])
        anchor = np.array([phase == "anchor" for phase in phases])
        spread = [np.broadcast_to(row, (x, steps)) for row in (chosen, anchor, begin)]
        return self.account(*spread)


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
            unit = max(path.error, 1e-12) / max(path.state.max(), 1.0) / problem.steps
            rent = np.where(over > 1, unit * 1e-3, 0.0)
        else:
            rent = np.where(over > 1, np.maximum(rent, unit * 1e-3) * np.clip(over, 1.05, 2.0) ** 2, rent * 0.97)
    raise ValueError(f"No choice was found that remembers at most {targets.max_state_gib} GiB.")


def _solve_at(problem: Problem, targets: Targets, rent: np.ndarray) -> Solution:
    """For given rents: the least error at the speed asked for, else the least time at the quality asked for."""
    whole = problem.header.seconds["transformers"]
    fastest = problem.cheapest(1e9, rent)
    speedup = targets.speedup
    if speedup is None and targets.psnr is None:
        speedup = default_speedup(problem)
    if speedup is not None:
        # Rounding must not put dense itself out of reach.
        allowed = whole / speedup * (1 + 1e-9)
        if fastest.seconds > allowed:
            raise ValueError(
                f"target_speedup {speedup:g} is out of reach: {whole / fastest.seconds:.2f} is the most, at "
                f"{fastest.psnr:.1f} dB."
            )
        path = _search(problem, rent, lambda path: path.seconds <= allowed)
        if targets.psnr is not None and path.psnr < targets.psnr:
            slower = _search(problem, rent, lambda path: path.psnr < targets.psnr, last_false=True)
            raise ValueError(
                f"target_psnr {targets.psnr:g} and target_speedup {speedup:g} are out of reach together: "
                f"{path.psnr:.1f} dB is the best at that speed, and {whole / slower.seconds:.2f} the most at that "
                "quality."
            )
        return path
    assert targets.psnr is not None
    return _search(problem, rent, lambda path: path.psnr < targets.psnr, last_false=True)


def _search(problem: Problem, rent: np.ndarray, enough, last_false: bool = False) -> Solution:
    """The path at the least price of a second for which `enough` holds, or the last before that."""
    low, high = -40.0, 10.0
    least, most = problem.cheapest(math.exp(low), rent), problem.cheapest(math.exp(high), rent)
    if enough(least):
        return least
    if not enough(most):
        return most
    for _ in range(40):
        middle = (low + high) / 2
        path = problem.cheapest(math.exp(middle), rent)
        if enough(path):
            high, most = middle, path
        else:
            low, least = middle, path
    return least if last_false else most


def default_speedup(problem: Problem) -> float:
    """Where only memory is limited: the speed of the default uniform setting, at the rung nearest to its density."""
    ladder = problem.header.ladder
    plain = [k for k, rung in enumerate(ladder) if not rung.top_p]
    k = min(plain, key=lambda k: abs(ladder[k].density - SparseConfig.density))
    every = Problem(problem.profile)
    return problem.header.seconds["transformers"] / every.uniform(SparseConfig(), k).seconds


def middling(profile: Profile) -> tuple[Profile, dict[str, float]]:
    """Choices halfway between dense and the fastest, to be tried out, and what is predicted of them: the mean squared
    error of the frames, the seconds, and how many of these are not of sparse attention."""
    problem = Problem(profile)
    whole = profile.header.seconds["transformers"]
    fastest = problem.cheapest(1e9, np.zeros(problem.steps)).seconds
    halfway = Targets(speedup=whole / ((whole + fastest) / 2))
    found = solve(problem, halfway)
    dense = np.where(problem.ran & (found.option == 0), problem.header.costs["dense"], 0.0).sum()
    known = float(dense + problem.header.costs["other"])
    told = {"predicted_error": found.error, "predicted_seconds": found.seconds, "seconds_known": known}
    return fit(profile, halfway), told


def fit(profile: Profile, targets: Targets, methods: Sequence[ChoiceMethod] = (*AT_ONCE, *LEARNING)) -> Profile:
    """The profile with choices for these targets, and what is predicted of them."""
    problem = Problem(profile, methods)
    path = solve(problem, targets)
    whole = profile.header.seconds["transformers"]
    used = sorted(set(path.option.flatten().tolist()) | {0})
    index = np.zeros(len(problem.options), np.uint8)
    index[used] = np.arange(len(used))
    shape = profile.tensors["energy"].shape
    predicted = {
        "psnr_db": min(path.psnr, 200.0),
        "speedup": whole / path.seconds,
        "seconds": path.seconds,
        "state_gib": float(path.state.max()) / GIB,
    }
    return profile.with_choices(
        torch.from_numpy(index[path.option].reshape(shape)),
        torch.from_numpy(path.anchor.astype(np.uint8).reshape(shape)),
        [problem.options[i] for i in used],
        targets.to_dict(),
        predicted,
    )
