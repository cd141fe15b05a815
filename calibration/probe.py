"""What attention costs and how far it is from exact, call by call, read beside the calls of a run."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dit_sparse.calibration.kept import Kept, kept
from dit_sparse.report import Mark
from dit_sparse.state import Generation


@dataclass(frozen=True)
class Call:
    """One attention call: pairs of tokens visited and possible, and squared sums of its error and of exact outputs."""

    layer: str
    step: int
    phase: str
    start: Mark
    end: Mark
    possible: float
    known: float
    visited: tuple[Tensor | None, Tensor | None]  # on the device, before and after
    error: Tensor | None
    exact: Tensor | None

    @property
    def work(self) -> float:
        before, after = (0.0 if pairs is None else pairs.item() for pairs in self.visited)
        return (self.known + after - before) / self.possible


@dataclass
class Look:
    """Asks a probe for what one layer keeps, in its first call at one of `steps` that is not dense.

    found  what it kept, at step `at`; None before such a call
    """

    layer: str
    steps: range
    found: Kept | None = None
    at: int = -1


@dataclass
class Probe:
    """Records every attention call of a session's runs.

    rows    query rows per call that are also attended exactly, to measure the error; 0 measures time and work alone
    look    what else to find out, if anything
    calls   of all runs since it was put in place, or since `forget`
    beside  begin and end of what the probe itself did
    """

    generation: Generation
    rows: int = 0
    look: Look | None = None
    calls: list[Call] = field(default_factory=list)
    beside: list[tuple[Mark, Mark]] = field(default_factory=list)

    def forget(self) -> None:
        self.calls.clear()
        self.beside.clear()

    @property
    def seconds(self) -> float:
        """In attention, without what the probe does itself."""
        return sum(self.by_step().values())

    def by_step(self) -> dict[int, float]:
        """The same, of each step."""
        found: dict[int, float] = {}
        for call in self.calls:
            found[call.step] = found.get(call.step, 0.0) + call.start.until(call.end)
        return found

    @property
    def own_seconds(self) -> float:
        """In the probe itself, where that looked at more than the time."""
        return sum(start.until(end) for start, end in self.beside)

    def maps(self) -> list[dict[str, Any]]:
        """A row for each layer and step, over heads and branches: work and relative L2 error, None without rows."""
        cells: dict[tuple[str, int], list[Call]] = {}
        for call in self.calls:
            cells.setdefault((call.layer, call.step), []).append(call)
        rows: list[dict[str, Any]] = []
        for (layer, step), calls in cells.items():
            error: float | None = None
            if calls[0].error is not None:
                squares = [sum(getattr(call, name).item() for call in calls) for name in ("error", "exact")]
                error = (squares[0] / max(squares[1], 1e-30)) ** 0.5
            rows.append(
                {"layer": layer, "step": step, "work": sum(c.work for c in calls) / len(calls), "error": error}
            )
        return rows


def put_in_place(transformers: dict[str, nn.Module], generation: Generation, rows: int = 0) -> Probe:
    """A probe on the processors of a session, which are gone when the session is restored."""
    probe = Probe(generation, rows)
    for transformer in transformers.values():
        for module in transformer.modules():
            processor: Any = getattr(module, "processor", None)
            if hasattr(processor, "attend"):
                processor.attend = Watched(processor.attend, probe)
    return probe


class Watched:
    """The attention call of one layer, with a probe beside it."""

    def __init__(self, attend: Any, probe: Probe):
        self.attend, self.probe = attend, probe

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        return self._beside(lambda: self.attend(q, k, v, key_mask), q, k, v, key_mask)

    @property
    def joint(self) -> bool:
        return self.attend.joint

    def fall_back(self, reason: str, pairs: float) -> None:
        # Somebody else computes that call, so there is nothing to be beside of.
        self.attend.fall_back(reason, pairs)

    def _beside(self, attend: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        generation = self.probe.generation
        tally, moment = generation.tally, generation.moment
        possible, known, visited = tally.dense_pairs, tally.known_pairs, tally.visited_pairs
        step = moment.step if moment else 0
        phases = dict(tally.phases.get(step, {}))
        start = Mark(q.device)
        out = attend()
        end = Mark(q.device)
        grown = [phase for phase, count in tally.phases[step].items() if count > phases.get(phase, 0)]
        error = exact = None
        name, look = generation.layers[self.attend.layer].name, self.probe.look
        if self.probe.rows:
            error, exact = _error(q, k, v, mask, out, self.probe.rows)
        if look is not None and look.found is None and look.layer == name and step in look.steps:
            look.found, look.at = kept(q, k, v, mask, generation, self.attend.layer), step
        if self.probe.rows or look is not None:
            self.probe.beside.append((end, Mark(q.device)))
        self.probe.calls.append(
            Call(
                name,
                step,
                "sparse" if "sparse" in grown else grown[0],
                start,
                end,
                tally.dense_pairs - possible,
                tally.known_pairs - known,
                (visited, tally.visited_pairs),
                error,
                exact,
            )
        )
        return out


def _error(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Over evenly spaced rows and all heads: squared distance from exact attention, and squared length of that.

    mask is a key mask [B, L] bool, or anything that scaled_dot_product_attention takes. Rows that see no key do not
    count.
    """
    picked = torch.linspace(0, q.shape[2] - 1, min(rows, q.shape[2]), device=q.device).round().long()
    logits = q[:, :, picked].float() @ k.float().mT * q.shape[-1] ** -0.5
    if mask is not None:
        mask = mask[:, None, None] if mask.dim() == 2 and len(mask) == len(q) else mask
        mask = mask.expand(*logits.shape[:2], q.shape[2], k.shape[2])[:, :, picked]
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    exact = logits.softmax(-1).nan_to_num() @ v.float()
    seen = ~logits.isneginf().all(-1, keepdim=True)
    return ((out[:, :, picked].float() - exact) * seen).square().sum(), exact.square().sum()
