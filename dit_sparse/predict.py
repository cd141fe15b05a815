"""What sparse attention can and cannot gain, from shapes alone."""

from dataclasses import dataclass
from typing import Literal

from dit_sparse import schedule
from dit_sparse.config import SparseConfig
from dit_sparse.layout import TokenGrid

Phase = Literal["dense", "anchor", "sparse"]

# How fast kept work runs beside dense attention. At 10 % density gathered blocks reached 0.7 of dense SDPA's rate on a
# CPU with AVX-512 (4 heads, 8192 tokens), a plain Triton loop 0.8 of cuDNN's on an H200 (40 heads, 75648 tokens).
SPARSE_RATE = 0.7

# Below this a user would not notice, and the quality given up buys nothing.
WORTH = 1.1

# Bytes per channel, and per row for the scale that the rows of the packed formats carry.
_STORAGE = {"bf16": (2.0, 0), "fp8": (1.0, 4), "int4": (0.5, 4)}


@dataclass(frozen=True)
class ModelShape:
    """Everything about one forward of one model at one size that its cost depends on.

    grid         vision tokens that self-attention sees
    heads        attention heads
    head_dim     channels per head; heads * head_dim is the width of the model
    layers       transformer blocks, each with self-attention, cross-attention and a feed-forward part
    ffn_dim      hidden channels of the feed-forward part
    text_tokens  tokens that cross-attention attends to, padding included; 0 is no cross-attention
    branches     forwards per step: 2 with classifier-free guidance, else 1
    """

    grid: TokenGrid
    heads: int
    head_dim: int
    layers: int
    ffn_dim: int
    text_tokens: int
    branches: int = 2


@dataclass(frozen=True)
class Prediction:
    """What `predict` says. Shares are of the floating-point operations in matrix products.

    tokens           that self-attention sees
    block            tokens per block
    blocks           key blocks
    attention_share  self-attention's QK^T and PV among all matrix products of one dense forward
    work             self-attention work of the whole run relative to dense; dense steps and layers, anchors counted
    ceiling          speed-up of the transformer if self-attention took no time at all
    best             speed-up if kept work ran as fast as dense attention does
    expected         speed-up if it runs at SPARSE_RATE of that, for the work that is not dense
    state            storage -> bytes remembered from step to step, plan included; empty if the method keeps nothing
    phases           what each step is
    """

    tokens: int
    block: int
    blocks: int
    attention_share: float
    work: float
    ceiling: float
    best: float
    expected: float
    state: dict[str, int]
    phases: tuple[Phase, ...]

    @property
    def pays(self) -> bool:
        """Whether it is expected to be at least WORTH times as fast as dense."""
        return self.expected >= WORTH


def predict(shape: ModelShape, config: SparseConfig, steps: int) -> Prediction:
    """`steps` is the number of denoising steps; raises ValueError if the config names steps or layers beyond it."""
    tokens = shape.grid.tokens
    block = config.block_size(tokens)
    blocks = -(-tokens // block)
    share = attention_share(shape)
    dense_layers = len(schedule.span(config.dense_layers, shape.layers))
    sparse_layers = 1 - dense_layers / shape.layers
    told = phases(config, steps)
    dense_work = sparse_work = 0.0
    for phase in told:
        dense, sparse = _work(config, phase, blocks, block)
        dense_work += (1 - sparse_layers + sparse_layers * dense) / steps
        sparse_work += sparse_layers * sparse / steps
    return Prediction(
        tokens=tokens,
        block=block,
        blocks=blocks,
        attention_share=share,
        work=dense_work + sparse_work,
        ceiling=1 / (1 - share),
        best=1 / (1 - share + share * (dense_work + sparse_work)),
        expected=1 / (1 - share + share * (dense_work + sparse_work / SPARSE_RATE)),
        state=state_bytes(shape, config),
        phases=told,
    )


def attention_share(shape: ModelShape) -> float:
    """Self-attention's QK^T and PV among the operations of all matrix products of one forward."""
    tokens, width, text = shape.grid.tokens, shape.heads * shape.head_dim, shape.text_tokens
    attention = 4 * tokens**2 * width
    projections = 8 * tokens * width**2
    cross = 4 * (tokens + text) * width**2 + 4 * tokens * text * width if text else 0
    feed_forward = 4 * tokens * width * shape.ffn_dim
    return attention / (attention + projections + cross + feed_forward)


def state_bytes(shape: ModelShape, config: SparseConfig) -> dict[str, int]:
    """Storage -> bytes that the method remembers between steps: one residual row per query, and the plan."""
    if not config.learns:
        return {}
    tokens = shape.grid.tokens
    block = config.block_size(tokens)
    blocks = -(-tokens // block)
    sparse_layers = shape.layers - len(schedule.span(config.dense_layers, shape.layers))
    calls = sparse_layers * shape.branches * shape.heads
    plan = calls * blocks * 4 * (1 + _kept(config.density, blocks))
    rows = calls * tokens
    return {
        kind: int(rows * (per_channel * shape.head_dim + per_row)) + plan
        for kind, (per_channel, per_row) in _STORAGE.items()
    }


def phases(config: SparseConfig, steps: int) -> tuple[Phase, ...]:
    """What each of `steps` steps is; a dense step also serves as an anchor, so the interval counts from the last."""
    dense = schedule.span(config.dense_steps, steps)
    told: list[Phase] = []
    full: int | None = None
    for step in range(steps):
        if config.method == "dense" or step in dense:
            told.append("dense")
            full = step
        elif (full is None and config.learns) or (
            full is not None and config.interval is not None and step - full >= config.interval
        ):
            told.append("anchor")
            full = step
        else:
            told.append("sparse")
    return tuple(told)


def _kept(density: float, blocks: int) -> int:
    """Key blocks a query block keeps."""
    return max(1, round(density * blocks))


def _work(config: SparseConfig, phase: Phase, blocks: int, block: int) -> tuple[float, float]:
    """Dense and sparse attention work of one sparse layer at one step, relative to dense."""
    if phase == "dense":
        return 1.0, 0.0
    tail = 1 / block if config.has_tail else 0.0
    sparse = _kept(config.density, blocks) / blocks + tail
    if phase == "sparse":
        return 0.0, sparse
    if not config.learns:
        return 1.0, 0.0
    # An anchor computes both what it outputs and what the steps after it will, to know the difference.
    if config.anchor_density is not None:
        return 0.0, sparse + _kept(config.anchor_density, blocks) / blocks + tail
    return 1.0, sparse
