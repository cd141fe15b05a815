"""Which implementation of an op runs."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dit_sparse.plan import BlockPlan, Residual

try:
    import triton
except ImportError:  # Triton has no wheel for macOS and Windows; the torch implementations need none.
    triton = None

Impl = Literal["auto", "torch", "triton"]

# Tiles of a program from which it pays that programs start apart: about half a tile's time is lost to it.
APART = 32


@dataclass(frozen=True)
class Inputs:
    """What decides which implementation of block_attention runs; see there."""

    q: Tensor
    k: Tensor
    v: Tensor
    plan: BlockPlan
    block: int
    key_block: int
    key_mask: Tensor | None = None


def resolve(impl: Impl, x: Tensor) -> Literal["torch", "triton"]:
    """The implementation to run on tensors like x; a named one is taken or refused, never replaced.

    "auto" is triton for CUDA tensors of float16, bfloat16 or float32 and torch otherwise. Raises ValueError for an
    unknown name, and where triton would run but is not installed or does not take x's dtype.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"Unknown impl {impl!r}: choose from {', '.join(get_args(Impl))}.")
    takes = x.dtype in (torch.float16, torch.bfloat16, torch.float32)
    if impl == "torch" or (impl == "auto" and not (x.is_cuda and takes)):
        return "torch"
    if not takes:
        raise ValueError(f"impl 'triton' takes float16, bfloat16 or float32, not {x.dtype}; 'torch' takes it.")
    if triton is None:
        raise ValueError(f"impl {impl!r} on {x.device} tensors needs the triton package; impl 'torch' needs none.")
    return "triton"


def residual_kind(residual: Residual | None) -> int:
    """What kernels call it: 0 none, 1 full, 2 fp8, 3 int4, 4 full with one scale a row."""
    if residual is None:
        return 0
    weighed = residual.kind == "full" and residual.scales is not None
    return 4 if weighed else {"full": 1, "fp8": 2, "int4": 3}[residual.kind]


def lists_turn(device: torch.device, tiles: int, keys: int, head_dim: int) -> bool:
    """Whether so many tiles of 128 query rows begin in the middle of their lists in the Hopper kernel: where a head's
    keys and values, of 16 bits, are more than half of the cache (each half has copies of what it reads of the other),
    and a program has tiles enough to make up for starting late."""
    gpu = torch.cuda.get_device_properties(device)
    return tiles >= APART * gpu.multi_processor_count and 4 * keys * head_dim > gpu.L2_cache_size // 2


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Where kernels for tensors like x are to be launched: Triton takes the current device, not its tensors' one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def check_device(kernel: object, x: Tensor) -> None:
    """Raise ValueError where a compiled kernel is given anything but CUDA tensors; an interpreted one takes any."""
    if isinstance(kernel, triton.JITFunction) and not x.is_cuda:
        raise ValueError(f"impl 'triton' takes CUDA tensors, not {x.device} ones; 'torch' takes them.")
