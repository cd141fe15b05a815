"""What each head does at each step of one run: a profile's choices, laid out for the steps and the grid at hand."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from dit_sparse.config import SparseConfig, Storage

Phase = Literal["dense", "anchor", "sparse"]

# "calibrated" is Re-ttention with the profile's rho, "reshape" the same with rho and residual of the last anchor.
ChoiceMethod = Literal["dense", "none", "rectify", "tail", "calibrated", "anchor", "reshape"]
LEARNING: tuple[ChoiceMethod, ...] = ("anchor", "reshape")


@dataclass(frozen=True)
class Rung:
    """One setting on the ladder that calibration measures: how much of the keys is computed exactly."""

    density: float
    top_p: float | None = None

    def __str__(self) -> str:
        return f"{self.density:g}" + (f"+p{self.top_p:g}" if self.top_p else "")


@dataclass(frozen=True)
class Choice:
    """What one head does at one step. residual: how an anchor's memory is stored, None where nothing is learned;
    anchor_density: density of the anchor itself, None where that is dense."""

    method: ChoiceMethod
    rung: Rung | None = None
    residual: Storage | None = None
    anchor_density: float | None = None

    @property
    def learns(self) -> bool:
        return self.method in LEARNING

    def config(self, base: SparseConfig) -> SparseConfig:
        """The uniform config that does the same; `base` has the block, the order and the forced blocks."""
        if self.rung is None:
            return replace(base, method="dense")
        tail = self.method in ("tail", "calibrated", "anchor")
        return replace(
            base,
            method="tail" if self.method == "calibrated" else self.method,
            routing="mass" if self.method == "calibrated" else "auto",
            density=self.rung.density,
            top_p=self.rung.top_p,
            anchor_density=self.anchor_density,
            second_order=base.second_order if tail else True,
            second_order_limit=base.second_order_limit if tail else SparseConfig.second_order_limit,
        )

    def to_dict(self) -> dict[str, Any]:
        rung = self.rung and [self.rung.density, self.rung.top_p]
        told = {"method": self.method, "rung": rung, "residual": self.residual}
        return told if self.anchor_density is None else told | {"anchor_density": self.anchor_density}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Choice":
        rung = values["rung"]
        rung = None if rung is None else Rung(*rung)
        return cls(values["method"], rung, values["residual"], values.get("anchor_density"))


DENSE = Choice("dense")


@dataclass(frozen=True)
class Group:
    """Heads of one layer that do the same at one step.

    name    tells the group's memory from that of other groups of its layer; one name from an anchor to its last step
    phase   "anchor" where it learns, "sparse" where it does not or uses what it learned
    config  the uniform setting that does the same
    since   the step that its memory begins at, this one where it has none
    rho     [heads, bins] float32, the calibrated share of softmax mass along the routing order; None elsewhere
    fade    [steps since, heads] float32, how much of an anchor's residual is added if it was learned at `since`, at
            the step after it, and so on; None elsewhere
    """

    heads: tuple[int, ...]
    name: str
    phase: Phase
    choice: Choice
    config: SparseConfig
    since: int
    rho: Tensor | None = None
    fade: Tensor | None = None


Groups = tuple[Group, ...]


@dataclass(frozen=True)
class Table:
    """(layer, branch) -> the groups of each step of the run."""

    groups: dict[tuple[str, str], tuple[Groups, ...]]

    def at(self, layer: str, branch: str, step: int) -> Groups:
        """Raises ValueError for a branch that calibration did not see, or a step past the run's end."""
        steps = self.groups.get((layer, branch))
        if steps is None:
            known = sorted({name for _, name in self.groups})
            raise ValueError(f"The profile knows the branches {', '.join(known)}, not {branch!r}: calibrate again.")
        if step >= len(steps):
            raise ValueError(f"The profile was laid out for {len(steps)} steps, and step {step} lies past the last.")
        return steps[step]

    def phase(self, step: int) -> Phase:
        """What most heads do at a step."""
        count = Counter[Phase]()
        for steps in self.groups.values():
            for group in steps[step]:
                count[group.phase] += len(group.heads)
        return count.most_common(1)[0][0]


def nearest(levels: Sequence[float], known: Mapping[int, float]) -> list[int]:
    """For each noise level the step among `known` (step -> its level) that is nearest, the earlier of two."""
    return [min(known, key=lambda step: (abs(known[step] - level), step)) for level in levels]


# Two steps, and how far a noise level is from the first to the second.
Place = tuple[int, int, float]


def bracket(level: float, known: Mapping[int, float]) -> Place:
    """The two steps among `known` between whose noise levels `level` lies, and how far it is from the first to the
    second, from 0 to 1; beyond the outermost, that one twice."""
    above = min((step for step in known if known[step] >= level), key=lambda step: known[step], default=None)
    below = max((step for step in known if known[step] <= level), key=lambda step: known[step], default=None)
    if above is None or below is None:
        [end] = {above, below} - {None}
        assert end is not None
        return end, end, 0.0
    width = known[above] - known[below]
    return above, below, (known[above] - level) / width if width else 0.0


def laid_out(choices: Sequence[Choice], anchors: Sequence[bool], source: Sequence[int]) -> list[tuple[Choice, int]]:
    """For each step of a run: the choice, and the step its memory begins at, which is itself where nothing is learned.

    choices, anchors: of the calibrated steps; source: the calibrated step that each step of the run takes after. An
    anchor that no step of the run would use is plain dense.
    """
    begins: list[int] = []
    for step, choice in enumerate(choices):
        follows = choice.learns and not anchors[step] and step > 0 and choices[step - 1] == choice
        begins.append(begins[-1] if follows else step)
    found: list[tuple[Choice, int]] = []
    for step, origin in enumerate(source):
        choice = choices[origin]
        before = found[-1] if found else None
        same = before is not None and before[0] == choice and begins[source[step - 1]] == begins[origin]
        found.append((choice, before[1] if choice.learns and same and before is not None else step))
    followed = {since for step, (_, since) in enumerate(found) if since != step}
    return [
        (DENSE, step) if choice.learns and since not in followed else (choice, since)
        for step, (choice, since) in enumerate(found)
    ]


def grouped(layer: str, heads: Sequence[list[tuple[Choice, int]]], base: SparseConfig) -> Iterator[Groups]:
    """For each step, the heads of a layer by what they do: those whose anchors lie alike go together to the end."""
    steps = len(heads[0])
    ends: dict[tuple[int, int], int] = {}
    for head, told in enumerate(heads):
        for step, (_, since) in enumerate(told):
            ends[head, since] = step
    configs: dict[Choice, SparseConfig] = {}
    for step in range(steps):
        together: dict[tuple[Choice, int, int], list[int]] = {}
        for head, told in enumerate(heads):
            choice, since = told[step]
            span = (since, ends[head, since]) if choice.learns else (step, step)
            together.setdefault((choice, *span), []).append(head)
        groups = []
        for (choice, since, last), members in together.items():
            if choice not in configs:
                configs[choice] = choice.config(base)
            phase: Phase = "sparse"
            if choice.method == "dense" or (choice.learns and since == step):
                phase = "dense" if choice.method == "dense" else "anchor"
            name = f"{layer}[{','.join(map(str, members))}]@{since}-{last}" if choice.learns else layer
            groups.append(Group(tuple(members), name, phase, choice, configs[choice], since))
        yield tuple(groups)


def per_block(rho: Tensor, blocks: int) -> Tensor:
    """rho [heads, bins] at the middle of equal parts of the routing order -> [heads, blocks], linear in between."""
    return torch.nn.functional.interpolate(rho[None], size=blocks, mode="linear", align_corners=False)[0]
