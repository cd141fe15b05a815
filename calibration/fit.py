"""From measurements to choices: what each head does at each step, for the least error in the time and memory allowed.

An error inside attention counts by what it was measured to do to the video (see `Problem.weight`). Errors of different
heads add up as squares; those of one head, at one step and the next, also have a part in common, which adds up as it
is. The branches of guidance do the same: what their errors have in common goes away when one is subtracted from the
other. With a price on cost and on bytes at each step, every head is a shortest path of its own through the steps; the
prices are then moved until the targets are met.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from dit_sparse.calibration.growth import Run, fit_slopes, lasting
from dit_sparse.choices import DENSE, LEARNING, Choice, ChoiceMethod
from dit_sparse.config import SparseConfig, Storage
from dit_sparse.layout import TokenGrid
from dit_sparse.profile import ERRORS, LEARNERS, METHODS, ROUTINGS, STORAGES, Profile
from dit_sparse.state import GIB, Generation, Layer

AT_ONCE: tuple[ChoiceMethod, ...] = ("none", "rectify", "tail", "calibrated")
KEPT: tuple[Storage, ...] = ("bf16", "fp8", "int4")
Cost = Literal["seconds", "work"]
# Cosines are measured on a sample of rows: branches are never taken to cancel further than this share of the squares.
LEAST_LEFT = 0.02
# Rounds of looking for the best way where what one step costs depends on the others.
ROUNDS = 10
# How much of an error that was added up is there in the end, until a trial says so: about what the demo model's trials
# say. Errors of many layers and steps cancel in part, and cannot grow for ever.
LEFT = 0.1
# How far from 1 the slope of measured over predicted error may well be. By what factor prompts differ in how easily
# they are changed, and by what factor trials of one prompt are off besides, as logarithms.
SLOPE_WIDTH, PROMPTS_DIFFER, TRIALS_DIFFER = 0.35, 1.0, 0.35


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


@dataclass(frozen=True)
class Solution:
    """What heads do, x, in all branches.

    option  [x, steps] index into `Problem.options`; anchor [x, steps] bool, where a memory begins
    direct  [steps] mean squared error that each step adds to the latents; added is what they come to in the end, and
            error that of the frames
    biased  [x] how much has added up of errors that are the same all through
    spent   [steps] seconds in attention; seconds are those of the whole transformers, state [steps] bytes
    work    attention work as a share of that of dense attention; cost is either of the two, as the problem counts
    """

    option: np.ndarray
    anchor: np.ndarray
    direct: np.ndarray
    added: float
    biased: np.ndarray
    error: float
    spent: np.ndarray
    seconds: float
    work: float
    cost: float
    state: np.ndarray

    @property
    def psnr(self) -> float:
        return math.inf if self.error <= 0 else -10 * math.log10(self.error)


class Problem:
    """Error, cost and memory of every option, from a profile. methods: which may be chosen, besides dense."""

    def __init__(
        self, profile: Profile, methods: Sequence[ChoiceMethod] = (*AT_ONCE, *LEARNING), by: Cost = "seconds"
    ):
        self.profile, self.header, self.by = profile, profile.header, by
        h = self.header
        self.steps, self.rungs = len(h.levels), len(h.ladder)
        self.stats = {
            name: x.float().numpy() for name, x in profile.tensors.items() if name not in ("choice", "anchor", "rho")
        }
        self.energy = np.nan_to_num(self.stats["energy"])
        self.ran = ~np.isnan(self.stats["energy"]).all(1)
        self.at_once: list[ChoiceMethod] = [m for m in AT_ONCE if m in methods]
        self.learners: list[ChoiceMethod] = [m for m in LEARNING if m in methods]
        self.options: list[Choice] = [DENSE]
        self.options += [Choice(m, rung) for m in self.at_once for rung in h.ladder]
        self.singles = len(self.options)
        for method in self.learners:
            for soft in self._soft(method):
                below = [rung for rung in h.ladder if soft is None or rung.density < soft]
                self.options += [Choice(method, rung, kept, soft) for rung in below for kept in KEPT]
        self.longest = min(h.distances[-1], self.steps - 1)

    def _soft(self, method: ChoiceMethod) -> tuple[float | None, ...]:
        """Densities of anchors: dense, and the densest rung."""
        plain = [rung.density for rung in self.header.ladder if not rung.top_p]
        return (None, plain[-1]) if method == "anchor" and len(plain) > 1 else (None,)

    @cached_property
    def signed(self) -> np.ndarray:
        """[branches]: how guidance weighs what each branch says."""
        h = self.header
        guided = h.guidance_scale > 1 and len(h.branches) > 1
        scale = {"cond": h.guidance_scale, "uncond": 1 - h.guidance_scale} if guided else {}
        return np.array([scale.get(name, 1.0) for name in h.branches])

    def _joint(self, relative: np.ndarray, kind: str) -> np.ndarray:
        """[x, t, k]: mean squared error of what guidance makes of relative errors [x, b, t, k]; kind is one of ERRORS,
        whose errors in the first branch and in another are at a measured angle."""
        sizes = np.nan_to_num(relative) * np.sqrt(self.energy)[..., None] * self.signed[:, None, None]
        squares = np.square(sizes).sum(1)
        cosines = np.nan_to_num(self.stats["together"][..., ERRORS.index(kind), :])
        both = sum(2 * cosines[:, b] * sizes[:, 0] * sizes[:, b] for b in range(1, len(self.signed)))
        return np.maximum(squares + both, LEAST_LEFT * squares)

    def _steady(self, kind: str) -> np.ndarray:
        """[x, k]: cosine between a head's errors at a step and at the one before, the mean over branches and steps."""
        found = self.stats["persist"][..., ERRORS.index(kind), :]
        known = ~np.isnan(found)
        return np.clip(np.where(known, found, 0.0).sum((1, 2)) / np.maximum(known.sum((1, 2)), 1), 0.0, 1.0)

    @cached_property
    def bias(self) -> np.ndarray:
        """[x]: how much of the error of what learns nothing is the same all through a run."""
        return self._steady("tail").mean(1)

    @cached_property
    def gained(self) -> np.ndarray:
        """[x, t]: mean squared error in the latents for a unit of squared error in one head's part of the attention
        output: by probes, between which its logarithm is linear in the step, and by the size of the step."""
        h = self.header
        levels = np.array(h.levels)
        sizes = levels - np.append(levels[1:], 0.0)
        gains = []
        for name, heads, _ in h.layers:
            known = h.effects["gain"][name]
            probed = sorted((int(step), math.log(max(gain, 1e-30))) for step, gain in known.items())
            if not probed:
                raise ValueError(f"{self.profile.source} has no probe of {name}: calibrate again.")
            at, value = zip(*probed, strict=True)
            gains += [np.exp(np.interp(np.arange(self.steps), at, value))] * heads
        return np.stack(gains) * sizes**2

    @cached_property
    def grown(self) -> np.ndarray:
        """[t]: mean squared error of the latents at the end for one after a step."""
        levels = self.header.levels
        runs = [Run(np.array(t["direct"]), np.array(t["found"], float)) for t in self._trials]
        return lasting(levels, fit_slopes(levels, runs)) ** 2

    @property
    def _trials(self) -> list[dict[str, Any]]:
        return [trial for trial in self.header.effects["trials"] if sum(trial["direct"]) > 0]

    @cached_property
    def _seen(self) -> tuple[float, float, float]:
        """Of the logarithms of errors in trials: mean as added up, mean as measured, and the slope of the second over
        the first. Means of logarithms, as quality is told in decibels.

        Most of what differs between two trials is the prompt, if they are of two. How much faster or slower errors
        grow than they add up is told by two trials of one, so a prompt's own part of an error is taken to be the same
        in all of its trials.
        """
        if not self._trials:
            return 0.0, math.log(LEFT * self.header.effects["scale"]), 1.0
        x, y, prompt = self._tried
        # Generalised least squares, of trials that share their prompt's part of the error.
        shared = PROMPTS_DIFFER**2 * (prompt[:, None] == prompt)
        weigh = np.linalg.inv(shared + TRIALS_DIFFER**2 * np.eye(len(x)))
        before, after = (weigh.sum(0) @ told / weigh.sum() for told in (x, y))
        dx, dy = x - before, y - after
        slope = (dx @ weigh @ dy + 1 / SLOPE_WIDTH**2) / (dx @ weigh @ dx + 1 / SLOPE_WIDTH**2)
        return float(before), float(after), float(np.clip(slope, 0.3, 1.5))

    @cached_property
    def _tried(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each trial: logarithm of the error as added up and as measured, and the number of its prompt."""
        x = np.log([(np.array(t["direct"]) * self.grown).sum() for t in self._trials])
        y = np.log([max(t["error"], 1e-20) for t in self._trials])
        return x, y, np.array([t.get("prompt", -1 - number) for number, t in enumerate(self._trials)])

    @cached_property
    def spread(self) -> float:
        """Decibels by which one prompt typically differs from the mean of many: by the trials, and, as if it were one
        more prompt, by what is usual."""
        total, free = PROMPTS_DIFFER**2, 1
        if self._trials:
            x, y, prompt = self._tried
            before, after, slope = self._seen
            off = y - after - slope * (x - before)
            each = np.array([off[prompt == one].mean() for one in np.unique(prompt)])
            total, free = total + float(np.square(each - each.mean()).sum()), len(each)
        return 10 / math.log(10) * math.sqrt(total / free)

    def frames_error(self, added: float) -> float:
        """Mean squared error of the frames, for errors of the latents that add up to this: what is small adds up to
        more than it seems, since choices fall on what was measured too low, and what is large cannot grow on."""
        before, after, slope = self._seen
        return 0.0 if added <= 0 else math.exp(after + slope * (math.log(added) - before))

    @cached_property
    def weight(self) -> np.ndarray:
        """[x, t]: mean squared error of the latents at the end for a unit of squared error in one head's part of the
        attention output at one step, of what guidance makes of the branches."""
        return self.gained * self.grown

    @cached_property
    def slower(self) -> float:
        """By how much what is not dense took longer in the trials than its parts when they were timed alone."""
        found = [
            (t["seconds"] - t["seconds_known"]) / (t["predicted_seconds"] - t["seconds_known"])
            for t in self.header.effects["trials"]
            if t["predicted_seconds"] - t["seconds_known"] > 0.02 * t["predicted_seconds"]
        ]
        return float(np.clip(np.median(found), 0.5, 2.0)) if found else 1.0

    @cached_property
    def single(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Error, seconds and work of each option that learns nothing, [x, t, options]."""
        error = np.zeros((*self.ran.shape, self.singles))
        seconds, work = np.zeros_like(error), np.zeros_like(error)
        branches = len(self.signed)
        seconds[..., 0], work[..., 0] = branches * self.header.costs["dense"], branches
        for i, method in enumerate(self.at_once):
            at = slice(1 + i * self.rungs, 1 + (i + 1) * self.rungs)
            told = self.stats["error"][..., METHODS.index(method), :]
            error[..., at] = self.weight[..., None] * self._joint(told, method)
            seconds[..., at] = self._seconds(method, method)
            work[..., at] = self._work(method)
        seconds[~self.ran] = work[~self.ran] = 0
        return error, seconds, work

    def _kept(self, method: ChoiceMethod) -> np.ndarray:
        """[x, b, t, k]: share of blocks in each head's plan."""
        routing = ROUTINGS.index("error" if method in ("tail", "anchor") else "mass")
        return np.nan_to_num(self.stats["kept"][..., routing, :])

    def _work(self, method: ChoiceMethod) -> np.ndarray:
        """[x, t, k]: in units of one head's dense attention; what is pooled counts as a key for each block."""
        pooled = 1 / SparseConfig.from_dict(self.header.config).block_size(TokenGrid(*self.header.grid).tokens)
        return (self._kept(method) + (pooled if method in ("tail", "calibrated", "anchor") else 0.0)).sum(1)

    def _seconds(self, name: str, method: ChoiceMethod) -> np.ndarray:
        """[x, t, k], by the share of blocks that each head kept: a rung with top_p costs more where it kept more.
        Between the rungs that were timed it is linear."""
        rungs, kept = self.header.ladder, self._kept(method)
        plain = sorted((rung.density, self.header.costs[name][k]) for k, rung in enumerate(rungs) if not rung.top_p)
        shares, seconds = (np.array(x) for x in zip(*plain, strict=True))
        if len(plain) == 1:
            return np.full(kept.shape, seconds[0] * self.slower).sum(1)
        slopes = np.diff(seconds) / np.diff(shares)
        place = np.clip(np.searchsorted(shares, kept) - 1, 0, len(slopes) - 1)
        timed = np.maximum(seconds[place] + slopes[place] * (kept - shares[place]), seconds[0] * 0.5)
        return (timed * self.slower).sum(1)

    @cached_property
    def followed(self) -> "Followed":
        parts = [
            self._followed(method, soft)
            for method in self.learners
            for soft in self._soft(method)
            if any(soft is None or rung.density < soft for rung in self.header.ladder)
        ]
        if not parts:
            none = np.zeros((*self.ran.shape, 0))
            return Followed(none[None], none, none, none[:, 0], none, none, none, none, np.zeros(0))
        size = np.array([self._bytes(choice) for choice in self.options[self.singles :]])
        told = {name: np.concatenate([part[name] for part in parts], -1) for name in parts[0]}
        return Followed(size=size, **told)

    def _followed(self, method: ChoiceMethod, soft: float | None) -> dict[str, np.ndarray]:
        """All of `Followed` but size, for one method and density of its anchors."""
        m, ladder = LEARNERS.index(method), self.header.ladder
        below = [k for k, rung in enumerate(ladder) if soft is None or rung.density < soft]
        aged = np.stack([self._joint(self._aged(m, age), method) for age in range(1, self.longest + 1)])
        lacking = self.stats["error"][..., METHODS.index("tail" if method == "anchor" else "remainder"), :]
        lacks = np.square(np.nan_to_num(lacking)) * self.energy[..., None] * np.square(self.signed)[:, None, None]
        stored = [np.zeros((*self.ran.shape, self.rungs))]
        for s in range(len(STORAGES)):
            stored.append((lacks * np.square(np.nan_to_num(self.stats["coarse"][..., m, s]))[..., None]).sum(1))
        coarse = np.stack(stored, -1)
        seconds_at, work, dense = self._seconds(f"{method} at anchor", method), self._work(method), self.single
        work_at, at_error = work + dense[2][..., :1], np.zeros((*self.ran.shape, 1))
        if soft is not None:
            top = next(k for k, rung in enumerate(ladder) if rung.density == soft and not rung.top_p)
            at_error = self._joint(self.stats["error"][..., METHODS.index("tail"), :], "tail")[..., top, None]
            seconds_at = seconds_at - self.slower * dense[1][..., :1] + self._seconds("tail", "tail")[..., top, None]
            work_at = work + self._work("tail")[..., top, None]
        lost = coarse[..., below, :].reshape(*self.ran.shape, -1)

        def each(x: np.ndarray) -> np.ndarray:
            """For each storage the same."""
            return np.repeat(x[..., below], len(KEPT), -1)

        return {
            "aged": each(aged),
            "lost": lost,
            "begun": np.repeat(at_error, lost.shape[-1], -1),
            "steady": each(self._steady(method)),
            "seconds": each(self._seconds(method, method)),
            "seconds_at": each(seconds_at),
            "work": each(work),
            "work_at": each(work_at),
        }

    def _aged(self, m: int, age: int) -> np.ndarray:
        """[x, b, t, k] relative error at an age between those measured: it grows linearly from one to the next."""
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
        return generation.state_bytes(
            Layer("", 0, 1, 1, dim), choice.residual, choice.config(base), branches=len(self.header.branches)
        )

    def dense(self) -> Solution:
        return self.cheapest(0.0, np.zeros(self.steps), only_dense=True)

    def cheapest(
        self, price: float, rent: np.ndarray, only_dense: bool = False, biased: np.ndarray | None = None
    ) -> Solution:
        """The least of added error + price * cost + sum over steps of rent * bytes, for each head by itself.

        What is the same all through a run adds up before it is squared, so one more step costs the more the more there
        is: the best way is looked for with what the way before had, beginning with `biased` [x].
        """
        best, least, now = None, math.inf, biased
        for turn in range(1 if only_dense else ROUNDS):
            path = self._cheapest_at(price, rent, only_dense, np.zeros(len(self.ran)) if now is None else now)
            value = path.added + price * path.cost + float((rent * path.state).sum())
            if value < least:
                best, least = path, value
            if now is not None and np.allclose(now, path.biased, rtol=1e-3, atol=1e-12):
                break
            now = path.biased if now is None else now + (path.biased - now) / (2 + turn / 2)
        assert best is not None
        return best

    def _cheapest_at(self, price: float, rent: np.ndarray, only_dense: bool, biased: np.ndarray) -> Solution:
        """The same where one more step of bias adds in proportion to `biased`."""
        f, counts = self.followed, self.by == "work"
        _, seconds, work = self.single
        single_cost = work if counts else seconds
        after, at = (f.work, f.work_at) if counts else (f.seconds, f.seconds_at)
        if counts:
            price = price / float(work[..., 0].sum())
        x, steps = self.ran.shape
        rows, root = np.arange(x), np.sqrt(self.weight)
        fresh, slope = (1 - self.bias)[:, None], (2 * self.bias * biased)[:, None]
        single_error = fresh[..., None] * self.single[0] + slope[..., None] * np.sqrt(self.single[0])
        ahead = np.zeros((steps + 1, x))
        option, length = np.zeros((steps, x), int), np.ones((steps, x), int)
        for t in reversed(range(steps)):
            value = single_error[:, t] + price * single_cost[:, t]
            option[t] = 0 if only_dense else value.argmin(1)
            best = value[rows, option[t]] + ahead[t + 1]
            if f.size.size and not only_dense:
                memory = _Memory(f, t, root[:, t])
                spent = price * at[:, t] + rent[t] * f.size
                for age in range(1, min(self.longest, steps - 1 - t) + 1):
                    now = t + age
                    memory.follow(f.aged[age - 1][:, now], root[:, now])
                    spent = spent + (price * after[:, now] + rent[now] * f.size)
                    # A component that does not run at a step can neither learn nor use anything there.
                    total = np.where(
                        (self.ran[:, t] & self.ran[:, now])[:, None], spent + memory.error(fresh, slope), np.inf
                    )
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
        x, steps = self.ran.shape
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
        """Error, cost and memory of given options; begin [x, t] is the step that each memory is from."""
        single_error, single_seconds, single_work = self.single
        f, (x, steps) = self.followed, chosen.shape
        rows, times = np.arange(x)[:, None], np.arange(steps)[None]
        learns = chosen >= self.singles
        plain = np.where(learns, 0, chosen)
        error = np.zeros((x, steps))
        bias = np.sqrt(np.where(learns, 0.0, single_error[rows, times, plain]))
        seconds = np.where(learns, 0.0, single_seconds[rows, times, plain])
        work = np.where(learns, 0.0, single_work[rows, times, plain])
        state = np.zeros(steps)
        if learns.any():
            q = np.where(learns, chosen - self.singles, 0)
            here = (rows, times, q)
            own, all_along = self._remembered(q, begin)
            error, bias = np.where(learns, own, 0.0), np.where(learns, all_along, bias)
            seconds = seconds + np.where(learns, np.where(anchor, f.seconds_at[here], f.seconds[here]), 0.0)
            work = work + np.where(learns, np.where(anchor, f.work_at[here], f.work[here]), 0.0)
            state = np.where(learns, f.size[q], 0.0).sum(0)
        # Of what is the same all through, each step has its part of the square of the sum.
        biased, steady = bias.sum(1), self.bias[:, None]
        chance = self._chance(bias, begin)
        error = error + (1 - steady) * chance + steady * bias * biased[:, None]
        whole, share = float(seconds.sum() + self.header.costs["other"]), float(work.sum() / single_work[..., 0].sum())
        return Solution(
            option=chosen,
            anchor=anchor,
            direct=error.sum(0) / self.grown,
            error=self.frames_error(float(error.sum())),
            added=float(error.sum()),
            biased=biased,
            spent=seconds.sum(0),
            seconds=whole,
            work=share,
            cost=share if self.by == "work" else whole,
            state=state,
        )

    def _chance(self, bias: np.ndarray, begin: np.ndarray) -> np.ndarray:
        """[x, t]: what each step adds to the squares of biases, which are sums only over the steps of one memory."""
        found, so_far = np.zeros_like(bias), np.zeros(len(bias))
        for t in range(bias.shape[1]):
            so_far = np.where(begin[:, t] == t, 0.0, so_far)
            found[:, t] = (so_far + bias[:, t]) ** 2 - so_far**2
            so_far = so_far + bias[:, t]
        return found

    def _remembered(self, q: np.ndarray, begin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[x, t] if all go by a memory of option q: what each step adds to its own error, and the bias from its
        anchor."""
        f, (x, steps) = self.followed, q.shape
        rows, root = np.arange(x), np.sqrt(self.weight)
        found, biases = np.zeros((x, steps)), np.zeros((x, steps))
        lost, begun, steady, chance, straight, since, before = (np.zeros(x) for _ in range(7))
        for t in range(steps):
            new, now, age = begin[:, t] == t, q[:, t], np.maximum(t - begin[:, t], 1)
            lost = np.where(new, f.lost[rows, t, now], lost)
            begun = np.where(new, f.begun[rows, t, now], begun)
            steady = np.where(new, f.steady[rows, now], steady)
            wrong = np.where(new, 0.0, np.sqrt(f.aged[np.minimum(age, len(f.aged)) - 1, rows, t, now]) * root[:, t])
            chance = np.where(new, 0.0, chance) + wrong**2
            straight = np.where(new, 0.0, straight) + wrong
            since = np.where(new, 0.0, since + root[:, t])
            whole = (1 - steady) * chance + steady * straight**2 + lost * since**2
            found[:, t] = whole - np.where(new, 0.0, before)
            biases[:, t] = np.sqrt(begun) * root[:, t]
            before = whole
        return found, biases

    def uniform(self, config: SparseConfig, k: int) -> Solution:
        """What a uniform config at rung k would do, staggering aside."""
        x, steps = self.ran.shape
        phases = [Generation(config).phase_at(step, steps) for step in range(steps)]
        storage: Storage = "bf16" if config.residual == "auto" else config.residual
        choice = Choice(config.method, self.header.ladder[k], storage if config.learns else None)  # type: ignore[arg-type]
        index, begin, last = self.options.index(choice), np.zeros(steps, int), 0
        for step, phase in enumerate(phases):
            last = step if phase == "anchor" or not config.learns else last
            begin[step] = last
        chosen = np.array([0 if phase == "dense" else index for phase in phases])
        anchor = np.array([phase == "anchor" for phase in phases])
        spread = [np.broadcast_to(row, (x, steps)) for row in (chosen, anchor, begin)]
        return self.account(*spread)


@dataclass(frozen=True)
class Followed:
    """The options that learn, q, without the weight of steps. aged [age from 1, x, t, q]: squared error; lost [x, t of
    the anchor, q]: what storage adds to it; begun, likewise: what the anchor itself got wrong; steady [x, q]: cosine
    between errors at one step and the next. seconds and work [x, t, q], at the anchor seconds_at and work_at; size [q]
    in bytes, of all branches."""

    aged: np.ndarray
    lost: np.ndarray
    begun: np.ndarray
    steady: np.ndarray
    seconds: np.ndarray
    seconds_at: np.ndarray
    work: np.ndarray
    work_at: np.ndarray
    size: np.ndarray


class _Memory:
    """Errors [x, q] of all options that learned at one step, while they are followed. What was wrong or lost at the
    anchor is the same at each step; what grows with age is partly so."""

    def __init__(self, followed: Followed, t: int, root: np.ndarray):
        self.lost, self.begun, self.steady = followed.lost[:, t], followed.begun[:, t], followed.steady
        self.chance, self.straight = np.zeros_like(self.lost), np.zeros_like(self.lost)
        self.since, self.grown = np.zeros_like(root), root

    def follow(self, aged: np.ndarray, root: np.ndarray) -> None:
        """One step, at which errors weigh root squared."""
        wrong = np.sqrt(aged) * root[:, None]
        self.chance, self.straight = self.chance + wrong**2, self.straight + wrong
        self.since, self.grown = self.since + root, self.grown + root

    def error(self, fresh: np.ndarray, slope: np.ndarray) -> np.ndarray:
        """What an anchor got wrong is a bias like that of what learns nothing: fresh is how much of it is not, slope
        what one more step of the rest adds."""
        own = (1 - self.steady) * self.chance + self.steady * self.straight**2 + self.lost * self.since[:, None] ** 2
        all_along = np.sqrt(self.begun) * self.grown[:, None]
        return own + fresh * all_along**2 + slope * all_along


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
    return least if last_false else most


def default_speedup(problem: Problem) -> float:
    """Where only memory is limited: the speed of the default uniform setting, at the rung nearest to its density."""
    ladder = problem.header.ladder
    plain = [k for k, rung in enumerate(ladder) if not rung.top_p]
    k = min(plain, key=lambda k: abs(ladder[k].density - SparseConfig.density))
    every = Problem(problem.profile)
    return problem.header.seconds["transformers"] / every.uniform(SparseConfig(), k).seconds


def try_out(profile: Profile, psnr: float) -> tuple[Profile, dict[str, Any]]:
    """Choices of the least work for `psnr`, or of the least there is, to be tried, and what is predicted of them: the
    error that each step adds, the step of the first that is not dense, and from it on the seconds, and how many of
    these are not of sparse attention."""
    problem = Problem(profile, by="work")
    targets = Targets(psnr=psnr, by="work")
    path = solve(problem, targets)
    sparse = (path.option > 0).any(0)
    start = int(sparse.argmax()) if sparse.any() else problem.steps - 1
    other = problem.header.costs["other"] * (problem.steps - start) / problem.steps
    dense = float(np.where(problem.ran & (path.option == 0), problem.single[1][..., 0], 0.0)[:, start:].sum())
    told = {
        "work": path.work,
        "direct": path.direct.tolist(),
        "start": start,
        "predicted_seconds": (float(path.spent[start:].sum()) - dense) / problem.slower + dense + other,
        "seconds_known": dense + other,
    }
    return _written(profile, problem, path, targets), told


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
