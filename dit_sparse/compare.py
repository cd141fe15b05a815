"""The command that makes the same videos or images dense and sparse, scores and times them, and shows both."""

import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from dit_sparse import generate, models, prompts, schedule
from dit_sparse.config import SparseConfig
from dit_sparse.video import write_record, write_video


@dataclass(frozen=True)
class CompareOptions:
    """Make every prompt dense and with each method at each density, from the same noise, and compare.

    Written to output_dir: results.csv (a row for each video), layers.csv (work and error by layer and step), maps.npz
    (where in the frame the error is, and what heads attend to), results.json, report.html, which is made of these
    alone, the videos, and finished runs under the name of their content, which results.csv gives: the same command
    goes on where it stopped, and takes dense runs from there. What is scored are the frames in 8 bits, against the
    dense video of the same prompt and seed. Of image models these are images.
    """

    model_id: str | None = None
    """Directory saved by diffusers, or a Hugging Face id; if not given, the demo model that comes with dit-sparse."""
    methods: tuple[str, ...] = ("dense", "anchor", "tail", "reshape", "rectify", "none")
    """Separated by commas or spaces: methods of generate, dense:BACKEND for dense attention by a backend of diffusers,
    and profile for the file given by --profile. Plain dense is always there. After any of them, what is on beside:
    +firstblock, +taylorseer or +magcache, step caches of diffusers with their default settings, or with a threshold or
    an interval (+firstblock=0.1); +compile, blocks by torch.compile; +fp8, weights stored in 8 bits;
    +8bit, sparse attention in 8 bits, on Hopper."""
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
    key_block: int | Literal["auto"] = SparseConfig.key_block
    """Tokens per block of keys, as in generate, for the methods that take it."""
    first_frame: bool = False
    """Also keep the blocks of the first frame, with every method."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of the model; auto is bfloat16 on a GPU and float32 on a CPU."""
    device: str = "auto"
    """cpu, cuda, cuda:1 and so on; auto is cuda where there is one."""
    offload: Literal["none", "model", "group"] = "none"
    """Keep weights in main memory, as in generate."""
    maps: bool = True
    """Measure in the first prompt's run work and error by layer and step, and what heads attend to; what that takes is
    in no time. On a GPU it is a run of its own."""
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

    from dit_sparse.calibration.runs import Maker, weights_of
    from dit_sparse.compare_settings import settings_of
    from dit_sparse.pipelines.session import FAMILIES

    models.check_known(files, FAMILIES)
    settings = settings_of(options, request, files, device, dtype)
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
    bar = _bar()
    maker = Maker(
        pipe,
        request,
        files,
        options.negative_prompt,
        identity,
        cache,
        lambda setting, job: bar.update(bar.task_ids[0], description=_doing(setting, job, len(told))),
        lambda steps: bar.update(bar.task_ids[0], advance=steps),
    )
    settings = _prepare(maker, settings, told[0], options.seed)
    rows, layers, maps, missing = _make(maker, settings, told, options, bar)
    facts = {
        "model": Path(files.source).name if files.is_local else files.source,
        "request": {name: value for name, value in asdict(request).items() if name != "prompt"},
        "prompts": told,
        "negative_prompt": options.negative_prompt,
        "seeds": [options.seed + number for number in range(len(told))],
        "settings": {
            s.name: s.config.to_dict() | {"backend": s.backend} | _beside(s, request.num_inference_steps)
            for s in settings
        },
        "device": identity["device"],
        "dtype": str(dtype).removeprefix("torch."),
        "versions": identity["versions"],
        "fps": options.fps,
        "missing": missing,
    }
    return _write(output, facts, rows, layers, maps)


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


def _prepare(maker: Any, settings: list[Any], prompt: str, seed: int) -> list[Any]:
    """The settings with what magcache goes by; raises ValueError, before any is made, for one that cannot be had."""
    from dit_sparse.calibration import extras

    steps = maker.request.num_inference_steps
    for setting in settings:
        if setting.backend is not None:
            for transformer in maker.transformers.values():
                try:
                    transformer.set_attention_backend(setting.backend)
                except (ValueError, RuntimeError, ImportError, KeyError) as error:
                    raise ValueError(f"dense:{setting.backend} cannot be had: {error}") from None
                finally:
                    transformer.reset_attention_backend()
        if cache := extras.cache_of(setting.extras):
            with ExitStack() as trial:
                trial.enter_context(
                    extras.switched_on(maker.pipe, list(maker.transformers), (cache,), steps, (1.0,) * steps)
                )
    by_magnitude = [s for s in settings if (extras.cache_of(s.extras) or "").startswith("magcache")]
    ratios = maker.mag_ratios(prompt, seed) if by_magnitude else ()
    return [replace(s, ratios=ratios) if s in by_magnitude else s for s in settings]


def _beside(setting: Any, steps: int) -> dict[str, Any]:
    """What is on beside the method, for the record."""
    from dit_sparse.calibration import extras

    cache = extras.cache_of(setting.extras)
    told = {} if cache is None else {"cache": repr(extras.cache_config(cache, steps, setting.ratios))}
    return told | {extra: True for extra in setting.extras if extra != cache}


def _doing(setting: Any, job: Any, prompts: int) -> str:
    if job is None:
        return f"{setting.name}, warming up"
    return f"{setting.name}, prompt {job.number + 1} of {prompts}{', maps' if job.probed else ''}"


def _make(
    maker: Any, settings: list[Any], told: tuple[str, ...], options: CompareOptions, bar: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Any, list[str]]:
    """Rows of results.csv and of layers.csv, what maps.npz holds, and what could not be measured; the videos are
    written on the way."""
    from dit_sparse.calibration import extras
    from dit_sparse.calibration.maps import error_map
    from dit_sparse.calibration.perceptual import lpips_or_reason
    from dit_sparse.calibration.prompt_score import prompt_score
    from dit_sparse.calibration.runs import Job
    from dit_sparse.calibration.scores import scores

    lpips, missing = lpips_or_reason()
    is_demo = Path(maker.files.source).resolve() == models.demo_directory().resolve()
    plain = [Job(number, prompt, options.seed + number) for number, prompt in enumerate(told)]
    jobs = {}
    for setting in settings:
        probed = [replace(plain[0], probed=True)] if options.maps and not setting.compiled else []
        # On a CPU a probed run is as good as one that is not.
        jobs[setting.name] = probed + plain[bool(probed) and not maker.on_gpu :]
    bar.update(bar.task_ids[0], total=maker.request.num_inference_steps * sum(map(len, jobs.values())))
    rows: list[dict[str, Any]] = []
    layers: list[dict[str, Any]] = []
    dense: dict[int, Any] = {}
    errors: dict[str, Any] = {}
    seen: dict[str, Any] = {}
    with bar:
        for setting in settings:
            start, videos = time.perf_counter(), []
            for job, result in zip(jobs[setting.name], maker.make(setting, jobs[setting.name]), strict=True):
                if job.probed:
                    layers += [{"setting": setting.name} | row for row in result.maps]
                    seen[setting.name] = result
                    if maker.on_gpu:
                        continue
                number, reference = job.number, dense.setdefault(job.number, result)
                videos.append(result.frames)
                video = result.frames.astype("float32") / 255
                row = {
                    "setting": setting.name,
                    "method": setting.method,
                    "density_asked": setting.density,
                    "prompt_number": number + 1,
                    "prompt": job.prompt,
                    "seed": job.seed,
                    "run": maker.key(setting, job),
                } | _relative(result.facts, reference.facts, extras.cache_of(setting.extras) is not None)
                if setting.name == "dense":
                    row |= dict.fromkeys(("psnr_db", "ssim", "ms_ssim", "lpips", "flicker"))
                else:
                    row |= scores(video, reference.frames.astype("float32") / 255, lpips)
                row["prompt_score"] = prompt_score(job.prompt, video) if is_demo else None
                rows.append(row)
                write_video(video_name(options.output_dir, setting.name, number + 1, len(video)), video, options.fps)
            if setting.name != "dense":
                errors[setting.name] = error_map(videos, [dense[number].frames for number in range(len(told))])
            # A file shows no bar.
            bar.console.print(f"{setting.name}: {time.perf_counter() - start:.1f} s with all that belongs to it")
    return rows, layers, _maps(errors, seen, dense[0].frames), [missing] if missing else []


def _relative(facts: dict[str, Any], dense: dict[str, Any], may_skip: bool) -> dict[str, Any]:
    """What was measured in a run, with shares of all that the dense run of the same prompt computed."""
    made = facts["pairs"] / dense["pairs"]
    return {name: value for name, value in facts.items() if name != "pairs"} | {
        "work": facts["work"] * made,
        "dense_share": facts["dense_share"] * made,
        "skipped": 1 - made if may_skip else None,
    }


def _maps(errors: dict[str, Any], seen: dict[str, Any], video: Any) -> Any:
    from dit_sparse.calibration.maps import HEADS, Maps, chosen_frames, over_tokens

    kept = {name: made.kept for name, made in seen.items() if made.kept is not None}
    if not kept:
        return Maps(errors, {}, {})
    one = next(iter(kept.values()))
    # The middle of the middle frame.
    query = (one.grid.frames // 2, one.grid.height // 2, one.grid.width // 2)
    frames = chosen_frames(one.grid.frames, query[0])
    layer = next(made.kept_of[0] for made in seen.values() if made.kept is not None)
    return Maps(
        errors,
        {name: found.frames(query, slice(HEADS))[:, list(frames)] for name, found in kept.items()},
        {name: seen[name].kept_of[1] for name in kept},
        over_tokens(video, one, frames),
        layer,
        query,
        frames,
    )


def video_name(output: Path, setting: str, prompt_number: int, frames: int) -> Path:
    """Where the video, or the image, of a setting and a prompt lies."""
    plain = "".join(c if c.isalnum() or c in ".-" else "-" for c in setting)
    return output / "videos" / f"{plain}.{prompt_number}.{'png' if frames == 1 else 'mp4'}"


def _write(
    output: Path, facts: dict[str, Any], rows: list[dict[str, Any]], layers: list[dict[str, Any]], maps: Any
) -> int:
    from rich.console import Console
    from rich.table import Table

    from dit_sparse.calibration import table
    from dit_sparse.calibration.maps import write_maps

    table.write_rows(output / "results.csv", rows)
    if layers:
        table.write_rows(output / "layers.csv", layers)
    write_maps(output / "maps.npz", maps)
    from dit_sparse.calibration.report import write_report

    told = table.summary(rows)
    write_record(output / "results.json", table.plain(facts | {"summary": told, "rows": rows, "layers": layers}))
    print(f"{facts['model']}, {len(facts['prompts'])} prompts, {facts['device']}, {facts['dtype']}")
    columns = table.columns_of(told)
    # Two tables, since one would not fit a terminal.
    for wanted in (table.COST, table.QUALITY):
        drawn = Table()
        for name in (kept := ["setting", *(name for name in columns if name in wanted)]):
            drawn.add_column(table.TABLE[name][0], justify="left" if name == "setting" else "right", no_wrap=True)
        for row in told:
            drawn.add_row(*(table.shown(name, row.get(name)) for name in kept))
        # Numbers cut off to fit say nothing.
        Console(width=max(Console().width, Console(width=1000).measure(drawn).maximum)).print(drawn)
    for sentence in facts["missing"]:
        print(sentence)

    def video_of(setting: str, number: int) -> Path:
        return video_name(output, setting, number, facts["request"]["num_frames"])

    write_report(output / "report.html", facts, rows, layers, maps, video_of)
    print(", ".join(str(output / name) for name in ("report.html", "results.csv", "maps.npz", "results.json")))
    return 0


def _bar() -> Any:
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
    bar.add_task("", total=None)
    return bar
