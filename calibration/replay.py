"""A pipeline's transformers with their outputs recorded, or taken from a recording instead of computed."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dit_sparse.calibration.values import copied, from_tensors, sample_of, to_tensors
from dit_sparse.state import Generation

Forward = Callable[..., Any]
Key = tuple[str, int, str]
CPU = torch.device("cpu")


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


@dataclass(frozen=True)
class Call:
    """The arguments of one forward as the pipeline gave them, by place and by name, on the CPU."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Tape:
    """What the forwards of a dense run said, and the arguments of those at some steps, on the CPU.

    outputs  (component, step, branch) -> all that the transformer said, in the form in which it said it
    calls    the same -> its arguments
    """

    outputs: dict[Key, Any] = field(default_factory=dict)
    calls: dict[Key, Call] = field(default_factory=dict)

    def record(self, generation: Generation, keep_calls: frozenset[int]) -> Callable[..., Any]:
        """To be given to `forwards` around a dense run of a session with this generation. Arguments are kept of the
        steps `keep_calls`, and of the first that a component runs at. The run raises ValueError where something cannot
        be told again from a file."""

        def forward(part: str, original: Forward, *args: Any, **kwargs: Any) -> Any:
            moment = generation.moment
            assert moment is not None
            key = (part, moment.step, moment.branch)
            first = min((step for of, step, _ in self.outputs if of == part), default=moment.step)
            if moment.step in keep_calls or moment.step == first:
                self.calls[key] = Call(
                    tuple(_kept(x, f"argument {i + 1} of {part}") for i, x in enumerate(args)),
                    {name: _kept(x, f"{name} of {part}") for name, x in kwargs.items()},
                )
            out = original(*args, **kwargs)
            self.outputs[key] = _kept(out, f"the output of {part}")
            return out

        return forward

    def play(self, generation: Generation, computed: Callable[[int], bool]) -> Callable[..., Any]:
        """To be given to `forwards`: steps say what is on the tape, where they are not `computed`."""

        def forward(part: str, original: Forward, *args: Any, **kwargs: Any) -> Any:
            moment = generation.moment
            assert moment is not None
            if computed(moment.step):
                return original(*args, **kwargs)
            return copied(self.outputs[part, moment.step, moment.branch], generation.device)

        return forward

    def tensors(self) -> dict[str, Tensor]:
        """All of it under names a file can hold."""
        named: dict[str, Tensor] = {}
        for (part, step, branch), said in self.outputs.items():
            named |= to_tensors(f"out/{part}/{step}/{branch}", said)
        for (part, step, branch), call in self.calls.items():
            named |= to_tensors(f"call/{part}/{step}/{branch}", (call.args, call.kwargs))
        return named

    @classmethod
    def from_tensors(cls, named: Mapping[str, Tensor]) -> "Tape":
        tape = cls()
        for name in named:
            kind, part, step, branch, *rest = name.split("/")
            if rest:
                continue
            value = from_tensors(name, named)
            if kind == "out":
                tape.outputs[part, int(step), branch] = value
            else:
                tape.calls[part, int(step), branch] = Call(*value)
        return tape


def _kept(x: Any, what: str) -> Any:
    try:
        return copied(x, CPU)
    except TypeError as error:
        raise ValueError(
            f"This model cannot be calibrated: {what} holds {error}, and what is repeated are tensors, numbers and "
            "strings, and tuples, lists, dicts and outputs of diffusers made of these."
        ) from None


@torch.no_grad()
def forward_once(transformer: nn.Module, call: Call, device: torch.device) -> Tensor:
    """The transformer's sample, see `sample_of`, for recorded arguments: float32, on the CPU."""
    return sample_of(transformer(*copied(call.args, device), **copied(call.kwargs, device))).float().cpu()
