"""Sparse attention in plain diffusers style: one processor object for all of a transformer's attention modules."""

import inspect
import sys
from collections.abc import Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline
from diffusers.hooks.hooks import HookRegistry
from torch import nn

from dit_sparse.config import Method, SparseConfig
from dit_sparse.pipelines.registry import FAMILIES, family_of, known_of, parts_of, processor_of, set_processor, unwrap
from dit_sparse.pipelines.swap import carry

if TYPE_CHECKING:
    from dit_sparse.pipelines.session import Session


def config_of(config: SparseConfig | str | None, options: Mapping[str, Any]) -> SparseConfig:
    """The config that a user means by one, or by a method's name and options."""
    if isinstance(config, SparseConfig):
        if options:
            raise ValueError(f"Give a SparseConfig or options, not both: {', '.join(options)} came beside one.")
        return config
    return SparseConfig.from_dict(({} if config is None else {"method": config}) | dict(options))


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
        self.config = config_of(config, options)
        self.session: Session | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "SparseAttnProcessor":
        copy = SparseAttnProcessor(self.config)
        carry(self, copy)
        return copy

    def __call__(self, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self._hand_over(sys._getframe(1))
        named = inspect.signature(attn.processor.__call__).parameters
        return attn.processor(attn, *args, **{name: x for name, x in kwargs.items() if name in named})

    def _hand_over(self, frame: FrameType | None) -> None:
        # The session knows this class, too.
        from dit_sparse.pipelines.session import HOOK, Session, session_on, taken

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
                unwrap(c) is transformer for c in owner.components.values()
            ):
                pipe = owner
            frame = frame.f_back
        if transformer is None:
            raise ValueError(
                f"SparseAttnProcessor runs inside one of {', '.join(sorted(FAMILIES))}, not alone; for other models "
                "see the README's list of families."
            )

        # The two transformers of one pipeline share their steps, if they were given the same object.
        parts = known_of(parts_of(pipe or transformer))
        held = {part: [m for m in module.modules() if processor_of(m) is self] for part, module in parts.items()}
        mine = {part: parts[part] for part, modules in held.items() if modules}
        for part, module in mine.items():
            session = session_on(module)
            if session is not None:
                if session.author is None:
                    raise taken(part)
                session.release(module)
            names = {m: name for name, m in unwrap(module).named_modules()}
            for m in held[part]:
                set_processor(m, family_of(module).stock(names[m], unwrap(module)))
                carry(self, m.processor)
        self.session = Session(pipe or transformer, self.config, mine)
        self.session.author = self
        # This forward began before the hook was there.
        hook = HookRegistry.check_if_exists_or_initialize(transformer).get_hook(HOOK)
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
