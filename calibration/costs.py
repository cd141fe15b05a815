"""What each choice costs in seconds, timed on queries, keys and values of the model itself."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dit_sparse.attention import attend_part, fastest_dense
from dit_sparse.choices import DENSE, LEARNING, Choice, ChoiceMethod, Phase, Rung
from dit_sparse.config import SparseConfig
from dit_sparse.layout import TokenGrid
from dit_sparse.memory import free_bytes
from dit_sparse.report import Mark
from dit_sparse.state import Generation, Layer, Part

# Seconds that a GPU is busy for when the kernels of a choice are launched: more than that takes.
QUEUED = 5e-3
# Tensors as large as the queries that a call has at a time, by count, and some more.
COPIES = 12
METHODS: tuple[ChoiceMethod, ...] = ("none", "rectify", "tail", "calibrated", "anchor", "reshape")


def measure(
    layer: Layer,
    qkv: tuple[Tensor, Tensor, Tensor],
    grid: TokenGrid,
    ladder: Sequence[Rung],
    base: SparseConfig,
    *,
    repeats: int | None = None,
) -> dict[str, Any]:
    """Seconds per head: "dense", and for each other method a list by rung. For methods that learn the list under
    "METHOD" is of the steps that follow an anchor, and under "METHOD at anchor" of the anchor. Least of `repeats`, by
    default two, on a GPU three, whose kernels are compiled before. And as "kernel" what block attention ran on."""
    q, k, v = qkv
    if q.device.type == "cpu":
        # The CPU computes one head after the other, so one tells as much as all.
        q, k, v = (x[:, :1] for x in (q, k, v))
    heads = q.shape[1]
    repeats = repeats or (2 if q.device.type == "cpu" else 3)
    alone = Layer(layer.name, layer.index, layer.of, heads, layer.head_dim)
    found: dict[str, Any] = {}

    def entered() -> Generation:
        generation = Generation(SparseConfig("dense"), [alone])
        generation.enter(grid, batch=q.shape[0], device=q.device, timestep=0.0, branch="cond", step=0, total=1)
        return generation

    def attend(generation: Generation, choice: Choice, at_anchor: bool = False) -> None:
        phase: Phase = "dense" if choice is DENSE else "anchor" if at_anchor else "sparse"
        # Numbers that cost what any would.
        rho = torch.full((heads, base.layout(grid).blocks), 0.5, device=q.device)
        fade = torch.full((heads,), 0.5, device=q.device)
        part = Part(
            alone,
            None,
            phase,
            choice.config(base),
            choice.residual,
            rho if choice.method == "calibrated" else None,
            fade if choice.method == "anchor" and not at_anchor else None,
        )
        attend_part(q, k, v, part, generation, None)

    def once(choice: Choice) -> None:
        # Which another thread does not inherit.
        with torch.no_grad():
            own = entered()
            if choice.method in LEARNING:
                attend(own, choice, at_anchor=True)
            attend(own, choice)

    def timed(choice: Choice, at_anchor: bool = False) -> float:
        return _least(partial(attend, generation, choice, at_anchor), repeats, q.device, queued) / heads

    def queued() -> None:
        """In a run a GPU has work left when a layer's kernels are launched, so nobody waits for the launches."""
        if q.device.type != "cpu":
            for _ in range(_ahead(found["dense"] * heads) if found else 1):
                fastest_dense(q, k, v, alone, generation, None)

    generation = entered()
    if _compiles(q.device):
        room = free_bytes(q.device) / (COPIES * q.numel() * q.element_size())
        _side_by_side([partial(once, choice) for choice in (DENSE, *(_choice(x, ladder[0]) for x in METHODS))], room)
    found["dense"] = timed(DENSE)
    for method in METHODS:
        for rung in ladder:
            choice = _choice(method, rung)
            if method in LEARNING:
                found.setdefault(f"{method} at anchor", []).append(timed(choice, at_anchor=True))
            found.setdefault(method, []).append(timed(choice))
    generation.reset()
    return found | {"kernel": generation.kernel}


def _choice(method: ChoiceMethod, rung: Rung) -> Choice:
    return Choice(method, rung, "fp8" if method in LEARNING else None)


def _compiles(device: torch.device) -> bool:
    return device.type != "cpu"


def _side_by_side(calls: Sequence[Callable[[], object]], most: float) -> None:
    """Each once, as many at a time as there is room for: kernels are compiled at first use, one after the other for a
    minute, on one of the machine's cores."""
    with ThreadPoolExecutor(int(min(max(most, 1), len(calls)))) as pool:
        for done in [pool.submit(call) for call in calls]:
            done.result()


def _ahead(seconds: float) -> int:
    """How many dense calls of so many seconds a GPU is busy with for long enough."""
    return min(math.ceil(QUEUED / max(seconds, QUEUED / 100)), 100)


def _least(call: Callable[[], object], repeats: int, device: torch.device, before: Callable[[], object]) -> float:
    def once() -> float:
        before()
        start = Mark(device)
        call()
        return start.until(Mark(device))

    return min(once() for _ in range(repeats))
