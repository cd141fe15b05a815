"""What a profile knows of each option a head has at a step: its error in the video, its cost and its memory.

An error inside attention counts by what it was measured to do to the video (see `Measured.weight`). The branches of
guidance add up as they are: what their errors have in common goes away when one is subtracted from the other.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from dit_sparse.calibration.growth import Band, Run, corrected, fit_slopes, lasting
from dit_sparse.choices import DENSE, LEARNING, Choice, ChoiceMethod
from dit_sparse.config import SparseConfig, Storage
from dit_sparse.layout import TokenGrid
from dit_sparse.pipelines.registry import FAMILIES
from dit_sparse.profile import ERRORS, LEARNERS, METHODS, ROUTINGS, STORAGES, Profile
from dit_sparse.state import Generation, Layer

AT_ONCE: tuple[ChoiceMethod, ...] = ("none", "rectify", "tail", "calibrated")
KEPT: tuple[Storage, ...] = ("bf16", "fp8", "int4")
Cost = Literal["seconds", "work"]
# What the branches of guidance are called: by pipelines, by guiders, and where nobody names them, as with Cosmos and
# Kandinsky, whose forward with the prompt is the first.
COND, UNCOND = ("cond", "pred_cond", "branch 0"), ("uncond", "pred_uncond", "branch 1")
# Cosines are measured on a sample of rows: branches are never taken to cancel further than this share of the squares.
LEAST_LEFT = 0.02
# How much of an error that was added up is there in the end, until a trial says so: about what the demo model's trials
# say. Errors of many layers and steps cancel in part, and cannot grow for ever.
LEFT = 0.1
# The slope of measured over predicted error, as logarithms, as far as trials do not say, and how far from that it may
# well be: below 1, since choices fall on what was measured too low, the more the less error is left. The trials of the
# profiles that come along have this slope.
SLOPE, SLOPE_WIDTH = 0.75, 0.25
# By what factor prompts differ in how easily they are changed, and by what factor trials of one prompt are off
# besides, as logarithms.
PROMPTS_DIFFER, TRIALS_DIFFER = 1.0, 0.35


@dataclass(frozen=True)
class Followed:
    """The options that learn, q, without the weight of steps. aged [age from 1, x, t, q]: squared error; fade,
    likewise: how much of what the anchor remembered is added; lost [x, t of the anchor, q]: what storage adds to
    the squared error of all of it; begun, likewise: what the anchor itself got wrong; steady [x, q]: cosine
    between errors at one step and the next. seconds and work [x, t, q], at the anchor seconds_at and work_at; size
    [q] in bytes, of all branches.
    """

    aged: np.ndarray
    fade: np.ndarray
    lost: np.ndarray
    begun: np.ndarray
    steady: np.ndarray
    seconds: np.ndarray
    seconds_at: np.ndarray
    work: np.ndarray
    work_at: np.ndarray
    size: np.ndarray


class Measured:
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
        beyond = any(FAMILIES[told["class"]].beyond for told in h.weights.values())
        own = h.guidance_scale + beyond
        scale = dict.fromkeys(COND, own) | dict.fromkeys(UNCOND, 1 - own)
        return np.array([scale.get(name, 1.0) if guided else 1.0 for name in h.branches])

    def _joint(self, relative: np.ndarray, kind: str) -> np.ndarray:
        """[x, t, k]: mean squared error of what guidance makes of relative errors [x, b, t, k]; kind is one of ERRORS,
        whose errors in the first branch and in another are at a measured angle."""
        sizes = np.nan_to_num(relative) * self.felt[..., None]
        squares = np.square(sizes).sum(1)
        cosines = self.agreeing[..., None] * np.nan_to_num(self.stats["together"][..., ERRORS.index(kind), :])
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
    def _gains(self) -> np.ndarray:
        """[x, b, t]: mean square of what changes in a branch's output for a unit of squared error in one head's part
        of the attention output: by probes, between which its logarithm is linear in the step."""
        return np.exp(self._between("gain", lambda gain: math.log(max(gain, 1e-30))))

    @cached_property
    def agreeing(self) -> np.ndarray:
        """[x, b, t]: how much of what two branches' errors in attention have in common, they have in common in the
        outputs: layers that come after see each branch's text. Between probes it is linear in the step."""
        return self._between("agree", float)

    def _between(self, what: str, of: Callable[[float], float]) -> np.ndarray:
        """[x, b, t] from what probes found of each layer and branch at a few steps."""
        found = []
        for name, heads, _ in self.header.layers:
            known = sorted((int(step), each) for step, each in self.header.effects.get(what, {}).get(name, {}).items())
            if not known or any(not isinstance(each, list | tuple) for _, each in known):
                raise ValueError(f"{self.profile.source} has no probe of both branches in {name}: calibrate again.")
            at, values = zip(*known, strict=True)
            told = [np.interp(np.arange(self.steps), at, [of(x) for x in own]) for own in zip(*values, strict=True)]
            found += [np.stack(told)] * heads
        return np.stack(found)

    @cached_property
    def felt(self) -> np.ndarray:
        """[x, b, t]: how far a relative error of 1 in one head moves what guidance makes of the branches, signed as
        guidance has it, as a multiple of what a unit of error in the first branch does there."""
        return np.sqrt(self.energy * self._gains / self._gains[:, :1]) * self.signed[:, None]

    @cached_property
    def gained(self) -> np.ndarray:
        """[x, t]: mean squared error in the latents for a unit of squared error in one head's part of the attention
        output in the first branch: by probes, and by the size of the step."""
        levels = np.array(self.header.levels)
        return self._gains[:, 0] * (levels - np.append(levels[1:], 0.0)) ** 2

    @cached_property
    def grown(self) -> np.ndarray:
        """[t]: mean squared error of the latents at the end for one after a step, by how errors grew in trials, and by
        what came of the bands of steps that were tried alone."""
        levels, effects = self.header.levels, self.header.effects
        runs = [Run(np.array(t["direct"]), np.array(t["found"], float)) for t in self._trials]
        bands = [Band(np.array(t["direct"]), t["error"], t["prompt"], t["part"]) for t in effects.get("bands", ())]
        return corrected(lasting(levels, fit_slopes(levels, runs)) ** 2, bands)

    @property
    def _trials(self) -> list[dict[str, Any]]:
        """Those that tell of errors: where frames are the same as dense ones, theirs were too small to be seen."""
        return [trial for trial in self.header.effects["trials"] if sum(trial["direct"]) > 0 and trial["error"] > 0]

    @cached_property
    def _seen(self) -> tuple[float, float, float]:
        """Of the logarithms of errors in trials: mean as added up, mean as measured, and the slope of the second over
        the first. Means of logarithms, as quality is told in decibels.

        Most of what differs between two trials is the prompt, if they are of two. How much faster or slower errors
        grow than they add up is told by two trials of one, so a prompt's own part of an error is taken to be the same
        in all of its trials.
        """
        if not self._trials:
            # LEFT is for errors as they are.
            return 0.0, math.log(LEFT * self.header.effects["scale"]), 1.0
        x, y, prompt = self._tried
        # Generalised least squares, of trials that share their prompt's part of the error.
        shared = PROMPTS_DIFFER**2 * (prompt[:, None] == prompt)
        weigh = np.linalg.inv(shared + TRIALS_DIFFER**2 * np.eye(len(x)))
        before, after = (weigh.sum(0) @ told / weigh.sum() for told in (x, y))
        dx, dy = x - before, y - after
        slope = (dx @ weigh @ dy + SLOPE / SLOPE_WIDTH**2) / (dx @ weigh @ dx + 1 / SLOPE_WIDTH**2)
        return float(before), float(after), float(np.clip(slope, 0.3, 1.5))

    @cached_property
    def _tried(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each trial: logarithm of the error as added up and as measured, and the number of its prompt."""
        x = np.log([(np.array(t["direct"]) * self.grown).sum() for t in self._trials])
        y = np.log([t["error"] for t in self._trials])
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
        """By how much what is not dense took longer than its parts when they were timed alone: in what was verified,
        which was timed as a user sees it, or, before there is any of that, in the trials."""
        found = [
            ("verified" in t, (t["seconds"] - t["seconds_known"]) / (t["predicted_seconds"] - t["seconds_known"]))
            for t in self.header.effects["trials"]
            # What was verified elsewhere says nothing of the seconds here.
            if t["seconds"] is not None and t["predicted_seconds"] - t["seconds_known"] > 0.02 * t["predicted_seconds"]
        ]
        told = [ratio for verified, ratio in found if verified] or [ratio for _, ratio in found]
        return float(np.clip(np.median(told), 0.5, 2.0)) if told else 1.0

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
        routing = ROUTINGS.index("fine" if method in LEARNING else "error" if method == "tail" else "mass")
        return np.nan_to_num(self.stats["kept"][..., routing, :])

    def _work(self, method: ChoiceMethod) -> np.ndarray:
        """[x, t, k]: in units of one head's dense attention; what is pooled counts as a key for each block."""
        pooled = 1 / SparseConfig.from_dict(self.header.config).layout(TokenGrid(*self.header.grid)).key_size
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
    def followed(self) -> Followed:
        parts = [
            self._followed(method, soft)
            for method in self.learners
            for soft in self._soft(method)
            if any(soft is None or rung.density < soft for rung in self.header.ladder)
        ]
        if not parts:
            none = np.zeros((*self.ran.shape, 0))
            return Followed(none[None], none[None], none, none, none[:, 0], none, none, none, none, np.zeros(0))
        size = np.array([self._bytes(choice) for choice in self.options[self.singles :]])
        told = {name: np.concatenate([part[name] for part in parts], -1) for name in parts[0]}
        return Followed(size=size, **told)

    def _followed(self, method: ChoiceMethod, soft: float | None) -> dict[str, np.ndarray]:
        """All of `Followed` but size, for one method and density of its anchors."""
        m, ladder = LEARNERS.index(method), self.header.ladder
        below = [k for k, rung in enumerate(ladder) if soft is None or rung.density < soft]
        aged = np.stack([self._joint(self._aged(m, age), method) for age in range(1, self.longest + 1)])
        fade = np.ones_like(aged)
        if method == "anchor":
            fade = self._fade.transpose(2, 0, 1, 3)[1 : self.longest + 1]
        lacking = self.stats["error"][..., METHODS.index("soft" if method == "anchor" else "remainder"), :]
        lacks = np.square(np.nan_to_num(lacking) * self.felt[..., None])
        stored = [np.zeros((*self.ran.shape, self.rungs))]
        for s in range(len(STORAGES)):
            stored.append((lacks * np.square(np.nan_to_num(self.stats["coarse"][..., m, s]))[..., None]).sum(1))
        coarse = np.stack(stored, -1)
        seconds_at, work, dense = self._seconds(f"{method} at anchor", method), self._work(method), self.single
        # What an anchor visits besides its output's: its plan, but where each pair is visited once.
        own = work - self._kept(method).sum(1) if self.header.visits_once else work
        work_at, at_error = own + dense[2][..., :1], np.zeros((*self.ran.shape, 1))
        if soft is not None:
            top = next(k for k, rung in enumerate(ladder) if rung.density == soft and not rung.top_p)
            at_error = self._joint(self.stats["error"][..., METHODS.index("soft"), :], "soft")[..., top, None]
            seconds_at = seconds_at - self.slower * dense[1][..., :1] + self._seconds("tail", "tail")[..., top, None]
            work_at = own + self._work("tail")[..., top, None]
        lost = coarse[..., below, :].reshape(*self.ran.shape, -1)

        def each(x: np.ndarray) -> np.ndarray:
            """For each storage the same."""
            return np.repeat(x[..., below], len(KEPT), -1)

        return {
            "aged": each(aged),
            "fade": each(fade),
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

    @cached_property
    def _fade(self) -> np.ndarray:
        """[x, t, age, k]: the mean over branches, of which one may not have run."""
        return self.profile.fading().mean(1).numpy()

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
