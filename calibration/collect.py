"""A calibration from start to end: dense runs that record, probes, trials, bands, and the profile made of them.

Every part is on disk when it is finished, in a directory beside the output file, and is not done again.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dit_sparse.calibration import costs, effects
from dit_sparse.calibration.fit import try_out
from dit_sparse.calibration.metrics import psnr
from dit_sparse.calibration.record import Plan, Recorder
from dit_sparse.calibration.replay import Tape, forwards
from dit_sparse.choices import Choice
from dit_sparse.pipelines.session import FAMILIES, Session, levels_of, sparsify
from dit_sparse.profile import ERRORS, METHODS, Header, Profile, fingerprint
from dit_sparse.video import whole, write_record

Tick = Callable[[str, int], None]
# Is called after each step with its latents, or with nothing by pipelines that do not tell them.
Done = Callable[[Tensor | None], None]
# (component, step, branch) -> what its blocks said in the dense run.
Heard = dict[tuple[str, int, str], effects.Blocks]
# Qualities in dB that the trials of a prompt aim at, one prompt after the other: what comes of them is right where
# targets are. Two of one prompt say how quality grows with what is spent, whatever the prompt.
TRIED = ((30.0, 36.0), (33.0, 27.0), (27.0, 33.0), (36.0, 30.0))
# Into how many parts the steps of a run are cut, each of which is tried alone.
BANDS = 5
# Numbers of the latents that are looked at after each step.
LATENTS = 1 << 16
# Of what is kept to be resumed; of another format nothing can be.
_FORMAT = 4


@dataclass(frozen=True)
class Job:
    """One calibration.

    run     (prompt, seed, done) -> frames [F, H, W, 3] from 0 to 1; done(latents) is called after each step
    facts   what goes into the header as it is: model_id, size, guidance_scale, created, device, dtype, versions
    """

    pipe: Any
    run: Callable[[str, int, Done], np.ndarray]
    prompts: tuple[str, ...]
    seed: int
    steps: int
    plan: Plan
    facts: Mapping[str, Any]
    tick: Tick

    @property
    def transformers(self) -> dict[str, nn.Module]:
        parts = self.pipe.components
        return {part: module for part, module in parts.items() if type(module).__name__ in FAMILIES}

    def identity(self) -> dict[str, Any]:
        """What must be the same for a calibration to be resumed."""
        told = {
            "format": _FORMAT,
            "plan": asdict(self.plan),
            "prompts": self.prompts,
            "seed": self.seed,
            "steps": self.steps,
            "weights": weights_of(self.transformers),
            "facts": {name: value for name, value in self.facts.items() if name != "created"},
        }
        return json.loads(json.dumps(told))

    def forwards(self) -> int:
        """Ticks of the whole calibration: a tick is a step of a run, or a probe."""
        layers = sum(len(_layers(part, module)) for part, module in self.transformers.items())
        runs = len(self.prompts) + len(self.trials()) + len(self.bands())
        return runs * self.steps + layers * len(effects.probe_steps(self.steps))

    def trials(self) -> list[tuple[int, float]]:
        """Number of the prompt, and the quality to try. Of a single prompt once: how it differs from others, which is
        not known then, is more than a second trial would tell."""
        aims = [TRIED[number % len(TRIED)] for number in range(len(self.prompts))]
        count = 1 if len(self.prompts) == 1 else 2
        return [(number, aim) for turn in range(count) for number, aim in enumerate(each[turn] for each in aims)]

    def bands(self) -> list[tuple[int, float, range]]:
        """Number of the prompt, the quality to try, and the steps that are not dense: each prompt once in each band.
        Of a single prompt none, for which they would take longer than all the rest."""
        count = min(BANDS, self.steps)
        if len(self.prompts) == 1 or count < 2:
            return []
        ends = [round(i * self.steps / count) for i in range(count + 1)]
        spans = [range(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]
        return [(number, TRIED[number % len(TRIED)][0], span) for number in range(len(self.prompts)) for span in spans]


def collect(job: Job, work: Path) -> Profile:
    """The profile, without choices. `work` is where finished parts are kept; the caller removes it."""
    _begin(job, work)
    heard: Heard = {}
    for number in range(len(job.prompts)):
        _dense(job, work, number, heard)
    _probes(job, work, heard)
    for place in range(len(job.prompts)):
        _trial(job, work, place)
    for place in range(len(job.bands())):
        _band(job, work, place)
    for place in range(len(job.prompts), len(job.trials())):
        _trial(job, work, place)
    return _profile(job, work)


def weights_of(transformers: Mapping[str, nn.Module]) -> dict[str, dict[str, str]]:
    return {part: {"class": type(module).__name__} | fingerprint(module) for part, module in transformers.items()}


def _begin(job: Job, work: Path) -> None:
    try:
        work.mkdir(exist_ok=True)
        known = work / "job.json"
        if not known.is_file():
            write_record(known, job.identity())
    except OSError as error:
        raise ValueError(f"{str(work)!r} cannot be written: {error.strerror}.") from None
    there = json.loads(known.read_text(encoding="utf-8"))
    mine = job.identity()
    odd = next((name for name in mine if there.get(name) != mine[name]), None)
    if odd is not None:
        raise ValueError(
            f"{str(work)!r} holds an unfinished calibration with other {odd}: finish that one, or delete it."
        )


def _dense(job: Job, work: Path, number: int, heard: Heard) -> None:
    """One prompt, dense and recorded, with the tape that trials need; `heard` gets what probes need of the first."""
    file = work / f"dense-{number}.safetensors"
    if _whole(file):
        job.tick(f"prompt {number + 1}, recorded before", job.steps)
        return
    tape = Tape()
    found: list[Session] = []
    keep = frozenset(effects.probe_steps(job.steps)) if number == 0 else frozenset()

    def wrap(part: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        moment = found[0].generation.moment
        with ExitStack() as stack:
            if moment is not None and moment.step in keep:
                blocks = heard[part, moment.step, moment.branch] = effects.Blocks(job.transformers[part])
                stack.enter_context(blocks.listening())
            return tape.record(found[0].generation, keep)(part, original, *args, **kwargs)

    metric: dict[str, Tensor] = {}
    for part, module in job.transformers.items():
        metric |= effects.output_metric(module, part)
    with forwards(job.transformers, wrap), sparsify(job.pipe, "dense") as session:
        found.append(session)
        recorder = Recorder(job.plan, session.generation, job.steps, metric)
        session.generation.dense = recorder
        latents = _Latents(partial(job.tick, f"prompt {number + 1}, dense", 1))
        frames = job.run(job.prompts[number], job.seed + number, latents)
        # Some pipelines tell nobody when a step is done.
        job.tick(f"prompt {number + 1}, dense", max(0, job.steps - latents.steps))
        report, grid = session.report(), session.generation.grid
        if report.fallbacks:
            raise ValueError(f"This model cannot be calibrated: {'; '.join(report.fallbacks)}.")
        assert grid is not None and recorder.inputs is not None
        dense, recording = recorder.seconds
        told = {
            "layers": [[layer.name, layer.heads, layer.head_dim] for layer in session.generation.layers],
            "branches": list(recorder.found),
            "levels": levels_of(job.pipe.scheduler),
            "grid": [grid.frames, grid.height, grid.width],
            "seconds": {
                "transformers": sum(step.seconds for step in report.steps) - recording,
                "attention": dense,
                "recording": recording,
            },
            "kernel": f"{report.kernel}, dense {report.dense_backend}",
            "costs": None,
        }
        if number == 0:
            layer, q, k, v = recorder.inputs
            with torch.no_grad():
                told["costs"] = costs.measure(layer, (q, k, v), grid, job.plan.ladder, job.plan.base)
    stats = {f"{branch}/{name}": x.cpu() for branch, named in recorder.found.items() for name, x in named.items()} | {
        "frames": torch.from_numpy(np.ascontiguousarray(frames, dtype=np.float32)),
        "latents": latents.seen(),
    }
    _save(tape.tensors(), work / f"tape-{number}.safetensors")
    _save(stats, file, {"told": json.dumps(told)})


def _probes(job: Job, work: Path, heard: Heard) -> None:
    """Each layer of the first prompt, written down as it is finished."""
    file, known = _effects(work)
    tape = Tape.from_tensors(load_file(work / "tape-0.safetensors"))
    branches = _told(work, 0)["branches"]
    config = Choice("tail", job.plan.ladder[job.plan.middle]).config(job.plan.base)
    for part, module in job.transformers.items():
        layers = _layers(part, module)
        called = sorted(step for of, step, said in tape.calls if (of, said) == (part, branches[0]))
        # One of two transformers may not run at the usual steps, and has its first.
        for step in [step for step in called if step in effects.probe_steps(job.steps)] or called:
            said = {branch: heard.pop((part, step, branch), None) or effects.Blocks(module) for branch in branches}
            own = [name.removeprefix(f"{part}.") for name in layers]
            # The last first: what ran before it is then known, if it was not heard in the dense run.
            for index, name in reversed(list(enumerate(layers))):
                key = f"{name}@{step}"
                if key not in known["probes"]:
                    known["probes"][key] = effects.probe(part, module, tape, step, index, own, said, config)
                    write_record(file, known)
                job.tick("probes", 1)


def _trial(job: Job, work: Path, place: int) -> None:
    """What would be chosen by all that is known, on one prompt: how its error grows from step to step, and by how much
    predictions are off."""
    _, known = _effects(work)
    if place < len(known["trials"]):
        job.tick(f"trial {place + 1}", job.steps)
        return
    number, aim = job.trials()[place]
    fitted, told = try_out(_profile(job, work, unseen=number), aim)
    _keep(work, "trials", told | _tried(job, work, number, fitted, told, f"trial {place + 1}"))


def _band(job: Job, work: Path, place: int) -> None:
    """The same where all but a few steps are dense: what the errors of these alone come to in the end."""
    _, known = _effects(work)
    if place < len(known["bands"]):
        job.tick("bands", job.steps)
        return
    number, aim, band = job.bands()[place]
    fitted, told = try_out(_profile(job, work, unseen=number), aim, band)
    measured = _tried(job, work, number, fitted, told, "bands")
    part = place % (len(job.bands()) // len(job.prompts))
    _keep(work, "bands", {"prompt": number, "part": part, "direct": told["direct"], "error": measured["error"]})


def _tried(job: Job, work: Path, number: int, fitted: Profile, told: dict[str, Any], said: str) -> dict[str, Any]:
    """A prompt with a fitted profile that is dense before the step told as "start".

    "error" is the mean square of the frames' error, "seconds" what passed from that step on, "found" the error of the
    latents after each step."""
    start = told["start"]
    fitted.save(work / "trial.safetensors")
    dense = load_file(work / f"dense-{number}.safetensors")
    tape = Tape.from_tensors(load_file(work / f"tape-{number}.safetensors"))
    found: list[Session] = []

    def wrap(part: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return tape.play(found[0].generation, start)(part, original, *args, **kwargs)

    with forwards(job.transformers, wrap), sparsify(job.pipe, profile=str(work / "trial.safetensors")) as session:
        found.append(session)
        clock = session.generation.dense = costs.Clock()
        latents = _Latents(partial(job.tick, said, 1))
        frames = job.run(job.prompts[number], job.seed + number, latents)
        seconds = sum(step.seconds for step in session.report().steps if step.step >= start)
    if clock.per_head:
        # The machine may have been busier or freer than in the dense run.
        seconds *= fitted.header.costs["dense"] / clock.per_head
    job.tick(said, job.steps - latents.steps)
    error = 10 ** (-psnr(frames, dense["frames"].numpy()) / 10)
    off = latents.off(dense["latents"], len(told["direct"]))
    return {"prompt": number, "error": error, "seconds": seconds, "found": off}


def _keep(work: Path, kind: str, told: dict[str, Any]) -> None:
    file, known = _effects(work)
    known[kind].append(told)
    write_record(file, known)


def _effects(work: Path) -> tuple[Path, dict[str, Any]]:
    file = work / "effects.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return file, {"probes": {}, "trials": [], "bands": []} | known


class _Latents:
    """Some numbers of the latents after each step of a run; calls `tick` after each."""

    def __init__(self, tick: Callable[[], None]):
        self.tick, self.steps = tick, 0
        self._seen: list[Tensor] = []

    def __call__(self, latents: Tensor | None) -> None:
        if latents is not None:
            flat = latents.detach().flatten()
            self._seen.append(flat[:: max(1, flat.numel() // LATENTS)].float().cpu())
        self.steps += 1
        self.tick()

    def seen(self) -> Tensor:
        """[steps, numbers]; empty where the pipeline tells no latents."""
        return torch.stack(self._seen) if self._seen else torch.zeros(0, 0)

    def off(self, dense: Tensor, steps: int) -> list[float | None]:
        """Mean squared error after each of the run's steps; None where it is not known."""
        mine = self.seen()
        if mine.shape != dense.shape or len(mine) != steps:
            return [None] * steps
        return [float(x) for x in (mine - dense).square().mean(-1)]


def _profile(job: Job, work: Path, unseen: int | None = None) -> Profile:
    """What was measured on all prompts, or on all but one that is to be tried, where there are others."""
    told = [_told(work, number) for number in range(len(job.prompts))]
    first = told[0]
    branches, prompts = first["branches"], []
    for number in range(len(job.prompts)):
        named = load_file(work / f"dense-{number}.safetensors")
        prompts.append(
            {name: torch.stack([named[f"{branch}/{name}"] for branch in branches], 1) for name in job.plan.axes()}
        )
    seen = [found for number, found in enumerate(prompts) if number != unseen] or prompts
    mean = {name: torch.stack([found[name] for found in seen]).nanmean(0) for name in job.plan.axes()}
    layers = tuple((name, heads, dim) for name, heads, dim in first["layers"])
    seconds = {name: sum(t["seconds"][name] for t in told) / len(told) for name in first["seconds"]}
    _, known = _effects(work)
    header = Header(
        weights=weights_of(job.transformers),
        layers=layers,
        branches=tuple(branches),
        ran=_ran(layers, prompts[0]["energy"]),
        levels=tuple(first["levels"]),
        grid=tuple(first["grid"]),
        scheduler=_scheduler(job.pipe.scheduler),
        config=job.plan.base.to_dict(),
        rungs=tuple((rung.density, rung.top_p) for rung in job.plan.ladder),
        distances=job.plan.distances,
        bins=job.plan.bins,
        rows=job.plan.rows,
        kernel=first["kernel"],
        prompts=job.prompts,
        seconds=seconds,
        costs=_in_run(first["costs"], seconds, layers, len(branches) * len(first["levels"])),
        effects=_felt(known, layers, prompts[0], job.plan) | {"scale": _scale(work)},
        **job.facts,
    )
    return Profile(header, _relative(mean))


def _felt(
    known: Mapping[str, Any], layers: Sequence[tuple[str, int, int]], stats: Mapping[str, Tensor], plan: Plan
) -> dict[str, Any]:
    """gain: layer -> step -> for each branch, how much a unit of its squared error changes the transformer's output;
    agree: likewise, how much of what its error has in common with that of the first branch is still in common there,
    from 0 to 1; trials and bands: see dit_sparse.calibration.fit.try_out, and what was measured."""
    tail, start = METHODS.index("tail"), 0
    gains: dict[str, dict[str, list[float]]] = {}
    agree: dict[str, dict[str, list[float]]] = {}
    for name, heads, _ in layers:
        gains[name], agree[name] = {}, {}
        for key, change in known["probes"].items():
            layer, step = key.rsplit("@", 1)
            if layer != name:
                continue
            here = (slice(start, start + heads), slice(None), int(step))
            squares = stats["error"][here][:, :, tail, plan.middle].double().nan_to_num().clamp(min=1e-30)
            cosines = stats["together"][here][:, :, ERRORS.index("tail"), plan.middle].double().nan_to_num()
            whole = squares.sum(0)
            alike = (cosines * (squares * squares[:, :1]).sqrt()).sum(0) / (whole * whole[0]).sqrt()
            gains[name][step] = [c / e for c, e in zip(change["squares"], whole.tolist(), strict=True)]
            agree[name][step] = [
                min(max(along / math.sqrt(max(own * change["squares"][0], 1e-60)) / max(said, 1e-6), 0.0), 1.0)
                for along, own, said in zip(change["along"], change["squares"], alike.tolist(), strict=True)
            ]
        start += heads
    return {"gain": gains, "agree": agree, "trials": known["trials"], "bands": known["bands"]}


def _scale(work: Path) -> float:
    """Variance of the first prompt's frames over that of its latents: how much of an error the decoder leaves, until
    there is a trial."""
    dense = load_file(work / "dense-0.safetensors")
    latents = dense["latents"][-1].var() if dense["latents"].numel() else torch.tensor(1.0)
    return float(dense["frames"].var() / latents.clamp(min=1e-12))


def _in_run(
    timed: Mapping[str, Any], seconds: Mapping[str, float], layers: Sequence[tuple[str, int, int]], forwards: int
) -> dict[str, Any]:
    """Costs as they are in a run, where attention finds its inputs in no cache: all times what dense attention took
    there over what it took alone. "other" is all of the transformers but self-attention."""
    heads = sum(heads for _, heads, _ in layers)
    calls = heads * forwards / max(1, len({name.partition(".")[0] for name, _, _ in layers}))
    factor = seconds["attention"] / calls / timed["dense"]
    scaled = {
        name: value * factor if isinstance(value, float) else [x * factor for x in value]
        for name, value in timed.items()
    }
    return scaled | {"other": seconds["transformers"] - seconds["attention"]}


def _relative(mean: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Statistics as they are stored: errors relative to the output's length, in float16."""
    energy = mean["energy"].clamp(min=1e-30)
    out = dict(mean)
    for name in ("error", "stale"):
        ratio = energy.reshape(*energy.shape, *[1] * (mean[name].dim() - 3))
        out[name] = (mean[name] / ratio).sqrt()
    return {name: (x.float() if name == "energy" else x.clamp(max=6e4).half()).contiguous() for name, x in out.items()}


def _ran(layers: Sequence[tuple[str, int, int]], energy: Tensor) -> dict[str, tuple[int, ...]]:
    ran: dict[str, tuple[int, ...]] = {}
    start = 0
    for name, heads, _ in layers:
        steps = (~energy[start, 0].isnan()).nonzero().flatten().tolist()
        ran.setdefault(name.partition(".")[0], tuple(steps))
        start += heads
    return ran


def _scheduler(scheduler: Any) -> dict[str, Any]:
    config = {k: v for k, v in scheduler.config.items() if isinstance(v, str | int | float | bool) and k[0] != "_"}
    return {"class": type(scheduler).__name__} | {k: v for k, v in config.items() if math.isfinite(_number(v))}


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _layers(part: str, transformer: nn.Module) -> list[str]:
    family = FAMILIES[type(transformer).__name__]
    return [
        f"{part}.{name}"
        for name, module in transformer.named_modules()
        if hasattr(module, "processor") and family.is_self_attention(name)
    ]


def _whole(file: Path) -> bool:
    """Whether a part was finished; writing is all or nothing, so this only fails where a disk does."""
    if not file.is_file():
        return False
    try:
        with safe_open(file, framework="pt") as opened:
            return bool(opened.metadata())
    except SafetensorError:
        return False


def _told(work: Path, number: int) -> dict[str, Any]:
    with safe_open(work / f"dense-{number}.safetensors", framework="pt") as opened:
        return json.loads(opened.metadata()["told"])


def _save(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    try:
        with whole(file) as part:
            save_file(dict(tensors), part, metadata=dict(metadata or {"part": "of a calibration"}))
    except (OSError, SafetensorError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        raise ValueError(f"{str(file)!r} cannot be written, and was not: {said}.") from None


def finish(work: Path) -> None:
    """Remove what was kept for resuming."""
    shutil.rmtree(work, ignore_errors=True)
