"""A pipeline's transformers with their outputs recorded, or taken from a recording instead of computed."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dit_sparse.state import Generation

Forward = Callable[..., Any]


@contextmanager
def forwards(transformers: Mapping[str, nn.Module], wrap: Callable[..., Any]) -> Iterator[None]:
    """Inside, each transformer's forward is wrap(component, its own forward, *args, **kwargs)."""
    before = {part: module.__dict__.get("forward") for part, module in transformers.items()}
    for part, module in transformers.items():
        module.forward = partial(wrap, part, module.forward)
    try:
        yield
    finally:
        for part, module in transformers.items():
            # A hook's forward is on the module; without one it is the class's again.
            del module.forward
            if (own := before[part]) is not None:
                module.forward = own


@dataclass
class Tape:
    """The outputs of a dense run, and the arguments of the forwards at some steps, on the CPU.

    outputs  (component, step, branch) -> what the transformer said
    calls    the same -> its tensor arguments by name
    """

    outputs: dict[tuple[str, int, str], Tensor] = field(default_factory=dict)
    calls: dict[tuple[str, int, str], dict[str, Tensor]] = field(default_factory=dict)

    def record(self, generation: Generation, keep_calls: frozenset[int]) -> Callable[..., Any]:
        """To be given to `forwards` around a dense run of a session with this generation. Arguments are kept of the
        steps `keep_calls`, and of the first that a component runs at."""

        def forward(part: str, original: Forward, *args: Any, **kwargs: Any) -> Any:
            moment = generation.moment
            assert moment is not None
            key = (part, moment.step, moment.branch)
            first = min((step for of, step, _ in self.outputs if of == part), default=moment.step)
            if moment.step in keep_calls or moment.step == first:
                if args:
                    raise ValueError(f"The pipeline calls {part} with nameless arguments, which no probe can repeat.")
                self.calls[key] = {name: x.to("cpu", copy=True) for name, x in kwargs.items() if isinstance(x, Tensor)}
            out = original(*args, **kwargs)
            self.outputs[key] = _sample(out).to("cpu", copy=True)
            return out

        return forward

    def play(self, generation: Generation, until: int) -> Callable[..., Any]:
        """To be given to `forwards`: steps before `until` say what is on the tape, the others are computed."""

        def forward(part: str, original: Forward, *args: Any, **kwargs: Any) -> Any:
            moment = generation.moment
            assert moment is not None
            if moment.step >= until:
                return original(*args, **kwargs)
            said = self.outputs[part, moment.step, moment.branch]
            return (said.to(generation.device),)

        return forward

    def tensors(self) -> dict[str, Tensor]:
        """All of it under names a file can hold."""
        named = {f"out/{part}/{step}/{branch}": x for (part, step, branch), x in self.outputs.items()}
        for (part, step, branch), call in self.calls.items():
            named |= {f"call/{part}/{step}/{branch}/{name}": x for name, x in call.items()}
        return {name: x.contiguous() for name, x in named.items()}

    @classmethod
    def from_tensors(cls, named: Mapping[str, Tensor]) -> "Tape":
        tape = cls()
        for name, x in named.items():
            kind, part, step, *rest = name.split("/")
            if kind == "out":
                tape.outputs[part, int(step), rest[0]] = x
            elif kind == "call":
                tape.calls.setdefault((part, int(step), rest[0]), {})[rest[1]] = x
        return tape


def _sample(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out.sample


@torch.no_grad()
def forward_once(transformer: nn.Module, call: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """The transformer's output for recorded arguments, on the CPU."""
    out = transformer(**{name: x.to(device) for name, x in call.items()}, return_dict=False)
    return _sample(out).float().cpu()
