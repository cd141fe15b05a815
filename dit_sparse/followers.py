"""Heads that follow an anchor are one call of a layer, whichever anchor it was and however dense their plans."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.nn.functional import pad

from dit_sparse.config import SparseConfig, Storage
from dit_sparse.correction import Learned
from dit_sparse.layers import Part
from dit_sparse.plan import BlockPlan, Residual
from dit_sparse.state import Generation


def together(parts: Sequence[Part], generation: Generation) -> tuple[Part, ...]:
    """The parts of a layer, of which those between anchors are one if nothing but what they remember tells them apart.

    A profile's heads have many plans: each with a call of its own would take longer to launch than to compute.
    """
    alike: dict[tuple[Storage | None, SparseConfig], list[Part]] = {}
    others = []
    for part in parts:
        if part.phase == "sparse" and part.config.method == "anchor":
            # The plan is there, so it no longer matters by what it was routed.
            settings = replace(part.config, density=1.0, top_p=None, anchor_density=None)
            alike.setdefault((part.storage, settings), []).append(part)
        else:
            others.append(part)
    found = [some[0] if len(some) == 1 else _one(some, generation) for some in alike.values()]
    return (*others, *found)


def _one(parts: Sequence[Part], generation: Generation) -> Part:
    known: list[Learned] = []
    for part in parts:
        learned = generation.recall(part.layer)
        assert isinstance(learned, Learned)
        known.append(learned)
    width = max(one.plan.indices.shape[-1] for one in known)
    indices = [pad(one.plan.indices, (0, width - one.plan.indices.shape[-1])) for one in known]
    counts = torch.cat([one.plan.counts for one in known], 1)
    scales = [one.residual.scales for one in known if one.residual.scales is not None]
    residual = Residual(
        torch.cat([one.residual.codes for one in known], 1),
        torch.cat(scales, 1) if scales else None,
        known[0].residual.kind,
    )
    fade = None
    if any(part.fade is not None for part in parts):
        ones = counts.new_ones(1, dtype=torch.float32)
        fade = torch.cat([ones.expand(part.layer.heads) if part.fade is None else part.fade for part in parts])
    heads = [head for part in parts for head in _numbers(part)]
    return replace(
        parts[0],
        layer=replace(parts[0].layer, heads=len(heads)),
        heads=heads,
        fade=fade,
        learned=Learned(
            BlockPlan(counts, torch.cat(indices, 1), known[0].plan.key_blocks),
            residual,
            None,
            max(one.step for one in known),
            torch.stack([one.visited for one in known]).sum(),
        ),
    )


def _numbers(part: Part) -> list[int]:
    """The heads of one of several parts of a layer."""
    assert part.heads is not None
    return part.heads if isinstance(part.heads, list) else list(range(part.heads.stop)[part.heads])
