"""What each method costs in decibels: the demo model's clips, sparse against dense, same prompts and seeds.

    python samples/quality_table.py
    python samples/quality_table.py --num_prompts 4 --density 0.1 --refresh_every 4 --methods anchor,rectify
    python samples/quality_table.py --pareto --seed 40000 --profile anchor40.profile.safetensors

All methods of a row have the same dense steps: the first `--dense_steps`, then one in every `refresh_every`. With
`--pareto`, settings of different attention work are listed, for comparing methods at equal work, and profiles, which
may be fitted to one method each (`dit-sparse fit --methods anchor --target_work 0.4`): give another seed than that of
the prompts they came from. `error` is that of attention in the calls computed sparse, relative to exact attention on
the same inputs, layer by layer.
"""

import argparse
import json
import os
import time
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import check_prompts
import demo_world as world
import torch
from diffusers import WanPipeline
from rich.console import Console
from rich.table import Table

from dit_sparse import SparseConfig, sparsify
from dit_sparse.calibration.metrics import psnr, ssim
from dit_sparse.calibration.probe import Probe, put_in_place

# Query rows of each call that are attended exactly, too.
PROBED_ROWS = 64
METHODS = ("none", "rectify", "reshape", "tail", "anchor", "anchor-fp8", "anchor-int4")


def settings_of(method: str, density: float, every: int | None, dense_steps: int) -> SparseConfig:
    """A method by name; "anchor-fp8" is anchor with its residual stored in fp8."""
    name, _, storage = method.partition("-")
    config = SparseConfig(name, density=density, refresh_every=every, dense_steps=dense_steps)
    if config.learns:
        config = replace(config, residual=storage or "bf16")
    return config


def pareto() -> dict[str, SparseConfig]:
    """Settings of different work: anchors by interval and softness, the rest by density alone."""
    found = {}
    anchors = ((3, 4, 0.5, 0.05), (3, 4, 0.25, 0.05), (3, 8, 0.5, 0.05), (4, 6, 0.5, 0.05), (4, 6, 0.5, 0.1))
    for dense_steps, every, soft, density in anchors:
        found[f"anchor every {every}, {soft}, {density}, after {dense_steps}"] = SparseConfig(
            density=density, refresh_every=every, anchor_density=soft, dense_steps=dense_steps, residual="bf16"
        )
    for density in (0.05, 0.2, 0.35):
        for method in ("tail", "rectify", "none"):
            found[f"{method} {density}, after 3"] = SparseConfig(method, density=density, dense_steps=3)
    for dense_steps, every, density in ((3, 4, 0.1), (3, 8, 0.1), (3, 8, 0.2), (4, 8, 0.1)):
        found[f"reshape every {every}, {density}, after {dense_steps}"] = SparseConfig(
            "reshape", density=density, refresh_every=every, dense_steps=dense_steps, residual="bf16"
        )
    return found


def layer_errors(probe: Probe) -> list[float | None]:
    """Relative L2 error of the sparse calls of each layer over prompts, steps and heads; None for a dense layer."""
    squares: dict[str, list[float]] = {}
    for call in probe.calls:
        totals = squares.setdefault(call.layer, [0.0, 0.0])
        if call.phase == "sparse" and call.error is not None and call.exact is not None:
            totals[0] += call.error.item()
            totals[1] += call.exact.item()
    return [(error / exact) ** 0.5 if exact else None for error, exact in squares.values()]


def scores(clips: torch.Tensor, dense: torch.Tensor, scenes: tuple[world.Scene, ...]) -> dict[str, float]:
    """Clips [N, T, H, W, 3] in [0, 1] against dense ones, and against what was asked for."""
    torch.set_num_threads(1)
    asked = check_prompts.judge(clips, scenes)
    pairs = [(a.numpy(), b.numpy()) for a, b in zip(clips, dense, strict=True)]
    return {
        "psnr_db": sum(psnr(a, b) for a, b in pairs) / len(pairs),
        "ssim": sum(ssim(a, b) for a, b in pairs) / len(pairs),
        "colour_and_shape": asked.colour_and_shape,
        "direction": asked.direction,
    }


def measure(
    pipe: WanPipeline,
    configs: dict[str, SparseConfig],
    scenes: tuple[world.Scene, ...],
    settings: check_prompts.Settings,
    workers: int = 1,
    seed: int = check_prompts.HELD_OUT_SEED,
) -> list[dict]:
    """A row for each setting, after one for dense; `workers` processes score clips while the next ones are made."""
    captions = [world.caption(scene) for scene in scenes]
    seeds = [seed + index for index in range(len(scenes))]
    rows: list[dict] = []
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        scored: list[Future[dict[str, float]]] = []
        for label, config in {"dense": SparseConfig("dense"), **configs}.items():
            start = time.perf_counter()
            with sparsify(pipe, config) as session:
                probe = put_in_place({"transformer": pipe.transformer}, session.generation, PROBED_ROWS)
                clips = check_prompts.generate(pipe, captions, seeds, settings)
                report = session.report()
                errors = layer_errors(probe)
            if not rows:
                dense = clips
            told = {"work": report.work, "density": report.density, "error": errors}
            rows.append({"setting": label, **told, "seconds": time.perf_counter() - start})
            scored.append(pool.submit(scores, clips, dense, scenes))
            print(json.dumps(rows[-1]), flush=True)
        return [row | future.result() for row, future in zip(rows, scored, strict=True)]


def shown(value: object) -> str:
    if isinstance(value, list):
        return " ".join("-" if x is None else f"{x:.2f}".lstrip("0") for x in value)
    return "-" if value is None else value if isinstance(value, str) else f"{value:.4g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_id", default=str(check_prompts.DEMO))
    parser.add_argument("--num_prompts", type=int, default=16)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--density", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--refresh_every", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--dense_steps", type=int, default=4)
    parser.add_argument("--pareto", action="store_true", help="list settings by attention work instead")
    parser.add_argument("--profile", nargs="+", default=[], help="with --pareto: files of dit-sparse fit")
    parser.add_argument("--seed", type=int, default=check_prompts.HELD_OUT_SEED, help="of the prompts and the noise")
    parser.add_argument("--num_frames", type=int, default=check_prompts.Settings.frames)
    parser.add_argument("--height", type=int, default=check_prompts.Settings.height)
    parser.add_argument("--width", type=int, default=check_prompts.Settings.width)
    parser.add_argument("--batch", type=int, help="clips at a time; 16 on a GPU, else 1")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output_file", type=Path, help="also write the rows as JSON")
    args = parser.parse_args()
    if args.profile and not args.pareto:
        parser.error("--profile is listed with --pareto only.")
    gpu = args.device.startswith("cuda")
    dtype = {"transformer": torch.bfloat16 if gpu else torch.float32, "default": torch.float32}
    pipe = WanPipeline.from_pretrained(args.model_id, torch_dtype=dtype).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    settings = check_prompts.Settings(args.num_frames, args.height, args.width, batch=args.batch or (16 if gpu else 1))
    fitted = {Path(path).name: SparseConfig(profile=path) for path in args.profile}
    configs = fitted | pareto() if args.pareto else {
        f"{method}, {density:g}, every {every}": settings_of(method, density, every, args.dense_steps)
        for every in args.refresh_every
        for density in args.density
        for method in args.methods.split(",")
    }  # fmt: skip
    workers = (os.cpu_count() or 1) - 2 if gpu else 1
    scenes = check_prompts.held_out(args.num_prompts, args.seed).scenes
    rows = measure(pipe, configs, scenes, settings, max(workers, 1), args.seed)
    table = Table(
        title=f"{args.num_prompts} prompts, {settings.steps} steps, {args.device}, torch {torch.__version__}"
    )
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "setting" else "right")
    for row in rows:
        table.add_row(*map(shown, row.values()))
    Console(width=160).print(table)
    if args.output_file is not None:
        args.output_file.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
