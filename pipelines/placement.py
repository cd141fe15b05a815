"""Which processor each attention module of a sparse transformer has, and which it had before."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers.hooks._helpers import AttentionProcessorRegistry
from torch import Tensor, nn

from dit_sparse.attend_op import address, attend
from dit_sparse.dealing import deal, order_on, work_of
from dit_sparse.pipelines.registry import family_of, processor_of, set_processor, unwrap
from dit_sparse.pipelines.sparse_processor import SparseAttnProcessor
from dit_sparse.pipelines.swap import carry, share_of
from dit_sparse.state import Generation, Layer


class Attention:
    """The attention call of one layer, as its processor makes it."""

    def __init__(self, generation: Generation, layer: int):
        self.generation, self.layer = generation, layer
        self.where = address(generation, layer)
        self.joint = generation.layers[layer].joint
        self.order: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Attention":
        # A copied processor attends for the same generation; a copy of all it has learned may not fit in memory.
        copy = Attention(self.generation, self.layer)
        copy.order = self.order
        return copy

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        return attend(q, k, v, key_mask, self.where)

    def unshardable(self, shards: int) -> str | None:
        before, after = self.generation.text
        reason = None
        if not shards:
            reason = "passes keys around or cuts the sequence unevenly, which plans know nothing of"
        elif self.joint and (after is None or (after and not before)):
            reason = "cuts a sequence whose text comes last"
        return reason and f"context parallelism {reason}"

    def sharded(self, shards: int) -> "Sharded":
        return Sharded(self, shards)

    def deal(self, device: torch.device) -> None:
        """Take up the order in which the heads are dealt out: for tensors torch.compile makes one graph for all
        layers, for numbers one for each."""
        order = self.generation.layers[self.layer].dealt
        self.order = order_on(order, device) if order else None

    def dealt(self, device: torch.device) -> Tensor | None:
        return None if self.order is None else self.order.to(device)

    def fall_back(self, reason: str, pairs: float) -> None:
        """Count a call of `pairs` query-key pairs that somebody else computes. Raises ValueError under strict."""
        generation = self.generation
        generation.fall_back(reason)
        generation.tally.dense(generation.moment.step if generation.moment else 0, pairs)


class Sharded:
    """The attention call of a layer whose tokens come from several processes, part behind part."""

    def __init__(self, attend: Attention, shards: int):
        self.attend, self.shards, self.joint = attend, shards, attend.joint
        self.fall_back, self.unshardable = attend.fall_back, attend.unshardable
        self.sharded, self.dealt = attend.sharded, attend.dealt

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        # Of text before the vision tokens; `unshardable` refuses text behind them.
        text = self.attend.generation.text[0] // self.shards if self.joint else 0
        parts = torch.arange(q.shape[2], device=q.device).unflatten(0, (self.shards, -1))
        take = torch.cat([parts[:, :text].flatten(), parts[:, text:].flatten()])
        q, k, v = (x.index_select(2, take) for x in (q, k, v))
        out = self.attend(q, k, v, None if key_mask is None else key_mask.index_select(1, take))
        return torch.empty_like(out).index_copy_(2, take, out)


class Placement:
    """Our processors in the self-attention of transformers, by component; the rest keeps what it has."""

    def __init__(self, transformers: Mapping[str, nn.Module], generation: Generation):
        self._transformers = {part: unwrap(transformer) for part, transformer in transformers.items()}
        self._generation = generation
        self._before = {
            module: module.processor
            for transformer in self._transformers.values()
            for module in transformer.modules()
            if hasattr(module, "processor")
        }
        # What each of ours stands in for.
        self._took: dict[Any, Any] = {}
        self._modules: list[nn.Module] = []
        self._named: dict[str, nn.Module] = {}
        self._attentions: dict[int, Attention] = {}
        self._places: dict[nn.Module, list[int]] = {}
        self._fused: dict[nn.Module, tuple[object, int]] = {}

    def install(self) -> None:
        """Put a processor of ours into every self-attention, and what it had into all other attention."""
        layers = self._generation.layers
        layers.clear()
        self._modules, self._places = [], {}
        for part, transformer in self._transformers.items():
            family = family_of(transformer)
            ours = []
            for name, module in transformer.named_modules():
                if module in self._before:
                    if family.is_self_attention(name):
                        ours.append((name, module))
                    else:
                        set_processor(module, self._before[module])
            self._places[transformer] = [len(layers) + i for i in range(len(ours))]
            for index, (name, module) in enumerate(ours):
                heads, head_dim = family.heads(module)
                layers.append(Layer(f"{part}.{name}", index, len(ours), heads, head_dim, family.is_joint(name)))
                self._modules.append(module)
                self._named[layers[-1].name] = module
                took = self._took.get(module.processor, self._before[module])
                self._place(transformer, module, len(layers) - 1, took)
            self._fused[transformer] = _fusions(transformer)
            self.share(transformer, torch.device("cpu"))

    def share(self, transformer: nn.Module, device: torch.device) -> None:
        """Tell the layers which of their heads this process has: diffusers may have begun to deal them out since."""
        layers, by_weights = self._generation.layers, _share_by_weights(transformer)
        for at in self._places[transformer]:
            layer, (share, shares) = layers[at], by_weights or share_of(self._modules[at].processor)
            if (layer.share, layer.shares) != (share, shares):
                heads, profile = layer.heads * layer.shares // shares, self._generation.profile
                dealt: tuple[int, ...] = ()
                if profile is not None and shares > 1 and by_weights is None:
                    dealt = deal(work_of(profile, layer.name), shares)
                layers[at] = replace(layer, heads=heads, share=share, shares=shares, dealt=dealt)
                # What other heads learned is no use to these.
                self._generation.reset()
            self._attentions[at].deal(device)

    def _place(self, transformer: nn.Module, module: nn.Module, index: int, took: Any) -> None:
        self._attentions[index] = Attention(self._generation, index)
        processor = family_of(transformer).processors[type(took)](self._attentions[index])
        _register(type(processor), type(took))
        carry(module.processor, processor)
        self._took[processor] = took
        set_processor(module, processor)

    def follow(self, transformer: nn.Module) -> None:
        """Take the places back that fuse_qkv_projections and unfuse_qkv_projections filled with stock processors.

        Only some models' do, and they keep what was there in `original_attn_processors`, a new dict each time, which
        is empty after it was put back.
        """
        known, now = self._fused[transformer], _fusions(transformer)
        if known[0] is now[0] and known[1] == now[1]:
            return
        self._fused[transformer] = now
        kinds = family_of(transformer).processors
        ours = {self._modules[index] for index in self._places[transformer]}
        for module in transformer.modules():
            if module in self._before and module not in ours:
                self._before[module] = module.processor
        for index in self._places[transformer]:
            module = self._modules[index]
            if module.processor not in self._took and type(module.processor) in kinds:
                self._place(transformer, module, index, module.processor)

    def check_parallel(self, transformer: nn.Module) -> None:
        """Raises ValueError where context parallelism cuts the sequence and attention never hears of it."""
        config = getattr(transformer, "_parallel_config", None)
        if config is None or config.context_parallel_config is None:
            return
        for took in self._took.values():
            if not hasattr(took, "_parallel_config"):
                raise ValueError(
                    f"Context parallelism cuts the sequence, but {type(took).__name__} of diffusers attends to a part "
                    "of it only: use a family whose attention diffusers dispatches, as Wan's or Flux's."
                )

    def strangers(self, transformer: nn.Module) -> Iterator[tuple[int, Any]]:
        """Layers whose processor is not ours, and that processor."""
        ours = tuple(kind for kind in family_of(transformer).processors.values() if isinstance(kind, type))
        for index in self._places[transformer]:
            processor = processor_of(self._modules[index])
            # One that is about to hand over to a session of its own is no stranger.
            if processor not in self._took and not isinstance(processor, (SparseAttnProcessor, *ours)):
                yield index, processor

    def processor(self, name: str) -> Any:
        """The processor of the layer of this name, if it is ours."""
        module = self._named.get(name)
        found = None if module is None else processor_of(module)
        return found if found in self._took else None

    def ours(self) -> Iterator[Any]:
        return (p for p in map(processor_of, self._modules) if p in self._took)

    def restore(self) -> None:
        """Every module has what it had, or what fuse_qkv_projections gave it since."""
        for transformer in self._places:
            self.follow(transformer)
        for module, before in self._before.items():
            set_processor(module, self._took.get(module.processor, before))
        for transformer in self._transformers.values():
            kept: dict[str, Any] = getattr(transformer, "original_attn_processors", None) or {}
            for name, processor in kept.items():
                kept[name] = self._took.get(processor, processor)
        self._before, self._took = {}, {}
        self._modules, self._named, self._attentions, self._places = [], {}, {}, {}


def _share_by_weights(transformer: nn.Module) -> tuple[int, int] | None:
    """Which part of each layer's heads this process has, and of how many, under tensor parallelism."""
    parallel = getattr(transformer, "_parallel_config", None)
    tensor = None if parallel is None else parallel.tensor_parallel_config
    return None if tensor is None else (tensor._mesh.get_local_rank(), tensor._mesh.size())


def _fusions(transformer: nn.Module) -> tuple[object, int]:
    kept = getattr(transformer, "original_attn_processors", None)
    return kept, len(kept or {})


def _register(ours: type, stock: type) -> None:
    """Guidance that leaves attention out asks diffusers by the processor's class how that is done."""
    try:
        metadata = AttentionProcessorRegistry.get(stock)
    except ValueError:
        # For this one nobody can.
        return
    AttentionProcessorRegistry.register(ours, metadata)
