"""Fitted profiles beside uniform settings on prompts they have not seen: quality, speed and attention work.

    python samples/profile_table.py --profile runs/demo30.profile.safetensors --num_prompts 4
    python samples/profile_table.py --profile a.profile.safetensors b.profile.safetensors --quick

For each profile it says how many decibels better it is than the best uniform setting that is at least as fast, and how
much less attention work it does than the least of any uniform setting that is at least as good.
"""

import argparse
import json
from pathlib import Path

import check_prompts
import torch
from diffusers import WanPipeline
from quality_table import measure

from dit_sparse import SparseConfig


def uniform(quick: bool) -> dict[str, SparseConfig]:
    """Settings of every method; `dense_steps` and intervals matter as much as the density."""
    found = {}
    for first in (1, 3) if quick else (0, 1, 2, 3, 5, 8):
        for density in (0.05,) if quick else (0.03, 0.1, 0.2):
            for method in ("tail",) if quick else ("tail", "rectify", "none"):
                found[f"{method} {density:g}, {first} dense"] = SparseConfig(
                    method, density=density, dense_steps=first
                )
            for method in ("anchor",) if quick else ("anchor", "reshape"):
                for every in (4,) if quick else (2, 3, 4, 8):
                    found[f"{method} {density:g}, every {every}, {first} dense"] = SparseConfig(
                        method, density=density, dense_steps=first, refresh_every=every, residual="bf16"
                    )
    return found


def verdict(row: dict, others: list[dict]) -> str:
    fast = [other for other in others if other["seconds"] <= row["seconds"]]
    good = [other for other in others if other["psnr_db"] >= row["psnr_db"]]
    best = max(fast, key=lambda other: other["psnr_db"], default=None)
    least = min(good, key=lambda other: other["work"], default=None)
    told = [f"{row['setting']}: {row['psnr_db']:.2f} dB in {row['seconds']:.1f} s, work {row['work']:.3f}"]
    told.append(
        "no uniform setting is as fast"
        if best is None
        else f"{row['psnr_db'] - best['psnr_db']:+.2f} dB beside the best as fast ({best['setting']})"
    )
    told.append(
        "no uniform setting but dense is as good"
        if least is None
        else f"{least['work'] / row['work']:.2f} times less work than the least as good ({least['setting']})"
    )
    return "; ".join(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_id", default=str(check_prompts.DEMO))
    parser.add_argument("--profile", nargs="+", required=True, help="files of dit-sparse fit")
    parser.add_argument("--num_prompts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=check_prompts.Settings.steps)
    parser.add_argument("--num_frames", type=int, default=check_prompts.Settings.frames)
    parser.add_argument("--height", type=int, default=check_prompts.Settings.height)
    parser.add_argument("--width", type=int, default=check_prompts.Settings.width)
    parser.add_argument("--quick", action="store_true", help="four uniform settings only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output_file", type=Path, help="also write the rows as JSON")
    args = parser.parse_args()
    gpu = args.device.startswith("cuda")
    dtype = {"transformer": torch.bfloat16 if gpu else torch.float32, "default": torch.float32}
    pipe = WanPipeline.from_pretrained(args.model_id, dtype=dtype).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    # One clip at a time, as the profiles were made.
    settings = check_prompts.Settings(args.num_frames, args.height, args.width, steps=args.steps, batch=1)
    configs = {Path(path).name: SparseConfig(profile=path) for path in args.profile}
    rows = measure(pipe, configs | uniform(args.quick), check_prompts.held_out(args.num_prompts).scenes, settings)
    profiles = rows[1 : 1 + len(configs)]
    for row in profiles:
        print(verdict(row, rows[1 + len(configs) :]))
    if args.output_file is not None:
        args.output_file.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
