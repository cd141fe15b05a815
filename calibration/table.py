"""Rows of a comparison as CSV, and the table that is made of them and of nothing else."""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_sparse.calibration.scores import MEASURES
from dit_sparse.video import whole

Row = dict[str, Any]

TEXT = ("setting", "method", "prompt", "run", "dense_kernel", "kernel", "layer")
REFERENCE = "dense"

# Column of the table -> its title and how a number is shown; times and memory are of one video.
TABLE = {
    "setting": ("method", "{}"),
    "density": ("density", "{:.3f}"),
    "work": ("work", "{:.3f}"),
    "dense_share": ("dense", "{:.0%}"),
    "skipped": ("skipped", "{:.0%}"),
    "dit_seconds": ("DiT s", "{:.2f}"),
    "seconds": ("whole s", "{:.2f}"),
    "attention_seconds": ("attention s", "{:.2f}"),
    "dit_speedup": ("DiT", "{:.2f}x"),
    "speedup": ("whole", "{:.2f}x"),
    "peak_memory_gib": ("GiB", "{:.2f}"),
    **{name: (title, "{:.2f}" if name == "psnr_db" else "{:.4f}") for name, (title, _) in MEASURES.items()},
    "prompt_score": ("prompt", "{:.0%}"),
}
QUALITY = ("density", "dense_share", "skipped", "work", *MEASURES, "prompt_score")
COST = ("work", *(name for name in TABLE if name not in QUALITY and name != "setting"))


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """CSV with a header; None is empty. Numbers are written in full, so reading them back gives the same ones."""
    with whole(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[Row]:
    """What `write_rows` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: _value(name, text) for name, text in row.items()} for row in csv.DictReader(file)]


def _value(name: str, text: str) -> Any:
    if name in TEXT:
        return text or None
    return float(text) if text else None


def summary(rows: Sequence[Row]) -> list[Row]:
    """A row for each setting, in order of appearance: means over prompts, and speed-ups over the dense runs.

    A mean is None where a prompt has no such number. Speed-ups are of sums, over the prompts that both have.
    """
    dense = {row["prompt_number"]: row for row in rows if row["setting"] == REFERENCE}
    found: list[Row] = []
    for name in dict.fromkeys(row["setting"] for row in rows):
        own = [row for row in rows if row["setting"] == name]
        row: Row = {"setting": name, "method": own[0]["method"], "density_asked": own[0]["density_asked"]}
        row["prompts"] = len(own)
        for column in (*TABLE, "state_bytes", "peak_memory_bytes", "fallbacks"):
            if column in own[0] and column not in row:
                row[column] = mean(r[column] for r in own)
        row["peak_memory_gib"] = row.pop("peak_memory_bytes") / 2**30
        for column, of in (("dit_speedup", "dit_seconds"), ("speedup", "seconds")):
            row[column] = sum(dense[r["prompt_number"]][of] for r in own) / sum(r[of] for r in own)
        found.append(row)
    return found


def mean(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if None in known else sum(known) / len(known)  # type: ignore[arg-type]


def columns_of(table: Sequence[Row]) -> list[str]:
    """The columns that hold anything."""
    return [name for name in TABLE if any(row.get(name) is not None for row in table)]


def shown(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float) and math.isinf(value):
        return "equal"
    return TABLE[column][1].format(value)


def plain(value: Any) -> Any:
    """The same for JSON, which knows no infinity."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
