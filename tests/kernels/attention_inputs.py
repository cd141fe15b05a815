"""Random inputs, plans and corrections for attention, in float64."""

import math

import torch

from dit_sparse.kernels import reference
from dit_sparse.plan import BlockPlan, Correction, Residual, SecondOrder, Tail
from dit_sparse.residual import pack, weighed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(batch=1, heads=2, queries=80, keys=None, dim=16, strided=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, n, heads, dim) for n in (queries, keys or queries, keys or queries)]
    qkv = [torch.randn(s, generator=g, dtype=torch.float64).transpose(1, 2) for s in shapes]
    return [(x if strided else x.contiguous()).to(DEVICE) for x in qkv]


def random_plan(batch, heads, rows, columns, density=0.4, seed=1):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, heads, rows, columns, generator=g) < density
    mask |= torch.nn.functional.one_hot(torch.randint(columns, mask.shape[:-1], generator=g), columns).bool()
    return BlockPlan.from_mask(mask.to(DEVICE), width=int(mask.sum(-1).max()))


def text_mask(batch, text):
    """[B, text]: nothing but padding for the first of the batch, some here and there for each of the others."""
    shown = (7 * torch.arange(text, device=DEVICE) + torch.arange(batch, device=DEVICE)[:, None]) % 10 < 6
    shown[0] = False
    return shown


def of_all_keys(mask, keys):
    """[B, text] -> [B, keys]"""
    return torch.cat([mask.new_ones(len(mask), keys - mask.shape[1]), mask], dim=1)


def corrected(q, k, v, plan, block, text, parts, key_block=None):
    """A Correction with the named parts, of the right shapes for these inputs, in float64."""
    g = torch.Generator().manual_seed(2)
    rows, columns = q.shape[2] - text, k.shape[2] - text
    draw = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64).to(DEVICE)  # noqa: E731
    tail = scale = residual = None
    if "tail" in parts:
        size = key_block or block
        lengths = (columns - torch.arange(0, columns, size, device=DEVICE)).clamp(max=size)
        stats = reference.block_stats(k[:, :, :columns], lengths, size)
        values = reference.block_stats(v[:, :, :columns], lengths, size).mean
        second = None
        if "second" in parts:
            real = (rows - torch.arange(0, rows, block, device=DEVICE)).clamp(max=block)
            queries = reference.block_stats(q[:, :, :rows], real, block)
            limit = 0.2 if "limit" in parts else math.inf
            second = SecondOrder(queries.mean, queries.var, stats.var, limit)
        tail = Tail(stats.mean, values, lengths.double().log(), second)
    leading = q.shape[:2]
    if "scale" in parts:
        scale = draw(*leading, rows).abs()
    if "block_scale" in parts:
        scale = draw(*leading, plan.counts.shape[-1]).abs()
    if "residual" in parts:
        residual = Residual(draw(*leading, rows, q.shape[-1]))
    if "weighed" in parts:
        residual = weighed(Residual(draw(*leading, rows, q.shape[-1])), draw(*leading, rows))
    if "block_residual" in parts:
        residual = Residual(draw(*leading, plan.counts.shape[-1], q.shape[-1]))
    for kind in ("fp8", "int4"):
        if kind in parts:
            residual = pack(draw(*leading, rows, q.shape[-1]).float(), kind)
    return Correction(scale, residual, tail)


def cast(correction, dtype):
    tail, residual, scale = correction.tail, correction.residual, correction.scale
    if tail is not None:
        wide, second = torch.promote_types(dtype, torch.float32), tail.second
        if second is not None:
            second = SecondOrder(*(x.to(wide) for x in (second.q_mean, second.q_var, second.variances)), second.limit)
        tail = Tail(tail.keys.to(dtype), tail.values.to(dtype), tail.log_weights.to(wide), second)
    if residual is not None and residual.kind == "full":
        residual = Residual(residual.codes.to(dtype), residual.scales)
    return Correction(None if scale is None else scale.float(), residual, tail)
