"""What can be on beside a method when it is compared: a step cache of diffusers, compiled blocks, fp8 weights,
attention in 8 bits."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from torch import nn

# FirstBlockCache comes from ParaAttention; TaylorSeer is arXiv 2503.06923, MagCache arXiv 2506.09045.
CACHES = ("firstblock", "taylorseer", "magcache")
# 8bit is the config's precision; all others are switched on around the transformers.
EXTRAS = (*CACHES, "compile", "fp8", "8bit")


def check(name: str, extras: Sequence[str]) -> None:
    """Raise ValueError unless these can be on together; name is what the user wrote."""
    plain = [extra.partition("=")[0] for extra in extras]
    for extra, kind in zip(extras, plain, strict=True):
        if kind not in EXTRAS:
            raise ValueError(f"Unknown {kind!r} in {name!r}: after a + comes one of {', '.join(EXTRAS)}.")
        if plain.count(kind) > 1:
            raise ValueError(f"{kind} is in {name!r} twice: once is enough.")
        if "=" in extra and kind not in CACHES:
            raise ValueError(f"{kind} takes no number, and {name!r} gives it one.")
        if kind in CACHES:
            cache_config(extra, 1, (1.0,))
    caches = [kind for kind in plain if kind in CACHES]
    if len(caches) > 1:
        raise ValueError(f"diffusers runs one step cache at a time, and {name!r} has {' and '.join(caches)}.")
    if "compile" in extras and caches == ["magcache"]:
        raise ValueError(f"diffusers runs magcache's blocks outside of torch.compile: leave out either in {name!r}.")
    if "compile" in extras and "fp8" in extras:
        raise ValueError(
            f"fp8 changes the dtype of weights inside of each forward, which torch.compile cannot trace: leave out "
            f"either in {name!r}."
        )


def cache_of(extras: Sequence[str]) -> str | None:
    return next((extra for extra in extras if extra.partition("=")[0] in CACHES), None)


def cache_config(cache: str, steps: int, ratios: Sequence[float] = ()) -> Any:
    """diffusers' settings of a cache in a run of `steps`: its defaults, but for the number after a =, which is the
    threshold of firstblock and magcache, and the interval of taylorseer. Raises ValueError for one that cannot be.

    ratios  magcache's, one for each step, see `mag_ratios`
    """
    kind, given, number = cache.partition("=")
    name, least = ("cache_interval", 1) if kind == "taylorseer" else ("threshold", 0)
    try:
        told = {name: int(number) if least else float(number)} if given else {}
    except ValueError:
        told = {name: math.nan}
    if told and not least <= told[name] < math.inf:
        noun = "a whole number of steps from 1 on" if least else "a threshold from 0 on"
        raise ValueError(f"After {kind}= comes {noun}, not {number!r}.")
    match kind:
        case "firstblock":
            return FirstBlockCacheConfig(**told)
        case "taylorseer":
            # The default patterns find no attention module in most models; this way whole blocks are skipped.
            return TaylorSeerCacheConfig(use_lite_mode=True, **told)
        case _:
            return MagCacheConfig(mag_ratios=list(ratios), num_inference_steps=steps, **told)


@contextmanager
def switched_on(
    pipe: Any, parts: Sequence[str], extras: Sequence[str], steps: int, ratios: Sequence[float] = ()
) -> Iterator[None]:
    """The transformers named in `parts` with `extras` on; afterwards the pipeline is as it was.

    Compiling and casting cannot be undone, so they are done to copies, while the originals wait in main memory.
    Raises ValueError where the model or its pipeline cannot take one of them.
    """
    with ExitStack() as stack:
        if "compile" in extras or "fp8" in extras:
            stack.enter_context(_copies(pipe, parts))
        transformers = {part: getattr(pipe, part) for part in parts}
        if "fp8" in extras:
            for transformer in transformers.values():
                transformer.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=transformer.dtype)
        if cache := cache_of(extras):
            stack.enter_context(_cached(transformers, cache, cache_config(cache, steps, ratios)))
        if "compile" in extras:
            for part, transformer in transformers.items():
                try:
                    # A cache decides in Python whether a block runs.
                    transformer.compile_repeated_blocks(fullgraph=cache is None)
                except ValueError as error:
                    raise ValueError(f"The blocks of {part} cannot be compiled: {error}") from None
            # What was compiled for one method counts against the limit of the next.
            stack.callback(torch.compiler.reset)
        yield


@contextmanager
def _copies(pipe: Any, parts: Sequence[str]) -> Iterator[None]:
    originals = {part: getattr(pipe, part) for part in parts}
    device = {part: original.device for part, original in originals.items()}
    for part, original in originals.items():
        setattr(pipe, part, copy.deepcopy(original.to("cpu")).to(device[part]))
    try:
        yield
    finally:
        for part, original in originals.items():
            # Both do not always fit on one device.
            getattr(pipe, part).to("meta")
            setattr(pipe, part, original.to(device[part]))


@contextmanager
def _cached(transformers: Mapping[str, nn.Module], cache: str, config: Any) -> Iterator[None]:
    on: list[Any] = []
    try:
        for part, transformer in transformers.items():
            kind = cache.partition("=")[0]
            if not hasattr(transformer, "enable_cache"):
                raise ValueError(f"{type(transformer).__name__} takes none of diffusers' caches, so not {kind}.")
            if kind == "magcache" and len(transformers) > 1:
                raise ValueError("magcache counts the steps of one transformer, and this pipeline shares them by two.")
            try:
                transformer.enable_cache(config)  # type: ignore[operator]  # diffusers'
            except (ValueError, IndexError) as error:
                said = str(error).rstrip(".")
                raise ValueError(f"{kind} does not know the blocks of {part}: {said}.") from None
            on.append(transformer)
            if not any(_is_hooked(module, kind) for module in transformer.modules()):
                raise ValueError(f"{kind} finds nothing to skip in {type(transformer).__name__}.")
        yield
    finally:
        for transformer in on:
            transformer.disable_cache()


_HOOKS = {"firstblock": "fbc_leader_block_hook", "taylorseer": "taylorseer_cache", "magcache": "mag_cache_block_hook"}


def _is_hooked(module: nn.Module, cache: str) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and registry.get_hook(_HOOKS[cache]) is not None


@dataclass
class MagRatios:
    """What MagCache goes by: how the sum of what the blocks add changes from a step to the next, one for each step.

    see    to be called after each step
    found  so far, of the first branch
    """

    transformer: nn.Module
    found: list[float] = field(default_factory=list)

    def see(self) -> None:
        hooks = (getattr(module, "_diffusers_hook", None) for module in self.transformer.modules())
        hook = next(h for r in hooks if r is not None and (h := r.get_hook(_HOOKS["magcache"])) is not None)
        states = hook.state_manager._state_cache
        if "inference" in states:
            # What diffusers calls it where nobody gave a name.
            raise ValueError("This pipeline does not name its branches of guidance, and magcache would mix them up.")
        self.found = list(next(iter(states.values())).calibration_ratios)


@contextmanager
def mag_ratios(transformer: nn.Module, steps: int) -> Iterator[MagRatios]:
    """Measures in a run of the transformer inside of the context, which skips nothing."""
    # With the last step diffusers prints what was measured and throws it away, so it waits for one more.
    config = MagCacheConfig(calibrate=True, num_inference_steps=steps + 1)
    with _cached({"transformer": transformer}, "magcache", config):
        yield MagRatios(transformer)
