"""Prompts from a file, one a line."""

from pathlib import Path

MOST = 8


def read(path: Path, most: int | None = MOST) -> tuple[str, ...]:
    """The lines of a UTF-8 file, from one to `most`; raises ValueError, with the line, for anything else."""
    if not path.is_file():
        raise ValueError(f"prompts_file {str(path)!r} is no file: give a text file of one prompt a line.")
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        number = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{path} is not UTF-8: line {number} holds a byte that no UTF-8 text has there.") from None
    if not any(line.strip() for line in lines):
        raise ValueError(f"{path} holds no prompt: write one or more, one a line.")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise ValueError(f"Line {number} of {path} is empty: write one prompt on each line, and none else.")
    if most is not None and len(lines) > most:
        raise ValueError(f"{path} holds {len(lines)} prompts, and at most {most} are taken.")
    return tuple(line.strip() for line in lines)
