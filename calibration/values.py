"""What goes into a transformer's forward and comes out of it, in any form a model gives that: tensors, plain values,
and tuples, lists, dicts and diffusers' outputs of them. It can be copied, counted and put in a file of tensors."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

_PLAIN = (bool, int, float, str, type(None))


def copied(value: Any, device: torch.device) -> Any:
    """The same on a device, sharing nothing with it. An output of diffusers becomes a plain one, which has the same
    names and indices, and as attributes what is not None. Raises TypeError, with the name of its class, for what is
    none of the above, such as a dict whose keys are no strings."""

    def copy(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.to(device, copy=True)
        if isinstance(x, _PLAIN):
            return x
        raise TypeError(f"a {type(x).__name__}")

    return _mapped(value, copy)


def bytes_of(value: Any) -> int:
    """What its tensors take in memory."""
    total = 0

    def count(x: Any) -> Any:
        nonlocal total
        if isinstance(x, Tensor):
            total += x.numel() * x.element_size()
        return x

    _mapped(value, count)
    return total


def sample_of(output: Any) -> Tensor:
    """What a transformer says of the video or image that is made, of all that it says: the first of several outputs,
    and a list of samples as one batch. Raises ValueError where there is none."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, list) and output and all(isinstance(x, Tensor) for x in output):
        return torch.stack(output)
    if isinstance(output, tuple | BaseOutput) and len(output):
        return sample_of(output[0])
    raise ValueError(
        f"The transformer's output is a {type(output).__name__}, in which no sample is known: it is to be a tensor, a "
        "list of tensors, or a tuple or an output of diffusers that begins with one."
    )


def to_tensors(name: str, value: Any) -> dict[str, Tensor]:
    """A copied value as tensors for a file: at `name`, in bytes of JSON, how it is put together, and behind that and a
    slash and a number each tensor in it."""
    found: list[Tensor] = []

    def told(x: Any) -> Any:
        if isinstance(x, Tensor):
            found.append(x)
            return {"tensor": len(found) - 1}
        if isinstance(x, list):
            return [told(one) for one in x]
        if isinstance(x, tuple):
            return {"tuple": [told(one) for one in x]}
        if isinstance(x, dict):
            return {"output" if isinstance(x, BaseOutput) else "dict": {key: told(one) for key, one in x.items()}}
        return x

    text = bytearray(json.dumps(told(value)).encode())
    return {name: torch.frombuffer(text, dtype=torch.uint8)} | {
        f"{name}/{i}": x.contiguous() for i, x in enumerate(found)
    }


def from_tensors(name: str, named: Mapping[str, Tensor]) -> Any:
    """The value that `to_tensors` wrote at that name."""

    def value(told: Any) -> Any:
        if isinstance(told, list):
            return [value(one) for one in told]
        if not isinstance(told, dict):
            return told
        [(kind, inside)] = told.items()
        match kind:
            case "tensor":
                return named[f"{name}/{inside}"]
            case "tuple":
                return tuple(value(one) for one in inside)
            case _:
                made = {key: value(one) for key, one in inside.items()}
                return BaseOutput(**made) if kind == "output" else made

    return value(json.loads(named[name].numpy().tobytes()))


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """The value with `change` done to all that is no tuple, list, dict or output."""
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        made = {key: _mapped(x, change) for key, x in value.items()}
        return BaseOutput(**made) if isinstance(value, BaseOutput) else made
    if isinstance(value, tuple | list):
        return (tuple if isinstance(value, tuple) else list)(_mapped(x, change) for x in value)
    return change(value)
