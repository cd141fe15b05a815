"""All that lives as long as one generation: where it is, what it has learned on the way, what it has cost."""

import logging
import os
from dataclasses import dataclass, field
from typing import Literal

import torch

from dit_sparse.config import SparseConfig, Storage
from dit_sparse.correction import Learned
from dit_sparse.layout import Layout, TokenGrid
from dit_sparse.report import Mark, Tally
from dit_sparse.residual import bytes_per_row
from dit_sparse.schedule import span

logger = logging.getLogger("dit_sparse")

Phase = Literal["dense", "anchor", "sparse"]

GIB = 1024**3
# Share of the device's memory that is left to activations when the storage of residuals is chosen from what is free.
RESERVE = 0.15


class StateTooLarge(ValueError):
    """What the method must remember does not fit the memory it may take."""


@dataclass(frozen=True)
class Moment:
    """One forward of a transformer inside a generation."""

    step: int
    branch: str  # "cond", "uncond", ...: what the pipeline says, or who comes first at a step
    timestep: float
    total: int | None  # steps of the whole run, where known


@dataclass(frozen=True)
class Layer:
    """One self-attention module of a transformer."""

    name: str  # "transformer_2.blocks.0.attn1"
    index: int  # among the self-attention modules of its transformer
    of: int  # how many there are
    heads: int
    head_dim: int


@dataclass
class Generation:
    """The one mutable object; `enter` tells it where it is, it never counts calls."""

    config: SparseConfig
    layers: list[Layer] = field(default_factory=list)
    branches: int = 1  # separate forwards a step, for the estimate of memory
    grid: TokenGrid | None = None
    moment: Moment | None = None
    storage: Storage | None = None
    learned: dict[tuple[str, str], Learned] = field(default_factory=dict)  # (layer, branch)
    tally: Tally = field(default_factory=Tally)
    peak_state_bytes: int = 0
    dense_backend: str = ""
    _run: object = None
    _batch: int = 0
    _device: torch.device = torch.device("cpu")
    _at_step: list[str] = field(default_factory=list)  # branches seen at the present step
    _prompts: list[object] = field(default_factory=list)  # whose identity tells branches apart

    def enter(
        self,
        grid: TokenGrid,
        *,
        batch: int,
        device: torch.device,
        timestep: float,
        branch: str | None = None,
        prompt: object = None,
        step: int | None = None,
        total: int | None = None,
        run: object = None,
    ) -> None:
        """Start one forward of a transformer.

        branch is the pipeline's name for it, else `prompt` tells branches apart by identity. step is the pipeline's
        count, else a changed timestep is the next step. run is any object that is another one in another generation.
        """
        if branch is None:
            if not any(p is prompt for p in self._prompts):
                self._prompts.append(prompt)
            branch = f"branch {next(i for i, p in enumerate(self._prompts) if p is prompt)}"
        last = self.moment
        fresh = last is None or run is not self._run or grid != self.grid or batch != self._batch
        if not fresh:
            if step is None:
                rises = timestep > last.timestep
                again = timestep == last.timestep and branch in self._at_step
                fresh = rises or again
            else:
                fresh = step < last.step or (step == last.step and branch in self._at_step)
        if fresh:
            prompts = [] if prompt is None else [prompt]
            self.reset()
            self.tally, self.peak_state_bytes = Tally(), 0
            if branch.startswith("branch "):
                self._prompts, branch = prompts, "branch 0"
            last = None
        if step is None:
            step = 0 if last is None else last.step + (timestep != last.timestep)
        if last is None or step != last.step:
            self._at_step = []
        self._at_step.append(branch)
        self._run, self._batch, self._device, self.grid = run, batch, device, grid
        self.moment = Moment(step, branch, timestep, total)
        if fresh:
            self._begin(device)
        self.tally.marks.append((step, Mark(device), None))

    def leave(self) -> None:
        """End the forward begun last."""
        step, start, _ = self.tally.marks[-1]
        self.tally.marks[-1] = (step, start, Mark(self._device))

    def reset(self) -> None:
        """Forget what was learned; the report stays until the next generation begins."""
        self.learned.clear()
        self._prompts, self._at_step = [], []
        self.moment = self._run = None

    def _begin(self, device: torch.device) -> None:
        assert self.moment is not None and self.grid is not None
        for name in ("dense_steps", "dense_layers"):
            self._span(name, self.layers[0].of if name == "dense_layers" and self.layers else self.moment.total)
        self.storage = self._choose_storage(device) if self.config.learns else None

    def _span(self, name: str, total: int | None) -> frozenset[int]:
        spec = getattr(self.config, name)
        if total is None:
            if not isinstance(spec, int):
                raise ValueError(
                    f"{name}={spec!r} counts against the number of steps, which nobody told here: give a count, or "
                    "use sparsify(pipe)."
                )
            total = 1 << 30
        try:
            return span(spec, total)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def phase(self, layer: Layer) -> Phase:
        """What this layer does in this forward."""
        moment = self.moment
        if moment is None:
            return "dense"
        if layer.index in self._span("dense_layers", layer.of):
            return "dense"
        learned = self.learned.get((layer.name, moment.branch))
        return self.phase_at(moment.step, moment.total, layer.index if self.config.stagger else 0, learned)

    def phase_at(self, step: int, total: int | None, offset: int = 0, learned: Learned | None = None) -> Phase:
        """The phase of a step, for a layer whose anchors are shifted by `offset` and that has `learned` so far."""
        config = self.config
        dense = self._span("dense_steps", total)
        if config.method == "dense" or step in dense:
            return "dense"
        first = next(i for i in range(step + 1) if i not in dense)
        interval = config.interval
        due = interval is not None and (step == first or (step - first + offset) % interval == 0)
        if not config.learns:
            return "dense" if due else "sparse"
        if learned is not None:
            # A step cache may have skipped the anchor that was due.
            due = due or step - learned.step >= interval
            due = due and learned.step != step
        return "anchor" if due else "sparse"

    def record(self, layer: Layer, learned: Learned) -> None:
        assert self.moment is not None
        self.learned[layer.name, self.moment.branch] = learned
        self.peak_state_bytes = max(self.peak_state_bytes, sum(_size(x) for x in self.learned.values()))

    def recall(self, layer: Layer) -> Learned | None:
        assert self.moment is not None
        return self.learned.get((layer.name, self.moment.branch))

    def fall_back(self, reason: str) -> None:
        """Count a call that ran dense although it should not have; raise under strict, log each reason once."""
        if self.config.strict:
            raise ValueError(f"{reason[0].upper()}{reason[1:]}, and strict=True allows no dense fallback.")
        if reason not in self.tally.fallbacks:
            logger.warning("dense fallback: %s", reason)
        self.tally.fallbacks[reason] += 1

    def _choose_storage(self, device: torch.device) -> Storage:
        """The finest storage whose state fits, or the one asked for if it fits."""
        assert self.grid is not None
        layout = Layout(self.grid, block=self.config.block_size(self.grid.tokens))
        free = self.config.max_state_gib * GIB if self.config.max_state_gib else _free_bytes(device)
        asked: list[Storage] = ["bf16", "fp8", "int4"] if self.config.residual == "auto" else [self.config.residual]
        need = {kind: self._state_bytes(layout, kind) for kind in asked}
        for kind in asked:
            if need[kind] <= free:
                if self.config.residual == "auto":
                    logger.info("residuals in %s: %.2f of %.2f GiB", kind, need[kind] / GIB, free / GIB)
                return kind
        least = need[asked[-1]]
        layers = max(layer.of for layer in self.layers)
        fit = int(layers * free / least)
        raise StateTooLarge(
            f"Method {self.config.method!r} must remember {least / GIB:.2f} GiB in {asked[-1]}, "
            f"but {free / GIB:.2f} GiB may be used: method='tail' remembers nothing, dense_layers={layers - fit} fits, "
            f"and so does max_state_gib={least / GIB:.2f} where the memory is there."
        )

    def _state_bytes(self, layout: Layout, kind: Storage) -> float:
        total = 0.0
        for layer in self.layers:
            if layer.index in self._span("dense_layers", layer.of):
                continue
            rows = self._batch * layer.heads
            plan = rows * layout.blocks * (1 + self.config.density * layout.blocks + 1) * 4
            rho = rows * layout.grid.tokens * 4 if self.config.method == "reshape" else 0
            total += rows * layout.grid.tokens * bytes_per_row(layer.head_dim, kind) + plan + rho
        return total * self.branches


def _size(learned: Learned) -> int:
    tensors = (learned.plan.counts, learned.plan.indices, learned.residual.codes, learned.residual.scales, learned.rho)
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(0.0, free + cached - RESERVE * whole)
    pages, size = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return max(0.0, pages * size - RESERVE * os.sysconf("SC_PHYS_PAGES") * size)
