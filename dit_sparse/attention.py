"""The data path, top to bottom."""

from weakref import WeakValueDictionary

import torch
from torch import Tensor

from dit_sparse.correction import Learned, learn_anchor, learn_reshape, pooled_tail, rectify, reshape
from dit_sparse.kernels.block_attention import block_attention
from dit_sparse.kernels.dense_attention import dense_attention, dense_backend
from dit_sparse.kernels.permute import permute
from dit_sparse.layout import Layout
from dit_sparse.order import token_order
from dit_sparse.plan import BlockPlan, Correction
from dit_sparse.routing import pool, route
from dit_sparse.state import Generation, Layer


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, layer: Layer, generation: Generation, *, text_mask: Tensor | None = None
) -> Tensor:
    """Self-attention of one layer at the generation's present moment.

    q, k, v [B, H, L, D] after RoPE and normalisation, vision tokens in raster order, then text; text_mask [B, Lt] bool
    is False for padding. Returns [B, H, L, D] like q. Raises ValueError on NaN or Inf in q, k, v under strict.
    """
    config, grid = generation.config, generation.grid
    if config.strict:
        _check_finite(layer, q=q, k=k, v=v)
    pairs = float(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
    text = 0 if grid is None else q.shape[2] - grid.tokens
    key_mask = None
    if text_mask is not None:
        key_mask = torch.cat([text_mask.new_ones(len(text_mask), k.shape[2] - text), text_mask], dim=1)
    generation.dense_backend = dense_backend(q.device, q.dtype, q.shape[-1])
    phase = generation.phase(layer)
    if phase == "dense":
        generation.tally.dense(generation.moment.step if generation.moment else 0, pairs)
        return dense_attention(q, k, v, key_mask=key_mask)[0]

    layout = Layout(grid, text, config.block_size(grid.tokens))
    order = token_order(config.order, grid, config.tile, q.device)
    if not order.is_raster:
        q, k, v = permute((q, k, v), order.take)
    kernel = dict(block=layout.block, key_mask=key_mask, text=text)

    def routed(density: float) -> BlockPlan:
        return route(pooled, layout, config, density=density, scale=scale, **texts).plan

    scale = q.shape[-1] ** -0.5
    texts = {} if not text else dict(text_keys=k[:, :, grid.tokens :], text_mask=text_mask)
    learned = generation.recall(layer) if phase == "sparse" and config.learns else None
    correction = Correction()
    pooled = None
    if learned is None or config.has_tail:
        pooled = pool(q, k, v, layout, config)
    if config.has_tail:
        correction = Correction(tail=pooled_tail(pooled, q.dtype, second_order=config.second_order))

    known = 0.0
    if learned is not None:  # between refreshes: the plan and what it lacked, with fresh q, k, v
        plan = learned.plan
        if config.method == "reshape":
            nth = generation.moment.step - learned.step
            correction = reshape(learned, nth, ramp=config.ramp, clamp=config.clamp, keep_mass=config.keep_mass)
        else:
            correction = Correction(tail=correction.tail, residual=learned.residual)
        out, _ = block_attention(q, k, v, plan, correction, **kernel)
        visited_blocks = learned.visited
    elif config.learns:  # a refresh: the best output we can have, and what the plan alone makes of this step
        plan = routed(config.density)
        part, part_lse = block_attention(q, k, v, plan, correction, **kernel)
        visited_blocks = plan.counts.sum()
        vision = slice(0, grid.tokens)
        if config.anchor_density is None or generation.recall(layer) is None:
            out, lse = dense_attention(q, k, v, key_mask=key_mask)
            known = pairs
        else:
            soft = routed(config.anchor_density)
            out, lse = block_attention(q, k, v, soft, correction, **kernel)
            visited_blocks = visited_blocks + soft.counts.sum()
        rho = None
        if config.method == "reshape":
            residual, rho = learn_reshape(
                out[:, :, vision], lse[..., vision], part[:, :, vision], part_lse[..., vision], generation.storage
            )
        else:
            residual = learn_anchor(out[:, :, vision], part[:, :, vision], generation.storage)
        generation.record(layer, Learned(plan, residual, rho, generation.moment.step, plan.counts.sum()))
    else:
        routing = route(pooled, layout, config, density=config.density, scale=scale, **texts)
        plan = routing.plan
        if config.method == "rectify":
            correction = rectify(routing, pooled, critical_mass=config.critical_mass)
        out, _ = block_attention(q, k, v, plan, correction, **kernel)
        visited_blocks = plan.counts.sum()

    rows = q.shape[0] * q.shape[1]
    text_pairs = rows * (text * k.shape[2] + grid.tokens * text)
    tail_pairs = rows * grid.tokens * layout.blocks if config.has_tail else 0
    generation.tally.sparse(
        generation.moment.step,
        phase,
        pairs,
        known + text_pairs + tail_pairs,
        visited_blocks * layout.block**2,
        plan.counts.sum() if learned is None else learned.visited,
        rows * layout.blocks**2,
    )
    return out if order.is_raster else permute((out,), order.place)[0]


def _check_finite(layer: Layer, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if not x.isfinite().all():
            raise ValueError(f"{name} of {layer.name} holds NaN or Inf, and strict=True accepts finite numbers only.")


# A custom op takes tensors, so it finds its generation by number. Weak: a generation ends with its session.
_generations: WeakValueDictionary[int, Generation] = WeakValueDictionary()


def address(generation: Generation, layer: int) -> Tensor:
    """[2] int64 on the CPU: where `attend` finds the generation and one of its layers.

    A tensor and not numbers, so that torch.compile makes one graph for all layers.
    """
    _generations[id(generation)] = generation
    return torch.tensor([id(generation), layer])


@torch.library.custom_op("dit_sparse::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, text_mask: Tensor | None, where: Tensor) -> Tensor:
    """`sparse_attention` of the layer at `where` (see `address`); q, k, v [B, H, L, D] -> [B, H, L, D]."""
    number, index = where.tolist()
    generation = _generations[number]
    out = sparse_attention(q, k, v, generation.layers[index], generation, text_mask=text_mask)
    # The layout that was promised to the compiler.
    return out if out.stride() == q.stride() else torch.empty_like(q).copy_(out)


@attend.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q)
