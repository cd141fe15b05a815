"""Attention over listed key blocks, with everything a method adds for the rest done before the output is written."""

from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from dit_sparse.kernels import block_attention_torch
from dit_sparse.kernels.implementation import Impl, Inputs, on_device, resolve
from dit_sparse.kernels.tail_weights import limit_of
from dit_sparse.plan import BlockPlan, Correction, Residual, SecondOrder, Tail

try:
    from dit_sparse.kernels import block_attention_triton
except ImportError:  # Triton has no wheel for macOS and Windows; the torch implementation needs none.
    block_attention_triton = None

try:
    from dit_sparse.kernels import block_attention_hopper as hopper
    from dit_sparse.kernels import block_attention_hopper8 as hopper8
    from dit_sparse.kernels import hopper_tiles
except ImportError:  # Triton without Gluon, or none.
    hopper = hopper8 = hopper_tiles = None

# auto, or one of: PyTorch; Triton for any GPU; Gluon, Triton's lower-level dialect, for Hopper.
AttentionImpl = Literal[Impl, "gluon"]
# full, or int8 products of queries and keys and e4m3 products with the values, as SageAttention2 has them.
Precision = Literal["full", "8bit"]


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    correction: Correction | None = None,
    *,
    block: int,
    key_block: int | None = None,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    text: int = 0,
    scatter: Tensor | None = None,
    impl: AttentionImpl = "auto",
    precision: Precision = "full",
    check_plan: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention over the planned key blocks, then `correction`: out = scale * merge(exact, tail) + residual.

    q [B, H, Lq, D], k and v [B, H, Lk, D], float16, bfloat16 or float32 (torch also float64), D a multiple of 8 up to
    256, any strides with the last dimension contiguous. The last `text` rows of q attend to every key and the last
    `text` keys are attended to by every row; the plan covers the others in blocks of `block`, and
    keys in those of key_block, which divides `block` and equals it unless given. key_mask bool is False for padding,
    which may hold any finite numbers: [B, text] is of the text keys alone, which slows no other step of a GPU kernel
    down; [B, Lk] of all keys, which takes narrower steps. scale is D^-1/2 unless given. scatter [n] int32 or int64, a
    permutation of 0..n-1, which is not checked on the device, says where each of the first n rows of the output is
    written; lse stays in the order of q.

    Returns out like q, and lse [B, H, Lq] float32 (float64 for float64), natural logarithm, of the exact part; rows
    that see no key give zeros and -inf. impl "auto" is gluon on Hopper where it takes the inputs (16-bit, 64 or 128
    channels, blocks of 128, of keys also 64, no mask but of text keys), triton on CUDA and torch elsewhere. A named
    one never falls back, and triton refuses float32 beyond 128 channels, which would not fit its registers. precision
    "8bit" (SageAttention2, arXiv 2411.10958, section 3: a unit a query row, a key block without the keys' mean, and a
    channel of values) takes what refused_8bit does not refuse, and errs by some percent. Raises ValueError where
    shapes, dtypes or devices do not fit together, and with check_plan, which waits for the device, where the plan is
    illegal; without, an illegal plan reads memory that is not its own.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    correction = correction or Correction()
    key_block = block if key_block is None else key_block
    _check(q, k, v, plan, correction, block, key_block, key_mask, text)
    if scatter is not None and (
        scatter.dim() != 1
        or scatter.dtype not in (torch.int32, torch.int64)
        or scatter.numel() > q.shape[2]
        or scatter.device != q.device
    ):
        raise ValueError(
            f"scatter must be [n] int32 or int64 on {q.device}, n at most {q.shape[2]}, not {tuple(scatter.shape)} "
            f"{scatter.dtype} on {scatter.device}."
        )
    if check_plan:
        plan.check()
    tail, residual = correction.tail, correction.residual
    second = tail and tail.second
    return _block_attention(
        q,
        k,
        v,
        plan.counts,
        plan.indices,
        plan.key_blocks,
        block,
        key_block,
        scale,
        key_mask,
        text,
        scatter,
        tail and tail.keys,
        tail and tail.values,
        tail and tail.log_weights,
        second and second.q_mean,
        second and second.q_var,
        second and second.variances,
        limit_of(tail, q.dtype),
        correction.scale,
        residual and residual.codes,
        residual and residual.scales,
        residual.kind if residual else "full",
        impl,
        precision,
    )


# Channels that the Hopper kernel of 16 bits takes, and its sizes of key blocks.
_DIMS, _KEYS = (64, 128), (64, 128)


def on_hopper(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the Hopper kernel takes such inputs in blocks of 128, all else being in order."""
    known = hopper_tiles is not None and hopper_tiles.TRITON >= (3, 6)
    return known and dtype in (torch.float16, torch.bfloat16) and head_dim in _DIMS


def _refused(inputs: Inputs, head_dims: tuple[int, ...], key_sizes: tuple[int, ...]) -> str | None:
    """Why the Hopper kernels do not take these inputs, or None."""
    if hopper_tiles is None or not inputs.q.is_cuda:
        return "needs CUDA tensors and triton 3.6 or newer"
    return hopper_tiles.refusal(inputs, head_dims, key_sizes)


def refused_8bit(inputs: Inputs) -> str | None:
    """Why block_attention cannot do these inputs with precision "8bit", or None."""
    return _refused(inputs, (128,), (128,))


def chosen_impl(
    impl: AttentionImpl, inputs: Inputs, precision: Precision = "full"
) -> Literal["torch", "triton", "gluon", "gluon, 8bit"]:
    """The implementation that block_attention runs for these inputs; raises ValueError where it refuses them."""
    if impl not in get_args(AttentionImpl):
        raise ValueError(f"Unknown impl {impl!r}: choose from {', '.join(get_args(AttentionImpl))}.")
    if precision not in get_args(Precision):
        raise ValueError(f"Unknown precision {precision!r}: choose from {', '.join(get_args(Precision))}.")
    if precision == "8bit":
        if impl not in ("auto", "gluon"):
            raise ValueError(f"precision '8bit' is there for impl auto and gluon, not for {impl!r}.")
        refused = refused_8bit(inputs)
        if refused is not None:
            raise ValueError(f"precision '8bit' {refused}.")
        return "gluon, 8bit"
    q = inputs.q
    if impl == "gluon" or (impl == "auto" and q.is_cuda):
        refused = _refused(inputs, _DIMS, _KEYS)
        if refused is None:
            return "gluon"
        if impl == "gluon":
            raise ValueError(f"impl 'gluon' {refused}.")
    wide = q.dtype == torch.float32 and q.shape[-1] > 128
    if impl == "triton" and wide:
        raise ValueError(f"impl 'triton' takes float32 up to head dimension 128, not {q.shape[-1]}; 'torch' takes it.")
    chosen = resolve("torch" if wide else impl, q)
    for name, size in (("block", inputs.block), ("key_block", inputs.key_block)):
        if chosen == "triton" and size not in (16, 32, 64, 128):
            raise ValueError(f"{name} must be 16, 32, 64 or 128 for impl 'triton', not {size}.")
    return chosen


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    correction: Correction,
    block: int,
    key_block: int,
    key_mask: Tensor | None,
    text: int,
) -> None:
    if q.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q [B, H, Lq, D] and k, v [B, H, Lk, D] must agree, but they are {tuple(q.shape)}, {tuple(k.shape)} and "
            f"{tuple(v.shape)}."
        )
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64) or {k.dtype, v.dtype} != {q.dtype}:
        raise ValueError(f"q, k and v must share one float type, but they are {q.dtype}, {k.dtype} and {v.dtype}.")
    if dim % 8 or not 8 <= dim <= 256:
        raise ValueError(f"The head dimension must be a multiple of 8 up to 256, not {dim}.")
    if {q.stride(-1), k.stride(-1), v.stride(-1)} != {1}:
        raise ValueError("The last dimension of q, k and v must be contiguous.")
    if block < 1:
        raise ValueError(f"block must be at least 1, not {block}.")
    if not 1 <= key_block <= block or block % key_block:
        raise ValueError(f"key_block must divide block {block}, not {key_block}.")
    if not 0 <= text < min(queries, keys):
        raise ValueError(f"text must leave at least one vision token of {min(queries, keys)}, but it is {text}.")
    rows, key_blocks = -(-(queries - text) // block), -(-(keys - text) // key_block)
    if plan.counts.shape != (batch, heads, rows) or plan.key_blocks != key_blocks:
        raise ValueError(
            f"The plan covers {tuple(plan.counts.shape)} query blocks and {plan.key_blocks} key blocks, but the "
            f"inputs have {(batch, heads, rows)} of {block} tokens and {key_blocks} of {key_block}."
        )
    masks = ((batch, keys), (batch, text)) if text else ((batch, keys),)
    if key_mask is not None and (key_mask.shape not in masks or key_mask.dtype != torch.bool):
        raise ValueError(
            f"key_mask must be bool {' or '.join(map(str, masks))}, not {key_mask.dtype} {tuple(key_mask.shape)}."
        )
    per_row = ((batch, heads, queries - text), (batch, heads, rows))
    if correction.scale is not None and correction.scale.shape not in per_row:
        raise ValueError(f"scale must be one of {per_row}, not {tuple(correction.scale.shape)}.")
    if (residual := correction.residual) is not None:
        width = dim // 2 if residual.kind == "int4" else dim
        if residual.codes.shape[:-1] not in per_row or residual.codes.shape[-1] != width:
            raise ValueError(
                f"A {residual.kind} residual must be one of {per_row} by {width}, not {tuple(residual.codes.shape)}."
            )
        needed = residual.kind != "full" or residual.scales is not None
        if needed and (residual.scales is None or residual.scales.shape != residual.codes.shape[:-1]):
            told, rows_of = residual.scales, tuple(residual.codes.shape[:-1])
            raise ValueError(
                f"A {residual.kind} residual needs one scale a row, {rows_of}, not "
                f"{None if told is None else tuple(told.shape)}."
            )
    if correction.tail is not None:
        check_tail(correction.tail, q, rows, key_blocks)


def check_tail(tail: Tail, q: Tensor, rows: int, key_blocks: int) -> None:
    """Raise ValueError unless the tail is one of so many key blocks for q [B, H, L, D] in so many query blocks."""
    batch, heads, _, dim = q.shape
    for name, x in (("keys", tail.keys), ("values", tail.values)):
        if x.shape != (batch, heads, key_blocks, dim):
            raise ValueError(f"tail.{name} must be {(batch, heads, key_blocks, dim)}, not {tuple(x.shape)}.")
    shapes = (key_blocks,), (batch, key_blocks)
    if tail.log_weights.shape not in shapes:
        raise ValueError(f"tail.log_weights must be one of {shapes}, not {tuple(tail.log_weights.shape)}.")
    if (second := tail.second) is None:
        return
    wide = torch.promote_types(q.dtype, torch.float32)
    for name, x, blocks in (
        ("q_mean", second.q_mean, rows), ("q_var", second.q_var, rows), ("variances", second.variances, key_blocks)
    ):  # fmt: skip
        if x.shape != (batch, heads, blocks, dim) or x.dtype != wide:
            raise ValueError(
                f"tail.second.{name} must be {(batch, heads, blocks, dim)} {wide}, not {tuple(x.shape)} {x.dtype}."
            )
    if not second.limit > 0:
        raise ValueError(f"tail.second.limit is a positive number, or inf, not {second.limit!r}.")


@torch.library.custom_op("dit_sparse::block_attention", mutates_args=())
def _block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    key_blocks: int,
    block: int,
    key_block: int,
    scale: float,
    key_mask: Tensor | None,
    text: int,
    scatter: Tensor | None,
    tail_keys: Tensor | None,
    tail_values: Tensor | None,
    tail_log_weights: Tensor | None,
    tail_q_mean: Tensor | None,
    tail_q_var: Tensor | None,
    tail_variances: Tensor | None,
    tail_limit: float,
    row_scale: Tensor | None,
    residual: Tensor | None,
    residual_scales: Tensor | None,
    residual_kind: str,
    impl: str,
    precision: str,
) -> tuple[Tensor, Tensor]:
    plan = BlockPlan(counts, indices, key_blocks)
    second = None if tail_q_mean is None else SecondOrder(tail_q_mean, tail_q_var, tail_variances, tail_limit)
    tail = None if tail_keys is None else Tail(tail_keys, tail_values, tail_log_weights, second)
    added = None if residual is None else Residual(residual, residual_scales, residual_kind)
    correction = Correction(row_scale, added, tail)
    # Here and not before, so that a compiler need not look into it.
    chosen = chosen_impl(impl, Inputs(q, k, v, plan, block, key_block, key_mask), precision)
    if chosen == "torch":
        return block_attention_torch.attend(
            q, k, v, plan, correction, block, key_block, scale, key_mask, text, scatter
        )
    every = _every(key_blocks, q.device)
    scatter = None if scatter is None else scatter.contiguous()
    with on_device(q):
        if chosen == "gluon, 8bit":
            return hopper8.attend(q, k, v, plan, correction, scale, key_mask, text, every, scatter)
        if chosen == "gluon":
            return hopper.attend(q, k, v, plan, correction, key_block, scale, key_mask, text, every, scatter)
        return block_attention_triton.attend(
            q, k, v, plan, correction, block, key_block, scale, key_mask, text, every, scatter
        )


@_block_attention.register_fake
def _(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))


@lru_cache(maxsize=32)
def _every(blocks: int, device: torch.device) -> Tensor:
    """The list of a text row: all blocks."""
    return torch.arange(blocks, dtype=torch.int32, device=device)
