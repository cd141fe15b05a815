"""Turning sparse attention on and off on a diffusers pipeline or transformer."""

import inspect
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from types import FrameType
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks.hooks import BaseState, CacheContext, HookRegistry, ModelHook, StateManager
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from dit_sparse.attention import address, attend
from dit_sparse.config import Method, SparseConfig
from dit_sparse.pipelines import (
    cogvideox,
    cosmos,
    flux,
    flux2,
    hunyuan_dit,
    hunyuan_video,
    hunyuan_video15,
    kandinsky5,
    ltx,
    ltx2,
    mochi,
    pixart,
    qwen_image,
    sd3,
    wan,
    z_image,
)
from dit_sparse.pipelines.family import Family
from dit_sparse.profile import Profile
from dit_sparse.report import RunReport
from dit_sparse.state import Generation, Layer

FAMILIES: dict[str, Family] = {
    "CogVideoXTransformer3DModel": cogvideox.FAMILY,
    "CosmosTransformer3DModel": cosmos.FAMILY,
    "Flux2Transformer2DModel": flux2.FAMILY,
    "FluxTransformer2DModel": flux.FAMILY,
    "HunyuanDiT2DModel": hunyuan_dit.FAMILY,
    "HunyuanVideo15Transformer3DModel": hunyuan_video15.FAMILY,
    "HunyuanVideoTransformer3DModel": hunyuan_video.FAMILY,
    "Kandinsky5Transformer3DModel": kandinsky5.FAMILY,
    "LTX2VideoTransformer3DModel": ltx2.FAMILY,
    "LTXVideoTransformer3DModel": ltx.FAMILY,
    "MochiTransformer3DModel": mochi.FAMILY,
    "PixArtTransformer2DModel": pixart.FAMILY,
    "QwenImageTransformer2DModel": qwen_image.FAMILY,
    "SD3Transformer2DModel": sd3.FAMILY,
    "WanTransformer3DModel": wan.FAMILY,
    "ZImageTransformer2DModel": z_image.FAMILY,
}

LINEAR = "its self-attention is linear, so there are no blocks of a softmax to leave out"
REFUSED = {"SanaTransformer2DModel": LINEAR, "SanaVideoTransformer3DModel": LINEAR}

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

    def __init__(self, pipe: Any, config: SparseConfig, transformers: Mapping[str, nn.Module] | None = None):
        """transformers: which of the pipeline's, by component; all that this library knows if None."""
        self._pipe = pipe
        parts = _parts(pipe)
        self._transformers = dict(transformers or _known(parts))
        if not self._transformers:
            found = [type(_unwrap(module)).__name__ for module in parts.values() if isinstance(module, nn.Module)]
            raise ValueError(
                f"{type(pipe).__name__} has no transformer this library knows: it has {', '.join(found) or 'none'}, "
                f"and known are {', '.join(sorted(FAMILIES))}."
                + "".join(f" {name} cannot be: {REFUSED[name]}." for name in found if name in REFUSED)
            )
        for part, transformer in self._transformers.items():
            if _session_on(transformer) is not None:
                raise _taken(part)
            _check_processors(part, _unwrap(transformer))
        self._before = [
            (module, module.processor)
            for transformer in self._transformers.values()
            for module in transformer.modules()
            if hasattr(module, "processor")
        ]
        self.generation = Generation(config, profile=self._profile(config), dense=self._chosen_dense)
        self._processors: dict[str, Any] = {}
        self.author: SparseAttnProcessor | None = None
        # The prompt of a forward that began before the session did, and so has no name for its branch.
        self.unnamed: Tensor | None = None
        # Of the present run, or of the last one; None before the first.
        self.total_steps: int | None = None
        self._device = torch.device("cpu")
        self._run: object = None
        self._levels: tuple[float, ...] | None = None
        self._tick: object = None
        self._step: int | None = None
        self._hook()
        self._binds = transformers is None and pipe is not next(iter(self._transformers.values()))
        if self._binds:
            pipe.set_attn_processor = self.set_attn_processor
        self._install()

    @property
    def config(self) -> SparseConfig:
        return self.generation.config

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
            dense_backend=self._chosen_backend() or g.dense_backend,
            kernel=g.kernel or ("triton" if find_spec("triton") and self._device.type == "cuda" else "torch"),
        )

    def set_attn_processor(self, processor: Any) -> None:
        """Change the method: a SparseConfig, a method's name, or a diffusers processor or dict of them.

        Bound to the pipeline while the session lasts. A diffusers processor goes to the transformers as
        `transformer.set_attn_processor` would send it, and leaves sparse attention off until a method is set again.
        """
        if isinstance(processor, SparseAttnProcessor):
            processor = processor.config
        if isinstance(processor, SparseConfig | str):
            config = _config(processor, {})
            profile = self._profile(config)
            self.generation.reset()
            self.generation.config, self.generation.profile = config, profile
            self._install()
            return
        for transformer in self._transformers.values():
            if not hasattr(transformer, "set_attn_processor"):
                raise ValueError(
                    f"{type(_unwrap(transformer)).__name__} takes no processors of diffusers from outside: give a "
                    "SparseConfig or a method's name, or restore()."
                )
            # diffusers empties the dict it is given.
            transformer.set_attn_processor(dict(processor) if isinstance(processor, Mapping) else processor)

    def restore(self) -> None:
        """Undo everything: processors, hooks and the pipeline's method are as they were. Safe to call twice."""
        for module, processor in self._before:
            _set(module, processor)
        self._before = []
        for transformer in self._transformers.values():
            registry = HookRegistry.check_if_exists_or_initialize(_unwrap(transformer))
            registry.remove_hook(_HOOK, recurse=False)
        self._transformers, self._processors = {}, {}
        if self._binds:
            del self._pipe.set_attn_processor
            self._binds = False
        self.generation.reset()

    def release(self, transformer: nn.Module) -> None:
        """Restore, and leave every other transformer to a session of its own, which its next forward begins."""
        others = [module for module in self._transformers.values() if module is not transformer]
        self.restore()
        for module in others:
            module.set_attn_processor(self.author)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def _forward_begins(
        self, transformer: nn.Module, family: Family, call: Mapping[str, Any], said: CacheContext | None
    ) -> None:
        """Tell the generation where it is: a forward of a transformer with the arguments `call` begins."""
        now = family.forward(transformer, call)
        # Every run of a pipeline makes a new tensor of timesteps.
        run = getattr(getattr(self._pipe, "scheduler", None), "timesteps", None)
        step = said.step_index if said else None
        # Pipelines put a new tensor here at every step, and None outside of their loops.
        tick = getattr(self._pipe, "_current_timestep", None)
        if step is None and tick is not None:
            if run is not self._run or self._step is None:
                self._step = 0
            elif tick is not self._tick:
                self._step += 1
            step = self._step
        if self.generation.profile is not None and (run is not self._run or self._levels is None):
            self._levels = levels_of(getattr(self._pipe, "scheduler", None))
        self._run, self._tick, self._device = run, tick, now.device
        self.total_steps = (said.num_inference_steps if said else None) or _total_steps(self._pipe)
        guided = getattr(self._pipe, "do_classifier_free_guidance", False) and not family.one_forward
        self.generation.branches = 2 if guided else 1
        self.generation.enter(
            now.grid,
            batch=now.batch,
            device=self._device,
            # Reading it waits for the device, so only where nobody counts the steps. The largest, because a clean
            # first frame of an image-to-video model has timestep 0 among its tokens'.
            timestep=float(now.timestep.max()) if step is None else 0.0,
            branch=said.name if said and (now.prompt is None or now.prompt is not self.unnamed) else None,
            prompt=now.prompt,
            step=step,
            total=self.total_steps,
            run=run,
            levels=self._levels,
            text=(now.before, now.after),
        )

    def _profile(self, config: SparseConfig) -> Profile | None:
        if config.profile is None:
            return None
        profile = Profile.load(config.profile)
        profile.check({part: _unwrap(transformer) for part, transformer in self._transformers.items()})
        return profile

    def _run_ends(self) -> None:
        self._step = None
        self.generation.reset()

    def _hook(self) -> None:
        for transformer in map(_unwrap, self._transformers.values()):
            family = FAMILIES[type(transformer).__name__]
            hook = GenerationHook(self, family)
            HookRegistry.check_if_exists_or_initialize(transformer).register_hook(hook, _HOOK)

    def _install(self) -> None:
        layers, before = self.generation.layers, dict(self._before)
        layers.clear()
        for part, transformer in self._transformers.items():
            family = FAMILIES[type(_unwrap(transformer)).__name__]
            ours, others = [], []
            for name, module in _unwrap(transformer).named_modules():
                if module in before:
                    (ours if family.is_self_attention(name) else others).append((name, module))
            for _, module in others:
                _set(module, before[module])
            for index, (name, module) in enumerate(ours):
                heads, head_dim = family.heads(module)
                layers.append(Layer(f"{part}.{name}", index, len(ours), heads, head_dim, family.is_joint(name)))
                processor = family.processors[type(before[module])](Attention(self.generation, len(layers) - 1))
                _carry(module.processor, processor)
                _set(module, processor)
                self._processors[layers[-1].name] = processor

    def _chosen_backend(self) -> str:
        chosen = {p._attention_backend for p in self._processors.values()} - {None}
        return ", ".join(sorted(str(getattr(backend, "value", backend)) for backend in chosen))

    def _chosen_dense(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor | None:
        """Attention by the backend that the user gave this layer with `set_attention_backend`, if any."""
        processor = self._processors.get(layer.name)
        if processor is None or processor._attention_backend is None:
            return None
        return _dispatch(q, k, v, None if key_mask is None else key_mask[:, None, None], processor)


class Attention:
    """The attention call of one layer, as its processor makes it."""

    def __init__(self, generation: Generation, layer: int):
        self.generation, self.layer = generation, layer
        self.where = address(generation, layer)
        self.joint = generation.layers[layer].joint

    def __deepcopy__(self, memo: dict[int, Any]) -> "Attention":
        # A copied processor attends for the same generation; a copy of all it has learned may not fit in memory.
        return Attention(self.generation, self.layer)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        return attend(q, k, v, key_mask, self.where)

    def fall_back(self, reason: str, pairs: float) -> None:
        """Count a call of `pairs` query-key pairs that somebody else computes. Raises ValueError under strict."""
        generation = self.generation
        generation.fall_back(reason)
        generation.tally.dense(generation.moment.step if generation.moment else 0, pairs)


def _dispatch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, processor: Any) -> Tensor:
    out = dispatch_attention_fn(
        *(x.transpose(1, 2) for x in (q, k, v)),
        attn_mask=mask,
        backend=processor._attention_backend,
        parallel_config=processor._parallel_config,
    )
    return out.transpose(1, 2)


def _carry(old: Any, new: Any) -> None:
    """Take over what diffusers' set_attention_backend and enable_parallelism wrote on a processor."""
    for name in ("_attention_backend", "_parallel_config"):
        setattr(new, name, getattr(old, name, None))


class _Context(StateManager):
    """Hears what the pipeline says in `transformer.cache_context(...)`."""

    def __init__(self) -> None:
        super().__init__(BaseState)


class GenerationHook(ModelHook):
    """Tells the generation where it is, before each forward of a transformer."""

    _is_stateful = True

    def __init__(self, session: Session, family: Family):
        super().__init__()
        self.said, self.session, self.family = _Context(), session, family

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        self.module = module
        self.names = list(inspect.signature(type(module).forward).parameters)[1:]
        return module

    # Bookkeeping, which torch.compile would trace anew at every step.
    @torch.compiler.disable
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if module is not self.module:
            raise ValueError(
                "This transformer is a deep copy of a sparse one, and diffusers' hooks would run the original in its "
                "place: copy before sparsify(), or after restore()."
            )
        call = dict(zip(self.names, args, strict=False)) | kwargs
        self.session._forward_begins(module, self.family, call, self.said._context)
        return args, kwargs

    @torch.compiler.disable
    def post_forward(self, module: nn.Module, output: Any) -> Any:  # noqa: ARG002  (diffusers' signature)
        self.session.generation.leave()
        return output

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.session._run_ends()
        return module


def _parts(pipe: Any) -> Mapping[str, Any]:
    return pipe.components if hasattr(pipe, "components") else {"transformer": pipe}


def _known(parts: Mapping[str, Any]) -> dict[str, nn.Module]:
    return {part: module for part, module in parts.items() if type(_unwrap(module)).__name__ in FAMILIES}


def _check_processors(part: str, transformer: nn.Module) -> None:
    family = FAMILIES[type(transformer).__name__]
    for name, module in transformer.named_modules():
        processor = getattr(module, "processor", None)
        if processor is None or not family.is_self_attention(name) or type(processor) in family.processors:
            continue
        raise ValueError(
            f"{part}.{name} has {type(processor).__name__}, which would be lost: in {family.name}, sparse attention "
            f"takes the place of {' or '.join(kind.__name__ for kind in family.processors)} alone."
        )


def _session_on(transformer: nn.Module) -> Session | None:
    hook = HookRegistry.check_if_exists_or_initialize(_unwrap(transformer)).get_hook(_HOOK)
    return None if hook is None else hook.session


def _taken(part: str) -> ValueError:
    return ValueError(f"{part} is sparse already: call restore() on its session first.")


def _unwrap(module: Any) -> Any:
    """The model inside torch.compile's wrapper."""
    return getattr(module, "_orig_mod", module)


def levels_of(scheduler: Any) -> tuple[float, ...] | None:
    """The noise level of each step, from 1 to 0."""
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None:
        return None
    return tuple((timesteps.double() / scheduler.config.num_train_timesteps).tolist())


def _total_steps(pipe: Any) -> int | None:
    # Outside of the pipeline's loop this is the number of an earlier run, and something else runs the transformer.
    running = getattr(pipe, "_current_timestep", None) is not None
    steps = getattr(pipe, "_num_timesteps", None) if running else None
    if steps is None:
        timesteps = getattr(getattr(pipe, "scheduler", None), "timesteps", None)
        steps = None if timesteps is None else len(timesteps)
    return steps


class SparseAttnProcessor:
    """Sparse attention in plain diffusers style: `transformer.set_attn_processor(SparseAttnProcessor(...))`.

    One object for every attention module. A module gives its processor no step and no grid, so in its first forward
    the object looks for its transformer, and for the pipeline that runs it, and hands over to a `Session`, kept as
    `session`: each self-attention gets its own processor, the rest gets stock ones back. config and options as in
    `sparsify`. To compile a transformer, use `sparsify`, or compile after the first forward.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self, config: SparseConfig | Method | None = None, **options: Any):
        self.config = _config(config, options)
        self.session: Session | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "SparseAttnProcessor":
        copy = SparseAttnProcessor(self.config)
        _carry(self, copy)
        return copy

    def __call__(self, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self._hand_over(sys._getframe(1))
        named = inspect.signature(attn.processor.__call__).parameters
        return attn.processor(attn, *args, **{name: x for name, x in kwargs.items() if name in named})

    def _hand_over(self, frame: FrameType | None) -> None:
        # No module knows its parent or its pipeline; the call stack does.
        transformer = pipe = None
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        while frame is not None and pipe is None:
            names = frame.f_locals
            owner = names.get("self")
            if transformer is None and isinstance(owner, nn.Module) and type(owner).__name__ in FAMILIES:
                transformer = owner
            if transformer is not None and owner is transformer and {"args", "kwargs"} <= names.keys():
                args, kwargs = names["args"], names["kwargs"]
            if isinstance(owner, DiffusionPipeline) and any(
                _unwrap(c) is transformer for c in owner.components.values()
            ):
                pipe = owner
            frame = frame.f_back
        if transformer is None:
            raise ValueError(
                f"SparseAttnProcessor runs inside one of {', '.join(sorted(FAMILIES))}, not alone; for other models "
                "see the README's list of families."
            )

        # The two transformers of one pipeline share their steps, if they were given the same object.
        parts = _known(_parts(pipe or transformer))
        held = {part: [m for m in module.modules() if _processor(m) is self] for part, module in parts.items()}
        mine = {part: parts[part] for part, modules in held.items() if modules}
        for part, module in mine.items():
            session = _session_on(module)
            if session is not None:
                if session.author is None:
                    raise _taken(part)
                session.release(module)
            names = {m: name for name, m in _unwrap(module).named_modules()}
            for m in held[part]:
                _set(m, FAMILIES[type(_unwrap(module)).__name__].stock(names[m], _unwrap(module)))
                _carry(self, m.processor)
        self.session = Session(pipe or transformer, self.config, mine)
        self.session.author = self
        # This forward began before the hook was there.
        hook = HookRegistry.check_if_exists_or_initialize(transformer).get_hook(_HOOK)
        call = dict(zip(hook.names, args, strict=False)) | kwargs
        self.session.unnamed = call.get("encoder_hidden_states")
        self.session._forward_begins(transformer, hook.family, call, None)


def _all_names() -> inspect.Signature:
    """Every argument that a processor it may stand in for takes: attention modules pass on no others."""
    stocks = {kind for family in FAMILIES.values() for kind in family.processors}
    names = {name for kind in stocks for name in inspect.signature(kind.__call__).parameters} - {"self", "attn"}
    kinds = inspect.Parameter
    return inspect.Signature(
        [kinds(name, kinds.POSITIONAL_OR_KEYWORD) for name in ("self", "attn")]
        + [kinds(name, kinds.KEYWORD_ONLY, default=None) for name in sorted(names)]
    )


# What inspect.signature goes by.
SparseAttnProcessor.__call__.__signature__ = _all_names()  # type: ignore[attr-defined]


def _set(module: nn.Module, processor: Any) -> None:
    # Mochi's attention has no method for it.
    if hasattr(module, "set_processor"):
        module.set_processor(processor)
    else:
        module.processor = processor


def _processor(module: nn.Module) -> Any:
    return getattr(module, "processor", None)
