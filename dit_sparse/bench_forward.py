"""One transformer forward at the shape of a published model, with random weights: dense, sparse and at an anchor."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dit_sparse.bench import Bench
from dit_sparse.kernels.dense_attention import Backend, dense_library
from dit_sparse.models import published

# Every third step is an anchor, so that a few forwards time both kinds.
REFRESH_EVERY = 3

# diffusers' names of the kernels that PyTorch itself has.
_DIFFUSERS: dict[Backend, str] = {"cudnn": "_native_cudnn", "flash": "_native_flash", "cpu": "native"}


@dataclass(frozen=True)
class ForwardCase:
    """One forward of a transformer: its class and arguments, and (frames, height, width) in pixels."""

    class_name: str
    transformer: Mapping[str, Any]
    size: tuple[int, int, int]
    text: int = 512


def _published(name: str, size: tuple[int, int, int], text: int = 512, **options: Any) -> ForwardCase:
    model = published(name)
    return ForwardCase(model.class_name, dict(model.transformer) | options, size, text)


FORWARDS: dict[str, ForwardCase] = {
    "wan-14b-720p": _published("wan2.1-14b", (81, 720, 1280)),
    "wan-14b-480p": _published("wan2.1-14b", (81, 480, 832)),
    "wan-1.3b-480p": _published("wan2.1-1.3b", (81, 480, 832)),
    "cogvideox-480p": _published("cogvideox-5b", (49, 480, 720), text=226, use_rotary_positional_embeddings=True),
    "flux-4096": _published("flux.1-dev", (1, 4096, 4096)),
    "small": ForwardCase(
        "WanTransformer3DModel",
        dict(num_attention_heads=2, attention_head_dim=64, num_layers=1, ffn_dim=256, text_dim=64, freq_dim=64),
        (13, 256, 256),
        text=32,
    ),
}


def _wan_inputs(transformer: nn.Module, case: ForwardCase, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    frames, height, width = case.size
    config: Any = transformer.config
    latent = (1, config.in_channels, (frames - 1) // 4 + 1, height // 8, width // 8)
    return {
        "hidden_states": torch.randn(latent, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, case.text, config.text_dim, device=device, dtype=dtype),
    }


def _cogvideox_inputs(
    transformer: nn.Module, case: ForwardCase, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    frames, height, width = (case.size[0] - 1) // 4 + 1, case.size[1] // 8, case.size[2] // 8
    config: Any = transformer.config
    grid = (height // config.patch_size, width // config.patch_size)
    latent = (1, frames, config.in_channels, height, width)
    return {
        "hidden_states": torch.randn(latent, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, case.text, config.text_embed_dim, device=device, dtype=dtype),
        "image_rotary_emb": get_3d_rotary_pos_embed(
            config.attention_head_dim, ((0, 0), grid), grid, frames, device=device
        ),
    }


def _flux_inputs(
    transformer: nn.Module, case: ForwardCase, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    # A token is a square of 2 x 2 latents, each of 8 x 8 pixels.
    height, width = case.size[1] // 16, case.size[2] // 16
    config: Any = transformer.config
    places = torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width)).float()
    return {
        "hidden_states": torch.randn(1, height * width, config.in_channels, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, case.text, config.joint_attention_dim, device=device, dtype=dtype),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, device=device, dtype=dtype),
        "img_ids": places.to(device),
        "txt_ids": torch.zeros(case.text, 3, device=device),
        "guidance": torch.full((1,), 3.5, device=device),
    }


# Transformer class -> the inputs of its forward, all but the timestep.
INPUTS: dict[str, Callable[[nn.Module, ForwardCase, torch.device, torch.dtype], dict[str, Any]]] = {
    "CogVideoXTransformer3DModel": _cogvideox_inputs,
    "FluxTransformer2DModel": _flux_inputs,
    "WanTransformer3DModel": _wan_inputs,
}


def forward(bench: Bench) -> None:
    """Dense on the fastest kernel diffusers has here, then the tail alone, then anchors and the steps between."""
    chosen = bench.options.case or (("small",) if bench.device.type == "cpu" else ("wan-1.3b-480p",))
    for name in chosen:
        if name not in FORWARDS:
            raise ValueError(f"Unknown case {name!r}: choose from {', '.join(FORWARDS)}.")
    for name in chosen:
        _forward_of(bench, name, FORWARDS[name])


def _forward_of(bench: Bench, name: str, case: ForwardCase) -> None:
    from dit_sparse.pipelines.session import sparsify

    transformer = _random(case, bench.device, bench.dtype)
    inputs = INPUTS[case.class_name](transformer, case, bench.device, bench.dtype)
    backend = dense_library(bench.device, bench.dtype, case.transformer["attention_head_dim"])
    repeats = bench.options.repeats
    compiled = {"no": "", "blocks": ", compiled by blocks", "whole": ", compiled"}[bench.options.compile]

    stock = _DIFFUSERS.get(backend, "native")
    transformer.set_attention_backend(stock)
    _compile(bench, transformer)
    dense = _steps(bench, transformer, inputs, lambda _: f"dense, {stock}{compiled}", 1 + repeats)
    transformer.reset_attention_backend()
    if backend not in _DIFFUSERS:
        with sparsify(transformer, method="dense"):
            _compile(bench, transformer)
            dense |= _steps(bench, transformer, inputs, lambda _: f"dense, {backend}{compiled}", 1 + repeats)
    best = min((ms for ms in dense.values() if ms), default=None)
    for what, ms in dense.items():
        _add(bench, name, what, None, ms, best)
    for density in bench.densities(0.1):
        for method, steps in (("tail", 1 + repeats), ("anchor", 1 + REFRESH_EVERY * max(1, repeats))):
            own: dict[str, Any] = {"refresh_every": REFRESH_EVERY} if method == "anchor" else {}
            own["precision"] = bench.options.precision
            if bench.options.key_block is not None:
                own["key_block"] = bench.options.key_block
            low = ", 8bit" if bench.options.precision == "8bit" else ""
            with sparsify(transformer, method=method, density=density, dense_steps=0, **own) as session:
                kinds = {kind: f"{method}, {kind} step{low}{compiled}" for kind in ("sparse", "anchor")}
                phase = lambda step, session=session, kinds=kinds: kinds[session.phase(step)]  # noqa: E731
                _compile(bench, transformer, strict=True)
                if bench.options.compile != "no":
                    # Blocks that differ by their inputs' strides are compiled one by one, dense ones as well.
                    _steps(bench, transformer, inputs, phase, 1 + REFRESH_EVERY)
                with torch._dynamo.config.patch(error_on_recompile=True):
                    times = _steps(bench, transformer, inputs, phase, steps)
            for what, ms in times.items():
                _add(bench, name, what, density, ms, best)


def _add(bench: Bench, name: str, what: str, density: float | None, ms: float | None, best: float | None) -> None:
    bench.add(case=name, what=what, density=density, ms=ms, error=None if ms else float("inf"),
              speedup=best / ms if ms and best else None)  # fmt: skip


def _compile(bench: Bench, transformer: Any, *, strict: bool = False) -> None:
    """As the options say, from scratch; strict allows no break of the graph."""
    torch.compiler.reset()
    if bench.options.compile == "blocks":
        transformer.compile_repeated_blocks(fullgraph=strict)
    elif bench.options.compile == "whole":
        transformer.compile(fullgraph=strict)


def _random(case: ForwardCase, device: torch.device, dtype: torch.dtype) -> Any:
    """The transformer with PyTorch's own initial weights, made on the device."""
    import diffusers

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            transformer = getattr(diffusers, case.class_name)(**case.transformer)
    finally:
        torch.set_default_dtype(before)
    return transformer.eval().requires_grad_(False)


def _steps(
    bench: Bench, transformer: nn.Module, inputs: Mapping[str, Any], kind: Callable[[int], str], steps: int
) -> dict[str, float | None]:
    """Median milliseconds of each kind of step over `steps` forwards; the first of a kind warms up and counts only if
    it is alone. None where an output held NaN or Inf."""
    times: dict[str, list[float]] = {}
    finite: dict[str, Tensor] = {}
    for step in range(steps):
        now = dict(inputs, timestep=torch.tensor([1000.0 - step], device=bench.device), return_dict=False)
        ms, (out,) = bench.timed(partial(transformer, **now))
        what = kind(step)
        times.setdefault(what, []).append(ms)
        finite[what] = out.isfinite().all() & finite.get(what, torch.ones((), dtype=torch.bool, device=bench.device))
    return {what: statistics.median(ms[1:] or ms) if finite[what] else None for what, ms in times.items()}
