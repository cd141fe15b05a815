"""What one generation did: phases, times, attention work, state, and where it fell back to dense."""

import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepRecord:
    step: int
    phase: str  # "dense", "anchor" or "sparse": what most of attention did
    seconds: float  # inside the transformers, all branches


@dataclass(frozen=True)
class RunReport:
    """density and work are measured: pairs of tokens visited, padding and text counted, over all pairs.

    density  share of key blocks in the plans of the sparse calls, without the denser plans of soft anchors
    work     attention work of the whole run relative to dense; anchors and the tail's pooled keys are in it, pooling
             and routing are not
    precision_error  of 8 bits: what they made wrong in the exact part of a layer's first head at its first sparse
             call, relative, the mean of all layers; precision_error_worst where it was most; None in full precision
    """

    steps: tuple[StepRecord, ...]
    density: float
    work: float
    state_bytes: int
    residual: str | None
    fallbacks: dict[str, int]
    dense_backend: str
    kernel: str
    precision: str = "full"
    precision_error: float | None = None
    precision_error_worst: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Mark:
    """A point in time on the device that does the work, read only when the report is made."""

    def __init__(self, device: torch.device):
        self.event = None
        if device.type == "cuda":
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record(torch.cuda.current_stream(device))
        else:
            self.seconds = time.perf_counter()

    def until(self, end: "Mark") -> float:
        """Seconds from this mark to `end`."""
        if self.event is None or end.event is None:
            return end.seconds - self.seconds
        end.event.synchronize()
        return self.event.elapsed_time(end.event) / 1000


@dataclass
class Tally:
    """Counts on the device, added up without reading it."""

    dense_pairs: float = 0.0  # what dense attention would have visited
    known_pairs: float = 0.0  # visited, where the number is known on the host
    visited_pairs: Tensor | None = None  # visited, where it is on the device
    blocks: Tensor | None = None  # block pairs in the plans of sparse calls
    possible_blocks: float = 0.0
    phases: dict[int, Counter[str]] = field(default_factory=dict)  # by the pairs that would be visited dense
    marks: list[tuple[int, Mark, Mark | None]] = field(default_factory=list)
    fallbacks: Counter[str] = field(default_factory=Counter)
    precision_errors: dict[str, Tensor] = field(default_factory=dict)  # by layer

    def dense(self, step: int, pairs: float) -> None:
        self.dense_pairs += pairs
        self.known_pairs += pairs
        self._phase(step, "dense", pairs)

    def sparse(
        self, step: int, phase: str, pairs: float, known: float, visited: Tensor, visited_blocks: Tensor, blocks: float
    ) -> None:
        """One call that would cost `pairs` dense: `known` plus `visited` pairs done, `visited_blocks` of `blocks`."""
        self.dense_pairs += pairs
        self.known_pairs += known
        self.visited_pairs = visited.double() if self.visited_pairs is None else self.visited_pairs + visited
        self.blocks = visited_blocks.double() if self.blocks is None else self.blocks + visited_blocks
        self.possible_blocks += blocks
        self._phase(step, phase, pairs)

    def _phase(self, step: int, phase: str, pairs: float) -> None:
        # Not by calls, which may be of few heads or of many.
        self.phases.setdefault(step, Counter())[phase] += int(pairs)

    def steps(self) -> tuple[StepRecord, ...]:
        seconds: dict[int, float] = {}
        for step, start, end in self.marks:
            if end is not None:
                seconds[step] = seconds.get(step, 0.0) + start.until(end)
        return tuple(
            StepRecord(step, phases.most_common(1)[0][0], seconds.get(step, 0.0))
            for step, phases in sorted(self.phases.items())
        )

    def work(self) -> float:
        """Pairs visited over all pairs; 1 before anything ran."""
        visited = 0.0 if self.visited_pairs is None else self.visited_pairs.item()
        return (self.known_pairs + visited) / self.dense_pairs if self.dense_pairs else 1.0

    def density(self) -> float:
        return 1.0 if self.blocks is None else self.blocks.item() / self.possible_blocks
