"""Sparse attention as an attention backend of diffusers, for models that have no family here.

A backend is told no grid, no step and no layer, so blocks follow the sequence as it is, and only methods that remember
nothing can be used: `sparsify` is better wherever it works. diffusers keeps its backends in a closed enum, which this
opens, and so it holds for the versions that were tested alone.
"""

import importlib.metadata
import inspect
from typing import Any

from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, _native_attention
from torch import Tensor

from dit_sparse.attention import sparse_attention
from dit_sparse.config import SparseConfig
from dit_sparse.layout import TokenGrid
from dit_sparse.state import Generation, Layer, Moment

NAME = "dit_sparse"
TESTED = ("0.42",)


class SparseBackend:
    """Registered as "dit_sparse" until `remove()`: `model.set_attention_backend("dit_sparse")` chooses it.

    Self-attention of `tokens` or more is sparse; all other calls run diffusers' native backend. What was asked of it
    and cannot be sparse is counted in `fallbacks`. Raises ValueError for a config that needs a grid, steps or memory,
    if one is registered already, and with versions of diffusers that were not tested.
    """

    def __init__(self, config: SparseConfig | None = None, *, tokens: int = 4096):
        config = SparseConfig("tail", order="raster", dense_steps=0) if config is None else config
        version = importlib.metadata.version("diffusers")
        if version.rpartition(".")[0] not in TESTED:
            raise ValueError(
                f"The backend is for diffusers {' and '.join(TESTED)}, not {version}: use sparsify(pipe), which needs "
                "nothing private of it."
            )
        if config.learns or config.has_pattern or config.order != "raster" or config.dense_steps or config.profile:
            raise ValueError(
                f"A backend knows no grid and no steps, so method={config.method!r}, order={config.order!r}, "
                f"dense_steps={config.dense_steps!r} cannot be: give a method that remembers nothing and looks at no "
                "places, order='raster' and dense_steps=0."
            )
        if NAME in AttentionBackendName._value2member_map_:
            raise ValueError(f"{NAME!r} is registered already: remove() it first.")
        self.config, self.tokens = config, tokens
        self._layer = Layer("attention", 0, 1, 1, 1, joint=False)
        self._generation = Generation(config, [self._layer])
        member = str.__new__(AttentionBackendName, NAME)
        member._name_, member._value_ = NAME.upper(), NAME
        AttentionBackendName._member_map_[member._name_] = member
        AttentionBackendName._value2member_map_[NAME] = member
        AttentionBackendName._member_names_.append(member._name_)
        _AttentionBackendRegistry.register(member)(self._attention())
        self._member = member

    @property
    def fallbacks(self) -> dict[str, int]:
        return dict(self._generation.tally.fallbacks)

    @property
    def work(self) -> float:
        """Attention work of the sparse calls relative to dense."""
        return self._generation.tally.work()

    def remove(self) -> None:
        """Take the name away again; models that chose it must choose another."""
        registry = _AttentionBackendRegistry
        for known in (registry._backends, registry._constraints, registry._supported_arg_names):
            known.pop(self._member, None)
        AttentionBackendName._member_map_.pop(self._member._name_, None)
        AttentionBackendName._value2member_map_.pop(NAME, None)
        if self._member._name_ in AttentionBackendName._member_names_:
            AttentionBackendName._member_names_.remove(self._member._name_)

    def _attention(self) -> Any:
        def attention(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attn_mask: Tensor | None = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            scale: float | None = None,
            enable_gqa: bool = False,
            return_lse: bool = False,
            _parallel_config: Any = None,
        ) -> Tensor:
            given = locals()
            names = inspect.signature(_native_attention).parameters
            native = {name: x for name, x in given.items() if name in names}
            if query.shape != key.shape or query.shape[1] < self.tokens:
                return _native_attention(**native)
            reason = None
            if attn_mask is not None or dropout_p or is_causal or enable_gqa or return_lse:
                reason = "a mask, dropout, causality, groups of heads or the log-sum-exp was asked for"
            elif scale not in (None, query.shape[-1] ** -0.5):
                reason = "attention was asked for another scale"
            elif _parallel_config is not None:
                reason = "context parallelism was asked of the backend"
            if reason is not None:
                self._generation.fall_back(reason)
                return _native_attention(**native)
            return self._sparse(query, key, value)

        return attention

    def _sparse(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        generation = self._generation
        generation.grid = TokenGrid(1, 1, query.shape[1])
        generation.moment = Moment(0, "", 0.0, 1)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return sparse_attention(q, k, v, self._layer, generation).transpose(1, 2)
