"""Times of attention, of the whole sparse operator, and of one transformer forward; nothing is timed that is wrong."""

import json
import math
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from dit_sparse.kernels import reference
from dit_sparse.kernels.block_attention import Precision, block_attention, chosen_impl, refused_8bit
from dit_sparse.kernels.dense_attention import Backend, dense_attention, dense_library
from dit_sparse.kernels.implementation import Inputs
from dit_sparse.layout import TokenGrid
from dit_sparse.plan import BlockPlan, Correction, Residual, SecondOrder, Tail


@dataclass(frozen=True)
class Case:
    """One attention call of a published model: heads, the token grid, text tokens, head dimension, block."""

    heads: int
    grid: tuple[int, int, int]
    head_dim: int = 128
    text: int = 0
    block: int = 128
    key_block: int | None = None

    @property
    def keys(self) -> int:
        """Of a block."""
        return self.key_block or self.block


CASES: dict[str, Case] = {
    "wan-14b-720p": Case(40, (21, 45, 80)),
    "wan-14b-480p": Case(40, (21, 30, 52)),
    "wan-1.3b-480p": Case(12, (21, 30, 52)),
    "wan-14b-720p-17s": Case(40, (70, 45, 80)),
    "hunyuanvideo-720p": Case(24, (33, 45, 80), text=256),
    "cogvideox-480p": Case(48, (13, 30, 45), head_dim=64, text=226),
    "flux-4096": Case(24, (1, 256, 256), text=512),
    # For kernels of others, whose plans know no text.
    "hunyuanvideo-720p-vision": Case(24, (33, 45, 80)),
    "cogvideox-480p-vision": Case(48, (13, 30, 45), head_dim=64),
    "small": Case(4, (8, 32, 32), head_dim=64, block=64),
}
DENSITIES = (0.05, 0.1, 0.2, 0.5, 1.0)
# What 8 bits may err by, relative, on random inputs, whose values share nothing that averages keep.
ERROR_8BIT = 0.05
# A GPU's clock is what power and heat leave: a call is repeated for so many milliseconds before as many are timed.
SETTLE = 200
# Densities at which counts are also spread, as top-p makes them.
UNEVEN = (0.1,)

Result = TypeVar("Result")


@dataclass(frozen=True)
class BenchOptions:
    """Time sparse attention beside the fastest dense attention here. Ratios are within one run.

    attention: the kernel over random plans; operator: a layer's sparse step and its parts; forward: a transformer with
    random weights. Each result is first checked against float64 on a sample of its rows, one in 8 bits for an error of
    at most 5 %, a forward for NaN and Inf; what fails is not timed, and the exit code is 1. TFLOP/s count kept work
    only. Extra memory is the peak beyond inputs and outputs.
    """

    case: tuple[str, ...] = ()
    """Shapes by name: wan-14b-720p, wan-14b-480p, wan-1.3b-480p, cogvideox-480p, flux-4096, small, and but for forward
    wan-14b-720p-17s (252,000 tokens), hunyuanvideo-720p and, without their text, hunyuanvideo-720p-vision and
    cogvideox-480p-vision; if none is given, small on a CPU, wan-14b-720p on a GPU (wan-1.3b-480p of forward)."""
    density: tuple[float, ...] = ()
    """Shares of key blocks computed: 0.05, 0.1, 0.2, 0.5 and 1 if none is given, of a forward 0.1."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of q, k and v: bfloat16 on a GPU and float32 on a CPU if not given."""
    repeats: int = 7
    """Timed runs of each; the median counts."""
    compile: Literal["no", "blocks", "whole"] = "no"
    """Of a forward: through torch.compile, block by block or in one piece, sparse and dense alike. Sparse attention
    must be one graph then, that no step compiles again."""
    precision: Precision = "full"
    """Of a forward's sparse attention: full or 8bit."""
    key_block: int | None = None
    """Keys of a block, where they are fewer than queries; as many if not given."""
    seed: int = 0
    """Of the random inputs and plans."""
    output_file: Path | None = None
    """Also write the rows as JSON."""


@dataclass
class Bench:
    """Rows of one run, and what is needed to make them."""

    options: BenchOptions
    device: torch.device = field(init=False)
    dtype: torch.dtype = field(init=False)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        kind = self.options.device
        if kind == "auto":
            kind = "cuda" if torch.cuda.is_available() else "cpu"
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError("device 'cuda' was asked for, and no CUDA device is here: use cpu.")
        self.device = torch.device(kind)
        name = self.options.dtype
        self.dtype = getattr(torch, ("bfloat16" if kind == "cuda" else "float32") if name == "auto" else name)
        for density in self.options.density:
            if not 0 < density <= 1:
                raise ValueError(f"density is a share above 0 and at most 1, not {density!r}.")
        torch.manual_seed(self.options.seed)

    def densities(self, *default: float) -> tuple[float, ...]:
        return self.options.density or default

    def cases(self) -> dict[str, Case]:
        for case in self.options.case:
            if case not in CASES:
                raise ValueError(f"Unknown case {case!r}: choose from {', '.join(CASES)}.")
        names = self.options.case or (("small",) if self.device.type == "cpu" else ("wan-14b-720p",))
        return {name: replace(CASES[name], key_block=self.options.key_block) for name in names}

    def qkv(self, case: Case) -> list[Tensor]:
        """Views [B, H, L, D] of [B, L, H, D], as models have them."""
        tokens = TokenGrid(*case.grid).tokens + case.text
        shape = (1, tokens, case.heads, case.head_dim)
        return [torch.randn(shape, device=self.device, dtype=self.dtype).transpose(1, 2) for _ in range(3)]

    def add(self, **row: Any) -> None:
        """Keep a row for the table, and tell it at once: a long run may be stopped before the table."""
        self.rows.append(row)
        print(", ".join(f"{key} {_cell(value)}" for key, value in row.items()), file=sys.stderr, flush=True)

    def milliseconds(self, *runs: Callable[[], Any]) -> list[float]:
        """Median time of each, after a run that does not count. They take turns, in random order, because a chip's
        clock falls as it warms; a turn on a GPU is as many runs as SETTLE takes, after as many that are not timed.
        """
        times: list[list[float]] = [[] for _ in runs]
        turns = list(zip(runs, times, strict=True))
        for turn in range(-1, self.options.repeats):
            random.Random(turn).shuffle(turns)
            for run, found in turns:
                ms = self.timed(run)[0]
                if turn >= 0:
                    found.append(self.settled(run, ms) if self.device.type == "cuda" else ms)
        return [statistics.median(found) for found in times]

    def settled(self, run: Callable[[], Any], ms: float) -> float:
        """Milliseconds that `run` takes on a GPU at the clock that it leaves the chip; it took `ms` just now."""
        several = range(math.ceil(SETTLE / ms))

        def again() -> None:
            for _ in several:
                run()

        again()
        return self.timed(again)[0] / len(several)

    def timed(self, run: Callable[[], Result]) -> tuple[float, Result]:
        """Milliseconds that `run` takes, and what it returns."""
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end), result
        begin = time.perf_counter()
        result = run()
        return (time.perf_counter() - begin) * 1000, result

    def extra_bytes(self, run: Callable[[], tuple[Tensor, ...]]) -> int:
        """Most memory `run` holds at once, beyond what it returns."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            result = run()
            peak = torch.cuda.max_memory_allocated() - before
        else:
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
            ) as profile:
                result = run()
            events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
            held = peak = 0
            for event in sorted(events, key=lambda e: e.start_ns()):
                held += event.nbytes()
                peak = max(peak, held)
        return peak - sum(x.numel() * x.element_size() for x in result)


def random_plan(case: Case, density: float, device: torch.device, *, spread: float = 1) -> BlockPlan:
    """Blocks drawn at random: as many in every row, or the same total with `spread` times the fewest at most."""
    tokens = TokenGrid(*case.grid).tokens
    rows, blocks = -(-tokens // case.block), -(-tokens // case.keys)
    keep = max(1, int(density * blocks))
    fewest, most = 2 * keep / (1 + spread), 2 * keep * spread / (1 + spread)
    counts = torch.linspace(fewest, most, rows, device=device).round().int().clamp(1, blocks)
    counts = counts[torch.rand(1, case.heads, rows, device=device).argsort(-1)]
    drawn = torch.rand(1, case.heads, rows, blocks, device=device).topk(int(counts.max()), -1).indices
    place = torch.arange(drawn.shape[-1], device=device)
    listed = drawn.masked_fill(place >= counts[..., None], blocks).sort(-1).values
    return BlockPlan(counts, listed.clamp(max=blocks - 1).int(), blocks)


def verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan | None,
    correction: Correction | None,
    case: Case,
    out: Tensor,
    precision: Precision = "full",
) -> float:
    """Error of `out` on sampled query blocks, over twice what PyTorch makes in that precision (in 8 bits, relative
    error over ERROR_8BIT); at most 1 passes.

    Every sampled block is computed with its listed keys alone, by kernels/reference.py in float64 and in q's dtype.
    """
    tokens = q.shape[2] - case.text
    blocks = -(-tokens // case.block)
    worst = 0.0
    for head, row in ((0, 0), (case.heads // 2, blocks // 2), (case.heads - 1, blocks - 1)):
        rows = slice(row * case.block, min((row + 1) * case.block, tokens))
        one = slice(head, head + 1)
        some, keys, values = q[:, one, rows], k[:, one], v[:, one]
        listed = None
        if plan is not None:
            at = slice(row, row + 1)
            listed = BlockPlan(plan.counts[:, one, at], plan.indices[:, one, at], plan.key_blocks)
        exact = _rows(some.double(), keys.double(), values.double(), listed, correction, case, head, rows)
        eager = _rows(some, keys, values, listed, correction, case, head, rows).double()
        got = out[:, one, rows].double()
        band = 2 * ((exact.to(q.dtype) + 0.3 - 0.3).double() - exact).abs().max()
        allowed = 2 * (eager - exact).abs().max() + band
        if precision == "8bit":
            worst = max(worst, ((got - exact).norm() / exact.norm() / ERROR_8BIT).item())
        else:
            worst = max(worst, ((got - exact).abs().max() / allowed).item())
        if not got.isfinite().all():
            return float("inf")
    return worst


def _rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan | None,
    correction: Correction | None,
    case: Case,
    head: int,
    rows: slice,
) -> Tensor:
    """One query block of one head, [1, 1, block, D]: attention over listed keys and text, then the correction."""
    vision = k.shape[2] - case.text
    if plan is None:
        return (q @ k.mT * case.head_dim**-0.5).softmax(-1) @ v
    listed = plan.indices[0, 0, 0, : int(plan.counts)].long()
    tokens = (listed[:, None] * case.keys + torch.arange(case.keys, device=q.device)).flatten()
    tokens = torch.cat([tokens[tokens < vision], torch.arange(vision, k.shape[2], device=q.device)])
    scores = q @ k[:, :, tokens].mT * case.head_dim**-0.5
    lse, out = scores.logsumexp(-1), scores.softmax(-1) @ v[:, :, tokens]
    if correction is None:
        return out
    one, row = slice(head, head + 1), slice(rows.start // case.block, rows.start // case.block + 1)
    tail, residual = correction.tail, correction.residual
    if tail is not None:
        second = tail.second
        if second is not None:
            of_q = second.q_mean[:, one, row], second.q_var[:, one, row]
            second = SecondOrder(*of_q, second.variances[:, one], second.limit)
        tail = Tail(tail.keys[:, one], tail.values[:, one], tail.log_weights, second)
    if residual is not None:
        scales = None if residual.scales is None else residual.scales[:, one, rows]
        residual = Residual(residual.codes[:, one, rows], scales, residual.kind)
    return reference.correct(q, out, lse, plan, Correction(None, residual, tail), case.block, case.head_dim**-0.5)


def attention(bench: Bench) -> None:
    """The bare kernel over random plans, against every dense kernel installed and, without text, FlashAttention-4."""
    for name, case in bench.cases().items():
        _attention_of(bench, name, case)


def _attention_of(bench: Bench, name: str, case: Case) -> None:
    q, k, v = bench.qkv(case)
    flops = 4.0 * case.heads * q.shape[2] ** 2 * case.head_dim
    dense = {
        f"dense {backend}": partial(dense_attention, q, k, v, backend=backend)
        for backend in dense_backends(bench.device, bench.dtype, case.head_dim)
    }
    errors = {what: verify(q, k, v, None, None, case, call()[0]) for what, call in dense.items()}
    times = right_ones(bench, dense, errors)
    best = min((ms for ms in times.values() if ms), default=None)
    for what, ms in times.items():
        bench.add(case=name, what=what, density=1.0, ms=ms, error=errors[what], speedup=None,
                  tflops=ms and flops / ms / 1e9, extra_mib=None)  # fmt: skip
    for density, spread in [(x, 1) for x in bench.densities(*DENSITIES)] + [(x, 10) for x in UNEVEN]:
        plan = random_plan(case, density, bench.device, spread=spread)
        kernels = calls(q, k, v, plan, case)
        errors = {
            what: verify(q, k, v, plan, None, case, call()[0], "8bit" if "8bit" in what else "full")
            for what, call in kernels.items()
        }
        # Listed blocks, text keys for every row, and every key for text rows.
        tokens = q.shape[2] - case.text
        share = (tokens * (plan.density() * tokens + case.text) + case.text * q.shape[2]) / q.shape[2] ** 2
        spread_by = f", counts spread {spread} times" if spread > 1 else ""
        for what, ms in right_ones(bench, kernels, errors).items():
            bench.add(case=name, what=what + spread_by, density=plan.density(), ms=ms, error=errors[what],
                      speedup=best / ms if ms and best else None, tflops=ms and share * flops / ms / 1e9,
                      extra_mib=bench.extra_bytes(kernels[what]) / 2**20)  # fmt: skip


def right_ones(
    bench: Bench, calls: Mapping[str, Callable[[], Any]], errors: Mapping[str, float]
) -> dict[str, float | None]:
    """Milliseconds of the calls that err by no more than allowed, None of the others."""
    right = {what: call for what, call in calls.items() if errors[what] <= 1}
    times = dict(zip(right, bench.milliseconds(*right.values()), strict=True))
    return {what: times.get(what) for what in calls}


def calls(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, case: Case
) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """Every kernel that can run this plan here, the one `auto` takes first."""
    kernel = partial(block_attention, q, k, v, plan, block=case.block, key_block=case.key_block, text=case.text)
    if not q.is_cuda:
        return {"torch": partial(kernel, impl="torch")}
    found: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {"triton": partial(kernel, impl="triton")}
    inputs = Inputs(q, k, v, plan, case.block, case.keys)
    if chosen_impl("auto", inputs) == "gluon":
        found = {"gluon": partial(kernel, impl="gluon"), **found}
    if refused_8bit(inputs) is None:
        found["gluon, 8bit"] = partial(kernel, precision="8bit")
    if case.text == 0 and case.block == case.keys == 128 and dense_library(q.device, q.dtype, case.head_dim) == "fa4":
        found["fa4"] = _fa4(q, k, v, plan, case.block)
    return found


def _fa4(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, block: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """FlashAttention-4's own block-sparse kernel over the same lists, none of them masked."""
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    none = torch.zeros_like(plan.counts)
    lists = BlockSparseTensorsTorch(none, none[..., None], plan.counts, plan.indices, block_size=(block, block))
    rows = [x.transpose(1, 2) for x in (q, k, v)]

    def call() -> tuple[Tensor, Tensor]:
        out, lse = flash_attn_func(*rows, block_sparse_tensors=lists, return_lse=True)
        return out.transpose(1, 2), lse

    return call


def dense_backends(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[Backend]:
    """The dense kernels that can run here, the fastest of others first."""
    first = dense_library(device, dtype, head_dim)
    if device.type == "cpu" or first == "block":
        return [first]
    order: list[Backend] = ["fa4", "cudnn", "flash"]
    return order[order.index(first) :]


def environment(device: torch.device) -> dict[str, str]:
    """What the figures depend on besides the code."""
    found = {"device": platform.processor() or platform.machine(), "threads": str(torch.get_num_threads())}
    if device.type == "cuda":
        found = {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda or ""}
    for package in ("torch", "triton", "diffusers", "flash-attn-4"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def run(what: Literal["attention", "operator", "forward"], options: BenchOptions) -> int:
    """Measure, print a table, return the exit code: 1 if a result did not verify."""
    from rich.console import Console
    from rich.table import Table

    # They are made of what stands above.
    from dit_sparse.bench_forward import forward
    from dit_sparse.bench_operator import operator

    bench = Bench(options)
    with torch.no_grad():
        {"attention": attention, "operator": operator, "forward": forward}[what](bench)
    facts = environment(bench.device) | {"dtype": str(bench.dtype).removeprefix("torch.")}
    columns = list(bench.rows[0])
    table = Table(title=f"bench {what}", caption=", ".join(f"{key} {value}" for key, value in facts.items()))
    for column in columns:
        table.add_column(column, justify="left" if column in ("case", "what") else "right")
    for row in bench.rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    Console(width=max(120, 20 + 16 * len(columns))).print(table)
    if options.output_file is not None:
        told = {"command": what, "options": asdict(options), "environment": facts, "rows": bench.rows}
        options.output_file.write_text(json.dumps(told, indent=1, default=str) + "\n")
    wrong = [row for row in bench.rows if row["error"] is not None and row["error"] > 1]
    for row in wrong:
        density = _cell(row["density"])
        print(f"not timed: {row['case']}, {row['what']}, density {density} errs {row['error']:.2f} times the limit")
    return 1 if wrong else 0


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.4g}"
