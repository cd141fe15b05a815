"""Sparse processors that are diffusers' own with another attention call inside."""

from collections.abc import Callable, Mapping
from functools import lru_cache, wraps
from typing import Any

import torch
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from dit_sparse.pipelines.family import Attend


def swapped(*stock: type) -> Mapping[type, Callable[[Attend], Any]]:
    """By diffusers' processor class, the class of ours that runs it with another attention call.

    Each must call `scaled_dot_product_attention` once, on the whole batch; projections, norms and RoPE stay its own.
    A mask of one row, bool [B, 1, 1, L], must hide nothing but padding of the text; any other makes attention dense.
    """
    return {kind: _swapping(kind) for kind in stock}


@lru_cache
def _swapping(stock: type) -> type:
    class SparseProcessor:
        # Where diffusers writes set_attention_backend's and enable_parallelism's choices.
        _attention_backend = None
        _parallel_config = None

        def __init__(self, attend: Attend):
            self.attend, self.stock = attend, stock()
            # The backend whose call can be swapped; the user's choice serves the dense steps, in the session.
            self.stock._attention_backend = AttentionBackendName.NATIVE

        # Attention modules pass on only the arguments that their processor's signature names.
        @wraps(stock.__call__)
        def __call__(self, attn: torch.nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            shards = shards_of(self)
            reason = None if shards == 1 else self.attend.unshardable(shards)
            if reason is not None:
                whole = stock()
                carry(self, whole)
                self.attend.fall_back(reason, 0.0)
                return whole(attn, hidden_states, *args, **kwargs)
            with _Swap(self.attend) if shards == 1 else _Deal(self.attend, self._parallel_config, shards):
                return self.stock(attn, hidden_states, *args, **kwargs)

    SparseProcessor.__name__ = SparseProcessor.__qualname__ = f"Sparse{stock.__name__}"
    return SparseProcessor


def carry(old: Any, new: Any) -> None:
    """Take over what diffusers' set_attention_backend and enable_parallelism wrote on a processor."""
    for name in ("_attention_backend", "_parallel_config"):
        setattr(new, name, getattr(old, name, None))


def shards_of(processor: Any) -> int:
    """Into how many parts context parallelism cuts the sequence: 1 without it, 0 where a ring passes keys around."""
    config = getattr(processor, "_parallel_config", None)
    parallel = None if config is None else config.context_parallel_config
    if parallel is None:
        return 1
    # Parts of unequal length lie elsewhere.
    return 0 if parallel.ring_degree > 1 or parallel.ulysses_anything else parallel.ulysses_degree


def share_of(processor: Any) -> tuple[int, int]:
    """Which part of a module's heads this process has, and of how many: diffusers deals them out in order."""
    shards = shards_of(processor)
    if shards <= 1:
        return 0, 1
    return processor._parallel_config.context_parallel_config._ulysses_local_rank, shards


class _Swap(TorchFunctionMode):
    """While it is on, `scaled_dot_product_attention` is `attend`."""

    def __init__(self, attend: Attend):
        super().__init__()
        self.attend = attend

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        # torch.compile cannot trace the methods under a mode, because they are Python and call super().
        if func is Tensor.unflatten:
            func = torch.unflatten
        elif func is Tensor.split:
            func = torch.split
        return func(*args, **kwargs)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        reason = None
        if any(isinstance(mode, AttentionScoreSkipFunctionMode) for mode in _get_current_function_mode_stack()):
            # The call below finds the guidance that is waiting for it.
            reason = "perturbed attention guidance replaces attention"
        elif query.shape != key.shape:
            reason = "self-attention was used as cross-attention"
        elif dropout_p or is_causal or scale not in (None, query.shape[-1] ** -0.5):
            reason = "attention was asked for dropout, causality or another scale"
        elif attn_mask is not None and not self._hides_text(attn_mask):
            reason = "a mask was given that may hide more than padding of the text"
        if reason is None:
            padding = None if attn_mask is None else attn_mask[:, 0, 0].expand(len(query), -1)
            return self.attend(query, key, value, padding)
        self.attend.fall_back(reason, float(query[..., 0].numel() * key.shape[2]))
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    def _hides_text(self, mask: Tensor) -> bool:
        return self.attend.joint and mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1:3] == (1, 1)


class _Deal(_Swap):
    """While it is on, attention is Ulysses': each process has some of the heads and the whole sequence, for which
    `scaled_dot_product_attention` is `attend`."""

    def __init__(self, attend: Attend, config: Any, shards: int):
        super().__init__(attend)
        self.config, self.shards = config, shards

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        order = self.attend.dealt(query.device)
        if order is not None:
            query, key, value = (x.index_select(1, order) for x in (query, key, value))
        with _Swap(self.attend.sharded(self.shards)):
            out = dispatch_attention_fn(
                query.transpose(1, 2),
                key.transpose(1, 2),
                value.transpose(1, 2),
                *args,
                **kwargs,
                backend=AttentionBackendName.NATIVE,
                parallel_config=self.config,
            ).transpose(1, 2)
        return out if order is None else torch.empty_like(out).index_copy_(1, order, out)
