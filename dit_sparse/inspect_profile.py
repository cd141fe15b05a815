"""The command that looks into profiles: tables, heat maps in the terminal, pictures with their numbers."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dit_sparse import options
from dit_sparse.choices import Choice
from dit_sparse.profile import LEARNERS, METHODS, Profile

# What a head does at a step: letter, colour.
MARKS = {
    "dense": ("D", "white on red"),
    "anchor": ("a", "black on yellow"),
    "reshape": ("r", "black on bright_yellow"),
    "tail": ("t", "black on green"),
    "calibrated": ("c", "black on cyan"),
    "rectify": ("p", "white on blue"),
    "none": (".", "white on black"),
}
SHADES = " .:-=+*#%@"


@dataclass(frozen=True)
class ShowOptions:
    """Print a profile: what it was made for, what it predicts, and what each head does at each step."""

    profile: Path | None = None
    """The file; may also be given without the name of the option."""
    branch: str | None = None
    """Which branch of guidance the heat map is of; the first if not given."""


@dataclass(frozen=True)
class DiffOptions:
    """Print in what two profiles differ; both files are given before the options."""

    branch: str | None = None
    """Which branch of guidance the heat map is of; the first if not given."""


@dataclass(frozen=True)
class PlotOptions:
    """Draw what was measured: recall by head and step, rho over the steps, error by layer; PNG and CSV."""

    profile: Path | None = None
    """The file; may also be given without the name of the option."""
    output_dir: Path = Path(".")
    """Where the pictures go."""


def run(arguments: list[str]) -> int:
    """Exit code of `dit-sparse profile ARGUMENTS`."""
    what = arguments[0] if arguments else ""
    rest = arguments[1:]
    named = _leading(rest)
    match what:
        case "show":
            told = options.parse(ShowOptions, rest[len(named) :], "dit-sparse profile show")
            show(_one(named, told.profile), told.branch)
        case "diff":
            chosen = options.parse(DiffOptions, rest[len(named) :], "dit-sparse profile diff")
            if len(named) != 2:
                raise ValueError(f"profile diff takes two files, not {len(named)}.")
            diff(Profile.load(named[0]), Profile.load(named[1]), chosen.branch)
        case "plot":
            from dit_sparse.calibration.figures import draw

            asked = options.parse(PlotOptions, rest[len(named) :], "dit-sparse profile plot")
            for file in draw(_one(named, asked.profile), asked.output_dir):
                print(file)
        case "-h" | "--help":
            print("usage: dit-sparse profile show FILE | diff FILE FILE | plot FILE [--output_dir DIR]")
        case _:
            raise ValueError(f"profile takes show, diff or plot first, not {what!r}.")
    return 0


def _leading(tokens: list[str]) -> list[str]:
    found = []
    for token in tokens:
        if token.startswith("-"):
            break
        found.append(token)
    return found


def _one(named: list[str], given: Path | None) -> Profile:
    if len(named) + (given is not None) != 1:
        raise ValueError(f"Give one profile, not {len(named) + (given is not None)}.")
    return Profile.load(named[0] if named else given)  # type: ignore[arg-type]


def show(profile: Profile, branch: str | None) -> None:
    console, h = Console(), profile.header
    b = _branch(profile, branch)
    table = Table(show_header=False, box=None)
    for name, value in facts(profile).items():
        table.add_row(name, value)
    console.print(table)
    console.print(_statistics(profile))
    console.print(_fading(profile))
    if profile.fitted:
        console.print(
            f"[bold]What each head does, branch {h.branches[b]}[/]: rows are layers and heads, columns steps"
        )
        for line in _map(profile, b):
            console.print(line)
        console.print(Text.assemble(*(part for m in MARKS for part in ((MARKS[m][0], MARKS[m][1]), f" {m}  "))))
        console.print("a capital A or R is where a memory begins")
    else:
        console.print(f"[bold]Error of the tail, branch {h.branches[b]}[/]: from {SHADES[1]} (small) to {SHADES[-1]}")
        console.print("\n".join(_shaded(profile, b)), markup=False)
        console.print("No choices yet: run dit-sparse fit.")


def facts(profile: Profile) -> dict[str, str]:
    h = profile.header
    height, width, frames = h.size
    verified = len(h.seen) - len(h.prompts)
    told = {
        "model": f"{h.model_id} ({', '.join(f'{part} ' + said['class'] for part, said in h.weights.items())})",
        "made": f"{h.created} on {h.device}, {h.dtype}, kernel {h.kernel}",
        "run": f"{len(h.levels)} steps of {h.scheduler['class']}, {frames} x {height} x {width}, "
        f"{' x '.join(map(str, h.grid))} tokens, guidance {h.guidance_scale:g}, {len(h.prompts)} prompts"
        + (f" and {verified} verified" if verified else ""),
        "ladder": ", ".join(map(str, h.ladder)),
    }
    for name, said in (("targets", h.targets), ("predicted", h.predicted), ("measured", h.measured)):
        if said:
            told[name] = ", ".join(f"{key} {value:.3g}" for key, value in said.items())
    return told


def _statistics(profile: Profile) -> Table:
    table = Table(title="shares, and errors by method: means over heads, branches and steps")
    aged = [f"{m}, {profile.header.distances[0]} on" for m in LEARNERS]
    for name in ("density", "rho", "recall", *METHODS[:4], *aged):
        table.add_column(name, justify="right")
    t = {name: x.float() for name, x in profile.tensors.items()}
    error, stale = t["error"].nanmean((0, 1, 2)), t["stale"][..., 0, :].nanmean((0, 1, 2))
    for k, rung in enumerate(profile.header.ladder):
        rho, recall = t["rho"][..., k, :].nanmean(), t["recall"][..., k].nanmean()
        table.add_row(str(rung), *(f"{x:.3f}" for x in (rho, recall, *error[:-1, k], *stale[:, k])))
    return table


def _fading(profile: Profile) -> Table:
    table = Table(
        title="share of an anchor's residual that is added, by steps since: means over heads, branches and steps"
    )
    for name in ("density", *map(str, profile.header.distances)):
        table.add_column(name, justify="right")
    fade = profile.tensors["fade"].float().nanmean((0, 1, 2))
    for k, rung in enumerate(profile.header.ladder):
        table.add_row(str(rung), *(f"{x:.3f}" for x in fade[:, k]))
    return table


def _branch(profile: Profile, name: str | None) -> int:
    known = profile.header.branches
    if name is None:
        return 0
    if name not in known:
        raise ValueError(f"Unknown branch {name!r}: choose from {', '.join(known)}.")
    return known.index(name)


def _map(profile: Profile, b: int) -> list[Text]:
    choices = [Choice.from_dict(values) for values in profile.header.choices]
    lines = []
    for name, rows in profile.header.rows_of.items():
        for head in range(rows.stop - rows.start):
            line = Text(f"{name if head == 0 else '':36.36} {head:3} ")
            told = profile.tensors["choice"][rows.start + head, b].tolist()
            begins = profile.tensors["anchor"][rows.start + head, b].tolist()
            for i, first in zip(told, begins, strict=True):
                letter, style = MARKS[choices[i].method]
                line.append(letter.upper() if first else letter, style)
            lines.append(line)
    return lines


def _shaded(profile: Profile, b: int) -> list[str]:
    error = profile.tensors["error"][:, b, :, METHODS.index("tail"), len(profile.header.ladder) // 2].float()
    level = (error / error[~error.isnan()].max() * (len(SHADES) - 1)).ceil().nan_to_num().long()
    lines = []
    for name, rows in profile.header.rows_of.items():
        for head in range(rows.stop - rows.start):
            marks = "".join(SHADES[i] for i in level[rows.start + head].tolist())
            lines.append(f"{name if head == 0 else '':36.36} {head:3} {marks}")
    return lines


def diff(one: Profile, other: Profile, branch: str | None) -> None:
    console = Console()
    before, after = facts(one), facts(other)
    table = Table("", one.source, other.source)
    for name in dict.fromkeys((*before, *after)):
        if before.get(name) != after.get(name):
            table.add_row(name, before.get(name, "-"), after.get(name, "-"))
    console.print(table if table.row_count else "The headers say the same.")
    if not (one.fitted and other.fitted):
        return
    if one.tensors["choice"].shape != other.tensors["choice"].shape:
        console.print("They have other layers, branches or steps, so their choices cannot be compared one by one.")
        return
    counts = Table("method and rung", one.source, other.source, title="share of choices")
    shares = [_shares(profile) for profile in (one, other)]
    for name in sorted(set(shares[0]) | set(shares[1])):
        counts.add_row(name, *(f"{share.get(name, 0):.1%}" for share in shares))
    console.print(counts)
    b = _branch(one, branch)
    same = torch.tensor(
        [[a == c for a, c in zip(x, y, strict=True)] for x, y in zip(_told(one, b), _told(other, b), strict=True)]
    )
    console.print(f"{1 - same.float().mean().item():.1%} of the choices of branch {one.header.branches[b]} differ: #")
    for name, rows in one.header.rows_of.items():
        for head in range(rows.stop - rows.start):
            marks = "".join("." if x else "#" for x in same[rows.start + head].tolist())
            console.print(f"{name if head == 0 else '':36.36} {head:3} {marks}", markup=False)


def _told(profile: Profile, b: int) -> list[list[tuple[Choice, int]]]:
    choices = [Choice.from_dict(values) for values in profile.header.choices]
    told, begins = (profile.tensors[name][:, b].tolist() for name in ("choice", "anchor"))
    return [
        [(choices[i], first) for i, first in zip(row, firsts, strict=True)]
        for row, firsts in zip(told, begins, strict=True)
    ]


def _shares(profile: Profile) -> dict[str, float]:
    choices = [Choice.from_dict(values) for values in profile.header.choices]
    count = Counter(profile.tensors["choice"].flatten().tolist())
    whole = sum(count.values())
    shares: dict[str, float] = {}
    for i, number in count.items():
        choice = choices[i]
        name = choice.method if choice.rung is None else f"{choice.method} {choice.rung}"
        shares[name] = shares.get(name, 0.0) + number / whole
    return shares
