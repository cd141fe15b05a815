"""Times of the whole sparse step of a layer, and of its parts."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dit_sparse.attention import sparse_attention
from dit_sparse.bench import DENSITIES, Bench, Case, right_ones, verify
from dit_sparse.config import SparseConfig
from dit_sparse.correction import Learned, pooled_tail
from dit_sparse.kernels.block_attention import block_attention, refused_8bit
from dit_sparse.kernels.dense_attention import dense_attention, dense_library
from dit_sparse.kernels.implementation import Inputs
from dit_sparse.kernels.permute import permute, permute_pooled
from dit_sparse.layout import TokenGrid
from dit_sparse.order import token_order
from dit_sparse.plan import Correction
from dit_sparse.residual import pack
from dit_sparse.routing import fine_scores, pool, route, wanted
from dit_sparse.state import Generation, Layer


def operator(bench: Bench) -> None:
    """The whole sparse step of a layer and its parts: statistics, routing, permutation, kernel, tail, residual."""
    for name, case in bench.cases().items():
        q, k, v = bench.qkv(case)
        library = dense_library(bench.device, bench.dtype, case.head_dim)
        [dense_ms] = bench.milliseconds(partial(dense_attention, q, k, v, backend=library))
        bench.add(
            case=name,
            what=f"dense, {library}",
            density=1.0,
            ms=dense_ms,
            error=None,
            share_of_dense=1.0,
            over_bare=None,
        )
        for density in bench.densities(*DENSITIES):
            _operator_of(bench, name, case, (q, k, v), dense_ms, density)


def _operator_of(
    bench: Bench, name: str, case: Case, qkv: tuple[Tensor, Tensor, Tensor], dense_ms: float, density: float
) -> None:
    grid, scale = TokenGrid(*case.grid), case.head_dim**-0.5
    layer = Layer("layer", 0, 1, case.heads, case.head_dim)
    sizes: dict[str, Any] = {"block": case.block, "key_block": case.keys}
    config = SparseConfig(density=density, **sizes, dense_steps=0, residual="fp8")
    layout = config.layout(grid, case.text)
    order = token_order(config.order, grid, config.tile, bench.device)
    q, k, v = permute(qkv, order.take)
    texts = dict(text_keys=k[:, :, grid.tokens :]) if case.text else {}
    pooled = pool(q, k, v, layout, config)
    fine = partial(fine_scores, q, k, layout, scale=scale)
    plan = route(pooled, layout, config, density=density, scale=scale, fine=fine, **texts).plan
    tail = pooled_tail(pooled, q.dtype, second_order=True, limit=config.second_order_limit)
    residual = pack(torch.randn_like(q[:, :, : grid.tokens]), "fp8")
    full = Correction(tail=tail, residual=residual)
    kernel = partial(block_attention, q, k, v, plan, **sizes, text=case.text)
    error = verify(q, k, v, plan, full, case, kernel(full)[0])
    scattered = permute((kernel(full, scatter=order.take)[0],), order.take)[0]
    error = max(error, verify(q, k, v, plan, full, case, scattered))

    of_tail = SparseConfig("tail", density=density, **sizes, dense_steps=0)
    tails = Generation(of_tail, [layer])
    anchors = Generation(config, [layer])
    low = Generation(replace(config, precision="8bit"), [layer])
    learning = Generation(config, [layer])
    for generation, step in ((tails, 0), (anchors, 1), (low, 1), (learning, 0)):
        generation.enter(grid, batch=1, device=bench.device, timestep=0.0, step=step, total=100)
    for generation in (anchors, low):
        generation.record(layer, Learned(plan, residual, None, 0, plan.counts.sum()))
    in_8bit: dict[str, Callable[[], Any]] = {}
    if refused_8bit(Inputs(q, k, v, plan, case.block, case.keys)) is None:
        found = kernel(full, precision="8bit")[0]
        error = max(error, verify(q, k, v, plan, full, case, found, "8bit"))
        in_8bit = {
            "bare block attention, 8bit": partial(kernel, precision="8bit"),
            "whole, between anchors, 8bit": partial(sparse_attention, *qkv, layer, low),
        }

    def at_anchor() -> Tensor:
        learning.reset()
        learning.enter(grid, batch=1, device=bench.device, timestep=0.0, step=0, total=100)
        return sparse_attention(*qkv, layer, learning)

    calls: dict[str, Callable[[], Any]] = {
        "permute q, k, v": partial(permute, qkv, order.take),
        "statistics": partial(pool, q, k, v, layout, config),
        "permute with statistics": partial(
            permute_pooled,
            qkv,
            order.take,
            pooled.lengths,
            block=case.keys,
            wants=wanted(config, routes=True),
        ),
        "routing at an anchor": partial(
            route, pooled, layout, config, density=density, scale=scale, fine=fine, **texts
        ),
        "routing, tail": partial(
            route, pool(q, k, v, layout, of_tail), layout, of_tail, density=density, scale=scale, **texts
        ),
        "bare block attention": kernel,
        "with tail": partial(kernel, Correction(tail=tail)),
        "with tail and residual": partial(kernel, full),
        "with tail and residual, in the model's order": partial(kernel, full, scatter=order.take),
        "permute out": partial(permute, (q,), order.place),
        "whole, tail": partial(sparse_attention, *qkv, layer, tails),
        "whole, between anchors": partial(sparse_attention, *qkv, layer, anchors),
        **in_8bit,
    }
    times = right_ones(bench, calls, dict.fromkeys(calls, error))
    # Apart: calls take turns, and after one that is ten times as long the chip is warmer.
    wrong = verify(*qkv, None, None, case, at_anchor())
    times |= right_ones(bench, {"whole, at an anchor": at_anchor}, {"whole, at an anchor": wrong})
    bare = times["bare block attention"]
    for what, ms in times.items():
        bench.add(case=name, what=what, density=plan.density(), ms=ms, error=error,
                  share_of_dense=ms and ms / dense_ms, over_bare=ms / bare if ms and bare else None)  # fmt: skip
