"""How much of what a caption asks for can be read back from a clip, for captions of the demo world."""

import numpy as np
import torch

from dit_sparse.samples import demo_world

PROPERTIES = ("colour", "shape", "direction", "size", "count")


def prompt_score(caption: str, frames: np.ndarray) -> float | None:
    """Share of the properties of all groups that frames [F, H, W, 3] from 0 to 1 show, from 0 to 1.

    A property that the caption leaves open counts as shown. None if the caption is not of the demo world's grammar.
    """
    try:
        scene = demo_world.parse(caption)
    except ValueError:
        return None
    groups = demo_world.score(torch.from_numpy(np.ascontiguousarray(frames)), scene)
    return sum(getattr(group, name) for group in groups for name in PROPERTIES) / (len(groups) * len(PROPERTIES))
