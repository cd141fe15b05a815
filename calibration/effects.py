"""How much an error inside attention is felt in a transformer's output, measured: one forward for each layer."""

import torch
from torch import nn

from dit_sparse.calibration.replay import Tape, forward_once
from dit_sparse.config import SparseConfig
from dit_sparse.pipelines.session import FAMILIES, sparsify


def probe_steps(steps: int) -> tuple[int, ...]:
    """The steps whose layers are probed: one early and one late, where there are two."""
    return tuple(sorted({round(0.2 * (steps - 1)), round(0.75 * (steps - 1))}))


def probe(
    part: str, transformer: nn.Module, tape: Tape, step: int, branch: str, layer: int, of: int, config: SparseConfig
) -> float:
    """Mean squared change of a transformer's output at one step if only its self-attention number `layer` of `of` is
    as in `config`."""
    call = tape.calls[part, step, branch]
    others = ",".join(str(i) for i in range(of) if i != layer)
    device = next(transformer.parameters()).device
    probed = SparseConfig.from_dict(config.to_dict() | {"dense_steps": 0, "dense_layers": others or 0})
    with sparsify(transformer, probed):
        out = forward_once(transformer, call, device)
    return float((out - tape.outputs[part, step, branch].float()).square().mean())


def output_metric(transformer: nn.Module, part: str) -> dict[str, torch.Tensor]:
    """Layer -> [heads, D, D], the square root of each head's Gram matrix in the output projection: an error times it
    is as long as the error is after the projection. Layers without a plain projection are left out."""
    family, found = FAMILIES[type(transformer).__name__], {}
    for name, module in transformer.named_modules():
        projection = getattr(module, "to_out", None)
        if not family.is_self_attention(name) or projection is None or not isinstance(projection[0], nn.Linear):
            continue
        weight = projection[0].weight.detach()
        if weight.is_meta:
            continue
        grams = weight.float().unflatten(1, (module.heads, -1)).permute(1, 2, 0)
        values, vectors = torch.linalg.eigh(grams @ grams.mT)
        found[f"{part}.{name}"] = (vectors * values.clamp(min=0).sqrt()[:, None]) @ vectors.mT
    return found
