"""What a comparison makes: a config for each method and density that was asked for, and what is on beside it."""

from dataclasses import replace
from typing import Any, get_args

import torch

from dit_sparse import predict
from dit_sparse.calibration import extras
from dit_sparse.calibration.runs import Setting
from dit_sparse.compare import CompareOptions
from dit_sparse.config import Method, Precision, SparseConfig, takes
from dit_sparse.generate import Request
from dit_sparse.kernels.dense_attention import visits_once
from dit_sparse.models import ModelFiles
from dit_sparse.pipelines.session import FAMILIES


def settings_of(
    options: CompareOptions, request: Request, files: ModelFiles, device: torch.device, dtype: torch.dtype
) -> list[Setting]:
    """Plain dense first, for a model that runs on this device in this type; raises ValueError for methods and extras
    that are not there or do not go together."""
    named = [name for token in options.methods for name in token.split(",") if name]
    if options.profile is not None and "profile" not in named:
        named.append("profile")
    if not options.density:
        raise ValueError("density takes one share or more.")
    found: dict[str, dict[str, Any]] = {"dense": {"name": "dense", "config": SparseConfig("dense")}}
    leader: str | None = None
    for name in named:
        bare, *beside = name.split("+")
        extras.check(name, beside)
        plus = "".join(f" +{extra}" for extra in beside)
        setting: dict[str, Any] = {"name": bare + plus, "extras": tuple(beside)}
        if {"compile", "fp8"} & set(beside) and options.offload != "none":
            raise ValueError(
                f"{name!r} takes weights that stay on their device, and offload {options.offload!r} moves them: leave "
                "out either."
            )
        precision: Precision = "8bit" if "8bit" in beside else "full"
        method, colon, backend = bare.partition(":")
        if method == "dense":
            setting |= {"config": SparseConfig("dense", precision=precision), "backend": backend if colon else None}
            found[setting["name"]] = setting
        elif bare == "profile":
            if options.profile is None:
                raise ValueError("Method profile needs --profile, a file written by dit-sparse fit.")
            found[setting["name"]] = setting | {
                "config": SparseConfig(profile=str(options.profile), precision=precision)
            }
        elif bare not in get_args(Method):
            known = ", ".join((*get_args(Method), "dense:BACKEND", "profile"))
            raise ValueError(f"Unknown method {bare!r}: choose from {known}.")
        else:
            if options.equal_work and extras.cache_of(beside):
                raise ValueError(f"How much work {name!r} skips is not known beforehand: leave out --equal_work.")
            leader = leader or bare
            for density in options.density:
                config = _config(options, bare, density)
                if options.equal_work and bare != leader:
                    first = _config(options, leader, density)
                    config = _as_much_work(config, first, request, files, device, dtype)
                config = replace(config, precision=precision)
                label = f"{bare} {density:g}{plus}"
                found[label] = setting | {"name": label, "config": config, "density": density}
    if options.refresh_every is not None and not any(values["config"].learns for values in found.values()):
        raise ValueError("refresh_every only means something to methods that remember, and none was asked for.")
    if options.key_block != "auto" and all(values["config"].key_block == "auto" for values in found.values()):
        able = " or ".join(method for method in get_args(Method) if takes(method, "key_block"))
        raise ValueError(f"key_block only means something to method {able}, and none of these was asked for.")
    return [Setting(**values) for values in found.values()]


def _config(options: CompareOptions, method: str, density: float) -> SparseConfig:
    config = SparseConfig(
        method,  # type: ignore[arg-type]  # checked by the config itself
        density=density,
        dense_steps=options.dense_steps,
        dense_layers=options.dense_layers,
        block=options.block,
        key_block=options.key_block if takes(method, "key_block") else SparseConfig.key_block,
        first_frame=options.first_frame,
    )
    return replace(config, refresh_every=options.refresh_every) if config.learns else config


def _as_much_work(
    config: SparseConfig,
    leader: SparseConfig,
    request: Request,
    files: ModelFiles,
    device: torch.device,
    dtype: torch.dtype,
) -> SparseConfig:
    """`config` with the largest density at which it does no more attention work than `leader`."""
    class_name, transformer = next(iter(files.transformers.values()))
    shape = FAMILIES[class_name].shape(transformer, request.height, request.width, request.num_frames, files.vae)

    def work(config: SparseConfig) -> float:
        block = config.layout(shape.grid).block
        once = visits_once(device, dtype, shape.head_dim, block, shape.grid.tokens + shape.joint_text)
        return sum(predict.attention_work(shape, config, request.num_inference_steps, visits_once=once))

    target = work(leader) + 1e-9
    blocks = config.layout(shape.grid).key_blocks
    # Densities between two of these keep equally many blocks.
    steps = [replace(config, density=min((n + 0.5) / blocks, 1.0)) for n in range(1, blocks + 1)]
    low, high = 0, len(steps)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if work(steps[middle]) <= target else (low, middle)
    if low == 0:
        raise ValueError(
            f"{config.method} does {work(steps[0]):.3f} of dense attention's work at its least, more than the "
            f"{target:.3f} of {leader.method} at density {leader.density:g}: give a higher density, or longer "
            "--refresh_every."
        )
    return steps[low - 1]
