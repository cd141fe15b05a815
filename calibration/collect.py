"""A calibration from start to end: dense runs that record, probes, trials, bands, and the profile made of them.

Every part is on disk when it is finished, in a directory beside the output file, and is not done again.
"""

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dit_sparse.calibration import costs, effects, trials
from dit_sparse.calibration.job import Job, Latents, weights_of
from dit_sparse.calibration.probe import put_in_place
from dit_sparse.calibration.record import Plan, Recorder
from dit_sparse.calibration.replay import Tape, forwards
from dit_sparse.calibration.steady import sampled, steady, waits
from dit_sparse.calibration.values import sample_of
from dit_sparse.choices import Choice
from dit_sparse.pipelines.session import FAMILIES, Session, levels_of, sparsify
from dit_sparse.profile import ERRORS, METHODS, Header, Profile
from dit_sparse.video import whole, write_record

# Scales on which layers are between others, and the way back: gains differ by orders of magnitude.
_LOGARITHMS = (lambda gains: np.log(gains.clip(min=1e-30)), np.exp)
_PLAIN = (np.asarray, np.asarray)

# (component, step, branch) -> what its blocks said in the dense run.
Heard = dict[tuple[str, int, str], effects.Blocks]


def collect(job: Job, work: Path) -> Profile:
    """The profile, without choices. `work` is where finished parts are kept; the caller removes it."""
    _begin(job, work)
    heard: Heard = {}
    _dense(job, work, 0, heard)
    # Of the first prompt, whose blocks' outputs take memory until then.
    _probes(job, work, heard)
    for number in range(1, len(job.prompts)):
        _dense(job, work, number, heard)
    for place in range(len(job.prompts)):
        _trial(job, work, place)
    for place in range(len(trials.bands(len(job.prompts), job.steps))):
        _band(job, work, place)
    for place in range(len(job.prompts), len(trials.trials(len(job.prompts)))):
        _trial(job, work, place)
    return _profile(job, work)


def ticks(job: Job) -> int:
    """Of the whole calibration: a tick is a step of a run, or a probe."""
    layers = [_layers(part, module) for part, module in job.transformers.items()]
    probed = sum(len(effects.probed_layers(names, job.steps)) for names in layers)
    prompts = len(job.prompts)
    runs = prompts + len(trials.trials(prompts)) + len(trials.bands(prompts, job.steps))
    return runs * job.steps + probed * len(effects.probe_steps(job.steps))


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
        latents = Latents(partial(job.tick, f"prompt {number + 1}, dense", 1))
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
                "transformers": steady([step.seconds - recording.get(step.step, 0.0) for step in report.steps]),
                "attention": steady(list(dense.values())),
                "recording": sum(recording.values()),
            },
            "kernel": None,
            "costs": None,
        }
        if number == 0:
            layer, q, k, v = recorder.inputs
            with torch.no_grad():
                told["costs"] = costs.measure(layer, (q, k, v), grid, job.plan.ladder, job.plan.base)
            told["kernel"] = f"{told['costs'].pop('kernel')}, dense {report.dense_backend}"
    if waits(job.pipe._execution_device):
        told["seconds"] |= _unrecorded(job, number, tape)
    stats = {f"{branch}/{name}": x.cpu() for branch, named in recorder.found.items() for name, x in named.items()} | {
        "frames": torch.from_numpy(np.ascontiguousarray(frames, dtype=np.float32)),
        "latents": latents.seen(),
    }
    _save(tape.tensors(), work / f"tape-{number}.safetensors")
    _save(stats, file, {"told": json.dumps(told)})


def _unrecorded(job: Job, number: int, tape: Tape) -> dict[str, float]:
    """Seconds of a prompt's dense run that nothing else is done in: of some steps the one whose forwards take least,
    since transformers' weights may have to come before the first of each, times all forwards."""
    rows: Counter[int] = Counter()
    for (_, step, _), said in tape.outputs.items():
        rows[step] += len(sample_of(said))
    computed = sampled(sorted(rows))
    found: list[Session] = []

    def wrap(part: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return tape.play(found[0].generation, computed.__contains__)(part, original, *args, **kwargs)

    with forwards(job.transformers, wrap), sparsify(job.pipe, "dense") as session:
        found.append(session)
        probe = put_in_place(job.transformers, session.generation)
        job.run(job.prompts[number], job.seed + number, lambda _: None)
        steps = {step.step: step.seconds for step in session.report().steps}
        attention = probe.by_step()
    best = min(computed, key=lambda step: steps[step] / rows[step])
    return {
        "transformers": steps[best] / rows[best] * rows.total(),
        "attention": attention[best] / rows[best] * rows.total(),
    }


def _probes(job: Job, work: Path, heard: Heard) -> None:
    """Layers of the first prompt, each written down as it is finished."""
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
            for index in reversed(effects.probed_layers(layers, job.steps)):
                key = f"{layers[index]}@{step}"
                if key not in known["probes"]:
                    known["probes"][key] = effects.probe(part, module, tape, step, index, own, said, config)
                    write_record(file, known)
                job.tick("probes", 1)


def _trial(job: Job, work: Path, place: int) -> None:
    _, known = _effects(work)
    if place < len(known["trials"]):
        job.tick(f"trial {place + 1}", job.steps)
        return
    number, _ = trials.trials(len(job.prompts))[place]
    _keep(work, "trials", trials.trial(job, work, place, _profile(job, work, unseen=number)))


def _band(job: Job, work: Path, place: int) -> None:
    _, known = _effects(work)
    if place < len(known["bands"]):
        job.tick("bands", job.steps)
        return
    number, *_ = trials.bands(len(job.prompts), job.steps)[place]
    _keep(work, "bands", trials.band(job, work, place, _profile(job, work, unseen=number)))


def _keep(work: Path, kind: str, told: dict[str, Any]) -> None:
    file, known = _effects(work)
    known[kind].append(told)
    write_record(file, known)


def _effects(work: Path) -> tuple[Path, dict[str, Any]]:
    file = work / "effects.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return file, {"probes": {}, "trials": [], "bands": []} | known


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
    from 0 to 1; of layers that were not probed both lie between those of others. trials and bands: see
    dit_sparse.calibration.fit.try_out, and what was measured."""
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
    for kind in {effects.kind_of(name) for name in gains}:
        for told, scale in ((gains, _LOGARITHMS), (agree, _PLAIN)):
            _fill([steps for name, steps in told.items() if effects.kind_of(name) == kind], *scale)
    return {"gain": gains, "agree": agree, "trials": known["trials"], "bands": known["bands"]}


def _fill(
    layers: Sequence[dict[str, list[float]]], to: Callable[[np.ndarray], np.ndarray], back: Callable[[Any], Any]
) -> None:
    """Step -> a number for each branch, of layers of one kind in order: those that were not probed at a step get what
    is between those before and behind, on the scale that `to` leads to."""
    for step in {step for steps in layers for step in steps}:
        known = [index for index, steps in enumerate(layers) if step in steps]
        rows = to(np.array([layers[index][step] for index in known]))
        for index, steps in enumerate(layers):
            if step not in steps:
                steps[step] = [float(back(np.interp(index, known, row))) for row in rows.T]


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
