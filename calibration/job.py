"""What one calibration is asked for, and the latents that its runs tell after each step."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dit_sparse.calibration.record import Plan
from dit_sparse.pipelines.session import FAMILIES
from dit_sparse.profile import fingerprint

Tick = Callable[[str, int], None]
# Is called after each step with its latents, or with nothing by pipelines that do not tell them.
Done = Callable[[Tensor | None], None]
# Numbers of the latents that are looked at after each step.
LATENTS = 1 << 16
# Of what is kept to be resumed; of another format nothing can be.
_FORMAT = 8


@dataclass(frozen=True)
class Job:
    """One calibration.

    run     (prompt, seed, done) -> frames [F, H, W, 3] from 0 to 1; done(latents) is called after each step
    facts   what goes into the header as it is: model_id, size, guidance_scale, created, device, dtype, versions
    """

    pipe: Any
    run: Callable[[str, int, Done], np.ndarray]
    prompts: tuple[str, ...]
    seed: int
    steps: int
    plan: Plan
    facts: Mapping[str, Any]
    tick: Tick

    @property
    def transformers(self) -> dict[str, nn.Module]:
        parts = self.pipe.components
        return {part: module for part, module in parts.items() if type(module).__name__ in FAMILIES}

    def identity(self) -> dict[str, Any]:
        """What must be the same for a calibration to be resumed."""
        told = {
            "format": _FORMAT,
            "plan": asdict(self.plan),
            "prompts": self.prompts,
            "seed": self.seed,
            "steps": self.steps,
            "weights": weights_of(self.transformers),
            "facts": {name: value for name, value in self.facts.items() if name != "created"},
        }
        return json.loads(json.dumps(told))


def weights_of(transformers: Mapping[str, nn.Module]) -> dict[str, dict[str, str]]:
    return {part: {"class": type(module).__name__} | fingerprint(module) for part, module in transformers.items()}


class Latents:
    """Some numbers of the latents after each step of a run; calls `tick` after each."""

    def __init__(self, tick: Callable[[], None]):
        self.tick, self.steps = tick, 0
        self._seen: list[Tensor] = []

    def __call__(self, latents: Tensor | None) -> None:
        if latents is not None:
            flat = latents.detach().flatten()
            # A copy to the CPU would have the GPU wait for the launches of the next step.
            self._seen.append(flat[:: max(1, flat.numel() // LATENTS)].to(torch.float32, copy=True))
        self.steps += 1
        self.tick()

    def seen(self) -> Tensor:
        """[steps, numbers]; empty where the pipeline tells no latents."""
        return torch.stack(self._seen).cpu() if self._seen else torch.zeros(0, 0)

    def off(self, dense: Tensor, steps: int) -> list[float | None]:
        """Mean squared error after each of the run's steps; None where it is not known."""
        mine = self.seen()
        if mine.shape != dense.shape or len(mine) != steps:
            return [None] * steps
        return [float(x) for x in (mine - dense).square().mean(-1)]
