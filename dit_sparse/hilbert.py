"""The generalised Hilbert ("Gilbert") curve through a box of any size."""

from functools import cache

import numpy as np

Triple = tuple[int, int, int]


def hilbert_curve(frames: int, height: int, width: int) -> np.ndarray:
    """Raster index of the token at each place of the curve, [tokens] int64.

    Neighbours on the curve are neighbours in space and time, but for a few longer steps where a side is odd.
    The whole curve runs along the width, as in Rectified SpaAttn (arXiv 2511.19835).
    """

    # A box is cut into few shapes, each many times: every shape is walked once and then moved into place.
    @cache
    def walk(a: int, b: int, c: int) -> np.ndarray:
        """Offsets along the three sides of the box, in the order visited, [|a b c|, 3]."""
        if sorted((abs(a), abs(b), abs(c)))[1] <= 1:
            lines = [np.arange(abs(side)) * _sign(side) for side in (a, b, c)]
            return np.stack(np.meshgrid(*lines, indexing="ij"), axis=-1).reshape(-1, 3)
        pieces = [np.roll(walk(*sides), turn, axis=1) + start for start, turn, sides in _pieces(a, b, c)]
        return np.concatenate(pieces)

    return walk(width, height, frames) @ np.array([1, width, width * height], dtype=np.int64)


def _pieces(a: int, b: int, c: int) -> list[tuple[Triple, int, Triple]]:
    """The smaller boxes that a box is cut into, as (start, turn, sides), in the order visited.

    A side is a signed length. The walk enters a box at its origin and leaves it at the far end of its first side, so
    each piece starts one step from where the one before it ends. A turn of 1 means that the sides of the piece lie
    along (b, c, a), a turn of 2 along (c, a, b).
    """
    w, h, d = abs(a), abs(b), abs(c)
    a1, b1, c1 = _half(a), _half(b), _half(c)
    a2, b2, c2 = a - a1, b - b1, c - c1
    # The last token along a whole side or its first half.
    a_end, c_end, b1_end, c1_end = a - _sign(a), c - _sign(c), b1 - _sign(b), c1 - _sign(c)
    if 2 * w > 3 * h and 2 * w > 3 * d:
        return [((0, 0, 0), 0, (a1, b, c)), ((a1, 0, 0), 0, (a2, b, c))]
    if 3 * h > 4 * d:
        return [
            ((0, 0, 0), 1, (b1, c, a1)),
            ((0, b1, 0), 0, (a, b2, c)),
            ((a_end, b1_end, 0), 1, (-b1, c, -a2)),
        ]
    if 3 * d > 4 * h:
        return [
            ((0, 0, 0), 2, (c1, a1, b)),
            ((0, 0, c1), 0, (a, b, c2)),
            ((a_end, 0, c1_end), 2, (-c1, -a2, b)),
        ]
    return [
        ((0, 0, 0), 1, (b1, c1, a1)),
        ((0, b1, 0), 2, (c, a1, b2)),
        ((0, b1_end, c_end), 0, (a, -b1, -c2)),
        ((a_end, b1, c_end), 2, (-c, -a2, b2)),
        ((a_end, b1_end, 0), 1, (-b1, c1, -a2)),
    ]


def _half(side: int) -> int:
    """Half of a side, even where it can be: an even piece ends where the next one can begin."""
    half = side // 2
    return half + _sign(side) if half % 2 and abs(side) > 2 else half


def _sign(side: int) -> int:
    return (side > 0) - (side < 0)
