"""The command that makes a video: every input is checked before a weight is read."""

import importlib.metadata
import inspect
import math
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from dit_sparse import models, predict, video
from dit_sparse.config import SparseConfig
from dit_sparse.profile import Profile


@dataclass(frozen=True)
class Request:
    """What is asked of a pipeline; every field is an option, and has a default only with the model."""

    prompt: str
    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float


# What the demo model was trained for; other models have their pipeline's own defaults.
DEMO = Request(
    prompt="a large plain magenta cross moves left over a olive cloudy background while the camera stays still",
    height=128,
    width=144,
    num_frames=15,
    num_inference_steps=20,
    guidance_scale=4.0,
)


@dataclass(frozen=True)
class GenerateOptions:
    """Generate a video or an image from a prompt with sparse attention, and write beside it a JSON file of how.

    Words used below: a token is one patch of the latent video, and attention cuts the tokens into blocks. A dense step
    computes all pairs of blocks, as the model was trained; a sparse step computes the share of them that is called the
    density. An anchor is dense and remembers what the sparse result would have lacked, which the sparse steps after it
    add. Attention work is relative to computing every step dense. A fallback is a call that had to be dense.
    An error is one sentence; with --debug its traceback is shown.
    """

    model_id: str | None = None
    """Directory saved by diffusers, or a Hugging Face id; if not given, the demo model that comes with dit-sparse.
    Only safetensors are loaded, and never code."""
    prompt: str | None = None
    """What to show. The demo model has one of its own."""
    negative_prompt: str | None = None
    """What to stay away from; only used where guidance_scale is above 1."""
    height: int | None = None
    """Pixels; if not given, as the model's pipeline has it."""
    width: int | None = None
    """Pixels; if not given, as the model's pipeline has it."""
    num_frames: int | None = None
    """Frames; if not given, as the model's pipeline has it, and 1 where that makes images."""
    num_inference_steps: int | None = None
    """Denoising steps; if not given, as the model's pipeline has it."""
    guidance_scale: float | None = None
    """How strongly to follow the prompt; above 1 the model runs twice a step (the two branches of guidance)."""
    seed: int = 0
    """Of the noise that the video starts from; the same on every device."""
    sparse: tyro.conf.OmitArgPrefixes[SparseConfig] = SparseConfig()
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of the model; auto is bfloat16 on a GPU and float32 on a CPU. The autoencoder runs in float32."""
    device: str = "auto"
    """cpu, cuda, cuda:1 and so on; auto is cuda where there is one."""
    output_file: Path | None = None
    """Ends in .mp4, .gif or .png (one file a frame), for an image in .png. If not given, a name in this directory that
    tells the settings. The JSON file has the same name with .json."""
    fps: int = 16
    """Frames per second of the mp4 or gif."""
    config: Path | None = None
    """YAML file of option: value lines, with the same names; what the command line says beats it."""
    compile: bool = False
    """Compile the transformer's blocks with torch.compile; the first steps are slow, the others faster."""
    offload: Literal["none", "model", "sequential", "group"] = "none"
    """Keep weights in main memory and move them to the GPU when needed: whole models, single layers (slowest, least
    memory), or groups of layers."""


def run(options: GenerateOptions) -> int:
    """Exit code. Raises ValueError for input that cannot work, before any model work where that can be known."""
    files = models.find(options.model_id)
    device, dtype = placement(options)
    request = request_of(options, files)

    from dit_sparse.pipelines.session import FAMILIES, sparsify

    models.check_known(files, FAMILIES)
    check(options, request, files)
    images = all(FAMILIES[kind].size(config, files.vae).frames is None for kind, config in files.transformers.values())
    output = options.output_file or Path(_name(options, request, files, ".png" if images else ".mp4"))
    if images and output.suffix.lower() != ".png":
        raise ValueError(f"output_file of an image ends in .png, not {output.suffix!r}.")
    video.check_writable(output)

    start = time.perf_counter()
    pipe = load(options, files, device, dtype)
    loaded = time.perf_counter()
    with sparsify(pipe, options.sparse) as session:
        frames = _denoise(pipe, options, request, files, device)
        report = session.report()
    made = time.perf_counter()
    written = video.write_video(output, frames, options.fps)
    seconds = {
        "load": loaded - start,
        "generate": made - loaded,
        "steps": sum(step.seconds for step in report.steps),
        "write": time.perf_counter() - made,
    }
    record = {
        "settings": _settings(options, request, files, device, dtype),
        "versions": versions(),
        "device": device_name(device),
        "seconds": seconds,
        "seconds_by_phase": _by_phase((step.phase, step.seconds) for step in report.steps),
        "peak_memory_bytes": _peak_memory(device),
        "attention": report.to_dict(),
        "files": [str(file) for file in written],
    }
    video.write_record(output.with_suffix(".json"), record)
    low = ""
    if report.precision_error is not None and report.precision_error_worst is not None:
        low = f", 8 bits err by {report.precision_error:.1%} ({report.precision_error_worst:.1%} in the worst layer)"
    print(
        f"{written[0]}{f' and {len(written) - 1} more' if len(written) > 1 else ''}: "
        f"{seconds['generate']:.1f} s, density {report.density:.3f}, attention work {report.work:.3f} of dense"
        + low
        + "".join(f"; {count} calls fell back because {reason}" for reason, count in report.fallbacks.items())
    )
    return 0


def placement(options: GenerateOptions) -> tuple[torch.device, torch.dtype]:
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"Unknown device {name!r}: choose from auto, cpu, cuda, cuda:0 and so on.") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is cpu or cuda, not {name!r}.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"There is no device {name!r} here: torch sees {torch.cuda.device_count()} CUDA devices.")
    if device.type == "cpu" and options.offload != "none":
        raise ValueError(f"offload {options.offload!r} moves weights to a GPU; on the CPU it can only be 'none'.")
    if options.dtype == "auto":
        return device, torch.float32 if device.type == "cpu" else torch.bfloat16
    return device, getattr(torch, options.dtype)


def request_of(options: GenerateOptions, files: models.ModelFiles) -> Request:
    """The options, with what the user left to the model filled in."""
    if options.model_id is None:
        defaults = asdict(DEMO)
    else:
        import diffusers

        pipeline = getattr(diffusers, files.index["_class_name"], None)
        if pipeline is None:
            raise ValueError(
                f"{files.source} is a {files.index['_class_name']}, which diffusers {diffusers.__version__} has not."
            )
        parameters = inspect.signature(pipeline.__call__).parameters
        images = makes_images(pipeline)
        for name in ("image", "video"):
            # Some that make images from text take others to go by, too; those with a strength begin from one.
            free = images and "strength" not in parameters
            if name in parameters and not (free and parameters[name].default is None):
                raise ValueError(
                    f"{files.source} is a {pipeline.__name__}, which starts from an existing {name}; generate only "
                    "makes videos and images from text, so use it from Python."
                )
        if "guidance_scale" not in parameters:
            raise ValueError(f"{files.source} is a {pipeline.__name__}, which has a guider of its own: use Python.")
        defaults = {name: parameter.default for name, parameter in parameters.items()}
        if images:
            defaults["num_frames"] = 1
        if defaults["guidance_scale"] is None and "true_cfg_scale" in defaults:
            defaults["guidance_scale"] = defaults["true_cfg_scale"]
        _check_negative_prompt(options.negative_prompt, pipeline)
    values: dict[str, Any] = {}
    for field in fields(Request):
        given = getattr(options, field.name)
        values[field.name] = defaults.get(field.name) if given is None else given
        if values[field.name] is None:
            raise ValueError(
                f"{field.name} is missing: give --{field.name}, since {files.source} has no default for it."
            )
    return Request(**values)


def makes_images(pipeline: type) -> bool:
    """Whether a pipeline class of diffusers makes single pictures."""
    parameters = inspect.signature(pipeline.__call__).parameters  # type: ignore[operator]
    return "num_frames" not in parameters and "video" not in parameters


def _check_negative_prompt(given: str | None, pipeline: type) -> None:
    parameters = inspect.signature(pipeline.__call__).parameters  # type: ignore[operator]
    if given is None:
        return
    if "negative_prompt" not in parameters:
        raise ValueError(f"{pipeline.__name__} has no use for a negative prompt: leave out --negative_prompt.")
    if "true_cfg_scale" in parameters and parameters["guidance_scale"].default is not None:
        raise ValueError(
            f"{pipeline.__name__} goes by its guidance_scale in one forward, and uses a negative prompt only with "
            "true_cfg_scale, from Python: leave out --negative_prompt."
        )


def check(options: GenerateOptions, request: Request, files: models.ModelFiles) -> None:
    if request.num_inference_steps < 1:
        raise ValueError(f"num_inference_steps is at least 1, not {request.num_inference_steps}.")
    if not math.isfinite(request.guidance_scale) or request.guidance_scale < 0:
        raise ValueError(f"guidance_scale is a number from 0 on, not {request.guidance_scale}.")
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"seed is a whole number from 0 to 2**63 - 1, not {options.seed}.")
    if not 1 <= options.fps <= 240:
        raise ValueError(f"fps is from 1 to 240, not {options.fps}.")
    if options.sparse.profile is not None:
        # Whether it was made for these weights is known once they are read.
        Profile.load(options.sparse.profile)
    predict.phases(options.sparse, request.num_inference_steps)
    from dit_sparse.pipelines.session import FAMILIES

    sides = request.height, request.width, request.num_frames
    for class_name, config in files.transformers.values():
        family = FAMILIES[class_name]
        models.check_size(family.size(config, files.vae), *sides)
        shape = family.shape(config, *sides, files.vae)
        predict.dense_layers(options.sparse, shape.layers)
        options.sparse.layout(shape.grid)


def load(options: GenerateOptions, files: models.ModelFiles, device: torch.device, dtype: torch.dtype) -> Any:
    """The pipeline, on its device."""
    import diffusers
    import transformers

    # The CLI has a bar of its own, and says in its own words what it refuses.
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        files.source,
        dtype={"default": dtype, "vae": torch.float32},
        use_safetensors=True,
        local_files_only=files.is_local,
    )
    pipe.set_progress_bar_config(disable=True)
    match options.offload:
        case "none":
            pipe.to(device)
        case "model":
            pipe.enable_model_cpu_offload(device=device)
        case "sequential":
            pipe.enable_sequential_cpu_offload(device=device)
        case "group":
            pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=True)
    if options.compile:
        for name in files.transformers:
            getattr(pipe, name).compile_repeated_blocks(fullgraph=True)
    return pipe


def _denoise(
    pipe: Any, options: GenerateOptions, request: Request, files: models.ModelFiles, device: torch.device
) -> np.ndarray:
    """The frames, [F, H, W, 3] floats from 0 to 1, with a bar on standard error while they are made."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    steps = request.num_inference_steps
    # The session learns the number of steps only when the pipeline runs.
    mixed = options.sparse.profile is not None
    phases = ("mixed",) * steps if mixed else predict.phases(options.sparse, steps)
    seen: list[tuple[str, float]] = []
    bar = Progress(
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(),
        TextColumn("{task.fields[phase]:6}"),
        TextColumn("{task.fields[left]}"),
        console=Console(stderr=True),
    )
    task = bar.add_task("", total=steps, phase=phases[0], left="")
    clock = time.perf_counter()

    def step_done(_pipe: Any, step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal clock
        if device.type == "cuda":
            # Kernels are queued; without this the bar would run ahead of the work.
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        seen.append((phases[step], now - clock))
        clock = now
        ahead = phases[step + 1 :]
        left = f"{seconds_left(seen, ahead):.0f} s left" if ahead else "decoding"
        bar.update(task, completed=step + 1, phase=ahead[0] if ahead else "", left=left)
        return {}

    with bar:
        return frames_of(pipe, request, files, options.negative_prompt, options.seed, step_done)


def frames_of(
    pipe: Any,
    request: Request,
    files: models.ModelFiles,
    negative_prompt: str | None,
    seed: int,
    step_done: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
) -> np.ndarray:
    """One run of the pipeline: [F, H, W, 3] floats from 0 to 1, an image as one frame. step_done is a diffusers
    callback, called where the pipeline has any."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    # WanPipeline rounds to a whole number of latent frames and adds one even where one latent is one frame.
    whole = files.vae.get("scale_factor_temporal", 4) == 1
    told = asdict(request) | {"num_frames": request.num_frames - whole, "negative_prompt": negative_prompt}
    if "true_cfg_scale" in parameters and parameters["guidance_scale"].default is None:
        # QwenImagePipeline's own name for it; without a negative prompt it would not guide at all.
        guidance = told.pop("guidance_scale")
        told |= {"true_cfg_scale": guidance, "negative_prompt": negative_prompt or (" " if guidance > 1 else None)}
    # What the pipeline has no name for was refused before; its own defaults stand for what is None.
    told = {name: value for name, value in told.items() if value is not None and name in parameters}
    if "use_resolution_binning" in parameters:
        # Else it makes one of the sizes it was trained at, and scales that.
        told["use_resolution_binning"] = False
    if step_done is not None and "callback_on_step_end" in parameters:
        told["callback_on_step_end"] = step_done
    elif step_done is not None and "callback" in parameters:
        told["callback"] = lambda step, timestep, latents: step_done(pipe, step, timestep, {"latents": latents})
    out = pipe(**told, generator=torch.Generator("cpu").manual_seed(seed), output_type="np")
    made = next(getattr(out, name)[0] for name in ("frames", "images", "image") if hasattr(out, name))
    return made if made.ndim == 4 else made[None]


def seconds_left(seen: Sequence[tuple[str, float]], ahead: Iterable[str]) -> float:
    """How long the phases ahead will take, if each takes the mean of its kind, or of all where its kind is new."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for phase, took in seen:
        seconds[phase].append(took)
    mean = sum(took for _, took in seen) / len(seen)
    return sum(sum(seconds[p]) / len(seconds[p]) if p in seconds else mean for p in ahead)


def _by_phase(steps: Iterable[tuple[str, float]]) -> dict[str, dict[str, float]]:
    total: dict[str, dict[str, float]] = {}
    for phase, seconds in steps:
        entry = total.setdefault(phase, {"steps": 0, "seconds": 0.0})
        entry["steps"] += 1
        entry["seconds"] += seconds
    return total


def _name(options: GenerateOptions, request: Request, files: models.ModelFiles, suffix: str) -> str:
    model = "demo" if options.model_id is None else Path(files.source).name
    size = f"{request.height}x{request.width}x{request.num_frames}"
    config = options.sparse
    method = config.method if config.method == "dense" else f"{config.method}-d{config.density:g}"
    if config.profile is not None:
        method = Path(config.profile).name.removesuffix(".safetensors")
    if config.top_p is not None and config.method != "dense":
        method += f"-p{config.top_p:g}"
    return f"{model}.{size}.{request.num_inference_steps}steps.{method}.seed{options.seed}{suffix}"


def _settings(
    options: GenerateOptions, request: Request, files: models.ModelFiles, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Every option by name; as a config, they make the same video again."""
    settings = {f.name: getattr(options, f.name) for f in fields(options) if f.name not in ("sparse", "config")}
    settings |= asdict(request) | asdict(options.sparse)
    settings |= {"model_id": files.source, "device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    return {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}


def versions() -> dict[str, str | None]:
    names = ("dit-sparse", "torch", "triton", "diffusers", "transformers", "accelerate", "imageio-ffmpeg")
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    from dit_sparse import __version__

    # A checkout is not installed, so it has no metadata of its own.
    return found | {"dit-sparse": __version__}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _peak_memory(device: torch.device) -> int:
    """Of the GPU while generating, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
