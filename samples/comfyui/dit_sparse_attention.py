"""A ComfyUI node that makes attention of a loaded diffusion transformer sparse.

Install dit-sparse into ComfyUI's environment, copy this file into ComfyUI/custom_nodes, and put "Sparse Attention
(dit-sparse)" between the model's loader and the sampler. It uses two things that ComfyUI offers to nodes: a wrapper
around the model's forward, which tells the step, and transformer_options["optimized_attention_override"], which gets
every attention call. What cannot be sparse runs ComfyUI's own attention, and is counted; each reason is logged once.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from dit_sparse.attention import sparse_attention
from dit_sparse.config import SparseConfig, takes
from dit_sparse.layout import TokenGrid
from dit_sparse.state import Generation, Layer

METHODS = ["tail", "anchor", "rectify", "reshape", "none", "topp", "svg", "sta", "radial", "ditfastattn", "dense"]


@dataclass(frozen=True)
class Kind:
    """blocks: the model's lists of blocks, by the block_type that it says; width: the name of its number of channels;
    joint: whether its attention has text, before the image."""

    blocks: dict[str, str]
    width: str
    joint: bool


KINDS = {
    "WanModel": Kind({"double": "blocks"}, "dim", joint=False),
    "Flux": Kind({"double": "double_blocks", "single": "single_blocks"}, "hidden_size", joint=True),
}

# The arguments of ComfyUI's attention functions that come by position.
ARGUMENTS = ("q", "k", "v", "heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape")


class SparseRun:
    """Attention of one patched model, from forward to forward; `before` are what other nodes had put in its places."""

    def __init__(
        self,
        model: Any,
        config: SparseConfig,
        forward_before: Callable[..., Any] | None = None,
        attention_before: Callable[..., Any] | None = None,
    ):
        name = type(model).__name__
        if name not in KINDS:
            raise ValueError(f"{name} is no model this node knows: it knows {' and '.join(KINDS)}.")
        kind, self.joint = KINDS[name], KINDS[name].joint
        # No reference to the model, which ComfyUI would copy with this.
        patch = model.patch_size
        self.patch = tuple(patch) if isinstance(patch, tuple | list) else (1, patch, patch)
        self.forward_before, self.attention_before = forward_before, attention_before
        names = [f"{block}.{i}" for block, where in kind.blocks.items() for i in range(len(getattr(model, where)))]
        head_dim = getattr(model, kind.width) // model.num_heads
        layers = [Layer(name, i, len(names), model.num_heads, head_dim, kind.joint) for i, name in enumerate(names)]
        self.layers = {layer.name: layer for layer in layers}
        if takes(config.method, "share_plan"):
            # ComfyUI runs conditions apart or as one batch, as memory has it, and the result must not depend on that.
            config = replace(config, share_plan=False)
        self.generation = Generation(config, layers)
        self.seen: set[str] = set()
        self.references = False

    def forward(self, apply_model: Callable[..., Tensor], call: dict[str, Any]) -> Tensor:
        """Around one forward of the model; `call` is what ComfyUI gives to a model_function_wrapper."""
        self.begin(call["input"], call["timestep"], call["c"], call["cond_or_uncond"])
        if self.forward_before is not None:
            out = self.forward_before(apply_model, call)
        else:
            out = apply_model(call["input"], call["timestep"], **call["c"])
        self.generation.leave()
        return out

    def begin(self, latents: Tensor, sigma: Tensor, c: dict[str, Any], cond_or_uncond: list[int]) -> None:
        sides = latents.shape[2:] if latents.dim() == 5 else (1, *latents.shape[2:])
        # ComfyUI fills up to whole patches.
        grid = TokenGrid(*(-(-n // p) for n, p in zip(sides, self.patch, strict=True)))
        sigmas = c.get("transformer_options", {}).get("sample_sigmas")
        now, step, total, run = float(sigma.max()), None, None, None
        if sigmas is not None:
            total = len(sigmas) - 1
            # A sampler's second look, between two noise levels or at the next one, counts with what comes after it.
            step = min(sum(level > now * (1 + 1e-5) for level in sigmas.tolist()), total - 1)
            run = weakref.ref(sigmas)
            if run is not self.generation._run:
                weakref.finalize(sigmas, self._ended, run)
        self.seen, self.references = set(), c.get("ref_latents") is not None
        self.generation.enter(
            grid,
            batch=len(latents),
            device=latents.device,
            timestep=now,
            # Which prompts come in one batch depends on the memory there is, and may change.
            branch="+".join(map(str, cond_or_uncond)),
            step=step,
            total=total,
            run=run,
        )

    def _ended(self, run: object) -> None:
        """What was learned goes with the noise levels that it was learned at."""
        if self.generation._run is run:
            self.generation.reset()

    def attention(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """In place of ComfyUI's attention function `func`, which gets the same arguments where it is dense."""
        call = dict(zip(ARGUMENTS, args, strict=False)) | kwargs
        dense = partial(self.attention_before, func) if self.attention_before is not None else func
        options = call.get("transformer_options") or {}
        name = f"{options.get('block_type')}.{options.get('block_index')}"
        q, k, v = (self._heads(call, which) for which in "qkv")
        # The first in a block is self-attention; what follows attends to text, of as many tokens it may be.
        first = name not in self.seen
        self.seen.add(name)
        if self.generation.moment is None or not first or q.shape != k.shape:
            return dense(*args, **kwargs)
        reason = self._reason(name, q.shape[2], call)
        layer = self.layers.get(name)
        if reason is not None or layer is None:
            self.generation.fall_back(reason or "")
        elif self.generation.phase(layer) != "dense":
            self.generation.text = (q.shape[2] - self.generation.grid.tokens, 0) if self.joint else (0, 0)
            out = sparse_attention(q, k, v, layer, self.generation)
            return out if call.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)
        self.generation.tally.dense(self.generation.moment.step, float(q[..., 0].numel() * k.shape[2]))
        return dense(*args, **kwargs)

    def _heads(self, call: dict[str, Any], which: str) -> Tensor:
        x = call[which]
        return x if call.get("skip_reshape") else x.unflatten(2, (call["heads"], -1)).transpose(1, 2)

    def _reason(self, name: str, tokens: int, call: dict[str, Any]) -> str | None:
        vision = self.generation.grid.tokens
        if name not in self.layers:
            return "the model does not say which of its blocks calls"
        if call.get("mask") is not None:
            return "a mask was given"
        if call.get("scale") is not None or call.get("enable_gqa"):
            return "attention was asked for another scale, or for groups of heads"
        if self.joint and self.references:
            return "reference images lie behind the image, and nobody tells how many tokens they have"
        if tokens < vision or (tokens > vision and not self.joint):
            return "the sequence is not the latents' grid"
        return None


class SparseAttention:
    """The node."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "model_patches"
    DESCRIPTION = "Sparse attention, without training. Gains speed on long sequences: video, and large images."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "method": (METHODS,),
                "density": ("FLOAT", {"default": 0.1, "min": 0.01, "max": 1.0, "step": 0.01}),
                "dense_steps": ("FLOAT", {"default": 0.15, "min": 0.0, "max": 1.0, "step": 0.05}),
            }
        }

    def patch(self, model: Any, method: str, density: float, dense_steps: float) -> tuple[Any]:
        config = SparseConfig(
            method, dense_steps=float(dense_steps), **({} if method == "dense" else {"density": density})
        )
        patched = model.clone()
        options = patched.model_options
        transformer_options = options["transformer_options"] = dict(options.get("transformer_options", {}))
        run = SparseRun(
            patched.get_model_object("diffusion_model"),
            config,
            options.get("model_function_wrapper"),
            transformer_options.get("optimized_attention_override"),
        )
        patched.set_model_unet_function_wrapper(run.forward)
        transformer_options["optimized_attention_override"] = run.attention
        return (patched,)


NODE_CLASS_MAPPINGS = {"DitSparseAttention": SparseAttention}
NODE_DISPLAY_NAME_MAPPINGS = {"DitSparseAttention": "Sparse Attention (dit-sparse)"}
