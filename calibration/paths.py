"""The ways of heads through the steps of a run, and the cheapest of them.

Errors of different heads add up as squares; those of one head, at one step and the next, also have a part in common,
which adds up as it is. With a price on cost and on bytes at each step, every head is a shortest path of its own.
"""

import math
from dataclasses import dataclass

import numpy as np

from dit_sparse.calibration.measured import Followed, Measured
from dit_sparse.choices import Choice
from dit_sparse.config import SparseConfig, Storage
from dit_sparse.state import Generation

# Rounds of looking for the best way where what one step costs depends on the others.
ROUNDS = 10


@dataclass(frozen=True)
class Solution:
    """What heads do, x, in all branches.

    option  [x, steps] index into `Measured.options`; anchor [x, steps] bool, where a memory begins
    direct  [steps] mean squared error that each step adds to the latents; added is what they come to in the end, apart
            [x] each head's part of it, and error that of the frames
    biased  [x] how much has added up of errors that are the same all through
    spent   [steps] seconds in attention; seconds are those of the whole transformers, state [steps] bytes
    work    attention work as a share of that of dense attention; cost is either of the two, as the problem counts, and
            price [x] each head's part of it
    """

    option: np.ndarray
    anchor: np.ndarray
    direct: np.ndarray
    added: float
    apart: np.ndarray
    biased: np.ndarray
    error: float
    spent: np.ndarray
    seconds: float
    work: float
    cost: float
    price: np.ndarray
    state: np.ndarray

    @property
    def psnr(self) -> float:
        return math.inf if self.error <= 0 else -10 * math.log10(self.error)


class Problem(Measured):
    """Error, cost and memory of whole ways through a run."""

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
                    memory.follow(f.aged[age - 1][:, now], f.fade[age - 1][:, now], root[:, now])
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

    def within(self, path: Solution, band: range) -> Solution:
        """The same at the steps of a band, and dense elsewhere. What remembers from before begins with the band."""
        steps = np.arange(self.steps)
        inside = (steps >= band.start) & (steps < band.stop)
        chosen = np.where(inside, path.option, 0)
        anchor = (path.anchor & inside) | ((chosen >= self.singles) & (steps == band.start))
        # A memory that no step of the band uses is none.
        followed = np.append((chosen >= self.singles)[:, 1:] & ~anchor[:, 1:], np.zeros((len(chosen), 1), bool), 1)
        chosen = np.where(anchor & ~followed, 0, chosen)
        anchor &= followed
        return self._given(chosen, anchor)

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
            apart=error.sum(1),
            biased=biased,
            spent=seconds.sum(0),
            seconds=whole,
            work=share,
            cost=share if self.by == "work" else whole,
            price=work.sum(1) / float(single_work[..., 0].sum()) if self.by == "work" else seconds.sum(1),
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
            at = (np.minimum(age, len(f.aged)) - 1, rows, t, now)
            wrong, fade = np.where(new, 0.0, np.sqrt(f.aged[at]) * root[:, t]), np.where(new, 1.0, f.fade[at])
            chance = np.where(new, 0.0, chance) + wrong**2
            straight = np.where(new, 0.0, straight) + wrong
            since = np.where(new, 0.0, since + fade * root[:, t])
            whole = (1 - steady) * chance + steady * straight**2 + lost * since**2
            found[:, t] = whole - np.where(new, 0.0, before)
            biases[:, t] = np.sqrt(begun) * fade * root[:, t]
            before = whole
        return found, biases

    def chosen(self) -> Solution:
        """What the profile's own choices come to."""
        index = np.array([self.options.index(Choice.from_dict(told)) for told in self.header.choices])
        chosen = index[self.profile.tensors["choice"][:, 0].numpy()]
        return self._given(chosen, self.profile.tensors["anchor"][:, 0].numpy() > 0)

    def mixed(self, one: Solution, other: Solution, of_other: np.ndarray) -> Solution:
        """Heads go the ways of one solution, and those in of_other [x] bool the ways of the other."""
        which = of_other[:, None]
        return self._given(np.where(which, other.option, one.option), np.where(which, other.anchor, one.anchor))

    def _given(self, chosen: np.ndarray, anchor: np.ndarray) -> Solution:
        steps = np.arange(self.steps)
        begin = np.where(chosen >= self.singles, np.maximum.accumulate(np.where(anchor, steps, 0), 1), steps)
        return self.account(chosen, anchor, begin)

    def uniform(self, config: SparseConfig, k: int) -> Solution:
        """What a uniform config at rung k would do, staggering aside; but that it would have anchors fade, too."""
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


class _Memory:
    """Errors [x, q] of all options that learned at one step, while they are followed. What was wrong or lost at the
    anchor is the same at each step; what grows with age is partly so."""

    def __init__(self, followed: Followed, t: int, root: np.ndarray):
        self.lost, self.begun, self.steady = followed.lost[:, t], followed.begun[:, t], followed.steady
        self.chance, self.straight = np.zeros_like(self.lost), np.zeros_like(self.lost)
        self.since, self.grown = np.zeros_like(self.lost), np.broadcast_to(root[:, None], self.lost.shape)

    def follow(self, aged: np.ndarray, fade: np.ndarray, root: np.ndarray) -> None:
        """One step, at which errors weigh root squared."""
        wrong = np.sqrt(aged) * root[:, None]
        self.chance, self.straight = self.chance + wrong**2, self.straight + wrong
        added = fade * root[:, None]
        self.since, self.grown = self.since + added, self.grown + added

    def error(self, fresh: np.ndarray, slope: np.ndarray) -> np.ndarray:
        """What an anchor got wrong is a bias like that of what learns nothing: fresh is how much of it is not, slope
        what one more step of the rest adds."""
        own = (1 - self.steady) * self.chance + self.steady * self.straight**2 + self.lost * self.since**2
        all_along = np.sqrt(self.begun) * self.grown
        return own + fresh * all_along**2 + slope * all_along
