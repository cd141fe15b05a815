"""What a config makes of each step of a run."""

import re

from dit_sparse.choices import Phase
from dit_sparse.config import SparseConfig
from dit_sparse.schedule import span


def named(config: SparseConfig, option: str, total: int | None) -> frozenset[int]:
    """The steps or layers, of `total` if that is known, that an option of the config names."""
    spec = getattr(config, option)
    if total is None:
        # A count, and ranges from the start, name the same steps whatever their number.
        if not isinstance(spec, int) and not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", str(spec).replace(" ", "")):
            raise ValueError(
                f"{option}={spec!r} counts against the number of steps, which nobody told here: give a count, or "
                "use sparsify(pipe)."
            )
        total = 1 << 30
    try:
        return span(spec, total)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


def planned_phase(config: SparseConfig, step: int, total: int | None, offset: int = 0) -> Phase:
    """The phase of a step in a run that skips none, for a layer whose anchors are shifted by `offset`."""
    learns, every, dense = config.learns, config.interval, named(config, "dense_steps", total)
    first = next((i for i in range(step + 1) if i not in dense), None)
    if config.method == "dense" or first is None or (step in dense and (every is None or not learns)):
        return "dense"
    if every is None:
        return "anchor" if learns and step == first else "sparse"
    if not learns:
        return "dense" if (step - first) % every == 0 else "sparse"

    def due(i: int) -> bool:
        return (i - first + offset) % every == 0

    anchor = first
    for i in range(first + 1, step + 1):
        if i in dense:
            # What a dense step knows serves the steps after it, unless there are none or they learn themselves.
            if i + 1 not in dense and i + 1 != total and not due(i + 1):
                anchor = i
        elif due(i) or i - anchor >= every:
            anchor = i
    if anchor == step:
        return "anchor"
    return "dense" if step in dense else "sparse"
