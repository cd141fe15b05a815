"""What a profile measured, and what heads keep, as pictures."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dit_sparse.calibration.maps import chosen_frames
from dit_sparse.profile import METHODS, Profile
from dit_sparse.video import whole

Row = tuple[Any, ...]


def draw(profile: Profile, folder: Path) -> list[Path]:
    """Three pictures and their CSV files in `folder`, named after the profile; the files written."""
    if not folder.is_dir():
        raise ValueError(f"output_dir {str(folder)!r} is no directory that exists: create it first.")
    stem = Path(profile.source).name.removesuffix(".safetensors") or "profile"
    written = []
    for name, (figure, columns, rows) in {
        "recall": recall(profile),
        "rho": rho(profile),
        "error": error(profile),
    }.items():
        picture, table = folder / f"{stem}.{name}.png", folder / f"{stem}.{name}.csv"
        with whole(picture) as part:
            figure.savefig(part, dpi=130)
        with whole(table) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(rows)
        written += [picture, table]
    return written


def recall(profile: Profile) -> tuple[Figure, Row, list[Row]]:
    """Routing recall of each head at each step, at the middle rung, the mean over branches."""
    middle = len(profile.header.ladder) // 2
    values = np.nanmean(profile.tensors["recall"].float().numpy()[..., middle], 1)
    figure = Figure(figsize=(8, 1.5 + 0.16 * len(values)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", cmap=matplotlib.colormaps["viridis"])
    axes.set_yticks([rows.start for rows in profile.header.rows_of.values()], _short(profile))
    axes.set(xlabel="step", ylabel="layer, one row a head")
    axes.set_title(f"recall of routing at density {profile.header.ladder[middle]}")
    figure.colorbar(image, label="mass found / most that so many blocks hold")
    rows = [(*_head(profile, x), step, f"{value:.5f}") for (x, step), value in np.ndenumerate(values)]
    return figure, ("layer", "head", "step", "recall"), rows


def rho(profile: Profile) -> tuple[Figure, Row, list[Row]]:
    """Share of softmax mass in the routed blocks over the steps, by rung: the mean, and the range of most heads."""
    values = np.nanmean(profile.tensors["rho"].float().numpy(), (1, 4))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = np.arange(values.shape[1])
    for k, rung in enumerate(profile.header.ladder):
        [line] = axes.plot(steps, np.nanmean(values[..., k], 0), label=str(rung))
        low, high = np.nanpercentile(values[..., k], (10, 90), axis=0)
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15)
    axes.set(xlabel="step", ylabel="rho", ylim=(0, 1.02))
    axes.set_title("share of softmax mass in the routed blocks: mean of heads, and 10th to 90th percentile")
    axes.legend(title="density")
    rows = [
        (*_head(profile, x), step, str(profile.header.ladder[k]), f"{value:.5f}")
        for (x, step, k), value in np.ndenumerate(values)
    ]
    return figure, ("layer", "head", "step", "density", "rho"), rows


def error(profile: Profile) -> tuple[Figure, Row, list[Row]]:
    """Relative error of each method by layer, at the middle rung, the mean over heads, branches and steps; and of the
    methods that learn, at the distance of two steps from their anchor."""
    h, middle = profile.header, len(profile.header.ladder) // 2
    measured = profile.tensors["error"].float().numpy()[..., middle]
    aged = profile.tensors["stale"].float().numpy()[..., min(1, len(h.distances) - 1), middle]
    named = {method: measured[..., m] for m, method in enumerate(METHODS[:4])}
    named |= {f"{name}, 2 steps on": aged[..., m] for m, name in enumerate(("anchor", "reshape"))}
    figure = Figure(figsize=(max(8, 0.5 * len(h.layers)), 4.5), layout="constrained")
    axes = figure.subplots()
    rows: list[Row] = []
    for i, (method, values) in enumerate(named.items()):
        by_layer = [float(np.nanmean(values[at])) for at in h.rows_of.values()]
        axes.bar(np.arange(len(by_layer)) + (i - len(named) / 2 + 0.5) * 0.13, by_layer, 0.13, label=method)
        rows += [(name, method, f"{value:.5f}") for name, value in zip(h.rows_of, by_layer, strict=True)]
    axes.set_xticks(range(len(h.layers)), _short(profile))
    axes.set(xlabel="layer", ylabel="relative L2 error")
    axes.set_title(f"error of the attention output at density {h.ladder[middle]}, on the dense trajectory")
    axes.legend()
    return figure, ("layer", "method", "error"), rows


def routing_blocks(blocks: np.ndarray, heads: Sequence[int], title: str) -> Figure:
    """blocks [heads, N, N] bool, query blocks by key blocks: a map for each head, kept pairs dark."""
    columns = min(len(heads), 3)
    rows = -(-len(heads) // columns)
    figure = Figure(figsize=(3.4 * columns, 3.6 * rows + 0.4), layout="constrained")
    for axes, head, mask in zip(figure.subplots(rows, columns, squeeze=False).flat, heads, blocks, strict=False):
        axes.imshow(mask, cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(f"head {head}: {mask.mean():.1%}", fontsize="medium")
        axes.set(xlabel="key block", ylabel="query block")
    for axes in figure.axes[len(heads) :]:
        axes.remove()
    figure.suptitle(f"block pairs kept: {title}")
    return figure


def routing_frames(
    kept: np.ndarray, heads: Sequence[int], queries: Sequence[tuple[int, int, int]], video: np.ndarray, title: str
) -> Figure:
    """kept [heads, queries, frames, height, width] bool, over video [F, H, W, 3] from 0 to 1: a row for each head and
    query, with frames side by side; what is left out is dark, and the query token is framed."""
    _, _, count, height, width = kept.shape
    shown = {query: chosen_frames(count, query[0]) for query in queries}
    columns = min(count, len(shown[queries[0]]))
    tall = 1.55 * video.shape[1] / video.shape[2] + 0.3
    rows = [(h, q) for h in range(len(heads)) for q in range(len(queries))]
    figure = Figure(figsize=(1.55 * columns + 0.4, max(tall * len(rows) + 0.5, 2)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, (h, q) in zip(grid, rows, strict=True):
        query = queries[q]
        for axes, frame in zip(line, shown[query], strict=True):
            # The first token frame is the first frame and the last the last, as autoencoders of videos have it.
            picture = video[round(frame * (len(video) - 1) / max(count - 1, 1))]
            high = np.arange(picture.shape[0]) * height // picture.shape[0]
            wide = np.arange(picture.shape[1]) * width // picture.shape[1]
            keeps = kept[h, q, frame][np.ix_(high, wide)][..., None]
            axes.imshow(np.where(keeps, 0.75 * picture + 0.25 * np.array((1.0, 0.6, 0.0)), 0.3 * picture))
            axes.set(xticks=[], yticks=[])
            axes.set_title(f"frame {frame}", fontsize="small")
            if frame == query[0]:
                side = picture.shape[0] / height, picture.shape[1] / width
                corner = query[2] * side[1] - 0.5, query[1] * side[0] - 0.5
                axes.add_patch(Rectangle(corner, side[1], side[0], fill=False, edgecolor="cyan", linewidth=1.5))
        line[0].set_ylabel(f"head {heads[h]}\n{' '.join(map(str, query))}", fontsize="small")
    figure.suptitle(f"keys attended to: {title}")
    return figure


def _short(profile: Profile) -> Sequence[str]:
    """Layer names without what they share."""
    return [".".join(part for part in name.split(".") if part.isdigit()) or name for name in profile.header.rows_of]


def _head(profile: Profile, x: int) -> tuple[str, int]:
    return next((name, x - rows.start) for name, rows in profile.header.rows_of.items() if x < rows.stop)
