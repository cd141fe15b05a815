"""Statistics of a profile as bytes in its file: a large model has tens of millions, known to a few per cent."""

from collections.abc import Mapping

import torch
from torch import Tensor

# The byte of what is no number; 0 to 254 are numbers.
NOTHING = 255
# Least and largest of what lies between two numbers, in equal steps.
SHARE, COSINE = (0.0, 1.0), (-1.0, 1.0)
BETWEEN = dict.fromkeys(("rho", "recall", "kept", "fade", "drift"), SHARE) | dict.fromkeys(
    ("together", "persist"), COSINE
)
# Relative errors in steps of a sixteenth of an octave, 4 %, from 2^-12, below which they are 0, to 14.
RELATIVE = ("error", "stale", "coarse")
PER_OCTAVE, LEAST = 16, -12


def encoded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Statistics as uint8, others as they are."""
    return {name: _bytes(name, x).contiguous() for name, x in tensors.items()}


def decoded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Statistics as float16, to within half a step if they were `encoded`, others as they are."""
    return {name: _numbers(name, x) for name, x in tensors.items()}


def _bytes(name: str, x: Tensor) -> Tensor:
    if name in BETWEEN:
        low, high = BETWEEN[name]
        codes = (x.float() - low) * ((NOTHING - 1) / (high - low))
    elif name in RELATIVE:
        codes = (x.float().log2() - LEAST) * PER_OCTAVE + 1
    else:
        return x
    return torch.where(codes.isnan(), NOTHING, codes.round().clamp(0, NOTHING - 1)).to(torch.uint8)


def _numbers(name: str, x: Tensor) -> Tensor:
    if x.dtype != torch.uint8 or name not in (*BETWEEN, *RELATIVE):
        return x
    codes = x.float()
    if name in BETWEEN:
        low, high = BETWEEN[name]
        found = low + codes * ((high - low) / (NOTHING - 1))
    else:
        found = torch.where(codes > 0, torch.exp2((codes - 1) / PER_OCTAVE + LEAST), 0.0)
    return found.masked_fill(codes == NOTHING, float("nan")).half()
