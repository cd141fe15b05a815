"""What a profile measured, as pictures and as the numbers behind them."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

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
    named = {method: measured[..., m] for m, method in enumerate(METHODS[:-1])}
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


def _short(profile: Profile) -> Sequence[str]:
    """Layer names without what they share."""
    return [".".join(part for part in name.split(".") if part.isdigit()) or name for name in profile.header.rows_of]


def _head(profile: Profile, x: int) -> tuple[str, int]:
    return next((name, x - rows.start) for name, rows in profile.header.rows_of.items() if x < rows.stop)
