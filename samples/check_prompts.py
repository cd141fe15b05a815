"""Does a pipeline show what its prompts ask for? Generates held-out prompts and reads the clips back in closed form.

python samples/check_prompts.py
python samples/check_prompts.py --num_prompts 8 --sheet sheet.png --height 240 --width 272
python samples/check_prompts.py --ground_truth
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import demo_world as world
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from PIL import Image

# Training draws its scenes from other seeds.
HELD_OUT_SEED = 20_000
DEMO = Path(__file__).parent / "demo"

score = world.score


@dataclass(frozen=True)
class Settings:
    """How each clip is made. The defaults are what the demo model is checked at."""

    frames: int = 15
    height: int = 128
    width: int = 144
    steps: int = 20
    guidance_scale: float = 4.0
    batch: int = 1


@dataclass(frozen=True)
class Check:
    """Shares of clips, in per cent. The plain names judge the group that is named first, which is in front."""

    prompts: int
    colour: float
    shape: float
    colour_and_shape: float
    direction: float
    size: float
    count: float
    second_group_colour_and_shape: float
    second_group_direction: float


def held_out(num_prompts: int, seed: int = HELD_OUT_SEED) -> world.SceneBatch:
    return world.sample_scenes(num_prompts, torch.Generator().manual_seed(seed))


def generate(pipe: WanPipeline, captions: list[str], seeds: list[int], settings: Settings) -> torch.Tensor:
    """Clips [N, T, H, W, 3] in [0, 1] on the CPU. The noise comes from CPU generators, the same on every device."""
    # With an autoencoder that keeps every frame, WanPipeline makes one frame more than it is asked for.
    requested = settings.frames - 1 if pipe.vae_scale_factor_temporal == 1 else settings.frames
    clips = []
    for first in range(0, len(captions), settings.batch):
        part = slice(first, first + settings.batch)
        video = pipe(
            prompt=captions[part],
            height=settings.height,
            width=settings.width,
            num_frames=requested,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
            output_type="pt",
        ).frames
        clips.append(video.permute(0, 1, 3, 4, 2).float().cpu())
    return torch.cat(clips)


def judge(clips: torch.Tensor, scenes: tuple[world.Scene, ...]) -> Check:
    """Score clips [N, T, H, W, 3] against their scenes."""
    if len(clips) != len(scenes):
        raise ValueError(f"judge() takes one scene per clip, not {len(clips)} clips and {len(scenes)} scenes.")
    scores = [score(clip, scene) for clip, scene in zip(clips, scenes, strict=True)]
    first = [groups[0] for groups in scores]
    second = [groups[1] for groups in scores if len(groups) > 1]

    def share(values: list[bool]) -> float:
        return round(100 * sum(values) / max(len(values), 1), 1)

    return Check(
        prompts=len(scores),
        colour=share([group.colour for group in first]),
        shape=share([group.shape for group in first]),
        colour_and_shape=share([group.colour and group.shape for group in first]),
        direction=share([group.direction for group in first]),
        size=share([group.size for group in first]),
        count=share([group.count for group in first]),
        second_group_colour_and_shape=share([group.colour and group.shape for group in second]),
        second_group_direction=share([group.direction for group in second]),
    )


def check(
    pipe: WanPipeline,
    num_prompts: int = 64,
    settings: Settings | None = None,
    prepare: Callable[[WanPipeline], object] | None = None,
    seed: int = HELD_OUT_SEED,
) -> tuple[Check, torch.Tensor]:
    """Generate held-out prompts and judge them; `prepare(pipe)`, if given, first changes the pipeline's method."""
    if prepare is not None:
        prepare(pipe)
    scenes = held_out(num_prompts, seed).scenes
    captions = [world.caption(scene) for scene in scenes]
    clips = generate(pipe, captions, [seed + index for index in range(num_prompts)], settings or Settings())
    return judge(clips, scenes), clips


def ground_truth(num_prompts: int, settings: Settings, seed: int = HELD_OUT_SEED) -> torch.Tensor:
    """The held-out scenes as the world renders them, [N, T, H, W, 3] in [0, 1]."""
    batch = held_out(num_prompts, seed)
    clips = []
    for index in range(num_prompts):
        one = world.SceneBatch(batch.scenes[index : index + 1], batch.nuisance[index : index + 1])
        tensors = world.scene_tensors(one, settings.width / settings.height)
        clips.append(world.render(tensors, settings.frames, settings.height, settings.width))
    return (torch.cat(clips).permute(0, 2, 3, 4, 1) + 1) / 2


@torch.no_grad()
def reconstruct(pipe: WanPipeline, clips: torch.Tensor) -> torch.Tensor:
    """Clips [N, T, H, W, 3] in [0, 1] through the autoencoder and back."""
    vae = pipe.vae
    again = []
    for clip in clips:
        # encode() takes one frame and then four at a time; what does not fill a four it drops.
        clip = clip[: len(clip) - (len(clip) - 1) % 4]
        pixels = (clip.permute(3, 0, 1, 2).unsqueeze(0) * 2 - 1).to(vae.device, vae.dtype)
        decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        again.append((decoded[0].permute(1, 2, 3, 0).float().cpu() + 1) / 2)
    return torch.stack(again).clamp(0, 1)


def psnr(clips: torch.Tensor, others: torch.Tensor) -> float:
    """Mean over clips of the peak signal-to-noise ratio, in decibels."""
    error = (clips - others).square().flatten(1).mean(1)
    return float((-10 * torch.log10(error.clamp_min(1e-10))).mean())


def contact_sheet(clips: torch.Tensor, path: Path, columns: int = 6) -> None:
    """One clip per row, evenly spaced frames from left to right."""
    picks = torch.linspace(0, clips.shape[1] - 1, columns).round().long()
    rows = clips[:, picks].permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)
    Image.fromarray((rows * 255).round().byte().numpy()).save(path, optimize=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check a pipeline against held-out prompts.")
    parser.add_argument("--model_id", default=str(DEMO))
    parser.add_argument("--num_prompts", type=int, default=64)
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED)
    parser.add_argument("--num_frames", type=int, default=Settings.frames)
    parser.add_argument("--height", type=int, default=Settings.height)
    parser.add_argument("--width", type=int, default=Settings.width)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--guidance_scale", type=float, default=Settings.guidance_scale)
    parser.add_argument("--shift", type=float, help="noise schedule shift; as the model is saved, if not given")
    parser.add_argument("--batch", type=int, help="clips at a time; 16 on a GPU, else 1")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ground_truth", action="store_true", help="check the checker and the autoencoder instead")
    parser.add_argument("--sheet", type=Path, help="write the first clips here as one picture")
    parser.add_argument("--sheet_rows", type=int, default=8)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    gpu = args.device.startswith("cuda")
    batch = args.batch if args.batch is not None else (16 if gpu else 1)
    settings = Settings(args.num_frames, args.height, args.width, args.steps, args.guidance_scale, batch)
    dtype = {"transformer": torch.bfloat16 if gpu else torch.float32, "default": torch.float32}
    pipe = WanPipeline.from_pretrained(args.model_id, torch_dtype=dtype).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    if args.shift is not None:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=args.shift)
    settings_line = {"model_id": args.model_id, "device": args.device, "shift": pipe.scheduler.config.shift}
    print(json.dumps({**settings_line, **asdict(settings)}), flush=True)
    start = time.perf_counter()
    if args.ground_truth:
        clips = ground_truth(args.num_prompts, settings, args.seed)
        again = reconstruct(pipe, clips)
        scenes = held_out(args.num_prompts, args.seed).scenes
        print(json.dumps({"rendered": asdict(judge(clips, scenes))}))
        error = psnr(clips[:, : again.shape[1]], again)
        print(json.dumps({"reconstructed": asdict(judge(again, scenes)), "psnr_db": round(error, 2)}))
        clips = again
    else:
        result, clips = check(pipe, args.num_prompts, settings, seed=args.seed)
        print(json.dumps({"generated": asdict(result), "seconds": round(time.perf_counter() - start, 1)}))
    if args.sheet is not None:
        contact_sheet(clips[: args.sheet_rows], args.sheet)


if __name__ == "__main__":
    main()
