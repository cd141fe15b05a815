"""What is remembered from step to step, in bytes, and the memory there is for it."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch

from dit_sparse.config import SparseConfig, Storage
from dit_sparse.correction import Learned
from dit_sparse.head_kinds import HeadKinds
from dit_sparse.layout import TokenGrid
from dit_sparse.residual import bytes_per_row
from dit_sparse.routing import forced_blocks

# Share of the device's memory that is left to activations when the storage of residuals is chosen from what is free.
RESERVE = 0.15


def bytes_per_head(config: SparseConfig, grid: TokenGrid, head_dim: int, storage: Storage) -> float:
    """Bytes that one head remembers of one row of the batch: residuals, rho where the method has it, and the plan."""
    layout = config.layout(grid)
    _, forced = forced_blocks(
        config.order, grid, config.tile, layout.block, layout.key_size, config.neighbours, config.first_frame,
        torch.device("cpu"),
    )  # fmt: skip
    kept = layout.key_blocks if config.top_p else max(1, int(config.density * layout.key_blocks))
    plan = layout.blocks * (1 + min(kept + forced, layout.key_blocks)) * 4
    rho = grid.tokens * 4 if config.method == "reshape" else 0
    return grid.tokens * bytes_per_row(head_dim, storage) + rho + plan


def size(learned: Iterable[Learned | HeadKinds]) -> int:
    """Bytes that they take; a plan that several share counts once."""
    kept = [x for x in learned if isinstance(x, Learned)]
    plans = {id(x.plan): x.plan for x in kept}.values()
    tensors = [tensor for plan in plans for tensor in (plan.counts, plan.indices)]
    tensors += [tensor for x in kept for tensor in (x.residual.codes, x.residual.scales, x.rho) if tensor is not None]
    return sum(x.numel() * x.element_size() for x in tensors)


def free_bytes(device: torch.device) -> float:
    """What may be remembered on a device."""
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(0.0, free + cached - RESERVE * whole)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        # Only Linux tells what could be used without swapping.
        return math.inf
    kib = {name: int(value.split()[0]) for name, value in (line.split(":", 1) for line in lines)}
    return max(0.0, (kib["MemAvailable"] - RESERVE * kib["MemTotal"]) * 1024)
