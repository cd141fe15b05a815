"""Dealing a layer's heads out to processes, so that none waits long for another."""

from functools import lru_cache

import torch
from torch import Tensor

from dit_sparse.choices import Choice
from dit_sparse.profile import Profile


def work_of(profile: Profile, layer: str) -> Tensor:
    """[heads, calls] float64: the share of key blocks that the choices of a fitted profile compute, call by call."""
    rows = profile.header.rows_of[layer]
    index, anchor = (profile.tensors[name][rows] for name in ("choice", "anchor"))
    # All ways of routing keep about as many.
    kept = profile.tensors["kept"][rows].double().nan_to_num().mean(-2)
    work = torch.ones(index.shape, dtype=torch.float64)
    for i, values in enumerate(profile.header.choices):
        choice = Choice.from_dict(values)
        if choice.rung is None:
            continue
        does = kept[..., profile.header.ladder.index(choice.rung)]
        if choice.learns:
            does = torch.where(anchor.bool(), choice.anchor_density or 1.0, does)
        work = torch.where(index == i, does, work)
    return work.flatten(1)


@lru_cache(maxsize=256)
def order_on(dealt: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(dealt, device=device)


def deal(work: Tensor, shares: int) -> tuple[int, ...]:
    """The heads in the order in which equal shares are to have them, by `work` [heads, calls]; empty for their own.

    In each call all wait for the share with most work. Heads with much of it are dealt first, each to the share where
    it makes the others wait least.
    """
    hands: list[list[int]] = [[] for _ in range(shares)]
    loads = torch.zeros(shares, work.shape[1], dtype=work.dtype)

    def waits(share: int, head: int) -> tuple[float, float]:
        after = loads.clone()
        after[share] += work[head]
        return after.amax(0).sum().item(), after[share].sum().item()

    for head in work.sum(1).argsort(descending=True, stable=True).tolist():
        room = [share for share in range(shares) if len(hands[share]) < len(work) // shares]
        best = min(room, key=lambda share: waits(share, head))  # noqa: B023  (called at once)
        hands[best].append(head)
        loads[best] += work[head]
    own = work.unflatten(0, (shares, -1)).sum(1).amax(0).sum()
    # Reordering copies every query, key and value.
    if loads.amax(0).sum() > 0.98 * own:
        return ()
    return tuple(head for hand in hands for head in sorted(hand))
