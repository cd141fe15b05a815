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
Argument = Tensor | tuple[Tensor, ...] | bool | int | float


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
    calls    the same -> its arguments by name: tensors, tuples of them, and plain numbers
    """

    outputs: dict[tuple[str, int, str], Tensor] = field(default_factory=dict)
    calls: dict[tuple[str, int, str], dict[str, Argument]] = field(default_factory=dict)

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
                self.calls[key] = {name: _kept(x) for name, x in kwargs.items() if _repeatable(name, x)}
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
            for name, x in call.items():
                at = f"call/{part}/{step}/{branch}/{name}"
                if isinstance(x, tuple):
                    named |= {f"{at}/{i}": one for i, one in enumerate(x)}
                else:
                    # A number is a tensor without axes that says so in its name.
                    named |= {at: x} if isinstance(x, Tensor) else {f"{at}/": torch.tensor(x)}
        return {name: x.contiguous() for name, x in named.items()}

    @classmethod
    def from_tensors(cls, named: Mapping[str, Tensor]) -> "Tape":
        tape = cls()
        tuples: dict[tuple[tuple[str, int, str], str], dict[int, Tensor]] = {}
        for name, x in named.items():
            kind, part, step, branch, *rest = name.split("/")
            key = part, int(step), branch
            if kind == "out":
                tape.outputs[key] = x
            elif len(rest) == 1:
                tape.calls.setdefault(key, {})[rest[0]] = x
            elif rest[1]:
                tuples.setdefault((key, rest[0]), {})[int(rest[1])] = x
            else:
                tape.calls.setdefault(key, {})[rest[0]] = x.item()
        for (key, name), parts in tuples.items():
            tape.calls.setdefault(key, {})[name] = tuple(parts[i] for i in sorted(parts))
        return tape


def _sample(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out.sample


def _repeatable(name: str, x: Any) -> bool:
    if isinstance(x, tuple | list):
        return bool(x) and all(isinstance(one, Tensor) for one in x)
    return isinstance(x, Tensor | bool | int | float) and name != "return_dict"


def _kept(x: Any) -> Argument:
    if isinstance(x, tuple | list):
        return tuple(one.to("cpu", copy=True) for one in x)
    return x.to("cpu", copy=True) if isinstance(x, Tensor) else x


@torch.no_grad()
def forward_once(transformer: nn.Module, call: Mapping[str, Argument], device: torch.device) -> Tensor:
    """The transformer's output for recorded arguments, on the CPU."""

    def there(x: Argument) -> Argument:
        if isinstance(x, tuple):
            return tuple(one.to(device) for one in x)
        return x.to(device) if isinstance(x, Tensor) else x

    out = transformer(**{name: there(x) for name, x in call.items()}, return_dict=False)
    return _sample(out).float().cpu()
