"""Turning sparse attention on and off on a diffusers pipeline or transformer."""

import inspect
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from diffusers.hooks.hooks import BaseState, CacheContext, HookRegistry, ModelHook, StateManager
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from dit_sparse.config import Method, SparseConfig
from dit_sparse.pipelines.family import Family
from dit_sparse.pipelines.placement import Attention, Placement
from dit_sparse.pipelines.registry import FAMILIES, REFUSED, family_of, known_of, parts_of, processor_of, unwrap
from dit_sparse.pipelines.sparse_processor import SparseAttnProcessor, config_of
from dit_sparse.profile import Profile
from dit_sparse.report import RunReport
from dit_sparse.state import Generation, Layer

__all__ = ["FAMILIES", "Attention", "Session", "SparseAttnProcessor", "sparsify"]

HOOK = "dit_sparse"


def sparsify(pipe: Any, config: SparseConfig | Method | None = None, **options: Any) -> "Session":
    """Make attention sparse on a diffusers pipeline (every transformer it has) or on one transformer.

    config is a SparseConfig or a method's name; options are SparseConfig's fields. While the session lasts,
    `pipe.set_attn_processor(...)` changes the method; `session.restore()`, or leaving a `with` block, undoes it all.
    Raises ValueError if the pipeline has no transformer this library knows, or is sparse already.
    """
    return Session(pipe, config_of(config, options))


class Session:
    """Sparse attention on a pipeline's transformers, until `restore()`."""

    def __init__(self, pipe: Any, config: SparseConfig, transformers: Mapping[str, nn.Module] | None = None):
        """transformers: which of the pipeline's, by component; all that this library knows if None."""
        self._pipe = pipe
        parts = parts_of(pipe)
        self._transformers = dict(transformers or known_of(parts))
        if not self._transformers:
            found = [type(unwrap(module)).__name__ for module in parts.values() if isinstance(module, nn.Module)]
            raise ValueError(
                f"{type(pipe).__name__} has no transformer this library knows: it has {', '.join(found) or 'none'}, "
                f"and known are {', '.join(sorted(FAMILIES))}."
                + "".join(f" {name} cannot be: {REFUSED[name]}." for name in found if name in REFUSED)
            )
        for part, transformer in self._transformers.items():
            if session_on(transformer) is not None:
                raise taken(part)
            _check_processors(part, unwrap(transformer))
        self.generation = Generation(config, profile=self._profile(config), dense=self._chosen_dense)
        self._placement = Placement(self._transformers, self.generation)
        # Whether the user set processors of somebody else's through the pipeline.
        self._off = False
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
        # What families read of their arguments on the host: the argument, its version and run, and the copy.
        self._read: dict[str, tuple[Tensor, int, object, Tensor]] = {}
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
        errors = [error.item() for error in tally.precision_errors.values()]
        return RunReport(
            steps=tally.steps(),
            density=tally.density(),
            work=tally.work(),
            state_bytes=g.peak_state_bytes,
            residual=g.storage,
            fallbacks=dict(tally.fallbacks),
            dense_backend=self._chosen_backend() or g.dense_backend,
            precision=g.config.precision,
            precision_error=sum(errors) / len(errors) if errors else None,
            precision_error_worst=max(errors, default=None),
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
            config = config_of(processor, {})
            profile = self._profile(config)
            self.generation.reset()
            self.generation.config, self.generation.profile = config, profile
            self._install()
            return
        self._off = True
        for transformer in self._transformers.values():
            if not hasattr(transformer, "set_attn_processor"):
                raise ValueError(
                    f"{type(unwrap(transformer)).__name__} takes no processors of diffusers from outside: give a "
                    "SparseConfig or a method's name, or restore()."
                )
            # diffusers empties the dict it is given.
            transformer.set_attn_processor(dict(processor) if isinstance(processor, Mapping) else processor)

    def restore(self) -> None:
        """Undo everything: processors, hooks and the pipeline's method are as they were. Safe to call twice."""
        self._placement.restore()
        for transformer in map(unwrap, self._transformers.values()):
            registry = HookRegistry.check_if_exists_or_initialize(transformer)
            forward, hook = transformer.forward, _hook_on(transformer)
            last = registry._hook_order[-1] == HOOK
            registry.remove_hook(HOOK, recurse=False)
            if last and forward is not hook.wrapped:
                # What diffusers puts back is older than what accelerate has put there since.
                transformer.forward = forward
        self._transformers, self._read = {}, {}
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
        # Every run of a pipeline makes a new tensor of timesteps.
        run = getattr(getattr(self._pipe, "scheduler", None), "timesteps", None)
        self._placement.follow(transformer)
        self._placement.check_parallel(transformer)
        now = family.forward(transformer, self._on_host(family, call, run))
        self._placement.share(transformer, now.device)
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
            part=next(part for part, module in self._transformers.items() if unwrap(module) is transformer),
        )
        if not self._off:
            self._count_strangers(transformer)

    def _on_host(self, family: Family, call: Mapping[str, Any], run: object) -> Mapping[str, Any]:
        """The arguments, with those that the family reads on the host; what a run repeats is read once."""
        here = {}
        for name in family.on_host:
            x = call[name]
            if name in self._read:
                known, version, of, copy = self._read[name]
                same = x is known and x._version == version
                if same or (run is not None and run is of and x.shape == known.shape):
                    here[name] = copy
                    continue
            here[name] = x.cpu()
            self._read[name] = x, x._version, run, here[name]
        return {**call, **here}

    def _count_strangers(self, transformer: nn.Module) -> None:
        """Attention that somebody took over, as an IP-adapter does, is dense without our seeing it."""
        generation = self.generation
        assert generation.moment is not None and generation.grid is not None
        for index, processor in self._placement.strangers(transformer):
            layer = generation.layers[index]
            tokens = generation.grid.tokens + (sum(n or 0 for n in generation.text) if layer.joint else 0)
            pairs = float(generation.rows * layer.heads * tokens**2)
            Attention(generation, index).fall_back(f"{type(processor).__name__} took sparse attention's place", pairs)

    def _profile(self, config: SparseConfig) -> Profile | None:
        if config.profile is None:
            return None
        profile = Profile.load(config.profile)
        profile.check({part: unwrap(transformer) for part, transformer in self._transformers.items()})
        return profile

    def _run_ends(self) -> None:
        self._step = None
        self._read = {}
        self.generation.reset()

    def _hook(self) -> None:
        for transformer in map(unwrap, self._transformers.values()):
            hook = GenerationHook(self, family_of(transformer))
            HookRegistry.check_if_exists_or_initialize(transformer).register_hook(hook, HOOK)
            hook.wrapped = transformer.forward

    def _install(self) -> None:
        self._placement.install()
        self._off = False

    def _chosen_backend(self) -> str:
        chosen = {p._attention_backend for p in self._placement.ours()} - {None}
        return ", ".join(sorted(str(getattr(backend, "value", backend)) for backend in chosen))

    def _chosen_dense(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor | None:
        """Attention by the backend that the user gave this layer with `set_attention_backend`, if any."""
        processor = self._placement.processor(layer.name)
        if processor is None or processor._attention_backend is None:
            return None
        return _dispatch(q, k, v, None if key_mask is None else key_mask[:, None, None], processor)


def _dispatch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, processor: Any) -> Tensor:
    out = dispatch_attention_fn(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        backend=processor._attention_backend,
        # The sequence is whole here, whoever holds its parts elsewhere.
        parallel_config=None,
    )
    return out.transpose(1, 2)


class _Context(StateManager):
    """Hears what the pipeline says in `transformer.cache_context(...)`."""

    def __init__(self) -> None:
        super().__init__(BaseState)


class GenerationHook(ModelHook):
    """Tells the generation where it is, before each forward of a transformer.

    In diffusers' registry it hears what the pipeline says. It acts from hooks of torch, which see the whole batch and
    the whole sequence whatever other hooks of diffusers split, and stay when accelerate takes its own away.
    """

    _is_stateful = True

    def __init__(self, session: Session, family: Family):
        super().__init__()
        self.said, self.session, self.family = _Context(), session, family
        # The forward that diffusers made of the model's when it took this hook in.
        self.wrapped: Any = None

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        # A number, which a deep copy keeps.
        self.module = id(module)
        self.names = list(inspect.signature(type(module).forward).parameters)[1:]
        self.handles = [
            module.register_forward_pre_hook(self.begin, with_kwargs=True),
            module.register_forward_hook(self.end),
        ]
        return module

    def deinitalize_hook(self, module: nn.Module) -> nn.Module:
        for handle in self.handles:
            handle.remove()
        return module

    # Bookkeeping, which torch.compile would trace anew at every step.
    @torch.compiler.disable
    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if id(module) != self.module:
            raise ValueError(
                "This transformer is a deep copy of a sparse one, and diffusers' hooks would run the original in its "
                "place: copy before sparsify(), or after restore()."
            )
        call = dict(zip(self.names, args, strict=False)) | kwargs
        self.session._forward_begins(module, self.family, call, self.said._context)

    @torch.compiler.disable
    def end(self, *_: object) -> None:
        self.session.generation.leave()

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.session._run_ends()
        return module


def _check_processors(part: str, transformer: nn.Module) -> None:
    family = family_of(transformer)
    for name, module in transformer.named_modules():
        processor = processor_of(module)
        if processor is None or not family.is_self_attention(name) or type(processor) in family.processors:
            continue
        raise ValueError(
            f"{part}.{name} has {type(processor).__name__}, which would be lost: in {family.name}, sparse attention "
            f"takes the place of {' or '.join(kind.__name__ for kind in family.processors)} alone."
        )


def session_on(transformer: nn.Module) -> Session | None:
    hook = _hook_on(unwrap(transformer))
    return None if hook is None else hook.session


def _hook_on(transformer: nn.Module) -> Any:
    return HookRegistry.check_if_exists_or_initialize(transformer).get_hook(HOOK)


def taken(part: str) -> ValueError:
    return ValueError(f"{part} is sparse already: call restore() on its session first.")


def levels_of(scheduler: Any) -> tuple[float, ...] | None:
    """The noise level of each step, from 1 to 0: the share of noise in what is denoised. None without a scheduler that
    has timesteps."""
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None:
        return None
    config = scheduler.config
    if "sigma_data" in config:
        # Timesteps of EDM, as in Cosmos 1, are logarithms.
        sigmas = scheduler.sigmas[: len(timesteps)].double()
        return tuple((sigmas / (sigmas + config.sigma_data)).tolist())
    levels = timesteps.double() / config.num_train_timesteps
    # Mochi's rise with what there is of the video.
    return tuple((1.0 - levels if config.get("invert_sigmas") else levels).tolist())


def _total_steps(pipe: Any) -> int | None:
    # Outside of the pipeline's loop this is the number of an earlier run, and something else runs the transformer.
    running = getattr(pipe, "_current_timestep", None) is not None
    steps = getattr(pipe, "_num_timesteps", None) if running else None
    if steps is None:
        timesteps = getattr(getattr(pipe, "scheduler", None), "timesteps", None)
        steps = None if timesteps is None else len(timesteps)
    return steps
