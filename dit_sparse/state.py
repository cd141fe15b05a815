"""All that lives as long as one generation: where it is, what it has learned on the way, what it has cost."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dit_sparse.choices import Phase, Table, per_block
from dit_sparse.config import SparseConfig, Storage
from dit_sparse.correction import Learned
from dit_sparse.head_kinds import HeadKinds
from dit_sparse.layers import Layer, Moment, Part
from dit_sparse.layout import TokenGrid
from dit_sparse.memory import bytes_per_head, free_bytes, size
from dit_sparse.phases import named, planned_phase
from dit_sparse.plan import BlockPlan
from dit_sparse.profile import Profile
from dit_sparse.report import Mark, Tally
from dit_sparse.some_heads import picks

logger = logging.getLogger("dit_sparse")

GIB = 1024**3


class StateTooLarge(ValueError):
    """What the method must remember does not fit the memory it may take."""


@dataclass
class Generation:
    """The one mutable object; `enter` tells it where it is, it never counts calls."""

    config: SparseConfig
    layers: list[Layer] = field(default_factory=list)
    profile: Profile | None = None
    branches: int = 1  # separate forwards a step, as far as anybody told: more are counted when they come
    rows: int = 0  # of the batch, in the present call
    grid: TokenGrid | None = None
    text: tuple[int, int | None] = (0, None)  # tokens before and behind the vision tokens; None is all that follow
    moment: Moment | None = None
    storage: Storage | None = None
    learned: dict[tuple[str, str], Learned | HeadKinds] = field(default_factory=dict)  # (layer, branch)
    tally: Tally = field(default_factory=Tally)
    peak_state_bytes: int = 0
    dense_backend: str = ""
    kernel: str = ""  # the implementation of block attention that ran last
    # (layer, q, k, v, key_mask) -> the output of the dense kernel that the user chose for a layer, None without one
    dense: Callable[[Layer, Tensor, Tensor, Tensor, Tensor | None], Tensor | None] | None = None
    _run: object = None
    _batch: int = 0
    _batches: dict[str, int] = field(default_factory=dict)  # rows of the batch, by what is remembered of a branch
    _memory: str = ""  # under which name the present call remembers
    _parts: set[str] = field(default_factory=set)  # transformers that have run at the present step
    _device: torch.device = torch.device("cpu")
    _first: int = 0  # the step that the run began at
    _at_step: list[str] = field(default_factory=list)  # branches seen at the present step
    _prompts: list[object] = field(default_factory=list)  # what tells branches without a name apart
    _table: Table | None = None  # the profile's choices for the present run
    _warned: bool = False

    def __deepcopy__(self, memo: dict[int, object]) -> "Generation":  # noqa: ARG002  (the protocol's signature)
        # A copy begins anew: what was learned may fill the device, and CUDA's clocks cannot be copied.
        return Generation(self.config, list(self.layers), self.profile)

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
        levels: Sequence[float] | None = None,
        text: tuple[int, int | None] = (0, None),
        part: str | None = None,
    ) -> None:
        """Start one forward of a transformer.

        branch is the pipeline's name for it, else `prompt` tells branches apart: by identity, or by value where it is
        another tensor at each step. step is the pipeline's count, else a changed timestep is the next step; a sampler
        may run a branch several times at one step. run is any object that is another one in another generation. levels
        are the noise levels of all steps, from 1 to 0, which a profile needs; text is how many tokens joint layers
        have before and behind the vision tokens; part is the transformer's name, with which its layers' names begin.
        Raises ValueError if the config names steps or layers that are not there, StateTooLarge if its method must
        remember more than it may.
        """
        last, self.text = self.moment, text
        # Branches with names may differ in it: some guidance runs beside a batch of both others. Where a run is known,
        # it may change, too: guidance may end, and FasterCache leaves half of the batch out.
        known = self._batch if branch is None else self._batches.get(branch, batch)
        same = last is not None and run is self._run and grid == self.grid and (batch == known or run is not None)
        ahead = last is None or (timestep != last.timestep if step is None else step != last.step)
        name = branch if branch is not None else self._branch(prompt, ahead)
        if last is not None and same:
            back = timestep > last.timestep if step is None else step < last.step
            # A branch that comes again is the sampler's second look at this step. At the first step, where nothing
            # tells runs apart, it is the next run of one step.
            again = not ahead and name in self._at_step
            same = not back and not (again and run is None and last.step == self._first)
        if last is None or not same:
            self.reset()
            self.tally, self.peak_state_bytes, self.kernel = Tally(), 0, ""
            self._run, self._batch, self._device, self.grid = run, batch, device, grid
            self._first = 0 if step is None else step
            self._parts = set() if part is None else {part}
            self._begin(total, levels)
            name = branch if branch is not None else self._branch(prompt, ahead=True)
            step = 0 if step is None else step
        elif step is None:
            step = last.step + ahead
        if ahead:
            self._at_step = []
        self._at_step.append(name)
        self._take_turns(part, ahead)
        self.moment = Moment(step, name, timestep, total)
        self.attending(batch)
        self.tally.marks.append((step, Mark(device), None))

    def _branch(self, prompt: object, ahead: bool) -> str:
        """The branch whose prompt this is; `ahead` if it is the first forward of a step."""
        places = [i for i, known in enumerate(self._prompts) if known is prompt]
        if not places:
            # A copy made at each step is the same prompt; two branches may have equal ones, but not at one step, but
            # where the sampler looks at it for a second time, which it does not at the first.
            seen = [] if ahead else self._at_step
            equal = [i for i, known in enumerate(self._prompts) if _equal(known, prompt)]
            first = self.moment is None or self.moment.step == self._first
            places = [i for i in equal if not first or f"branch {i}" not in seen]
            places.sort(key=lambda i: seen.count(f"branch {i}"))
        if not places:
            places = [len(self._prompts)]
            self._prompts.append(prompt)
        return f"branch {places[0]}"

    def _take_turns(self, part: str | None, ahead: bool) -> None:
        """Forget what a transformer learned that another one relieves, as in Wan 2.2."""
        if part is None or part in self._parts:
            # Of several that all ran at the step before, each may be the first at this one.
            return
        if ahead:
            self._parts = {part}
            for key in [key for key in self.learned if not key[0].startswith(f"{part}.")]:
                del self.learned[key]
        else:
            self._parts.add(part)
            self._store_again()

    def attending(self, rows: int) -> None:
        """An attention call has so many rows of the batch; other rows than the branch had are remembered apart."""
        if self.moment is None:
            return
        self.rows, branch = rows, self.moment.branch
        self._memory = branch if self._batches.get(branch, rows) == rows else f"{branch} of {rows}"
        if self._memory in self._batches:
            return
        self._batches[self._memory] = rows
        # One more than was told of may be one more than there is memory for.
        if len(self._batches) > self.branches or rows != self._batch:
            self._store_again()

    def _store_again(self) -> None:
        if self.profile is not None or not self.config.keeps_rows:
            return
        before, held = self.storage, size(self.learned.values())
        try:
            self.storage = self._choose_storage(held)
        except StateTooLarge:
            self.reset()
            raise
        if self.storage != before:
            # What is kept in the storage before would be in the way.
            self.learned.clear()

    def leave(self) -> None:
        """End the forward begun last."""
        step, start, _ = self.tally.marks[-1]
        self.tally.marks[-1] = (step, start, Mark(self._device))

    def reset(self) -> None:
        """Forget what was learned; the report stays until the next generation begins."""
        self.learned.clear()
        self._table = None
        self._prompts, self._at_step, self._batches, self._parts = [], [], {}, set()
        self.moment = self._run = None

    def _begin(self, total: int | None, levels: Sequence[float] | None) -> None:
        if self.profile is not None:
            self._lay_out(self.profile, total, levels)
            return
        named(self.config, "dense_steps", total)
        for layer in self.layers:
            named(self.config, "dense_layers", layer.of)
        self.storage = self._choose_storage() if self.config.keeps_rows else None

    def _lay_out(self, profile: Profile, total: int | None, levels: Sequence[float] | None) -> None:
        """The profile's choices for this run; one warning for all that it was not made for."""
        assert self.grid is not None
        if levels is None:
            raise ValueError("A profile goes by the noise level of each step, which nobody told: use sparsify(pipe).")
        # A run that begins in the middle, from a noisy video, has the last of its scheduler's steps.
        levels = levels[-total:] if total else levels
        distance = profile.distance(levels, self.grid)
        if distance and not self._warned:
            logger.warning("%s", distance)
            self._warned = True
        heads = {layer.name: layer.heads * layer.shares for layer in self.layers}
        held = {layer.name: layer.held for layer in self.layers}
        self._table = profile.table(levels, heads, self._device, held)
        free = free_bytes(self._device) if self.config.max_state_gib is None else self.config.max_state_gib * GIB
        need = self._planned_bytes(self._table)
        if need > free:
            raise StateTooLarge(
                f"The profile remembers {need / GIB:.3g} GiB at its peak, but {free / GIB:.3g} GiB may be used: "
                "fit it again with --max_state_gib."
            )

    def _planned_bytes(self, table: Table) -> float:
        """The most that a table has in memory at one step."""
        layers = {layer.name: layer for layer in self.layers}
        sums: dict[int, float] = {}
        for (name, _), steps in table.groups.items():
            for step, groups in enumerate(steps):
                for group in groups:
                    if group.choice.residual is not None:
                        heads = replace(layers[name], heads=len(group.heads))
                        need = self.state_bytes(heads, group.choice.residual, group.config, branches=1)
                        sums[step] = sums.get(step, 0.0) + need
        return max(sums.values(), default=0.0)

    def parts(self, layer: Layer) -> tuple[Part, ...]:
        """What the heads of this layer do in this forward; what no later step will use is forgotten."""
        if self.profile is None or self.moment is None or self._table is None or self.grid is None:
            phase, config = self.phase(layer), self.config
            if phase == "anchor" and self._in_full():
                # The user wants this step in full, whatever anchors are otherwise.
                config = replace(config, anchor_density=None)
            return (Part(layer, None, phase, config, self.storage),)
        groups, branch = self._table.at(layer.name, self.moment.branch, self.moment.step), self._memory
        live = {group.name for group in groups}
        for key in [key for key in self.learned if key[1] == branch and key[0].startswith(f"{layer.name}[")]:
            if key[0] not in live:
                del self.learned[key]
        parts = []
        for group in groups:
            heads, phase = picks(group.heads), group.phase
            known, fade = self.learned.get((group.name, branch)), None
            if group.choice.learns:
                # The anchor itself was skipped, or runs for a second time in one forward.
                phase = "anchor" if known is None else "sparse"
            if known is not None and group.fade is not None and known.step < self.moment.step:
                fade = group.fade[known.step - group.since]
            rho = group.rho
            if rho is not None:
                rho = per_block(rho, group.config.layout(self.grid).blocks)
            parts.append(
                Part(
                    replace(layer, name=group.name, heads=len(group.heads)),
                    None if len(group.heads) == layer.heads else heads,
                    phase,
                    group.config,
                    group.choice.residual,
                    rho,
                    fade,
                )
            )
        return tuple(parts)

    def phase(self, layer: Layer) -> Phase:
        """What this layer does in this forward."""
        moment, config = self.moment, self.config
        if moment is None or layer.index in named(config, "dense_layers", layer.of):
            return "dense"
        offset = layer.index if config.stagger else 0
        planned = self.phase_at(moment.step, moment.total, offset)
        if planned == "dense" or not config.learns:
            return planned
        learned = self.recall(layer)
        # Nothing to go by: the anchor was skipped, or this is another transformer or branch than at the steps before.
        if learned is None:
            return "anchor"
        if learned.step == moment.step:
            # A second look at a dense step is dense, too.
            return "dense" if self._in_full() else "sparse"
        late = config.interval is not None and moment.step - learned.step >= config.interval
        return "anchor" if late or planned == "anchor" else "sparse"

    def _in_full(self) -> bool:
        assert self.moment is not None
        return self.moment.step in named(self.config, "dense_steps", self.moment.total)

    def phase_at(self, step: int, total: int | None, offset: int = 0) -> Phase:
        """The phase of a step in a run that skips none, for a layer whose anchors are shifted by `offset`; with a
        profile, what most heads do."""
        if self._table is not None:
            return self._table.phase(step)
        return planned_phase(self.config, step, total, offset)

    def around(self, layer: Layer, tokens: int) -> tuple[int, int]:
        """Of a layer's `tokens`, how many are before and behind vision; raises ValueError if they do not add up."""
        assert self.grid is not None
        vision = self.grid.tokens
        before, after = self.text if layer.joint else (0, 0)
        if after is None:
            after = max(tokens - before - vision, 0)
        if tokens != before + vision + after:
            text = f" and {before + after} of text" if before + after else ""
            raise ValueError(f"{layer.name} was given {tokens} tokens, but its grid has {vision}{text}.")
        return before, after

    def text_of(self, layer: Layer, key_mask: Tensor) -> Tensor:
        """The columns of a mask [B, L] over a layer's tokens that belong to text."""
        before, after = self.around(layer, key_mask.shape[1])
        return torch.cat([key_mask[:, :before], key_mask[:, key_mask.shape[1] - after :]], dim=1)

    def record(self, layer: Layer, learned: Learned | HeadKinds) -> None:
        assert self.moment is not None
        self.learned[layer.name, self._memory] = learned
        self.peak_state_bytes = max(self.peak_state_bytes, size(self.learned.values()))

    def recall(self, layer: Layer) -> Learned | HeadKinds | None:
        assert self.moment is not None
        return self.learned.get((layer.name, self._memory))

    def plan_at_step(self, layer: Layer, config: SparseConfig) -> BlockPlan | None:
        """What a layer routed by this config in another branch of guidance at this step, the first that did."""
        assert self.moment is not None
        for branch in self._at_step if self.config.share_plan else ():
            found = self.learned.get((layer.name, branch))
            if branch == self.moment.branch or not isinstance(found, Learned) or found.config != config:
                continue
            if found.step == self.moment.step and len(found.plan.counts) == self.rows:
                return found.plan
        return None

    @property
    def device(self) -> torch.device:
        """Where the present or last run is."""
        return self._device

    def fall_back(self, reason: str, *, to: str = "dense") -> None:
        """Count a call that ran dense, or in full precision, although it should not have; raise under strict, log
        each reason once."""
        if self.config.strict:
            raise ValueError(f"{reason[0].upper()}{reason[1:]}, and strict=True allows no {to} fallback.")
        if reason not in self.tally.fallbacks:
            logger.warning("%s fallback: %s", to, reason)
        self.tally.fallbacks[reason] += 1

    def _choose_storage(self, held: int = 0) -> Storage:
        """The finest storage whose state fits, or the one asked for if it fits; `held` bytes of it are there."""
        asked: list[Storage] = ["bf16", "fp8", "int4"] if self.config.residual == "auto" else [self.config.residual]
        allowed = self.config.max_state_gib
        free = free_bytes(self._device) + held if allowed is None else allowed * GIB
        sparse = [layer for layer in self.layers if layer.index not in named(self.config, "dense_layers", layer.of)]
        for kind in asked:
            need = self._at_once(sparse, kind)
            if need <= free:
                if self.config.residual == "auto":
                    logger.info("residuals in %s: %.2f of %.2f GiB", kind, need / GIB, free / GIB)
                return kind
        dense = 0
        while self._at_once([layer for layer in self.layers if layer.index >= dense], kind) > free:
            dense += 1
        # Rounded up, because a figure that was rounded down would not fit.
        whole = math.ceil(need / GIB * 100) / 100
        raise StateTooLarge(
            f"Method {self.config.method!r} must remember {whole:.2f} GiB in {kind}, but {free / GIB:.2f} GiB may be "
            f"used: method='tail' remembers nothing, dense_layers={dense} fits, and so does "
            f"max_state_gib={whole:.2f} where the memory is there."
        )

    def _at_once(self, layers: Sequence[Layer], kind: Storage) -> float:
        """The most that these layers remember at one time: transformers that take turns do so in turn."""
        parts: dict[str, float] = {}
        for layer in layers:
            part = layer.name.split(".")[0]
            name = "" if part in self._parts else part
            parts[name] = parts.get(name, 0.0) + self.state_bytes(layer, kind)
        return max(parts.values(), default=0.0)

    def state_bytes(
        self, layer: Layer, kind: Storage, config: SparseConfig | None = None, branches: int | None = None
    ) -> float:
        """What one layer remembers, all branches and batch rows together."""
        assert self.grid is not None
        per_head = bytes_per_head(config or self.config, self.grid, layer.head_dim, kind)
        if branches is not None:
            rows = branches * self._batch
        else:
            # Those that were told of and have not come yet have as many rows as the first.
            rows = sum(self._batches.values()) + max(0, self.branches - len(self._batches)) * self._batch
        return rows * layer.heads * per_head


def _equal(a: object, b: object) -> bool:
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return False
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and torch.equal(a, b)
