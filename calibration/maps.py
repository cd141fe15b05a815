"""Where in the frame the error of a method sits, and which tokens its heads attend to: arrays that pictures are of."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dit_sparse.calibration.kept import Kept, Token
from dit_sparse.video import whole

# Pixels along the longer side of an error map; larger frames are averaged over squares.
LONGEST = 192
# Heads and frames of a layer that are shown.
HEADS, FRAMES = 4, 8


@dataclass(frozen=True)
class Maps:
    """What maps.npz holds, by setting, those left out that have none.

    error    [H, W] float32, mean absolute difference from the dense video over prompts, frames and colours, as a share
             of a pixel's range
    kept     [heads, frames, height, width] bool, tokens that the query token attends to
    step     that it is of
    picture  [frames, height, width, 3] uint8, the dense video averaged over tokens; None without `kept`
    layer, query, frames  that `kept` is of; frames of the token grid
    """

    error: dict[str, np.ndarray]
    kept: dict[str, np.ndarray]
    step: dict[str, int]
    picture: np.ndarray | None = None
    layer: str = ""
    query: Token = (0, 0, 0)
    frames: tuple[int, ...] = ()


def error_map(videos: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> np.ndarray:
    """[F, H, W, 3] uint8 each -> [H, W] float32, as in `Maps`."""
    total = np.zeros(videos[0].shape[1:3])
    for video, reference in zip(videos, references, strict=True):
        for frame, wanted in zip(video, reference, strict=True):
            total += np.abs(frame.astype(np.float32) - wanted).mean(-1)
    total /= 255 * sum(map(len, videos))
    return _shrunk(total, -(-max(total.shape) // LONGEST)).astype(np.float32)


def _shrunk(x: np.ndarray, by: int) -> np.ndarray:
    """[H, W] -> the mean of each square of `by`, the last ones short."""
    for axis in (0, 1):
        starts = np.arange(0, x.shape[axis], by)
        lengths = np.diff(np.append(starts, x.shape[axis]))
        x = np.add.reduceat(x, starts, axis) / np.expand_dims(lengths, 1 - axis)
    return x


def chosen_frames(count: int, query: int) -> tuple[int, ...]:
    """At most FRAMES of `count` token frames, evenly spaced, the query's among them."""
    picked = np.linspace(0, count - 1, min(count, FRAMES)).round().astype(int)
    picked[np.abs(picked - query).argmin()] = query
    return tuple(picked.tolist())


def over_tokens(video: np.ndarray, kept: Kept, frames: Sequence[int]) -> np.ndarray:
    """[F, H, W, 3] uint8 -> [frames, height, width, 3] uint8: the token's own patch of the frame it stands for.

    The first token frame is the first frame and the last the last, as autoencoders of videos have it.
    """
    grid = kept.grid
    at = [round(frame * (len(video) - 1) / max(grid.frames - 1, 1)) for frame in frames]
    rows = np.linspace(0, video.shape[1], grid.height + 1)[:-1].round().astype(int)
    columns = np.linspace(0, video.shape[2], grid.width + 1)[:-1].round().astype(int)
    wide = np.add.reduceat(np.add.reduceat(video[at].astype(np.float64), rows, 1), columns, 2)
    heights = np.diff(np.append(rows, video.shape[1]))[:, None, None]
    widths = np.diff(np.append(columns, video.shape[2]))[:, None]
    return (wide / (heights * widths)).round().astype(np.uint8)


def write_maps(path: Path, maps: Maps) -> None:
    """As npz: error.NAME, kept.NAME and step.NAME of each setting, and the rest by its own name."""
    arrays = {f"{kind}.{name}": x for kind in ("error", "kept", "step") for name, x in getattr(maps, kind).items()}
    if maps.picture is not None:
        arrays |= {"picture": maps.picture, "layer": maps.layer, "query": maps.query, "frames": maps.frames}
    with whole(path) as part:
        np.savez_compressed(part, **arrays)


def read_maps(path: Path) -> Maps:
    """What `write_maps` wrote."""
    with np.load(path) as stored:
        named = {
            kind: {name.partition(".")[2]: stored[name] for name in stored.files if name.startswith(f"{kind}.")}
            for kind in ("error", "kept", "step")
        }
        steps = {name: int(step) for name, step in named["step"].items()}
        if "picture" not in stored.files:
            return Maps(named["error"], named["kept"], steps)
        frame, row, column = stored["query"].tolist()
        return Maps(
            named["error"], named["kept"], steps, stored["picture"], str(stored["layer"]), (frame, row, column),
            tuple(stored["frames"].tolist()),
        )  # fmt: skip
