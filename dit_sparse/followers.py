"""Heads that follow an anchor are one call of a layer, whichever anchor it was and however dense their plans."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from dit_sparse.config import SparseConfig, Storage
from dit_sparse.correction import Learned
from dit_sparse.layers import Part
from dit_sparse.plan import BlockPlan, Residual
from dit_sparse.some_heads import picks, put
from dit_sparse.state import Generation


def together(parts: Sequence[Part], generation: Generation, heads: int) -> tuple[Part, ...]:
    """The parts of a layer of so many heads, of which those between anchors are one if nothing but what they remember
    tells them apart.

    A profile's heads have many plans. With a call of its own for each, short sequences would take longer to launch
    than to compute.
    """
    alike: dict[tuple[Storage | None, SparseConfig], list[Part]] = {}
    others = []
    for part in parts:
        if part.phase == "sparse" and part.config.method == "anchor":
            alike.setdefault((part.storage, _unrouted(part.config)), []).append(part)
        else:
            others.append(part)
    found = [some[0] if len(some) == 1 else _one(some, generation, heads) for some in alike.values()]
    return (*others, *found)


@lru_cache(maxsize=256)
def _unrouted(config: SparseConfig) -> SparseConfig:
    """The config without what it routed by, which no longer matters once there is a plan."""
    return replace(config, density=1.0, top_p=None, anchor_density=None)


def _one(parts: Sequence[Part], generation: Generation, heads: int) -> Part:
    known: list[Learned] = []
    for part in parts:
        learned = generation.recall(part.layer)
        assert isinstance(learned, Learned)
        known.append(learned)
    own = [_numbers(part) for part in parts]
    every = sorted(head for some in own for head in some)
    rank = {head: place for place, head in enumerate(every)}
    # In the layer's order: where that is all its heads, queries, keys, values and output need not be copied.
    places = [picks([rank[head] for head in some]) for some in own]

    def joined(each: list[Tensor]) -> Tensor:
        """[B, heads of a part, ...] -> [B, heads of all, ...]"""
        whole = each[0].new_empty(len(each[0]), len(every), *each[0].shape[2:])
        for place, x in zip(places, each, strict=True):
            put(whole, place, x)
        return whole

    plans, residuals = [one.plan for one in known], [one.residual for one in known]
    width = max(plan.indices.shape[-1] for plan in plans)
    indices = [pad(plan.indices, (0, width - plan.indices.shape[-1])) for plan in plans]
    counts = joined([plan.counts for plan in plans])
    scales = [residual.scales for residual in residuals if residual.scales is not None]
    fade = None
    if any(part.fade is not None for part in parts):
        whole = counts.new_ones(1, dtype=torch.float32)
        fades = [whole.expand(part.layer.heads) if part.fade is None else part.fade for part in parts]
        fade = joined([x[None] for x in fades])[0]
    return replace(
        parts[0],
        layer=replace(parts[0].layer, heads=len(every)),
        heads=None if len(every) == heads else picks(every),
        fade=fade,
        learned=Learned(
            BlockPlan(counts, joined(indices), plans[0].key_blocks),
            Residual(joined([x.codes for x in residuals]), joined(scales) if scales else None, residuals[0].kind),
            None,
            max(one.step for one in known),
            torch.stack([one.visited for one in known]).sum(),
        ),
    )


def _numbers(part: Part) -> list[int]:
    """The heads of one of several parts of a layer."""
    assert part.heads is not None
    return part.heads if isinstance(part.heads, list) else list(range(part.heads.stop)[part.heads])
