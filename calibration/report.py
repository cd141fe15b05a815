"""The page that shows a comparison: one HTML file with everything in it, made of the rows of the CSV files, of
maps.npz and of the videos."""

import base64
import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from dit_sparse.calibration.maps import Maps
from dit_sparse.calibration.table import REFERENCE, TABLE, Row, columns_of, shown, summary
from dit_sparse.video import whole

# What the videos of one page may take. Beyond it prompts are left out, and the page says so.
MOST_BYTES = 48 << 20
COLOURS = (
    "#2b6cb0",
    "#c05621",
    "#2f855a",
    "#b83280",
    "#6b46c1",
    "#b7791f",
    "#0987a0",
    "#c53030",
    "#4a5568",
    "#38a169",
)
# What marks kept tokens, and the one that asks.
MARK, ASKS = np.array((255, 140, 0)), np.array((0, 220, 255))
# From little to much, and readable in grey: dark blue, blue-green, green, yellow.
RAMP = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float64)


def write_report(
    path: Path,
    facts: Mapping[str, Any],
    rows: Sequence[Row],
    layers: Sequence[Row],
    maps: Maps,
    video_of: Callable[[str, int], Path],
) -> None:
    """rows and layers as in the CSV files; video_of (setting, prompt number from 1) -> its mp4, or png of an image."""
    table = summary(rows)
    names = [row["setting"] for row in table]
    videos, about = _videos(rows, names, video_of)
    size, frames = facts["request"], facts["request"]["num_frames"]
    still = frames == 1
    what = "images" if still else "videos"
    told = {
        "title": f"{facts['model']}: {len(names)} settings, {len(facts['prompts'])} prompts",
        "subtitle": f"{'images' if still else f'{frames} frames'} of {size['height']} x {size['width']}, "
        f"{size['num_inference_steps']} steps, {facts['dtype']} on {facts['device']}",
    }
    parts = {name: html.escape(text) for name, text in told.items()}
    left_out = len(facts["prompts"]) - len(videos)
    said = [*facts["missing"]]
    if left_out:
        said.append(f"The {what} of {left_out} prompts are left out, to keep this page small; they lie beside it.")
    parts["left_out"] = "".join(f'<p class="note">{html.escape(sentence)}</p>' for sentence in said)
    parts["table"] = _table(table)
    parts["plots"] = "".join(
        _scatter(table, quality) for quality in ("psnr_db", "ssim") if any(row.get(quality) for row in table)
    )
    parts["maps"] = _maps(layers, names) + _errors(maps) + _kept(maps)
    parts["settings"] = _settings(facts)
    data = {"fps": facts["fps"], "still": still, "prompts": facts["prompts"], "settings": names}
    data |= {"videos": videos, "about": about}
    # A prompt may hold what would end the script.
    parts["data"] = json.dumps(data).replace("<", "\\u003c")
    page = (files("dit_sparse.calibration") / "report.html").read_text(encoding="utf-8")
    for name, text in parts.items():
        page = page.replace("{{" + name + "}}", text)
    with whole(path) as part:
        part.write_text(page, encoding="utf-8")


def _videos(
    rows: Sequence[Row], names: Sequence[str], video_of: Callable[[str, int], Path]
) -> tuple[list[list[str]], list[list[str]]]:
    """Data URIs and captions, [prompt][setting], of as many prompts as there is room for."""
    videos: list[list[str]] = []
    about: list[list[str]] = []
    room = MOST_BYTES
    for number in dict.fromkeys(row["prompt_number"] for row in rows):
        own = {row["setting"]: row for row in rows if row["prompt_number"] == number}
        files_of = [video_of(name, int(number)) for name in names]
        kind = "image/png" if files_of[0].suffix == ".png" else "video/mp4"
        content = [file.read_bytes() for file in files_of]
        room -= sum(map(len, content)) * 4 // 3
        if room < 0 and videos:
            break
        videos.append([f"data:{kind};base64," + base64.b64encode(one).decode("ascii") for one in content])
        about.append([_about(own[name]) for name in names])
    return videos, about


def _about(row: Row) -> str:
    parts = [f"DiT {row['dit_seconds']:.2f} s"]
    if row["setting"] != REFERENCE:
        parts.append(f"work {row['work']:.3f}")
        for name in ("psnr_db", "ssim", "lpips"):
            if row.get(name) is not None:
                parts.append(f"{TABLE[name][0]} {shown(name, row[name])}")
    return ", ".join(parts)


def _table(table: Sequence[Row]) -> str:
    columns = columns_of(table)
    head = "".join(f"<th>{html.escape(TABLE[name][0])}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(shown(name, row.get(name)))}</td>" for name in columns) + "</tr>"
        for row in table
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _scatter(table: Sequence[Row], quality: str) -> str:
    """Points of (speed-up of the transformer, quality), and the line of those that none beats in both."""
    points = [
        (row["dit_speedup"], row[quality], row)
        for row in table
        if row.get(quality) is not None and math.isfinite(row[quality])
    ]
    title = TABLE[quality][0]
    if not points:
        return f"<p>{html.escape(title)}: every video equals the dense one.</p>"
    width, height, left, right, top, bottom = 560, 380, 58, 20, 16, 46
    xs, ys = [p[0] for p in points] + [1.0], [p[1] for p in points]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        along = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return left + along * (width - left - right), height - bottom - up * (height - top - bottom)

    drawn = []
    for x in x_ticks:
        at, floor = place(x, y_ticks[0])
        drawn.append(f'<line x1="{at:.1f}" y1="{top}" x2="{at:.1f}" y2="{floor:.1f}" stroke="#8884"/>')
        drawn.append(f'<text x="{at:.1f}" y="{floor + 18:.1f}" text-anchor="middle">{_round(x, x_ticks)}</text>')
    for y in y_ticks:
        _, at = place(x_ticks[0], y)
        drawn.append(f'<line x1="{left}" y1="{at:.1f}" x2="{width - right}" y2="{at:.1f}" stroke="#8884"/>')
        drawn.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{_round(y, y_ticks)}</text>')
    best = sorted(
        (p for p in points if not any(o[0] >= p[0] and o[1] >= p[1] and o[:2] != p[:2] for o in points)),
        key=lambda p: p[:2],
    )
    line = " ".join("{:.1f},{:.1f}".format(*place(*p[:2])) for p in best)
    drawn.append(f'<polyline points="{line}" fill="none" stroke="#888" stroke-dasharray="4 3"/>')
    methods = list(dict.fromkeys(p[2]["method"] for p in points))
    dots = [place(x, y) for x, y, _ in points]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in dots]
    for (x, y, row), (at, up) in zip(points, dots, strict=True):
        colour = COLOURS[methods.index(row["method"]) % len(COLOURS)]
        name = html.escape(row["setting"])
        label = _beside(at, up, 7.0 * len(row["setting"]), taken, (left, top, width, height - bottom))
        drawn.append(
            f'<circle cx="{at:.1f}" cy="{up:.1f}" r="5" fill="{colour}" data-setting="{name}">'
            f"<title>{name}: {x:.3f} times as fast, {shown(quality, y)}</title></circle>"
            f'<text x="{label[0]:.1f}" y="{label[1]:.1f}">{name}</text>'
        )
    middle = left + (width - left - right) / 2
    drawn.append(f'<text x="{middle}" y="{height - 8}" text-anchor="middle">speed-up of the transformer</text>')
    drawn.append(f'<text x="14" y="{top + 4}" transform="rotate(-90 14 {top + 4})" text-anchor="end">{title}</text>')
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}">{"".join(drawn)}</svg>'


def _beside(
    x: float, y: float, length: float, taken: list[tuple[float, float, float, float]], inside: tuple[float, ...]
) -> tuple[float, float]:
    """Where a label of that length begins so that it is in nobody's way, or in the fewest; it then is in `taken`."""
    best: tuple[int, tuple[float, float, float, float]] | None = None
    for drop in (4, -10, 18, -24, 32, -38, 46):
        for start in (x + 9, x - 9 - length):
            box = (start, y + drop - 12, start + length, y + drop + 2)
            hits = sum(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken)
            fits = inside[0] <= box[0] and box[2] <= inside[2] and inside[1] <= box[1] and box[3] <= inside[3]
            if best is None or hits + 10 * (not fits) < best[0]:
                best = (hits + 10 * (not fits), box)
    assert best is not None
    taken.append(best[1])
    return best[1][0], best[1][3] - 2


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers, evenly spaced, that enclose low to high."""
    spread = (high - low) or abs(high) or 1.0
    raw = spread / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [step * n for n in range(first, last + 1)]


def _round(value: float, known: Sequence[float]) -> str:
    """A tick with as many decimals as the step between ticks has."""
    step = known[1] - known[0]
    decimals = next(n for n in range(16) if abs(round(step, n) - step) < 1e-6 * step)
    return f"{value:.{decimals}f}"


def _maps(layers: Sequence[Row], names: Sequence[str]) -> str:
    if not layers:
        return ""
    worst = max(row["error"] for row in layers)
    parts = []
    for column, title, most in (
        ("work", "Attention work by layer and step", 1.0),
        ("error", "Error of attention by layer and step", worst or 1.0),
    ):
        note = (
            "Relative L2 error of attention outputs on sampled rows, against exact attention on the same inputs."
            if column == "error"
            else "Token pairs computed over all pairs."
        )
        scale = f'<img class="scale" alt="" src="{_png(np.linspace(0, 1, 64)[None])}">'
        drawn = "".join(
            f'<figure><img alt="{html.escape(f"{column} of {name}")}" data-map="{column}" '
            f'data-setting="{html.escape(name)}" src="{_png(grid / most)}">'
            f"<figcaption>{html.escape(name)}, mean {grid.mean():.3g}, most {grid.max():.3g}</figcaption></figure>"
            for name in names
            if name != REFERENCE and (grid := grid_of(layers, name, column)).size
        )
        parts.append(
            f"<section><h2>{title}</h2><p class='note'>{note} Each row is a layer, the first at the top; each column "
            f"a step. First prompt. 0 {scale} {most:.3g}</p><div class='maps'>{drawn}</div></section>"
        )
    return "".join(parts)


def _errors(maps: Maps) -> str:
    if not maps.error:
        return ""
    most = max(float(error.max()) for error in maps.error.values()) or 1.0
    scale = f'<img class="scale" alt="" src="{_png(np.linspace(0, 1, 64)[None])}">'
    drawn = "".join(
        f'<figure><img alt="{html.escape(f"where {name} errs")}" data-map="place" '
        f'data-setting="{html.escape(name)}" src="{_png(error / most)}">'
        f"<figcaption>{html.escape(name)}, mean {error.mean():.3g}, most {error.max():.3g}</figcaption></figure>"
        for name, error in maps.error.items()
    )
    return (
        "<section><h2>Where in the frame the error is</h2><p class='note'>Mean absolute difference from the dense "
        "video over time, colours and prompts, as a share of a pixel's range; the same scale for all. "
        f"0 {scale} {most:.3g}</p><div class='maps frames'>{drawn}</div></section>"
    )


def _kept(maps: Maps) -> str:
    if maps.picture is None:
        return ""
    frame, row, column = maps.query
    drawn = "".join(
        f'<figure><img alt="{html.escape(f"what {name} keeps")}" data-map="kept" data-setting="{html.escape(name)}" '
        f'src="{_data_uri(overlay(maps, kept))}"><figcaption>{html.escape(name)}, step {maps.step[name]}, keeps '
        f"{', '.join(f'{share:.1%}' for share in kept.mean((1, 2, 3)))} of the tokens shown</figcaption></figure>"
        for name, kept in maps.kept.items()
    )
    return (
        "<section><h2>What heads attend to</h2><p class='note'>Tokens whose keys are attended to exactly (orange) by "
        f"the query token at frame {frame}, row {row}, column {column} (blue), over the dense video of the first "
        f"prompt. Each row is a head of {html.escape(maps.layer)}, each column a frame of tokens: "
        f"{', '.join(map(str, maps.frames))}. All counted from 0.</p><div class='kept'>{drawn}</div></section>"
    )


def overlay(maps: Maps, kept: np.ndarray) -> np.ndarray:
    """kept [heads, frames, height, width] -> a picture, uint8 [rows, columns, 3], a pixel for each token: heads below
    each other, frames side by side, with a pixel of white between them."""
    assert maps.picture is not None
    grey = maps.picture.astype(np.float64).mean(-1, keepdims=True)
    heads, frames, height, width = kept.shape
    page = np.full((heads * (height + 1) - 1, frames * (width + 1) - 1, 3), 255.0)
    for head in range(heads):
        for frame in range(frames):
            tile = np.where(kept[head, frame][..., None], 0.45 * grey[frame] + 0.55 * MARK, 0.4 * grey[frame])
            if maps.frames[frame] == maps.query[0]:
                tile[maps.query[1], maps.query[2]] = ASKS
            top, left = head * (height + 1), frame * (width + 1)
            page[top : top + height, left : left + width] = tile
    return page.round().astype(np.uint8)


def grid_of(layers: Sequence[Row], setting: str, column: str) -> np.ndarray:
    """[layers, steps]; NaN where a layer did not run."""
    own = [row for row in layers if row["setting"] == setting]
    order = list(dict.fromkeys(row["layer"] for row in own))
    grid = np.full((len(order), 1 + max((int(row["step"]) for row in own), default=-1)), np.nan)
    for row in own:
        grid[order.index(row["layer"]), int(row["step"])] = row[column]
    return grid


def _png(shares: np.ndarray) -> str:
    """[H, W] from 0 to 1 as a picture of as many pixels, grey where NaN, as a data URI."""
    spot = np.nan_to_num(shares).clip(0, 1) * (len(RAMP) - 1)
    low = np.minimum(spot.astype(int), len(RAMP) - 2)
    colour = RAMP[low] + (spot - low)[..., None] * (RAMP[low + 1] - RAMP[low])
    colour[np.isnan(shares)] = 128
    return _data_uri(colour.round().astype(np.uint8))


def _data_uri(picture: np.ndarray) -> str:
    """[H, W, 3] uint8 as a PNG."""
    from PIL import Image

    stream = BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _settings(facts: Mapping[str, Any]) -> str:
    run = {
        name: facts[name] for name in ("model", "request", "negative_prompt", "seeds", "device", "dtype", "versions")
    }
    blocks = [("Run", run), ("Prompts", list(facts["prompts"])), *facts["settings"].items()]
    return "".join(
        f"<details><summary>{html.escape(name)}</summary>"
        f"<pre>{html.escape(json.dumps(told, indent=1, default=str))}</pre></details>"
        for name, told in blocks
    )
