"""Turning sparse attention on and off on a diffusers pipeline or transformer."""

import inspect
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from diffusers.hooks.hooks import BaseState, CacheContext, HookRegistry, ModelHook, StateManager
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from dit_sparse.attention import address, attend
from dit_sparse.config import Method, SparseConfig
from dit_sparse.pipelines import wan
from dit_sparse.pipelines.family import Family
from dit_sparse.report import RunReport
from dit_sparse.state import Generation, Layer

FAMILIES: dict[str, Family] = {
    "WanTransformer3DModel": wan.FAMILY,
}

_HOOK = "dit_sparse"


def sparsify(pipe: Any, config: SparseConfig | Method | None = None, **options: Any) -> "Session":
    """Make attention sparse on a diffusers pipeline (every transformer it has) or on one transformer.

    config is a SparseConfig or a method's name; options are SparseConfig's fields. While the session lasts,
    `pipe.set_attn_processor(...)` changes the method; `session.restore()`, or leaving a `with` block, undoes it all.
    Raises ValueError if the pipeline has no transformer this library knows, or is sparse already.
    """
    return Session(pipe, _config(config, options))


def _config(config: SparseConfig | str | None, options: Mapping[str, Any]) -> SparseConfig:
    if isinstance(config, SparseConfig):
        if options:
            raise ValueError(f"Give a SparseConfig or options, not both: {', '.join(options)} came beside one.")
        return config
    return SparseConfig.from_dict(({} if config is None else {"method": config}) | dict(options))


class Session:
    """Sparse attention on a pipeline's transformers, until `restore()`."""

    def __init__(self, pipe: Any, config: SparseConfig):
        self._pipe = pipe
        parts = pipe.components if hasattr(pipe, "components") else {"transformer": pipe}
        self._transformers = {
            part: module for part, module in parts.items() if type(_unwrap(module)).__name__ in FAMILIES
        }
        if not self._transformers:
            found = [type(module).__name__ for module in parts.values() if isinstance(module, nn.Module)]
            raise ValueError(
                f"{type(pipe).__name__} has no transformer this library knows: it has {', '.join(found) or 'none'}, "
                f"and known are {', '.join(sorted(FAMILIES))}."
            )
        for part, transformer in self._transformers.items():
            if HookRegistry.check_if_exists_or_initialize(_unwrap(transformer)).get_hook(_HOOK) is not None:
                raise ValueError(f"{part} is sparse already: call restore() on its session first.")
        self._before = [
            (module, module.processor)
            for transformer in self._transformers.values()
            for module in transformer.modules()
            if hasattr(module, "set_processor") and hasattr(module, "processor")
        ]
        self.generation = Generation(config)
        self._hook()
        if pipe is not next(iter(self._transformers.values())):
            pipe.set_attn_processor = self.set_attn_processor
        self._install()

    @property
    def config(self) -> SparseConfig:
        return self.generation.config

    @property
    def total_steps(self) -> int | None:
        """Steps of the present run, or of the last one; None before the pipeline has said."""
        return _total_steps(self._pipe)

    def phase(self, step: int) -> str:
        """What most layers do at this step of the present run: "dense", "anchor" or "sparse"."""
        return self.generation.phase_at(step, self.total_steps)

    def report(self) -> RunReport:
        """What the present or last generation did. Reads the device."""
        g, tally = self.generation, self.generation.tally
        return RunReport(
            steps=tally.steps(),
            density=tally.density(),
            work=tally.work(),
            state_bytes=g.peak_state_bytes,
            residual=g.storage,
            fallbacks=dict(tally.fallbacks),
            dense_backend=g.dense_backend,
            kernel="triton" if find_spec("triton") and self._device.type == "cuda" else "torch",
        )

    def set_attn_processor(self, processor: Any) -> None:
        """Change the method: a SparseConfig, a method's name, or a diffusers processor or dict of them.

        Bound to the pipeline while the session lasts. A diffusers processor goes to the transformers as
        `transformer.set_attn_processor` would send it, and leaves sparse attention off until a method is set again.
        """
        if isinstance(processor, SparseConfig | str):
            self.generation.reset()
            self.generation.config = _config(processor, {})
            self._put_back()
            self._install()
            return
        for transformer in self._transformers.values():
            # diffusers empties the dict it is given.
            transformer.set_attn_processor(dict(processor) if isinstance(processor, Mapping) else processor)

    def restore(self) -> None:
        """Undo everything: processors, hooks and the pipeline's method are as they were. Safe to call twice."""
        self._put_back()
        self._before = []
        for transformer in self._transformers.values():
            registry = HookRegistry.check_if_exists_or_initialize(_unwrap(transformer))
            registry.remove_hook(_HOOK, recurse=False)
        self._transformers = {}
        if "set_attn_processor" in vars(self._pipe):
            del self._pipe.set_attn_processor
        self.generation.reset()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    @property
    def _device(self) -> torch.device:
        modules = self._transformers.values() or (module for module, _ in self._before)
        return next((p.device for module in modules for p in module.parameters()), torch.device("cpu"))

    def _put_back(self) -> None:
        for module, processor in self._before:
            module.set_processor(processor)

    def _hook(self) -> None:
        for transformer in map(_unwrap, self._transformers.values()):
            family = FAMILIES[type(transformer).__name__]
            hook = GenerationHook(self.generation, family, self._pipe)
            HookRegistry.check_if_exists_or_initialize(transformer).register_hook(hook, _HOOK)

    def _install(self) -> None:
        layers = self.generation.layers
        layers.clear()
        for part, transformer in self._transformers.items():
            family = FAMILIES[type(_unwrap(transformer)).__name__]
            modules = [
                (name, module)
                for name, module in _unwrap(transformer).named_modules()
                if hasattr(module, "set_processor") and family.is_self_attention(name)
            ]
            for index, (name, module) in enumerate(modules):
                heads = module.heads
                layers.append(Layer(f"{part}.{name}", index, len(modules), heads, module.inner_dim // heads))
                call = Attention(self.generation, len(layers) - 1)
                module.set_processor(family.processor(call))


class Attention:
    """The attention call of one layer, as its processor makes it."""

    def __init__(self, generation: Generation, layer: int):
        self.generation, self.layer = generation, layer
        self.where = address(generation, layer)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, processor: Any) -> Tensor:
        """processor is asked for the dense kernel the user chose with `set_attention_backend`, if any."""
        generation = self.generation
        if processor._attention_backend is not None and generation.phase(generation.layers[self.layer]) == "dense":
            return self._dispatch(q, k, v, None, processor)
        return attend(q, k, v, None, self.where)

    def dense(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, processor: Any, reason: str) -> Tensor:
        """Dense attention by diffusers' own dispatcher, counted as a fallback. Raises ValueError under strict."""
        self.generation.fall_back(reason)
        return self._dispatch(q, k, v, mask, processor)

    def _dispatch(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, processor: Any) -> Tensor:
        moment = self.generation.moment
        self.generation.tally.dense(moment.step if moment else 0, float(q[..., 0].numel() * k.shape[2]))
        out = dispatch_attention_fn(
            *(x.transpose(1, 2) for x in (q, k, v)),
            attn_mask=mask,
            backend=processor._attention_backend,
            parallel_config=processor._parallel_config,
        )
        return out.transpose(1, 2)


class _Context(StateManager):
    """Hears what the pipeline says in `transformer.cache_context(...)`."""

    def __init__(self) -> None:
        super().__init__(BaseState)


class GenerationHook(ModelHook):
    """Tells the generation where it is, before each forward of a transformer."""

    _is_stateful = True

    def __init__(self, generation: Generation, family: Family, pipe: Any):
        super().__init__()
        self.said, self.generation, self.family, self.pipe = _Context(), generation, family, pipe

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        self.names = list(inspect.signature(type(module).forward).parameters)[1:]
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = dict(zip(self.names, args, strict=False)) | kwargs
        said: CacheContext | None = self.said._context
        hidden_states = call["hidden_states"]
        step = said.step_index if said else None
        scheduler = getattr(self.pipe, "scheduler", None)
        self.generation.branches = 2 if getattr(self.pipe, "do_classifier_free_guidance", False) else 1
        self.generation.enter(
            self.family.grid(module, hidden_states),
            batch=hidden_states.shape[0],
            device=hidden_states.device,
            # Reading it waits for the device, so only where nobody counts the steps. The largest, because a clean
            # first frame of an image-to-video model has timestep 0 among its tokens'.
            timestep=float(call["timestep"].max()) if step is None else 0.0,
            branch=said.name if said else None,
            prompt=call.get("encoder_hidden_states"),
            step=step,
            total=(said.num_inference_steps if said else None) or _total_steps(self.pipe),
            # Every run of a pipeline makes a new tensor of timesteps.
            run=getattr(scheduler, "timesteps", None),
        )
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:  # noqa: ARG002  (diffusers' signature)
        self.generation.leave()
        return output

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.generation.reset()
        return module


def _unwrap(module: Any) -> Any:
    """The model inside torch.compile's wrapper."""
    return getattr(module, "_orig_mod", module)


def _total_steps(pipe: Any) -> int | None:
    steps = getattr(pipe, "_num_timesteps", None)
    if steps is None:
        timesteps = getattr(getattr(pipe, "scheduler", None), "timesteps", None)
        steps = None if timesteps is None else len(timesteps)
    return steps


class SparseAttnProcessor:
    """Sparse attention in plain diffusers style: `transformer.set_attn_processor(SparseAttnProcessor(...))`.

    One object for every attention module. A module gives its processor no step and no grid, so the object looks for
    its transformer in the first forward, which therefore runs dense, and then hands over to a `Session` on it: each
    self-attention gets its own processor, the rest gets the stock ones back. config and options as in `sparsify`.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self, config: SparseConfig | Method | None = None, **options: Any):
        self.config = _config(config, options)
        self.session: Session | None = None

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        transformer = self._transformer()
        stock = FAMILIES[type(transformer).__name__].stock()
        for module in transformer.modules():
            if getattr(module, "processor", None) is self:
                module.set_processor(FAMILIES[type(transformer).__name__].stock())
        if self.session is not None:
            # Set again after restore(), or on a second transformer.
            self.session.restore()
        self.session = Session(transformer, self.config)
        return stock(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)

    def _transformer(self) -> nn.Module:
        """The transformer whose forward is running. No module knows its parent; the call stack does."""
        frame = sys._getframe(2)
        while frame is not None:
            owner = frame.f_locals.get("self")
            if type(owner).__name__ in FAMILIES and isinstance(owner, nn.Module):
                return owner
            frame = frame.f_back
        raise ValueError(
            f"SparseAttnProcessor runs inside one of {', '.join(sorted(FAMILIES))}, not alone; for other models see "
            "the README's list of families."
        )
