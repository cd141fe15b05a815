"""What attention refuses before it begins."""

import torch
from torch import Tensor

from dit_sparse.layers import Layer


def check_mask(text_mask: Tensor, keys: int) -> None:
    if text_mask.dim() != 2 or text_mask.dtype != torch.bool or text_mask.shape[1] >= keys:
        raise ValueError(
            f"text_mask must be bool [B, text tokens] for {keys} keys, not {text_mask.dtype} {tuple(text_mask.shape)}."
        )


def check_finite(layer: Layer, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if not x.isfinite().all():
            raise ValueError(f"{name} of {layer.name} holds NaN or Inf, and strict=True accepts finite numbers only.")
