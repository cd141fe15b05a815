"""The commands that measure a model and choose for it: `calibrate` and `fit`."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dit_sparse import generate, models, prompts
from dit_sparse.choices import Rung
from dit_sparse.config import SparseConfig
from dit_sparse.profile import Profile
from dit_sparse.video import check_place

if TYPE_CHECKING:
    from dit_sparse.calibration.fit import Verified

DISTANCES = (1, 2, 4, 8)
BINS = 8
# What the memory of sampled rows may take while recording; rows are halved until it fits.
MEMORY_BYTES = 4 << 30
Fitted = Literal["none", "rectify", "tail", "calibrated", "anchor", "reshape"]
ALL: tuple[Fitted, ...] = ("none", "rectify", "tail", "calibrated", "anchor", "reshape")


@dataclass(frozen=True)
class CalibrateOptions:
    """Measure a model in a dense run, and write what was found to a profile, for `dit-sparse fit` to choose from.

    For each layer, head, branch of guidance and step: the share of softmax mass in the blocks kept, how much of the
    best it is, and the error of every method at every density, on a sample of rows. Then one forward of each branch
    for each layer at two steps, or for as many layers as there are steps, to learn what such an error does to the
    outputs, and two runs of fitted choices for each prompt, or one of a single prompt, and with several prompts two
    more of each for a fifth of the steps, with all others dense, to learn how errors grow until the end and to correct
    what is predicted. On a GPU four steps of each dense run are computed once more to be timed, and where the run
    takes less than 20 s, all of each fitted run, but nothing of those of a fifth. It can be interrupted: the same
    command goes on where it stopped.
    """

    model_id: str | None = None
    """Directory saved by diffusers, or a Hugging Face id; if not given, the demo model that comes with dit-sparse."""
    prompts_file: Path | None = None
    """UTF-8 text, one prompt a line, from one to eight."""
    negative_prompt: str | None = None
    """What to stay away from; only used where guidance_scale is above 1."""
    height: int | None = None
    """Pixels; if not given, as the model's pipeline has it."""
    width: int | None = None
    """Pixels; if not given, as the model's pipeline has it."""
    num_frames: int | None = None
    """Frames; if not given, as the model's pipeline has it."""
    num_inference_steps: int | None = None
    """Denoising steps. A profile of fewer steps than are run later is stretched by noise level."""
    guidance_scale: float | None = None
    """How strongly to follow the prompt; above 1 the model runs twice a step."""
    seed: int = 0
    """Of the first prompt's noise; the next has the next."""
    density: tuple[float, ...] = (0.03, 0.06, 0.1, 0.2, 0.4)
    """Shares of key blocks to try. Anchors may be dense, or of the highest."""
    top_p: float | None = None
    """Also try the lowest density with this share of the estimated score kept at least."""
    rows: int = 128
    """Query rows looked at per head; fewer where their memory would not fit in 4 GiB."""
    block: int | Literal["auto"] = "auto"
    """Tokens per block, as in generate."""
    order: Literal["hilbert", "tile", "raster", "pixel"] = "hilbert"
    """Token order, as in generate."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of the model; auto is bfloat16 on a GPU and float32 on a CPU."""
    device: str = "auto"
    """cpu, cuda, cuda:1 and so on; auto is cuda where there is one."""
    offload: Literal["none", "model", "group"] = "none"
    """Keep weights in main memory, as in generate. Where a GPU waits longer for them than in a dense run, that is no
    part of predicted seconds until prompts are verified."""
    output_file: Path | None = None
    """Ends in .safetensors; what an interrupted run has done lies beside it, in a directory named .parts."""
    config: Path | None = None
    """YAML file of option: value lines, with the same names."""


@dataclass(frozen=True)
class FitOptions:
    """Choose for each head, branch and step of a profile what is computed, so that targets are met.

    A choice is dense, or a method with a density and, for methods that remember, where the anchors fall and how the
    residual is stored. Errors count by what they were measured to do to the video. Prints what is predicted.
    """

    profile: Path | None = None
    """Written by dit-sparse calibrate, or by an earlier fit."""
    output_file: Path | None = None
    """Ends in .safetensors; may be the same file."""
    target_psnr: float | None = None
    """At least this many dB against the dense video: the fastest such choice."""
    target_speedup: float | None = None
    """At least this speed-up of the transformers: the most faithful such choice."""
    target_work: float | None = None
    """At most this share of the work of dense attention, as the kernels of the machine calibrated on have it: the most
    faithful such choice."""
    by: Literal["seconds", "work"] = "seconds"
    """What target_psnr keeps low: seconds on the machine that was calibrated on, or attention work."""
    max_state_gib: float | None = None
    """Remember at most so much; without another target, at the speed of the default uniform setting."""
    methods: tuple[Fitted, ...] = ALL
    """Which methods may be chosen; calibrated is Re-ttention with the profile's rho instead of refresh steps."""
    verify: Path | None = None
    """Prompts file; make these, dense and with the profile, and print what is measured beside what is predicted. A
    later fit of output_file predicts by these prompts, too; of their seconds only if the device and the number format
    are those that were calibrated with."""
    num_inference_steps: int | None = None
    """Steps to verify with; those of the profile if not given."""
    model_id: str | None = None
    """The model to verify on, if it is a directory."""
    seed: int = 1000
    """Of the first prompt's noise when verifying."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of the model when verifying."""
    device: str = "auto"
    """Where to verify."""


def calibrate(options: CalibrateOptions) -> int:
    """Exit code. Raises ValueError for input that cannot work, before any model work where that can be known."""
    output = _output(options.output_file)
    if options.prompts_file is None:
        raise ValueError(f"Give --prompts_file, a text file of one to {prompts.MOST} prompts, one a line.")
    told = prompts.read(options.prompts_file)
    ladder = _ladder(options)
    asked = generate.GenerateOptions(
        model_id=options.model_id,
        prompt=told[0],
        negative_prompt=options.negative_prompt,
        height=options.height,
        width=options.width,
        num_frames=options.num_frames,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        seed=options.seed,
        dtype=options.dtype,
        device=options.device,
        offload=options.offload,
        sparse=SparseConfig("tail", block=options.block, order=options.order, dense_steps=0),
    )
    files = models.find(options.model_id)
    device, dtype = generate.placement(asked)
    request = generate.request_of(asked, files)

    from dit_sparse.calibration.collect import collect, finish, ticks
    from dit_sparse.calibration.job import Job
    from dit_sparse.calibration.record import Plan
    from dit_sparse.pipelines.session import FAMILIES

    models.check_known(files, FAMILIES)
    generate.check(asked, request, files)
    base = replace(asked.sparse, dense_steps=SparseConfig.dense_steps)
    plan = Plan(ladder, DISTANCES, BINS, _rows(options, files, request, len(ladder)), base)
    pipe = generate.load(asked, files, device, dtype)
    facts = {
        "model_id": name_of(options.model_id, files),
        "size": (request.height, request.width, request.num_frames),
        "guidance_scale": request.guidance_scale,
        "created": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "device": generate.device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": generate.versions(),
    }
    bar, tick = _bar()
    job = Job(
        pipe, _runner(pipe, request, files, options.negative_prompt), told, options.seed,
        request.num_inference_steps, plan, facts, tick,
    )  # fmt: skip
    work = output.with_name(f"{output.name}.parts")
    bar.update(bar.task_ids[0], total=ticks(job))
    with bar:
        profile = collect(job, work)
    profile.save(output)
    finish(work)
    seconds = profile.header.seconds
    print(
        f"{output}: {output.stat().st_size / 2**20:.2f} MiB, {len(told)} prompts, "
        f"{seconds['transformers']:.1f} s of dense transformers a prompt, {seconds['recording']:.1f} s of recording; "
        f"next: dit-sparse fit --profile {output}"
    )
    return 0


def fit(options: FitOptions) -> int:
    """Exit code. Raises ValueError for targets out of reach, with what is in reach."""
    from dit_sparse.calibration.fit import Targets, learned
    from dit_sparse.calibration.fit import fit as fitted

    if options.profile is None:
        raise ValueError("Give --profile, a file written by dit-sparse calibrate.")
    output = _output(options.output_file)
    targets = Targets(
        options.target_psnr, options.target_speedup, options.target_work, options.max_state_gib, options.by
    )
    unseen = None if options.verify is None else prompts.read(options.verify, most=None)
    profile = Profile.load(options.profile)
    seen = set(unseen or ()) & set(profile.header.seen)
    if seen:
        raise ValueError(f"verify is for prompts that were not calibrated or verified on, and {min(seen)!r} was.")
    found = fitted(profile, targets, options.methods)
    found.save(output)
    print(f"{output}: {sentence(found)}")
    if unseen is not None:
        measured, made = verify(output, found, options, unseen)
        known = found if made is None else learned(found, made)
        replace(known, header=replace(known.header, measured=measured)).save(output)
        for name, value in measured.items():
            before = found.header.predicted.get(name)
            print(f"{name:10} predicted {'-' if before is None else f'{before:.2f}':>8}  measured {value:8.2f}")
        if made is None:
            print("Of steps other than those calibrated, so later fits do not predict by these prompts.")
    return 0


def verify(
    path: Path, profile: Profile, options: FitOptions, unseen: tuple[str, ...]
) -> tuple[dict[str, float], list["Verified"] | None]:
    """The prompts dense and with the profile: mean PSNR in dB, speed-up of the transformers, attention work; and what
    a later fit can learn of them, which is nothing with other steps than were calibrated."""
    from dit_sparse.calibration.fit import Verified
    from dit_sparse.calibration.metrics import psnr
    from dit_sparse.calibration.steady import steady
    from dit_sparse.pipelines.session import sparsify

    header = profile.header
    height, width, num_frames = header.size
    model_id = options.model_id or (None if header.model_id == "demo" else header.model_id)
    asked = generate.GenerateOptions(
        model_id=model_id, prompt=unseen[0], height=height, width=width, num_frames=num_frames,
        num_inference_steps=options.num_inference_steps or len(header.levels),
        guidance_scale=header.guidance_scale, dtype=options.dtype, device=options.device,
    )  # fmt: skip
    files = models.find(model_id)
    device, dtype = generate.placement(asked)
    request = generate.request_of(asked, files)
    alike = (generate.device_name(device), str(dtype).removeprefix("torch.")) == (header.device, header.dtype)
    pipe = generate.load(asked, files, device, dtype)
    run = _runner(pipe, request, files, None)
    bar, tick = _bar()
    # A GPU compiles kernels at first use, which no later run waits for.
    warm = ("dense", "sparse") if device.type == "cuda" else ()
    bar.update(bar.task_ids[0], total=(2 * len(unseen) + len(warm)) * request.num_inference_steps)
    configs = {"dense": SparseConfig("dense"), "sparse": SparseConfig(profile=str(path))}
    quality, seconds, work, found = [], {"dense": 0.0, "sparse": 0.0}, [], []
    with bar:
        for name in warm:
            with sparsify(pipe, configs[name]):
                run(unseen[0], options.seed, partial(_told, tick, "kernels"))
        for number, prompt in enumerate(unseen):
            made, took = {}, {}
            for name, config in configs.items():
                with sparsify(pipe, config) as session:
                    done = partial(_told, tick, f"prompt {number + 1}, {name}")
                    made[name] = run(prompt, options.seed + number, done)
                    report = session.report()
                    took[name] = [step.seconds for step in report.steps]
                    seconds[name] += sum(took[name])
            decibels = psnr(made["sparse"], made["dense"])
            quality.append(min(decibels, 200.0))
            work.append(report.work)
            found.append(Verified(prompt, 10 ** (-decibels / 10), took["sparse"], steady(took["dense"]), alike))
    measured = {
        "psnr_db": sum(quality) / len(quality),
        "speedup": seconds["dense"] / seconds["sparse"],
        "work": sum(work) / len(work),
        "seconds": seconds["sparse"] / len(unseen),
    }
    return measured, found if request.num_inference_steps == len(header.levels) else None


def sentence(profile: Profile) -> str:
    said = profile.header.predicted
    spread = said.get("psnr_spread_db")
    # What is predicted is a mean over the prompts that were calibrated and verified on, and no better known than that.
    differs = ""
    if spread is not None:
        doubt = spread / math.sqrt(max(1, len(profile.header.seen)))
        differs = (
            f", give or take {doubt:.1f}, for the mean of many prompts (one differs from it by about {spread:.1f})"
        )
    return (
        f"predicted {said['psnr_db']:.1f} dB{differs}, transformers {said['speedup']:.2f} times as fast "
        f"({said['seconds']:.1f} s), attention work {said['work']:.3f} of dense, "
        f"{said['state_gib']:.3g} GiB remembered at the peak"
    )


def name_of(model_id: str | None, files: models.ModelFiles) -> str:
    """What a profile calls the model: no path of the machine it was made on."""
    if model_id is None:
        return "demo"
    return Path(files.source).resolve().name if files.is_local else files.source


def _output(path: Path | None) -> Path:
    if path is None or path.suffix != ".safetensors":
        raise ValueError(f"output_file ends in .safetensors, for example model.profile.safetensors, not {path}.")
    check_place(path)
    return path


def _ladder(options: CalibrateOptions) -> tuple[Rung, ...]:
    ladder = [Rung(density) for density in sorted(set(options.density))]
    if not ladder:
        raise ValueError("density takes one share or more.")
    for rung in ladder:
        SparseConfig("tail", density=rung.density, top_p=options.top_p)
    if options.top_p is not None:
        ladder.insert(1, Rung(ladder[0].density, options.top_p))
    return tuple(ladder)


def _rows(options: CalibrateOptions, files: models.ModelFiles, request: generate.Request, rungs: int) -> int:
    """As many rows as asked for, unless what anchors would remember of them does not fit."""
    from dit_sparse.pipelines.session import FAMILIES

    if options.rows < 1:
        raise ValueError(f"rows is at least 1, not {options.rows}.")
    sides = request.height, request.width, request.num_frames
    shapes = [FAMILIES[name].shape(config, *sides, files.vae) for name, config in files.transformers.values()]
    width = sum(shape.layers * shape.heads * shape.head_dim for shape in shapes)
    branches = 2 if request.guidance_scale > 1 else 1
    per_row = width * branches * DISTANCES[-1] * rungs * 2 * 2
    rows = options.rows
    while rows > 16 and rows * per_row > MEMORY_BYTES:
        rows //= 2
    return rows


def _runner(
    pipe: Any, request: generate.Request, files: models.ModelFiles, negative_prompt: str | None
) -> Callable[[str, int, Callable[[Any], None]], np.ndarray]:
    def run(prompt: str, seed: int, done: Callable[[Any], None]) -> np.ndarray:
        def step_done(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            done(tensors.get("latents"))
            return {}

        return generate.frames_of(pipe, replace(request, prompt=prompt), files, negative_prompt, seed, step_done)

    return run


def _told(tick: Callable[[str, int], None], what: str, _latents: Any) -> None:
    tick(what, 1)


def _bar() -> tuple[Any, Callable[[str, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.percentage:3.0f}%"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
    )
    task = bar.add_task("", total=None)

    def tick(what: str, steps: int) -> None:
        bar.update(task, advance=steps, description=what)

    return bar, tick
