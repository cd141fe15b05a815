"""How what an anchor remembers is stored."""

import torch
from torch import Tensor

from dit_sparse.config import Storage
from dit_sparse.plan import Residual

E4M3_MAX = 448.0


def pack(x: Tensor, storage: Storage) -> Residual:
    """x [..., D] -> the residual in `storage`: 2, 1 + 4/D or 1/2 + 4/D bytes a number; D even for int4."""
    if storage == "bf16":
        return Residual(x.to(torch.bfloat16))
    limit = E4M3_MAX if storage == "fp8" else 7.0
    scales = x.abs().amax(-1).float().div_(limit).clamp_(min=torch.finfo(torch.float32).tiny)
    x = x.float() / scales[..., None]
    if storage == "fp8":
        # A row of nothing but zeros divides to zeros; rounding may pass the limit by a hair, which e4m3 calls NaN.
        codes = x.clamp_(-limit, limit).to(torch.float8_e4m3fn).view(torch.uint8)
        return Residual(codes, scales, "fp8")
    low, high = x.round_().clamp_(-limit, limit).add_(8).to(torch.uint8).chunk(2, dim=-1)
    return Residual(low | (high << 4), scales, "int4")


def weighed(residual: Residual, weight: Tensor) -> Residual:
    """The residual times a weight [...] a row; nothing of its own size is made."""
    scales = weight if residual.scales is None else residual.scales * weight
    return Residual(residual.codes, scales.float().expand(residual.codes.shape[:-1]).contiguous(), residual.kind)


def bytes_per_row(head_dim: int, storage: Storage) -> float:
    """Bytes that one row of one head takes."""
    return {"bf16": 2.0 * head_dim, "fp8": head_dim + 4.0, "int4": head_dim / 2 + 4.0}[storage]


def unpack(residual: Residual) -> Tensor:
    """The residual as numbers, [..., D]."""
    if residual.kind == "full":
        return residual.codes if residual.scales is None else residual.codes * residual.scales[..., None]
    assert residual.scales is not None
    if residual.kind == "fp8":
        values = residual.codes.view(torch.float8_e4m3fn).float()
    else:  # The low halves of the bytes are the first D/2 channels, each a signed number plus 8.
        values = torch.cat([residual.codes & 15, residual.codes >> 4], dim=-1).float() - 8
    return values * residual.scales[..., None]
