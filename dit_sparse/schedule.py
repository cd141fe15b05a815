"""Which steps or layers a user means: a count, a share, or a list of ranges."""

import math
from functools import lru_cache

Span = int | float | str


# Typed, because 1 (the first) and 1.0 (all) are equal as keys.
@lru_cache(maxsize=256, typed=True)
def span(spec: Span, total: int) -> frozenset[int]:
    """The indices below `total` that `spec` names.

    An int n is the first n; a float is the first share of them, rounded up; a string is either of these, or ranges
    such as "0-1,39", where "-1" is the last. Indices past the end are an error, since they would name nothing.
    """
    if isinstance(spec, str):
        if not _lists(spec):
            return span(number(spec), total)
        return frozenset(index for low, high in _ranges(spec, total) for index in range(low, high + 1))
    if isinstance(spec, bool) or not isinstance(spec, int | float) or not 0 <= spec < math.inf:
        raise _unclear(spec)
    if isinstance(spec, float):
        if spec > 1:
            raise ValueError(
                f"A share of steps or layers lies between 0 and 1, not {spec}; write a count without a point."
            )
        spec = math.ceil(spec * total - 1e-9)  # 0.15 of 20 is 3, whatever the float product says
    return frozenset(range(min(spec, total)))


def check(spec: Span) -> None:
    """Raise ValueError if `spec` could not be understood for any total."""
    if isinstance(spec, str) and _lists(spec):
        _ranges(spec, 1 << 30)
    elif isinstance(spec, Span):
        span(spec, 1)
    else:
        raise _unclear(spec)


def number(text: str) -> int | float:
    """'3' -> 3, '0.2' -> 0.2."""
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            raise _unclear(text) from None


def _lists(text: str) -> bool:
    return "," in text or "-" in text


def _ranges(text: str, total: int) -> list[tuple[int, int]]:
    """The ranges in `text`, first and last index of each."""
    ranges = []
    for part in text.split(","):
        first, dash, last = part.strip().rpartition("-")
        try:
            if dash and first:
                low, high = int(first), int(last)
            else:
                low = high = int(part)
                low = high = low + total if low < 0 else low
        except ValueError:
            raise ValueError(
                f"{part.strip()!r} is not an index or a range in {text!r}; write for example '0-1,39'."
            ) from None
        if low > high:
            raise ValueError(f"{part.strip()!r} in {text!r} runs backwards; write the smaller index first.")
        if not 0 <= low <= high < total:
            raise ValueError(f"{part.strip()!r} in {text!r} lies outside 0..{total - 1}.")
        ranges.append((low, high))
    return ranges


def _unclear(spec: object) -> ValueError:
    return ValueError(
        f"{spec!r} names no steps or layers: give a count, a share from 0 to 1, or ranges like '0-1,39'."
    )
