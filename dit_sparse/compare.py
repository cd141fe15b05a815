"""The command that makes the same videos dense and sparse, scores and times them, and shows both."""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from dit_sparse import generate, models, predict, prompts, schedule
from dit_sparse.config import Method, SparseConfig
from dit_sparse.video import write_record, write_video


@dataclass(frozen=True)
class CompareOptions:
    """Make every prompt dense and with each method at each density, from the same noise, and compare.

    Written to output_dir: results.csv (a row for each video), layers.csv (work and error by layer and step),
    results.json, report.html, the videos, and finished runs under the name of their content: the same command goes on
    where it stopped, and takes dense runs from there. What is scored are the frames in 8 bits, against the dense video
    of the same prompt and seed.
    """

    model_id: str | None = None
    """Directory saved by diffusers, or a Hugging Face id; if not given, the demo model that comes with dit-sparse."""
    methods: tuple[str, ...] = ("dense", "anchor", "tail", "reshape", "rectify", "none")
    """Separated by commas or spaces: methods of generate, dense:BACKEND for dense attention by a backend of diffusers,
    and profile for the file given by --profile. Plain dense is always there."""
    density: tuple[float, ...] = (0.1,)
    """Shares of key blocks computed exactly, each with every method that has a density."""
    equal_work: bool = False
    """Take density as that of the first method that has one, and give the others the density at which they do as much
    attention work over the whole run."""
    profile: Path | None = None
    """Written by dit-sparse fit; adds the method profile."""
    prompts_file: Path | None = None
    """UTF-8 text, one prompt a line, from one to eight."""
    prompt: str | None = None
    """One prompt, instead of a file. The demo model has one of its own."""
    negative_prompt: str | None = None
    """What to stay away from; only used where guidance_scale is above 1."""
    height: int | None = None
    """Pixels; if not given, as the model's pipeline has it."""
    width: int | None = None
    """Pixels; if not given, as the model's pipeline has it."""
    num_frames: int | None = None
    """Frames; if not given, as the model's pipeline has it."""
    num_inference_steps: int | None = None
    """Denoising steps; if not given, as the model's pipeline has it."""
    guidance_scale: float | None = None
    """How strongly to follow the prompt; above 1 the model runs twice a step."""
    seed: int = 0
    """Of the first prompt's noise; the next has the next."""
    dense_steps: schedule.Span = SparseConfig.dense_steps
    """Steps computed dense by every method, as in generate."""
    dense_layers: schedule.Span = SparseConfig.dense_layers
    """Layers computed dense by every method, as in generate."""
    refresh_every: int | None = None
    """Steps from one refresh to the next, for methods that remember; each has its own if not given."""
    block: int | Literal["auto"] = SparseConfig.block
    """Tokens per block, as in generate."""
    first_frame: bool = False
    """Also keep the blocks of the first frame, with every method."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of the model; auto is bfloat16 on a GPU and float32 on a CPU."""
    device: str = "auto"
    """cpu, cuda, cuda:1 and so on; auto is cuda where there is one."""
    offload: Literal["none", "model", "group"] = "none"
    """Keep weights in main memory, as in generate."""
    maps: bool = True
    """Make the first prompt once more with each method, and measure work and error by layer and step. These runs come
    first, so that what a GPU compiles at first use is in no time that counts."""
    fps: int = 16
    """Frames per second of the videos."""
    output_dir: Path = Path("compare")
    """Made if it is not there."""
    cache_dir: Path | None = None
    """Where finished runs are kept; a directory in output_dir if not given."""
    config: Path | None = None
    """YAML file of option: value lines, with the same names."""


def run(options: CompareOptions) -> int:
    """Exit code. Raises ValueError for input that cannot work, before any model work where that can be known."""
    told = _prompts(options)
    asked = generate.GenerateOptions(
        prompt=told[0] if told else None,
        sparse=SparseConfig("dense"),
        **{f.name: getattr(options, f.name) for f in fields(options) if f.name in _SHARED},
    )
    files = models.find(options.model_id)
    device, dtype = generate.placement(asked)
    request = generate.request_of(asked, files)
    told = told or (request.prompt,)

    from dit_sparse.calibration.runs import Maker, Setting, weights_of
    from dit_sparse.pipelines.session import FAMILIES

    models.check_known(files, FAMILIES)
    settings = [Setting(**values) for values in _settings(options, request, files)]
    for setting in settings:
        generate.check(replace(asked, sparse=setting.config), request, files)
    output = options.output_dir
    cache = options.cache_dir or output / "runs"
    for folder in (output, cache, output / "videos"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{str(folder)!r} cannot be made: {error.strerror}.") from None

    pipe = generate.load(asked, files, device, dtype)
    identity = {
        "pipeline": files.index["_class_name"],
        "weights": weights_of(pipe),
        "scheduler": dict(pipe.scheduler.config),
        "device": generate.device_name(device),
        "dtype": str(dtype),
        "offload": options.offload,
        "versions": generate.versions(),
    }
    bar, done = _bar()
    maker = Maker(pipe, request, files, options.negative_prompt, identity, cache, done)
    _check_backends(maker, settings)
    rows, layers, missing = _make(maker, settings, told, options, bar)
    facts = {
        "model": Path(files.source).name if files.is_local else files.source,
        "request": {name: value for name, value in asdict(request).items() if name != "prompt"},
        "prompts": told,
        "negative_prompt": options.negative_prompt,
        "seeds": [options.seed + number for number in range(len(told))],
        "settings": {s.name: s.config.to_dict() | {"backend": s.backend} for s in settings},
        "device": identity["device"],
        "dtype": str(dtype).removeprefix("torch."),
        "versions": identity["versions"],
        "fps": options.fps,
        "missing": missing,
    }
    return _write(output, facts, rows, layers)


_SHARED = (
    "model_id", "negative_prompt", "height", "width", "num_frames", "num_inference_steps", "guidance_scale", "seed",
    "dtype", "device", "offload", "fps",
)  # fmt: skip


def _prompts(options: CompareOptions) -> tuple[str, ...]:
    if options.prompts_file is None:
        return () if options.prompt is None else (options.prompt,)
    if options.prompt is not None:
        raise ValueError("Give --prompt or --prompts_file, not both.")
    return prompts.read(options.prompts_file)


def _settings(options: CompareOptions, request: generate.Request, files: models.ModelFiles) -> list[dict[str, Any]]:
    """Name, config, density and backend of every setting, plain dense first."""
    named = [name for token in options.methods for name in token.split(",") if name]
    if options.profile is not None and "profile" not in named:
        named.append("profile")
    if not options.density:
        raise ValueError("density takes one share or more.")
    found: dict[str, dict[str, Any]] = {"dense": {"name": "dense", "config": SparseConfig("dense")}}
    leader: str | None = None
    for name in named:
        method, colon, backend = name.partition(":")
        if method == "dense":
            found[name] = {"name": name, "config": SparseConfig("dense"), "backend": backend if colon else None}
        elif name == "profile":
            if options.profile is None:
                raise ValueError("Method profile needs --profile, a file written by dit-sparse fit.")
            found[name] = {"name": name, "config": SparseConfig(profile=str(options.profile))}
        elif name not in get_args(Method):
            known = ", ".join((*get_args(Method), "dense:BACKEND", "profile"))
            raise ValueError(f"Unknown method {name!r}: choose from {known}.")
        else:
            leader = leader or name
            for density in options.density:
                config = _config(options, name, density)
                if options.equal_work and name != leader:
                    config = _as_much_work(config, _config(options, leader, density), request, files)
                label = f"{name} {density:g}"
                found[label] = {"name": label, "config": config, "density": density}
    if options.refresh_every is not None and not any(values["config"].learns for values in found.values()):
        raise ValueError("refresh_every only means something to methods that remember, and none was asked for.")
    return list(found.values())


def _config(options: CompareOptions, method: str, density: float) -> SparseConfig:
    config = SparseConfig(
        method,  # type: ignore[arg-type]  # checked by the config itself
        density=density,
        dense_steps=options.dense_steps,
        dense_layers=options.dense_layers,
        block=options.block,
        first_frame=options.first_frame,
    )
    return replace(config, refresh_every=options.refresh_every) if config.learns else config


def _as_much_work(
    config: SparseConfig, leader: SparseConfig, request: generate.Request, files: models.ModelFiles
) -> SparseConfig:
    """`config` with the largest density at which it does no more attention work than `leader`."""
    from dit_sparse.pipelines.session import FAMILIES

    class_name, transformer = next(iter(files.transformers.values()))
    shape = FAMILIES[class_name].shape(transformer, request.height, request.width, request.num_frames, files.vae)

    def work(config: SparseConfig) -> float:
        return sum(predict.attention_work(shape, config, request.num_inference_steps))

    target = work(leader) + 1e-9
    blocks = -(-shape.grid.tokens // config.block_size(shape.grid.tokens))
    # Densities between two of these keep equally many blocks.
    steps = [replace(config, density=min((n + 0.5) / blocks, 1.0)) for n in range(1, blocks + 1)]
    low, high = 0, len(steps)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if work(steps[middle]) <= target else (low, middle)
    if low == 0:
        raise ValueError(
            f"{config.method} does {work(steps[0]):.3f} of dense attention's work at its least, more than the "
            f"{target:.3f} of {leader.method} at density {leader.density:g}: give a higher density, or longer "
            "--refresh_every."
        )
    return steps[low - 1]


def _check_backends(maker: Any, settings: list[Any]) -> None:
    """Raise ValueError for a backend that is not here, before anything is made."""
    for setting in settings:
        if setting.backend is not None:
            for transformer in maker.transformers.values():
                try:
                    transformer.set_attention_backend(setting.backend)
                except (ValueError, RuntimeError, ImportError, KeyError) as error:
                    raise ValueError(f"dense:{setting.backend} cannot be had: {error}") from None
                finally:
                    transformer.reset_attention_backend()


def _make(
    maker: Any, settings: list[Any], told: tuple[str, ...], options: CompareOptions, bar: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """Rows of results.csv and of layers.csv, and what could not be measured; the videos are written on the way."""
    from dit_sparse.calibration.perceptual import lpips_or_reason
    from dit_sparse.calibration.prompt_score import prompt_score
    from dit_sparse.calibration.scores import scores

    lpips, missing = lpips_or_reason()
    is_demo = Path(maker.files.source).resolve() == models.demo_directory().resolve()
    steps = maker.request.num_inference_steps
    bar.update(bar.task_ids[0], total=steps * len(settings) * (len(told) + options.maps))
    rows: list[dict[str, Any]] = []
    layers: list[dict[str, Any]] = []

    def made(setting: Any, number: int, probed: bool = False) -> Any:
        what = f"{setting.name}, {'maps' if probed else f'prompt {number + 1} of {len(told)}'}"
        bar.update(bar.task_ids[0], description=what)
        key = maker.key(setting, told[number], options.seed + number, probed)
        if maker.is_kept(key):
            bar.update(bar.task_ids[0], advance=steps)
        return maker.make(setting, told[number], options.seed + number, probed=probed)

    dense: dict[int, Any] = {}
    with bar:
        for setting in settings:
            if options.maps:
                layers += [{"setting": setting.name} | row for row in made(setting, 0, probed=True).maps]
            for number, prompt in enumerate(told):
                result = made(setting, number)
                dense.setdefault(number, result)
                video = result.frames.astype("float32") / 255
                row = {
                    "setting": setting.name,
                    "method": setting.config.method if setting.config.profile is None else "profile",
                    "density_asked": setting.density,
                    "prompt_number": number + 1,
                    "prompt": prompt,
                    "seed": options.seed + number,
                } | result.facts
                if setting.name == "dense":
                    row |= dict.fromkeys(("psnr_db", "ssim", "ms_ssim", "lpips", "flicker"))
                else:
                    row |= scores(video, dense[number].frames.astype("float32") / 255, lpips)
                row["prompt_score"] = prompt_score(prompt, video) if is_demo else None
                rows.append(row)
                write_video(video_name(options.output_dir, setting.name, number + 1), video, options.fps)
    return rows, layers, [missing] if missing else []


def video_name(output: Path, setting: str, prompt_number: int) -> Path:
    """Where the video of a setting and a prompt lies."""
    plain = "".join(c if c.isalnum() or c in ".-" else "-" for c in setting)
    return output / "videos" / f"{plain}.{prompt_number}.mp4"


def _write(output: Path, facts: dict[str, Any], rows: list[dict[str, Any]], layers: list[dict[str, Any]]) -> int:
    from rich.console import Console
    from rich.table import Table

    from dit_sparse.calibration import table

    table.write_rows(output / "results.csv", rows)
    if layers:
        table.write_rows(output / "layers.csv", layers)
    from dit_sparse.calibration.report import write_report

    told = table.summary(rows)
    write_record(output / "results.json", table.plain(facts | {"summary": told, "rows": rows, "layers": layers}))
    # Numbers cut off to fit say nothing.
    console = Console(width=max(Console().width, 100))
    console.print(f"{facts['model']}, {len(facts['prompts'])} prompts, {facts['device']}, {facts['dtype']}")
    columns = table.columns_of(told)
    # Two tables, since one would not fit a terminal.
    for wanted in (table.COST, table.QUALITY):
        drawn = Table()
        for name in (kept := ["setting", *(name for name in columns if name in wanted)]):
            drawn.add_column(table.TABLE[name][0], justify="left" if name == "setting" else "right", no_wrap=True)
        for row in told:
            drawn.add_row(*(table.shown(name, row.get(name)) for name in kept))
        console.print(drawn)
    for sentence in facts["missing"]:
        print(sentence)
    write_report(output / "report.html", facts, rows, layers, lambda name, number: video_name(output, name, number))
    print(", ".join(str(output / name) for name in ("report.html", "results.csv", "results.json")))
    return 0


def _bar() -> tuple[Any, Any]:
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
    return bar, lambda: bar.update(task, advance=1)
