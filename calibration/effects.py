"""How much an error inside attention is felt in what guidance makes of a transformer's outputs, measured."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dit_sparse.calibration.replay import CPU, Tape, forward_once, forwards
from dit_sparse.calibration.values import bytes_of, copied, sample_of
from dit_sparse.config import SparseConfig
from dit_sparse.memory import free_bytes
from dit_sparse.pipelines.session import FAMILIES, sparsify

# What the outputs of blocks may take in a forward that is probed: this share of a GPU's free memory, much of which the
# decoder will want, or, if that is less, these bytes of the CPU's. Blocks whose outputs find no room run again in
# every probe.
KEPT_SHARE, KEPT_BYTES = 1 / 24, 1 << 30


def probe_steps(steps: int) -> tuple[int, ...]:
    """The steps whose layers are probed: one early and one late, where there are two."""
    return tuple(sorted({round(0.2 * (steps - 1)), round(0.75 * (steps - 1))}))


def kind_of(name: str) -> str:
    """What layers of a transformer have in common that are alike but for their place."""
    return re.sub(r"\.\d+", ".", name)


def probed_layers(names: Sequence[str], steps: int) -> list[int]:
    """Places of the layers to probe at one of `probe_steps`: about as many as the run has steps, so that all probes,
    each a step or, where all blocks' outputs are kept, half of one, take no longer than two runs. Of each kind a
    share, evenly spaced, its first and its last among them."""
    kinds: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        kinds.setdefault(kind_of(name), []).append(place)
    found: list[int] = []
    for places in kinds.values():
        count = min(len(places), max(2, round(steps * len(places) / len(names))))
        found += [places[round(i * (len(places) - 1) / max(1, count - 1))] for i in range(count)]
    return sorted(found)


@dataclass
class Blocks:
    """What the blocks of a transformer say in a dense forward, so that those before a probed layer need not run again.

    known  block -> its output, of the first blocks in the order in which they ran;
           None before anything was heard
    """

    transformer: nn.Module
    known: dict[str, Any] | None = None
    _heard: dict[str, Any] = field(default_factory=dict)
    _deaf: bool = False
    _where: torch.device = CPU
    _room: float = 0.0

    @property
    def _device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Around a dense forward."""
        self._where, self._room = room_for_outputs(self._device)
        with forwards(self._blocks(), self._listen):
            yield
        self.known, self._heard = self._heard, {}

    @contextmanager
    def around(self, layer: str) -> Iterator[None]:
        """Around a forward of the same arguments in which only self-attention `layer` is not dense. Where nothing was
        heard so far, all blocks run, and those before that layer are listened to."""
        own = self._block(layer)
        if own is not None and self.known is None:
            with self.listening():
                yield
            self.known = _until(own, self.known or {})
        else:
            blocks, known = self._blocks(), self.known or {}
            with forwards({name: blocks[name] for name in _until(own, known) if name in blocks}, self._recall):
                yield

    def _block(self, name: str) -> str | None:
        """The first of a module's ancestors that is one of a list of modules."""
        path = name.split(".")
        for depth in range(1, len(path)):
            if isinstance(self.transformer.get_submodule(".".join(path[:depth])), nn.ModuleList):
                return ".".join(path[: depth + 1])
        return None

    def _blocks(self) -> dict[str, nn.Module]:
        """Those with self-attention. None where a block has a hook, which may bring its weights, or the next one's."""
        family, found = FAMILIES[type(self.transformer).__name__], {}
        for name, module in self.transformer.named_modules():
            if hasattr(module, "processor") and family.is_self_attention(name) and (block := self._block(name)):
                found[block] = self.transformer.get_submodule(block)
        hooked = any(hasattr(block, "_diffusers_hook") or hasattr(block, "_hf_hook") for block in found.values())
        return {} if hooked else found

    def _listen(self, name: str, original: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        if name in self._heard:
            # What runs twice has no one output.
            self._heard, self._deaf = {}, True
        self._deaf = self._deaf or sum(map(bytes_of, self._heard.values())) + bytes_of(out) > self._room
        if not self._deaf:
            try:
                self._heard[name] = copied(out, self._where)
            except TypeError:
                # It runs again in every probe, and so does what follows.
                self._deaf = True
        return out

    def _recall(self, name: str, _original: Any, *_args: Any, **_kwargs: Any) -> Any:
        assert self.known is not None
        return copied(self.known[name], self._device)


def room_for_outputs(device: torch.device) -> tuple[torch.device, float]:
    """Where the outputs of a transformer's blocks are kept, which is on this device, and how many bytes of them."""
    room = 0.0 if device.type == "cpu" else free_bytes(device) * KEPT_SHARE
    return (device, room) if room > KEPT_BYTES else (CPU, KEPT_BYTES)


def probe(
    part: str,
    transformer: nn.Module,
    tape: Tape,
    step: int,
    layer: int,
    names: Sequence[str],
    branches: Mapping[str, Blocks],
    config: SparseConfig,
) -> dict[str, list[float]]:
    """What changes in a transformer's outputs at one step if only its self-attention number `layer` of `names` is as
    in `config`: for each of `branches`, in "squares" the mean square of the change, and in "along" the mean product
    with that of the first branch; 0 of a branch that did not run at that step."""
    # A number alone would be a count.
    others = ",".join(f"{i}-{i}" for i in range(len(names)) if i != layer)
    device = next(transformer.parameters()).device
    probed = SparseConfig.from_dict(config.to_dict() | {"dense_steps": 0, "dense_layers": others or 0})
    changes: list[Tensor] = []
    for branch, blocks in branches.items():
        if (part, step, branch) not in tape.calls:
            changes.append(torch.zeros(()))
            continue
        with ExitStack() as stack:
            stack.enter_context(blocks.around(names[layer]))
            stack.enter_context(sparsify(transformer, probed))
            out = forward_once(transformer, tape.calls[part, step, branch], device)
        change = out - sample_of(tape.outputs[part, step, branch]).float()
        changes.append(taken(transformer, change))
    return {
        "squares": [float(change.square().mean()) for change in changes],
        "along": [float((change * changes[0]).mean()) for change in changes],
    }


def taken(transformer: nn.Module, sample: Tensor) -> Tensor:
    """What pipelines take of a transformer's sample [B, C, ...]: those of PixArt and HunyuanDiT leave the second half
    of the channels, a variance."""
    config = transformer.config
    channels = config.get("in_channels")
    twice = config.get("learn_sigma") or (channels and config.get("out_channels") == 2 * channels)
    return sample[:, : sample.shape[1] // 2] if twice else sample


def output_metric(transformer: nn.Module, part: str) -> dict[str, torch.Tensor]:
    """Layer -> [heads, D, D], the square root of each head's Gram matrix in the output projection: an error times it
    is as long as the error is after the projection. Layers without a plain projection are left out."""
    family, found = FAMILIES[type(transformer).__name__], {}
    for name, module in transformer.named_modules():
        projection = getattr(module, "to_out", None)
        plain = isinstance(projection, nn.ModuleList | nn.Sequential) and isinstance(projection[0], nn.Linear)
        if not plain or not family.is_self_attention(name):
            continue
        weight = projection[0].weight.detach()
        if weight.is_meta:
            continue
        grams = weight.float().unflatten(1, (module.heads, -1)).permute(1, 2, 0)
        values, vectors = torch.linalg.eigh(grams @ grams.mT)
        found[f"{part}.{name}"] = (vectors * values.clamp(min=0).sqrt()[:, None]) @ vectors.mT
    return found


def _until(block: str | None, said: Mapping[str, Any]) -> dict[str, Any]:
    """What ran before a block; all where it is not there."""
    found: dict[str, Any] = {}
    for name, out in said.items():
        if name == block:
            break
        found[name] = out
    return found
