"""Fitted profiles beside uniform settings on prompts they have not seen: quality, attention work and speed.

    python samples/profile_table.py --profile runs/demo30.profile.safetensors
    python samples/profile_table.py --profile a.profile.safetensors b.profile.safetensors --quick --batch 8

For each profile it says how many decibels better it is than the best uniform settings at equal work and at equal
seconds, and how many times its work and seconds these need for the same quality. Seconds mean something with one clip
at a time only, on a machine that does nothing else. They vary little from prompt to prompt, and quality much, so they
may be measured apart, with few prompts:

    python samples/profile_table.py --rows quality.json --seconds seconds.json --profile samples/*.profile.safetensors
"""

import argparse
import json
from pathlib import Path

import check_prompts
import demo_world as world
import torch
from diffusers import WanPipeline
from rich.console import Console
from rich.table import Table

from dit_sparse import SparseConfig, sparsify
from dit_sparse.calibration.metrics import psnr
from dit_sparse.profile import Profile

# Other prompts than those of samples/prompts.txt, which profiles may come from.
UNSEEN_SEED = check_prompts.HELD_OUT_SEED + 20_000


def uniform(quick: bool, only: list[str] | None = None) -> dict[str, SparseConfig]:
    """Settings of every method; the dense steps at the start matter as much as the density."""
    found = {}
    for first in (2, 3, 4, 6) if quick else (1, 2, 3, 4, 6, 8, 11):
        for method, density in (("tail", 0.1), ("tail", 0.3), ("rectify", 0.2), ("none", 0.3)):
            found[f"{method} {density:g}, {first} dense"] = SparseConfig(method, density=density, dense_steps=first)
        for method, density, every, soft in (
            ("anchor", 0.05, 4, None),
            ("anchor", 0.1, 2, None),
            ("anchor", 0.1, 4, None),
            ("anchor", 0.1, 8, None),
            ("anchor", 0.05, 4, 0.4),
            ("anchor", 0.1, 6, 0.5),
            ("anchor", 0.05, 8, 0.4),
            ("anchor", 0.1, 8, 0.5),
            ("anchor", 0.2, 8, None),
            ("reshape", 0.1, 4, None),
            ("reshape", 0.1, 2, None),
            ("ditfastattn", 0.1, 4, None),
        ):
            told = f", anchors of {soft:g}" if soft else ""
            found[f"{method} {density:g}, every {every}{told}, {first} dense"] = SparseConfig(
                method, density=density, dense_steps=first, refresh_every=every, anchor_density=soft, residual="bf16"
            )
        for method in ("svg", "sta", "radial", "topp"):
            found[f"{method} 0.2, {first} dense"] = SparseConfig(method, density=0.2, dense_steps=first)
    few = ("tail 0.1", "tail 0.3", "anchor 0.05, every 4", "anchor 0.1", "reshape 0.1, every 4") if quick else ("",)
    chosen = {name: config for name, config in found.items() if name.startswith(few if only is None else tuple(only))}
    if not chosen:
        raise SystemExit(f"No setting begins with {only!r}; there are: {'; '.join(found)}.")
    return chosen


def measure(pipe: WanPipeline, configs: dict[str, SparseConfig], scenes: tuple, seed: int, settings) -> list[dict]:
    """A row for each config, the first of which is dense; the noise of scene i is of seed + i."""
    captions = [world.caption(scene) for scene in scenes]
    seeds = [seed + index for index in range(len(scenes))]
    rows, dense = [], None
    for label, config in configs.items():
        seconds, work, clips = 0.0, [], []
        with sparsify(pipe, config) as session:
            if pipe.device.type == "cuda":
                # A GPU compiles kernels at first use, which is in no time that counts.
                check_prompts.generate(pipe, captions[: settings.batch], seeds[: settings.batch], settings)
            for first in range(0, len(scenes), settings.batch):
                part = slice(first, first + settings.batch)
                clips.append(check_prompts.generate(pipe, captions[part], seeds[part], settings))
                report = session.report()
                seconds += sum(step.seconds for step in report.steps)
                work.append(report.work)
        made = torch.cat(clips).numpy()
        dense = made if dense is None else dense
        each = [min(psnr(a, b), 200.0) for a, b in zip(made, dense, strict=True)]
        row = {"setting": label, "work": sum(work) / len(work), "seconds": seconds, "psnr_db": sum(each) / len(each)}
        print(json.dumps(row), flush=True)
        rows.append(row | {"each": each})
    return rows


def front(rows: list[dict], cost: str) -> list[tuple[float, float]]:
    """(cost, dB) of the rows that none beats at both, the cheapest first."""
    found: list[tuple[float, float]] = []
    for row in sorted(rows, key=lambda row: (row[cost], -row["psnr_db"])):
        if not found or row["psnr_db"] > found[-1][1]:
            found.append((row[cost], row["psnr_db"]))
    return found


def between(x: float, points: list[tuple[float, float]]) -> float | None:
    """y at x on the line through points of ascending x; None outside of them."""
    for (low, y0), (high, y1) in zip(points[:-1], points[1:], strict=True):
        if low <= x <= high:
            return y0 + (y1 - y0) * (x - low) / (high - low) if high > low else max(y0, y1)
    return None


def verdict(row: dict, others: list[dict], cost: str) -> dict[str, float | None]:
    """Decibels over the best uniform settings at equal cost, and how many times their cost at equal quality; settings
    between two of the front are taken to lie on the line through these."""
    points = front(others, cost)
    there = between(row[cost], points)
    same = between(row["psnr_db"], [(db, spent) for spent, db in points])
    return {
        "gain_db": None if there is None else row["psnr_db"] - there,
        "ratio": None if same is None else same / row[cost],
    }


def made(args: argparse.Namespace) -> list[dict]:
    """The rows of new clips: dense, the profiles, and uniform settings."""
    gpu = args.device.startswith("cuda")
    dtype = {"transformer": torch.bfloat16 if gpu else torch.float32, "default": torch.float32}
    pipe = WanPipeline.from_pretrained(args.model_id, dtype=dtype).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    settings = check_prompts.Settings(args.num_frames, args.height, args.width, steps=args.steps, batch=args.batch)
    configs = {Path(path).name: SparseConfig(profile=path) for path in args.profile}
    scenes = check_prompts.held_out(args.num_prompts, args.seed).scenes
    every = {"dense": SparseConfig("dense")} | configs | ({} if args.only == [] else uniform(args.quick, args.only))
    return measure(pipe, every, scenes, args.seed, settings)


def read(files: list[Path]) -> list[dict]:
    """The rows of several output_files; of a setting that is in more than one, the first."""
    found: dict[str, dict] = {}
    for file in files:
        rows = json.loads(file.read_text())
        if found and len(rows[0]["each"]) != len(next(iter(found.values()))["each"]):
            raise SystemExit(f"{file} has clips of {len(rows[0]['each'])} prompts, and {files[0]} of another number.")
        for row in rows:
            found.setdefault(row["setting"], row)
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_id", default=str(check_prompts.DEMO))
    parser.add_argument("--profile", nargs="+", required=True, help="files of dit-sparse fit")
    parser.add_argument("--num_prompts", type=int, default=8)
    parser.add_argument("--seed", type=int, default=UNSEEN_SEED, help="of the prompts, and of the first one's noise")
    parser.add_argument("--steps", type=int, default=check_prompts.Settings.steps)
    parser.add_argument("--num_frames", type=int, default=check_prompts.Settings.frames)
    parser.add_argument("--height", type=int, default=check_prompts.Settings.height)
    parser.add_argument("--width", type=int, default=check_prompts.Settings.width)
    parser.add_argument("--quick", action="store_true", help="a few of the uniform settings")
    parser.add_argument("--only", nargs="*", help="uniform settings whose names begin with one of these, or none")
    parser.add_argument("--batch", type=int, default=1, help="clips at a time")
    parser.add_argument(
        "--rows", type=Path, nargs="+", help="output_files of before of the same prompts, in place of new clips"
    )
    parser.add_argument(
        "--seconds", type=Path, help="an output_file, the seconds of which count; settings not in it do not"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output_file", type=Path, help="also write the rows as JSON")
    args = parser.parse_args()
    if args.rows is None:
        rows = made(args)
        what = f"{args.num_prompts} prompts, {args.steps} steps, {args.device}, torch {torch.__version__}"
    else:
        rows, what = read(args.rows), " and ".join(map(str, args.rows))
    if args.seconds is not None:
        timed = {row["setting"]: row["seconds"] for row in json.loads(args.seconds.read_text())}
        rows = [row | {"seconds": timed[row["setting"]]} for row in rows if row["setting"] in timed]
        what += f", seconds from {args.seconds}"
    names = [Path(path).name for path in args.profile]
    told = {row["setting"]: row for row in rows}
    if missing := [name for name in names if name not in told]:
        raise SystemExit(f"{', '.join(missing)} is not among the settings of {what}.")
    profiles = [told[name] for name in names]
    others = [
        row for row in rows if row["setting"] not in ("dense", *names) and not row["setting"].endswith(".safetensors")
    ]
    table = Table(title=what)
    for column in ("profile", "predicted dB", "dB", "work", "dB over uniform at equal work", "times its work",
                   "dB over uniform at equal seconds", "times its seconds"):  # fmt: skip
        table.add_column(column, justify="left" if column == "profile" else "right")
    for row, path in zip(profiles, args.profile, strict=True):
        row["predicted"] = Profile.load(path).header.predicted
        row["verdict"] = {cost: verdict(row, others, cost) for cost in ("work", "seconds")}
        told = [row["predicted"]["psnr_db"], row["psnr_db"], row["work"]]
        told += [row["verdict"][cost][key] for cost in ("work", "seconds") for key in ("gain_db", "ratio")]
        table.add_row(row["setting"], *("-" if x is None else f"{x:.4g}" for x in told))
    Console(width=140).print(table)
    if args.output_file is not None:
        args.output_file.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
