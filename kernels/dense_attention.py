"""Dense attention with its log-sum-exp, on the fastest kernel installed."""

from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, get_args

import torch
from torch import Tensor

from dit_sparse.kernels.block_attention import block_attention, chosen_impl, on_hopper
from dit_sparse.kernels.implementation import Inputs, lists_turn, on_device
from dit_sparse.plan import BlockPlan

# Tokens from which the Hopper kernel is faster than cuDNN's in bfloat16, at 64 and 128 channels, and as fast in
# float16: fewer do not make up for its launch (H200, 2026-11-27, torch 2.11, triton 3.6).
LONG = 16384

Backend = Literal["fa4", "cudnn", "flash", "cpu", "block"]


@lru_cache(maxsize=64)
def dense_backend(
    device: torch.device, dtype: torch.dtype, head_dim: int, tokens: int, heads: int, masked: bool = False
) -> Backend:
    """The fastest dense kernel here for so many tokens, queries and keys alike, and heads, of all rows of a batch:
    `dense_library`, but for long ones in bfloat16 on Hopper our own block kernel with every block listed.
    FlashAttention-4 is slower only where our lists turn."""
    found = dense_library(device, dtype, head_dim, masked)
    if found not in ("fa4", "cudnn") or dtype != torch.bfloat16 or tokens < LONG or not on_hopper(dtype, head_dim):
        return found
    if torch.cuda.get_device_capability(device)[0] != 9:
        return found
    tiles = heads * -(-tokens // 128)
    return "block" if found == "cudnn" or lists_turn(device, tiles, tokens, head_dim) else found


def visits_once(device: torch.device, dtype: torch.dtype, head_dim: int, block: int, tokens: int) -> bool:
    """Whether anchors in such blocks visit each pair once in full precision: on Hopper, of long sequences."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return hopper and on_hopper(dtype, head_dim) and block == 128 and tokens >= LONG


def dense_library(device: torch.device, dtype: torch.dtype, head_dim: int, masked: bool = False) -> Backend:
    """The fastest dense kernel of others: FlashAttention-4, cuDNN, torch's FlashAttention-2, torch's CPU kernel, or,
    where none of them takes the dtype, the head dimension or a key mask, our own."""
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda" or masked or dtype not in (torch.float16, torch.bfloat16):
        return "block"
    major, _ = torch.cuda.get_device_capability(device)
    if major in (9, 10) and head_dim in (64, 96, 128) and _installed("flash-attn-4"):
        return "fa4"
    if major >= 9 and head_dim <= 128 and torch.backends.cudnn.is_available():
        return "cudnn"
    return "flash" if major >= 8 else "block"


def _on_hopper_kernel(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether these tensors, their strides and their number of blocks are what the Hopper kernel takes."""
    plan = BlockPlan.full(*q.shape[:2], -(-q.shape[2] // 128), -(-k.shape[2] // 128), q.device)
    return chosen_impl("auto", Inputs(q, k, v, plan, 128, 128)) == "gluon"


def _installed(distribution: str) -> bool:
    # Not by module: flash-attn 2 has a flash_attn too, and looking inside a missing package raises.
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    backend: Backend | Literal["auto"] = "auto",
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v over every key: q [B, H, Lq, D], k and v [B, H, Lk, D].

    key_mask bool is False for keys that nothing attends to: [B, Lk], or [B, n] of the last n keys, which the block
    kernel is faster with.

    Returns out like q, and lse [B, H, Lq] float32 (float64 for float64), natural logarithm; rows that see no key give
    zeros and -inf. backend "auto" is `dense_backend`; a named one never falls back. Raises ValueError for an unknown
    backend, and for one that does not take the key mask or the device.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys = k.shape[2]
    if key_mask is not None and (
        key_mask.dim() != 2 or len(key_mask) != len(k) or key_mask.shape[1] > keys or key_mask.dtype != torch.bool
    ):
        raise ValueError(
            f"key_mask must be bool {(k.shape[0], keys)}, or of fewer keys, the last, not {key_mask.dtype} "
            f"{tuple(key_mask.shape)}."
        )
    if key_mask is not None and key_mask.shape[1] == 0:
        key_mask = None
    if backend == "auto":
        backend = dense_backend(q.device, q.dtype, q.shape[-1], keys, q.shape[0] * q.shape[1], key_mask is not None)
        if backend == "block" and q.is_cuda and key_mask is None and not _on_hopper_kernel(q, k, v):
            backend = dense_library(q.device, q.dtype, q.shape[-1])
    if backend not in get_args(Backend):
        raise ValueError(f"Unknown dense kernel {backend!r}: choose from auto, {', '.join(get_args(Backend))}.")
    if backend != "block" and q.is_cuda == (backend == "cpu"):
        raise ValueError(f"The dense kernel {backend!r} does not run on {q.device}; 'auto' takes one that does.")
    if key_mask is not None and backend not in ("cpu", "block"):
        raise ValueError(f"The dense kernel {backend!r} takes no key mask; 'cpu' and 'block' do.")
    match backend:
        case "cpu":
            bias = None
            if key_mask is not None:
                key_mask = _of_all(key_mask, keys)
                bias = torch.zeros(key_mask.shape, dtype=q.dtype).masked_fill_(~key_mask, float("-inf"))[:, None, None]
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, False, attn_mask=bias, scale=scale
            )
            # Where a row sees no key, the kernel says 0.
            return out, lse if key_mask is None else lse.masked_fill(~key_mask.any(-1)[:, None, None], float("-inf"))
        case "cudnn":
            out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
                q, k, v, None, True, 0.0, False, False, scale=scale
            )
            return out, lse.reshape(q.shape[:-1])
        case "flash":
            out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)
            return out, lse
        case "fa4":
            from flash_attn.cute import flash_attn_func

            with on_device(q):
                out, lse = flash_attn_func(
                    *(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale, return_lse=True
                )
            return out.transpose(1, 2), lse
        case _:
            size, text = 128, 0
            batch, heads, queries, _ = q.shape
            if key_mask is not None and key_mask.shape[1] < min(queries, keys):
                # As text, of whose mask the other keys' blocks know nothing.
                text = key_mask.shape[1]
            elif key_mask is not None:
                key_mask = _of_all(key_mask, keys)
            rows, columns = queries - text, keys - text
            plan = BlockPlan.full(batch, heads, -(-rows // size), -(-columns // size), q.device)
            return block_attention(q, k, v, plan, block=size, scale=scale, key_mask=key_mask, text=text)


def _of_all(key_mask: Tensor, keys: int) -> Tensor:
    """[B, n] of the last keys -> [B, keys]."""
    return torch.nn.functional.pad(key_mask, (keys - key_mask.shape[1], 0), value=True)
