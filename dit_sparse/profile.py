"""The file that calibration writes and a run reads: what was measured, what was chosen, and what it was made for."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dit_sparse.choices import Choice, Group, Groups, Place, Rung, Table, bracket, grouped, laid_out, nearest
from dit_sparse.codes import decoded, encoded
from dit_sparse.config import SparseConfig
from dit_sparse.kernels.dense_attention import LONG
from dit_sparse.layout import TokenGrid
from dit_sparse.video import whole

SCHEMA = 5
# Files of schema 4 have statistics as float16.
READ = (4, 5)
# Noise levels this close are the same step: rounding of a scheduler in another precision.
SAME_LEVEL = 1e-3
# Numbers of each weight that identify a model.
SAMPLE = 64


@dataclass(frozen=True)
class Header:
    """All of a profile but its tensors. Times are in seconds, levels of noise from 1 to 0.

    weights    component -> the class of its transformer, and what its weights look like in two precisions
    layers     (name, heads, channels per head) of each self-attention; the first axis of the tensors has all heads
    ran        component -> the steps it ran at
    grid       vision tokens (frames, rows, columns); size is (height, width, num_frames) in pixels
    config     block, order and forced blocks that were measured, as a config
    rungs      (density, top_p) of the ladder; distances are in steps since the last anchor
    costs      see dit_sparse.calibration.costs
    choices    what `choice` indexes; empty before a fit
    """

    model_id: str
    weights: dict[str, dict[str, str]]
    layers: tuple[tuple[str, int, int], ...]
    branches: tuple[str, ...]
    ran: dict[str, tuple[int, ...]]
    levels: tuple[float, ...]
    grid: tuple[int, int, int]
    size: tuple[int, int, int]
    scheduler: dict[str, Any]
    guidance_scale: float
    config: dict[str, Any]
    rungs: tuple[tuple[float, float | None], ...]
    distances: tuple[int, ...]
    bins: int
    rows: int
    created: str
    device: str
    dtype: str
    kernel: str
    versions: dict[str, str | None]
    prompts: tuple[str, ...]
    seconds: dict[str, float]
    costs: dict[str, Any]
    effects: dict[str, Any]
    choices: tuple[dict[str, Any], ...] = ()
    targets: dict[str, float] = field(default_factory=dict)
    predicted: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)

    @property
    def rows_of(self) -> dict[str, slice]:
        """Layer name -> its heads on the first axis of the tensors."""
        found, start = {}, 0
        for name, heads, _ in self.layers:
            found[name] = slice(start, start + heads)
            start += heads
        return found

    @property
    def seen(self) -> tuple[str, ...]:
        """The prompts that predictions come from: those calibrated on, and those verified on by a fit before."""
        trials = self.effects.get("trials", ())
        return (*self.prompts, *dict.fromkeys(trial["verified"] for trial in trials if "verified" in trial))

    @property
    def visits_once(self) -> bool:
        """Whether anchors, on the device that was calibrated on, visit each pair of blocks once."""
        return self.kernel.startswith("gluon, dense") and TokenGrid(*self.grid).tokens >= LONG

    @property
    def ladder(self) -> tuple[Rung, ...]:
        return tuple(Rung(*rung) for rung in self.rungs)


# Tensor -> its axes: h heads of all layers, b branches, t steps, k rungs, p bins along the routing order, d distances,
# and lists of names below.
AXES = {
    "rho": "hbtkp",
    "recall": "hbtk",
    "kept": "hbtrk",
    "error": "hbtmk",
    "stale": "hbtldk",
    "fade": "hbtdk",
    "coarse": "hbtls",
    "drift": "hbtd",
    "together": "hbtek",
    "persist": "hbtek",
    "energy": "hbt",
    "choice": "hbt",
    "anchor": "hbt",
}
ROUTINGS = ("mass", "error", "fine")
# Two are no methods. "remainder" is the output without rho times the sparse part, which Re-ttention's residual holds;
# "soft" is the tail as anchors route, which is what an anchor lacks, or a soft one outputs.
METHODS = ("none", "rectify", "tail", "calibrated", "remainder", "soft")
LEARNERS = ("anchor", "reshape")
ERRORS = (*METHODS, *LEARNERS)
STORAGES = ("fp8", "int4")


@dataclass(frozen=True)
class Profile:
    """Statistics of a dense run and, after a fit, a choice for each head, branch of guidance and step.

    rho     share of softmax mass inside the routed blocks (by mass), the mean over rows of each bin
    recall  the same over what the best blocks of that number hold
    kept    share of key blocks in the plan, by routing
    error   relative L2 error of the output, by method
    stale   the same for a method that learns, by the distance to its last anchor; of anchor as it fades
    fade    how much of an anchor's residual is added at that distance, 0 to 1: what has the least error
    coarse  relative L2 error of the stored residual, by method and storage
    drift   mean change of rho, of the plan kept from an anchor, by distance, at the middle rung
    together  cosine between the errors of this branch and of the first one, which guidance subtracts
    persist   cosine between the errors of this step and of the one before; of methods that learn, from one anchor
    energy  mean square of the output, after the output projection
    choice  uint8, index into the header's choices; anchor is 1 where a memory begins
    All but the last two are float16 or float32, and NaN where a component did not run; in the file they are bytes, see
    `codes`. Errors are after the output projection.
    """

    header: Header
    tensors: dict[str, Tensor]
    source: str = ""

    @property
    def fitted(self) -> bool:
        return bool(self.header.choices)

    @classmethod
    def load(cls, path: str | Path) -> "Profile":
        """Raises ValueError for anything that is not a whole, unchanged profile of this schema."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"profile {str(path)!r} is no file: give one written by dit-sparse calibrate or fit.")
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get("dit_sparse_profile")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or no safetensors file: {error}.") from None
        if text is None:
            raise ValueError(f"{path} is a safetensors file, but no profile: its header says nothing of dit-sparse.")
        try:
            told = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} was damaged: its header is not JSON ({error}).") from None
        schema, digest = told.pop("schema", None), told.pop("digest", None)
        if schema not in READ:
            known = " and ".join(map(str, READ))
            raise ValueError(f"{path} has schema {schema!r}, and this version of dit-sparse reads {known}.")
        if digest != _digest(told, tensors):
            raise ValueError(f"{path} was damaged or changed after it was written: its digest does not fit.")
        header = Header(**{name: _frozen(value) for name, value in told.items()})
        return cls(header, decoded(tensors), str(path))

    def save(self, path: str | Path) -> None:
        """The whole file or none. Raises ValueError where it cannot be written."""
        path = Path(path)
        told = json.loads(json.dumps(asdict(self.header)))
        tensors = encoded(self.tensors)
        told |= {"schema": SCHEMA, "digest": _digest(told, tensors)}
        try:
            with whole(path) as part:
                save_file(tensors, part, metadata={"dit_sparse_profile": json.dumps(told)})
        except (OSError, SafetensorError) as error:
            said = error.strerror if isinstance(error, OSError) else str(error)
            raise ValueError(f"{str(path)!r} cannot be written, and nothing was: {said}.") from None

    def with_choices(
        self, choice: Tensor, anchor: Tensor, choices: Sequence[Choice], targets: dict[str, float],
        predicted: dict[str, float],
    ) -> "Profile":  # fmt: skip
        header = replace(
            self.header, choices=tuple(c.to_dict() for c in choices), targets=targets, predicted=predicted, measured={}
        )
        return replace(self, header=header, tensors=self.tensors | {"choice": choice, "anchor": anchor})

    def check(self, transformers: Mapping[str, nn.Module]) -> None:
        """Raise ValueError unless these are the transformers that were calibrated, and there are choices."""
        if not self.fitted:
            raise ValueError(f"{self.source} has measurements, but no choices yet: run dit-sparse fit on it.")
        known = self.header.weights
        for part, module in transformers.items():
            name = type(module).__name__
            if part not in known or known[part]["class"] != name:
                of = ", ".join(f"{part} {said['class']}" for part, said in known.items())
                raise ValueError(f"{self.source} was made for {of}, and this is {part} {name}.")
            half = next(module.parameters()).dtype == torch.float16
            kind = "float16" if half else "bfloat16"
            if fingerprint(module)[kind] != known[part][kind]:
                raise ValueError(
                    f"{self.source} was made for {self.header.model_id}, and the {part} here has other weights: "
                    "calibrate this model."
                )

    def distance(self, levels: Sequence[float], grid: TokenGrid) -> str:
        """What a run is away from the one that was calibrated, in a sentence; empty if it is the same."""
        own, there = self.header.levels, (grid.frames, grid.height, grid.width)
        gap = max(min(abs(level - known) for known in own) for level in levels)
        told = []
        if len(levels) != len(own) or gap > SAME_LEVEL:
            told.append(f"{len(levels)} steps instead of {len(own)}, up to {gap:.3f} from the nearest noise level")
        if there != self.header.grid:
            ratio = grid.tokens / TokenGrid(*self.header.grid).tokens
            sizes = (" x ".join(map(str, size)) for size in (there, self.header.grid))
            told.append("{} tokens instead of {}, {:.2f} times as many".format(*sizes, ratio))
        return f"profile {self.source} is stretched to {' and '.join(told)}" if told else ""

    def table(
        self,
        levels: Sequence[float],
        layers: Mapping[str, int],
        device: torch.device,
        held: Mapping[str, Sequence[int]] | None = None,
    ) -> Table:
        """The choices for a run with these noise levels: the nearest step's; rho and fade are between two steps'.
        layers is name -> heads; raises ValueError for others. held is name -> those of its heads that the table is
        for, which it numbers from 0; all if None."""
        header = self.header
        own = {name: heads for name, heads, _ in header.layers}
        if dict(layers) != own:
            odd = next(iter(set(layers.items()) ^ set(own.items())))
            raise ValueError(f"{self.source} was made for other layers: {odd[0]} with {odd[1]} heads is in one only.")
        choices = [Choice.from_dict(values) for values in header.choices]
        ladder = header.ladder
        base = SparseConfig.from_dict(header.config)
        known = {part: {step: header.levels[step] for step in steps} for part, steps in header.ran.items()}
        source = {part: nearest(levels, at) for part, at in known.items()}
        groups: dict[tuple[str, str], tuple[Groups, ...]] = {}
        rhos: list[Tensor] = []
        fades: list[Tensor] = []
        fading = self.fading() if any(choice.method == "anchor" for choice in choices) else None
        for name, rows in header.rows_of.items():
            part = name.partition(".")[0]
            origin = source[part]
            here = [rows.start + head for head in (range(own[name]) if held is None else held[name])]
            places = [bracket(level, known[part]) for level in levels]
            for b, branch in enumerate(header.branches):
                chosen, anchor = (self.tensors[key][here, b].tolist() for key in ("choice", "anchor"))
                told = [
                    laid_out([choices[i] for i in head], [bool(x) for x in begins], origin)
                    for head, begins in zip(chosen, anchor, strict=True)
                ]
                steps = []
                for step, found in enumerate(grouped(name, told, base)):
                    for group in found:
                        if not (_has_rho(group) or _fades(group)):
                            continue
                        assert group.choice.rung is not None
                        k = ladder.index(group.choice.rung)
                        at = [here[head] for head in group.heads]
                        first, second, share = places[step]
                        if _has_rho(group):
                            pair = self.tensors["rho"][at, b][:, [first, second], k].float()
                            rhos.append(torch.lerp(pair[:, 0], pair[:, 1], share))
                        else:
                            pair = fading[at, b, :, :, k][:, [first, second]]
                            own_age = torch.lerp(pair[:, 0], pair[:, 1], share)
                            fades.append(_at_ages(own_age, places[step], places[group.since : step]))
                    steps.append(found)
                groups[name, branch] = tuple(steps)
        rho, fade = (iter(_split_on(device, x)) for x in (rhos, fades))

        def with_numbers(group: Group) -> Group:
            if _has_rho(group):
                return replace(group, rho=next(rho))
            return replace(group, fade=next(fade)) if _fades(group) else group

        return Table({key: tuple(tuple(map(with_numbers, found)) for found in steps) for key, steps in groups.items()})

    def fading(self) -> Tensor:
        """[h, b, t, age, k] float32 from age 0 on: all of a residual is added to the step it is of, and between the
        distances that were measured it is linear. Early in a run nothing is as old as the next distance."""
        told, distances = self.tensors["fade"].float(), self.header.distances
        ages = torch.arange(distances[-1] + 1, dtype=torch.float32)
        found = [told.new_ones(*told.shape[:3], told.shape[-1])]
        for i, distance in enumerate(distances):
            further = 1 - (1 - found[-1]) * (distance / distances[i - 1] if i else 1.0)
            found.append(torch.where(told[..., i, :].isnan(), further.clamp(min=0), told[..., i, :]))
        known = torch.tensor([0, *distances], dtype=torch.float32)
        above = torch.searchsorted(known, ages).clamp(min=1)
        share = (ages - known[above - 1]) / (known[above] - known[above - 1])
        low, high = (torch.stack([found[i] for i in at], dim=3) for at in ((above - 1).tolist(), above.tolist()))
        return torch.lerp(low, high, share[:, None])


def _has_rho(group: Group) -> bool:
    return group.choice.method == "calibrated"


def _fades(group: Group) -> bool:
    return group.choice.method == "anchor" and group.phase == "sparse"


def _at_ages(told: Tensor, now: Place, before: Sequence[Place]) -> Tensor:
    """[before, heads] of what is told [heads, age] of ages 0, 1, ... in calibrated steps, between which and beyond
    which a run's own steps may lie."""
    ages = [min(max(_number(now) - _number(place), 0.0), told.shape[1] - 1) for place in before]
    low = [min(int(age), told.shape[1] - 2) for age in ages]
    share = torch.tensor([age - floor for age, floor in zip(ages, low, strict=True)])
    return torch.lerp(told[:, low], told[:, [i + 1 for i in low]], share).T


def _number(place: Place) -> float:
    first, second, share = place
    return first + (second - first) * share


def _split_on(device: torch.device, parts: Sequence[Tensor]) -> list[Tensor]:
    """The parts on the device, by one copy."""
    if not parts:
        return []
    flat = torch.cat([part.flatten() for part in parts]).to(device)
    return [x.view(part.shape) for x, part in zip(flat.split([p.numel() for p in parts]), parts, strict=True)]


def fingerprint(model: nn.Module) -> dict[str, str]:
    """A hash of a sample of each weight, as bfloat16 and as float16: a model loaded in another precision than it was
    saved in is still recognised."""
    digests = {kind: hashlib.sha256() for kind in (torch.bfloat16, torch.float16)}
    for name, weight in sorted(model.named_parameters()):
        if hasattr(weight, "full_tensor"):
            raise ValueError(
                "The weights are spread over processes, so no profile can be told to fit them: call sparsify() before "
                "enable_parallelism()."
            )
        flat = (_offloaded(model, name) if weight.is_meta else weight.detach()).flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE].float().cpu()
        for kind, digest in digests.items():
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(sample.to(kind).view(torch.int16).numpy().tobytes())
    return {str(kind).removeprefix("torch."): digest.hexdigest()[:32] for kind, digest in digests.items()}


def _offloaded(model: nn.Module, name: str) -> Tensor:
    """A weight that accelerate's sequential offload keeps elsewhere."""
    owner, _, leaf = name.rpartition(".")
    hook = getattr(model.get_submodule(owner), "_hf_hook", None)
    weights = getattr(hook, "weights_map", None)
    if weights is None:
        raise ValueError(f"The weight {name} is not in memory, so no profile can be told to fit it.")
    return weights[leaf]


def _digest(told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def _frozen(value: Any) -> Any:
    """Lists from JSON as tuples."""
    if isinstance(value, list):
        return tuple(map(_frozen, value))
    return {name: _frozen(x) for name, x in value.items()} if isinstance(value, dict) else value
