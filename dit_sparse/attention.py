"""The data path, top to bottom."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dit_sparse.checks import check_finite, check_mask
from dit_sparse.config import SparseConfig, Storage
from dit_sparse.correction import Learned, calibrated, learn_anchor, learn_reshape, pooled_tail, rectify, reshape
from dit_sparse.followers import together
from dit_sparse.head_kinds import KINDS, HeadKinds, head_kinds
from dit_sparse.kernels.block_attention import Precision, block_attention, chosen_impl, refused_8bit
from dit_sparse.kernels.block_select import marked
from dit_sparse.kernels.dense_attention import LONG, dense_attention, dense_backend
from dit_sparse.kernels.implementation import Inputs
from dit_sparse.kernels.merge import merge_into, with_tail
from dit_sparse.kernels.permute import permute, permute_pooled
from dit_sparse.layout import Layout
from dit_sparse.order import TokenOrder, token_order, vision_first
from dit_sparse.patterns import Pattern, order_of, pattern_plan, tile_of
from dit_sparse.plan import BlockPlan, Correction
from dit_sparse.residual import weighed
from dit_sparse.routing import Pooled, Routing, fine_scores, pool, pooled_of, route, wanted
from dit_sparse.some_heads import put, take
from dit_sparse.state import Generation, Layer, Part


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, layer: Layer, generation: Generation, *, text_mask: Tensor | None = None
) -> Tensor:
    """Self-attention of one layer at the generation's present moment.

    q, k, v [B, H, L, D] after RoPE and normalisation, vision tokens in raster order, with text before or behind as the
    generation says; text_mask [B, Lt] bool is False for padding. Returns [B, H, L, D] like q. Raises ValueError
    where these do not fit the generation's grid, and on NaN or Inf in q, k, v under strict.
    """
    if generation.config.strict:
        check_finite(layer, q=q, k=k, v=v)
    if text_mask is not None:
        check_mask(text_mask, k.shape[2])
    generation.attending(len(q))
    heads = q.shape[0] * q.shape[1]
    generation.dense_backend = dense_backend(q.device, q.dtype, q.shape[-1], k.shape[2], heads, text_mask is not None)
    parts = together(generation.parts(layer), generation, q.shape[1])
    if len(parts) == 1:
        return attend_part(q, k, v, parts[0], generation, text_mask)
    out = torch.empty_like(q)
    for part in parts:
        assert part.heads is not None
        own = (take(x, part.heads) for x in (q, k, v))
        put(out, part.heads, attend_part(*own, part, generation, text_mask))
    return out


def attend_part(
    q: Tensor, k: Tensor, v: Tensor, part: Part, generation: Generation, text_mask: Tensor | None
) -> Tensor:
    """`sparse_attention` of heads that do the same."""
    layer, config, moment = part.layer, part.config, generation.moment
    pairs = float(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
    if moment is None or generation.grid is None or part.phase == "dense":
        generation.tally.dense(moment.step if moment else 0, pairs)
        return _dense(q, k, v, layer, generation, text_mask)

    tokens = generation.grid.tokens
    before, behind = generation.around(layer, q.shape[2])
    text = before + behind
    if text_mask is not None and text_mask.shape[1] != text:
        raise ValueError(
            f"{layer.name} was given {q.shape[2]} tokens, but its grid has {tokens} and {text_mask.shape[1]} of text."
        )
    layout = config.layout(generation.grid, text)
    if text == 0:
        text_mask = None
    if config.method == "svg":
        first = vision_first("raster", layout.grid, config.tile, q.device, before)
        if before:
            q, k, v = permute((q, k, v), first.take)
        out = _by_kind(q, k, v, part, layout, generation, text_mask, pairs)
        return permute((out,), first.place)[0] if before else out
    order = _order(config, layout, q.device, before)
    routes = part.phase == "anchor" or not config.learns
    pooled = scatter = None
    # On a GPU statistics come with the permutation, and the kernel's store undoes it: two passes over memory less.
    if not order.is_raster and q.is_cuda and (config.has_tail or (routes and not config.has_pattern)):
        lengths = layout.key_lengths(q.device)
        wants = wanted(config, routes=routes)
        (q, k, v), stats = permute_pooled((q, k, v), order.take, lengths, block=layout.key_size, wants=wants)
        pooled = pooled_of(stats, layout, lengths)
    elif not order.is_raster:
        q, k, v = permute((q, k, v), order.take)
    if not order.is_raster and q.is_cuda and (not config.learns or part.phase != "anchor"):
        scatter = order.take
    learned = part.learned or generation.recall(layer)
    call = Call(
        q, k, v, layout, config, text_mask,
        routes=routes, precision=generation.config.precision, given=pooled, scatter=scatter,
    )  # fmt: skip
    if not config.learns:
        out, routed = _at_once(call, part.rho)
    elif part.phase == "anchor":
        # A profile knows what its first anchor costs; a uniform setting's is dense.
        soft = learned is not None or generation.profile is not None
        plan = None if config.has_pattern else generation.plan_at_step(layer, config)
        out, learned = _refresh(call, moment.step, part.storage, plan, soft=soft)
        generation.record(layer, learned)
        routed = learned.visited
    else:
        assert isinstance(learned, Learned)
        out, routed = _between(call, learned, moment.step, part.fade), learned.visited
    possible = q.shape[0] * q.shape[1] * layout.blocks * layout.key_blocks
    listed = call.listed[0] if len(call.listed) == 1 else torch.stack(call.listed).sum()
    visited = listed * (layout.block * layout.key_size)
    _account(call, layer, generation)
    generation.tally.sparse(moment.step, part.phase, pairs, call.known, visited, routed, possible)
    return out if order.is_raster or scatter is not None else permute((out,), order.place)[0]


def _dense(q: Tensor, k: Tensor, v: Tensor, layer: Layer, generation: Generation, text_mask: Tensor | None) -> Tensor:
    """By the kernel that the user chose for the layer, else by the fastest; the tokens are in the model's order."""
    key_mask = None
    if text_mask is not None:
        before, end = _vision(k, layer, generation, text_mask)
        vision = text_mask.new_ones(len(text_mask), end - before)
        key_mask = torch.cat([text_mask[:, :before], vision, text_mask[:, before:]], dim=1)
    chosen = generation.dense and generation.dense(layer, q, k, v, key_mask)
    return fastest_dense(q, k, v, layer, generation, text_mask) if chosen is None else chosen


def fastest_dense(
    q: Tensor, k: Tensor, v: Tensor, layer: Layer, generation: Generation, text_mask: Tensor | None
) -> Tensor:
    """What a dense step is where the user chose no kernel, and what a measurement of one times; the tokens are in the
    model's order, and text_mask [B, text] bool is False for padding."""
    if text_mask is not None:
        before, end = _vision(k, layer, generation, text_mask)
        if before:
            # It is all the same to a query where keys stand, and a mask of the last ones is faster.
            k, v = (torch.cat([x[:, :, before:end], x[:, :, :before], x[:, :, end:]], dim=2) for x in (k, v))
    return dense_attention(q, k, v, key_mask=text_mask)[0]


def _vision(k: Tensor, layer: Layer, generation: Generation, text_mask: Tensor) -> tuple[int, int]:
    """Where the vision tokens begin and end."""
    text = text_mask.shape[1]
    before = min(generation.text[0], text) if layer.joint else 0
    return before, k.shape[2] - text + before


def _account(call: "Call", layer: Layer, generation: Generation) -> None:
    """Tell the generation which kernel a call ran, and how much 8 bits err in this layer, once in a run."""
    generation.kernel = call.kernel
    if call.refused is not None:
        generation.fall_back(f"attention in 8 bits {call.refused}", to="full-precision")
    elif call.precision == "8bit" and call.plans and layer.name not in generation.tally.precision_errors:
        generation.tally.precision_errors[layer.name] = call.error_of_8bit(call.plans[-1])


def _order(config: SparseConfig, layout: Layout, device: torch.device, before: int) -> TokenOrder:
    if config.has_pattern:
        pattern: Pattern = config.method  # type: ignore[assignment]
        return vision_first(order_of(pattern), layout.grid, tile_of(layout.grid, layout.block), device, before)
    return vision_first(config.order, layout.grid, config.tile, device, before)


def _by_kind(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    part: Part,
    layout: Layout,
    generation: Generation,
    text_mask: Tensor | None,
    pairs: float,
) -> Tensor:
    """Sparse VideoGen: a dense step says which pattern each head has; after it, each kind in an order of its own."""
    config, moment = part.config, generation.moment
    assert moment is not None
    if part.phase == "anchor":
        kinds = head_kinds(q, k, v, layout, config.density, config.first_frame, text_mask, moment.step)
        generation.record(part.layer, kinds)
        out = dense_attention(q, k, v, key_mask=text_mask)[0]
    else:
        recalled = generation.recall(part.layer)
        assert isinstance(recalled, HeadKinds)
        kinds, out = recalled, torch.empty_like(q)
    known, listed = (pairs, []) if part.phase == "anchor" else (0.0, [])
    routed = []
    for kind, heads in zip(KINDS, kinds.heads, strict=True):
        if not heads:
            continue
        rows = (q.shape[0], len(heads))
        plan = pattern_plan(kind, layout.grid, layout.block, config.density, config.first_frame, rows, q.device)
        routed.append(plan.counts.sum())
        if part.phase == "anchor":
            continue
        order = token_order(order_of(kind), layout.grid, tile_of(layout.grid, layout.block), q.device)
        own = tuple(x[:, list(heads)] for x in (q, k, v))
        if not order.is_raster:
            own = permute(own, order.take)
        call = Call(*own, layout, config, text_mask, routes=False, precision=generation.config.precision)
        some = call.over(plan, routed[-1], Correction())[0]
        out[:, list(heads)] = some if order.is_raster else permute((some,), order.place)[0]
        known += call.known
        _account(call, part.layer, generation)
        listed += call.listed
    visited = torch.stack(listed).sum() * layout.block**2 if listed else routed[0].new_zeros(())
    possible = q.shape[0] * q.shape[1] * layout.blocks**2
    generation.tally.sparse(moment.step, part.phase, pairs, known, visited, torch.stack(routed).sum(), possible)
    return out


def _at_once(call: "Call", rho: Tensor | None) -> tuple[Tensor, Tensor]:
    """Route, and stand in for the rest with what this call itself tells (none, tail, rectify), or weigh the tail by
    the rho that calibration measured."""
    correction = call.tail
    if call.config.method == "rectify":
        routing = call.route(call.config.density)
        plan, correction = routing.plan, rectify(routing, call.pooled, critical_mass=call.config.critical_mass)
    else:
        plan = call.plan(call.config.density)
    if rho is not None:
        assert correction.tail is not None
        vision = call.q[:, :, : call.layout.grid.tokens]
        correction = calibrated(vision, plan, correction.tail, rho, block=call.layout.block, scale=call.scale)
        call.known += vision.shape[0] * vision.shape[1] * vision.shape[2] * call.layout.blocks
    routed = plan.counts.sum()
    return call.over(plan, routed, correction)[0], routed


def _refresh(
    call: "Call", step: int, storage: Storage | None, given: BlockPlan | None, *, soft: bool
) -> tuple[Tensor, Learned]:
    """The best output there is, and what the steps between would make of this one (anchor, reshape,
    ditfastattn) with the given plan, or one of this call: they differ by what is to be learned. After the first anchor
    the best may be a denser plan."""
    assert storage is not None
    config, vision = call.config, slice(0, call.layout.grid.tokens)
    plan = call.plan(config.density) if given is None else given
    routed = plan.counts.sum()
    denser = None
    if soft and config.anchor_density is not None:
        denser = call.route(config.anchor_density).plan
    if call.visits_once(plan):
        (part, part_lse), (out, lse) = call.both(plan, routed, denser)
    else:
        if denser is not None and given is not None:
            # Its own plan is part of the denser one, but another branch's need not be.
            denser = marked(denser.mask() | plan.mask())
        part, part_lse = call.over(plan, routed, call.tail)
        out, lse = call.dense() if denser is None else call.over(denser, denser.counts.sum(), call.tail)
    rho = None
    if config.method == "reshape":
        residual, rho = learn_reshape(
            out[:, :, vision], lse[..., vision], part[:, :, vision], part_lse[..., vision], storage
        )
    else:
        residual = learn_anchor(out[:, :, vision], part[:, :, vision], storage)
    return out, Learned(plan, residual, rho, step, routed, config)


def _between(call: "Call", learned: Learned, step: int, fade: Tensor | None) -> Tensor:
    """Between refreshes: the plan and what it lacked, or as much of it as `fade` says, with fresh q, k and v."""
    config = call.config
    if config.method == "reshape":
        # A layer that runs again in the forward it learned from, as under checkpointing, is at its first step.
        nth = max(step - learned.step, 1)
        correction = reshape(learned, nth, ramp=config.ramp, clamp=config.clamp, keep_mass=config.keep_mass)
    else:
        whole = learned.residual
        correction = replace(call.tail, residual=whole if fade is None else weighed(whole, fade[None, :, None]))
    return call.over(learned.plan, learned.visited, correction)[0]


@dataclass
class Call:
    """The inputs of one call in routing order, what the methods do with them, and the token pairs that took.

    text_mask [B, text] bool, False for padding, in the order that text has behind the vision tokens
    routes  whether it chooses blocks, for which the queries are pooled too
    precision of block attention
    given   the statistics, where they are known
    scatter where block attention writes each row of its output, None for where it stands
    listed  query-key block pairs visited, () int64 on the device for each pass over a plan
    known   pairs of tokens, or of a token and a pooled key, visited besides
    kernel  the implementation of block attention that ran
    plans   that it ran over
    refused why it did not run in 8 bits although it should have
    """

    q: Tensor
    k: Tensor
    v: Tensor
    layout: Layout
    config: SparseConfig
    text_mask: Tensor | None
    routes: bool
    precision: Precision = "full"
    given: Pooled | None = None
    scatter: Tensor | None = None
    listed: list[Tensor] = field(default_factory=list)
    known: float = 0.0
    kernel: str = ""
    plans: list[BlockPlan] = field(default_factory=list)
    refused: str | None = None

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    @cached_property
    def pooled(self) -> Pooled:
        return self.given or pool(self.q, self.k, self.v, self.layout, self.config, routes=self.routes)

    @cached_property
    def tail(self) -> Correction:
        """The pooled tail where the method has one, else nothing."""
        if not self.config.has_tail:
            return Correction()
        c = self.config
        tail = pooled_tail(self.pooled, self.q.dtype, second_order=c.second_order, limit=c.second_order_limit)
        return Correction(tail=tail)

    def plan(self, density: float) -> BlockPlan:
        """By the method's pattern, or routed."""
        config, layout = self.config, self.layout
        if not config.has_pattern:
            return self.route(density).plan
        rows, pattern = (self.q.shape[0], self.q.shape[1]), config.method
        return pattern_plan(
            pattern,  # type: ignore[arg-type]  # the methods that have one are named for it
            layout.grid,
            layout.block,
            density,
            config.first_frame,
            rows,
            self.q.device,
        )

    def route(self, density: float) -> Routing:
        text = self.k[:, :, self.layout.grid.tokens :] if self.layout.text else None
        return route(
            self.pooled,
            self.layout,
            self.config,
            density=density,
            scale=self.scale,
            text_keys=text,
            text_mask=self.text_mask,
            fine=lambda: self._fine_scores,
        )

    @cached_property
    def _fine_scores(self) -> Tensor:
        """Made once for the plans of an anchor."""
        return fine_scores(self.q, self.k, self.layout, scale=self.scale)

    def over(self, plan: BlockPlan, listed: Tensor, correction: Correction) -> tuple[Tensor, Tensor]:
        """Block attention over a plan that lists `listed` pairs of blocks: out and lse."""
        layout, rows = self.layout, self.q.shape[0] * self.q.shape[1]
        vision, text = layout.grid.tokens, layout.text
        self.listed.append(listed)
        self.known += rows * (text * layout.tokens + vision * text)
        if correction.tail is not None:
            self.known += rows * vision * layout.key_blocks
        inputs = self._inputs(plan)
        if self.precision == "8bit":
            self.refused = refused_8bit(inputs)
        precision: Precision = "full" if self.refused else self.precision
        self.kernel = chosen_impl("auto", inputs, precision)
        self.plans.append(plan)
        return block_attention(
            self.q,
            self.k,
            self.v,
            plan,
            correction,
            block=layout.block,
            key_block=layout.key_block,
            key_mask=self.text_mask,
            text=text,
            scatter=self.scatter,
            precision=precision,
        )

    def _inputs(self, plan: BlockPlan) -> Inputs:
        return Inputs(self.q, self.k, self.v, plan, self.layout.block, self.layout.key_block, self.text_mask)

    def visits_once(self, plan: BlockPlan) -> bool:
        """Whether an anchor is to make its two outputs of the same pairs: where block attention is as fast as dense
        attention, and not in 8 bits, the error of which a residual is to hold, too."""
        fast = self.k.shape[2] >= LONG and chosen_impl("auto", self._inputs(plan)) == "gluon"
        return fast and self.precision == "full"

    def both(
        self, plan: BlockPlan, listed: Tensor, denser: BlockPlan | None
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(out, lse) of the plan with its tail, for vision rows, and of all keys, or of a denser plan with its tail,
        for all rows; lse are of what is exact. Each pair of blocks is visited once."""
        layout, tail = self.layout, self.tail.tail
        vision = slice(0, layout.grid.tokens)
        exact, lse = self.over(plan, listed, Correction())
        known = plan.mask()
        missing = ~known if denser is None else denser.mask() & ~known
        q, k, v = (x[:, :, vision] for x in (self.q, self.k, self.v))
        other, other_lse = block_attention(q, k, v, marked(missing), block=layout.block, key_block=layout.key_block)
        self.listed.append(missing.sum())
        # Where nothing was missing, a block was visited because a plan has no empty rows.
        whole = ~missing.any(-1).repeat_interleave(layout.block, -1)[..., vision]
        other_lse.masked_fill_(whole, float("-inf"))

        def tailed(out: Tensor, lse: Tensor, plan: BlockPlan) -> Tensor:
            assert tail is not None
            self.known += q.shape[0] * q.shape[1] * q.shape[2] * layout.key_blocks
            return with_tail(q, out[:, :, vision], lse[..., vision], plan, tail, block=layout.block)

        if tail is None:
            part, out = exact[:, :, vision], exact.clone()
        else:
            part, out = tailed(exact, lse, plan), exact
        part_lse, lse = lse[..., vision], lse.clone()
        merge_into(out[:, :, vision], lse[..., vision], other, other_lse)
        if denser is not None and tail is not None:
            out[:, :, vision] = tailed(out, lse, marked(known | missing))
        return (part, part_lse), (out, lse)

    def error_of_8bit(self, plan: BlockPlan) -> Tensor:
        """() float32: what 8 bits make wrong in the exact part of the first head, over that part."""
        q, k, v = (x[:, :1] for x in (self.q, self.k, self.v))
        first = BlockPlan(plan.counts[:, :1], plan.indices[:, :1], plan.key_blocks)
        options: dict[str, Any] = dict(block=self.layout.block, key_mask=self.text_mask, text=self.layout.text)
        full, low = (block_attention(q, k, v, first, **options, precision=p)[0] for p in ("full", "8bit"))
        return (low.float() - full.float()).norm() / full.float().norm()

    def dense(self) -> tuple[Tensor, Tensor]:
        """Attention to every key: out and lse."""
        self.known += self.q.shape[0] * self.q.shape[1] * self.layout.tokens**2
        return dense_attention(self.q, self.k, self.v, key_mask=self.text_mask)
