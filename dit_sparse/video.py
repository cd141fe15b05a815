"""Frames and records on disk: either the whole file appears under its name, or nothing does."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

SUFFIXES = (".mp4", ".gif", ".png")


def check_writable(path: Path) -> None:
    """Raise ValueError unless a video can be written to `path`; leaves no trace."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"output_file ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, not {path.suffix!r}.")
    check_place(path)


def check_place(path: Path) -> None:
    """Raise ValueError unless a file can be written to `path`; leaves no trace."""
    if path.is_dir():
        raise ValueError(f"output_file {str(path)!r} is a directory: give the name of a file in it.")
    if not path.parent.is_dir():
        raise ValueError(
            f"output_file {str(path)!r} is in no directory that exists: create {str(path.parent)!r} first."
        )
    part = _part(path)
    try:
        part.touch()
        part.unlink()
    except OSError as error:
        raise ValueError(f"output_file {str(path)!r} cannot be written: {error.strerror}.") from None


def write_video(path: Path, frames: np.ndarray, fps: int) -> list[Path]:
    """frames [F, H, W, 3], floats from 0 to 1 -> the files written: one mp4 or gif, or one png for each frame.

    A single frame is written to x.png itself, several to x-0000.png, x-0001.png and so on. Raises ValueError for NaN
    or Inf, and for odd heights or widths in an mp4, whose colours are stored for pairs of pixels.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"A video is [frames, height, width, 3], not {list(frames.shape)}.")
    bad = int(np.count_nonzero(~np.isfinite(frames)))
    if bad:
        raise ValueError(f"{bad} of {frames.size} values of the video are NaN or Inf; all must be from 0 to 1.")
    pixels = (frames.clip(0, 1) * 255).round().astype(np.uint8)
    import imageio.v3 as iio

    kind = path.suffix.lower()
    if kind == ".png":
        digits = max(4, len(str(len(pixels) - 1)))
        names = [path] if len(pixels) == 1 else [
            path.with_name(f"{path.stem}-{i:0{digits}d}{path.suffix}") for i in range(len(pixels))
        ]  # fmt: skip
        for name, frame in zip(names, pixels, strict=True):
            with whole(name) as part:
                iio.imwrite(part, frame)
        return names
    with whole(path) as part:
        if kind == ".gif":
            iio.imwrite(part, pixels, duration=1000 / fps, loop=0)
        else:
            if pixels.shape[1] % 2 or pixels.shape[2] % 2:
                raise ValueError(f"An mp4 needs even height and width, not {pixels.shape[1]}x{pixels.shape[2]}.")
            iio.imwrite(
                part, pixels, plugin="FFMPEG", fps=fps, codec="libx264", quality=8, macro_block_size=2,
                ffmpeg_log_level="error",
            )  # fmt: skip
    return [path]


def read_video(path: Path) -> np.ndarray:
    """Frames [F, H, W, 3], floats from 0 to 1, of an mp4 or gif, a picture, or a series or directory of pictures.

    A series is named as `write_video` names it: x.png stands for x-0000.png and so on. Raises ValueError for what
    holds no frame, or frames of more than one size.
    """
    files = _pictures(path)
    if not files:
        raise ValueError(f"{str(path)!r} is no video: give an mp4, a gif, a png, or a directory of pngs.")
    import imageio.v3 as iio

    try:
        if files == [path] and path.suffix.lower() != ".png":
            plugin = None if path.suffix.lower() == ".gif" else "FFMPEG"
            frames = list(iio.imiter(path, plugin=plugin))
        else:
            frames = [iio.imread(file) for file in files]
    except Exception as error:
        # Each of imageio's plugins, and ffmpeg behind them, has errors of its own.
        said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(f"{str(path)!r} cannot be read as a video: {said}.") from None
    if not frames:
        raise ValueError(f"{str(path)!r} holds no frame.")
    sizes = {frame.shape[:2] for frame in frames}
    if len(sizes) > 1:
        told = " and ".join("x".join(map(str, size)) for size in sorted(sizes))
        raise ValueError(f"{str(path)!r} holds frames of different sizes: {told}.")
    return np.stack([_rgb(frame) for frame in frames])


def _pictures(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.glob("*.png"))
    if path.is_file():
        return [path]
    return sorted(path.parent.glob(f"{path.stem}-*.png")) if path.suffix.lower() == ".png" else []


def _rgb(frame: np.ndarray) -> np.ndarray:
    """[H, W], [H, W, 1 to 4] of any integer type -> [H, W, 3] float32 from 0 to 1; transparency is left out."""
    frame = frame.reshape(*frame.shape[:2], -1)
    frame = frame[..., :3] if frame.shape[-1] >= 3 else frame[..., :1].repeat(3, -1)
    return frame.astype(np.float32) / np.iinfo(frame.dtype).max


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """`record` as JSON."""
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def _part(path: Path) -> Path:
    return path.with_name(f".{path.stem}.{os.getpid()}{path.suffix.lower()}")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, which becomes `path` if all goes well and vanishes if not."""
    part = _part(path)
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
