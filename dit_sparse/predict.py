"""What sparse attention can and cannot gain, from shapes alone."""

from dataclasses import dataclass
from functools import lru_cache
from typing import get_args

from dit_sparse.choices import Phase
from dit_sparse.config import SparseConfig, Storage
from dit_sparse.layout import Layout, TokenGrid
from dit_sparse.memory import bytes_per_head
from dit_sparse.patterns import Pattern, pattern_mask
from dit_sparse.phases import named, planned_phase

# How fast kept work runs beside dense attention, between what the tables of kernels/README.md give at 10 % density:
# 0.7 on a CPU with AVX-512 (`bench attention`), 0.8 for the bare kernel and cuDNN on an H200 (`bench operator`).
SPARSE_RATE = 0.7

# Below this a user would not notice, and the quality given up buys nothing.
WORTH = 1.1


@dataclass(frozen=True)
class ModelShape:
    """Everything about one forward of one model at one size that its cost depends on.

    grid         vision tokens that self-attention sees
    heads        attention heads
    head_dim     channels per head; heads * head_dim is the width of the model
    layers       transformer blocks, each with self-attention, cross-attention and a feed-forward part
    ffn_dim      hidden channels of the feed-forward part
    text_tokens  tokens that cross-attention attends to, padding included; 0 is no cross-attention
    joint_text   tokens of text that go through all of the blocks beside the vision tokens, padding included
    branches     forwards per step: 2 with classifier-free guidance, else 1
    """

    grid: TokenGrid
    heads: int
    head_dim: int
    layers: int
    ffn_dim: int
    text_tokens: int
    branches: int = 2
    joint_text: int = 0


@dataclass(frozen=True)
class Prediction:
    """What `predict` says. Shares are of the floating-point operations in matrix products.

    tokens           of vision that self-attention sees
    block            tokens per block of keys
    blocks           key blocks
    attention_share  self-attention's QK^T and PV among all matrix products of one dense forward
    work             self-attention work of the whole run relative to dense: dense steps and layers, anchors, the tail
                     and padding counted; blocks that top_p, neighbours and first_frame add depend on the input
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
    share = attention_share(shape)
    dense, sparse = attention_work(shape, config, steps)
    layout = config.layout(shape.grid)
    return Prediction(
        tokens=shape.grid.tokens,
        block=layout.key_size,
        blocks=layout.key_blocks,
        attention_share=share,
        work=dense + sparse,
        ceiling=1 / (1 - share),
        best=1 / (1 - share + share * (dense + sparse)),
        expected=1 / (1 - share + share * (dense + sparse / SPARSE_RATE)),
        state=state_bytes(shape, config),
        phases=phases(config, steps),
    )


def attention_share(shape: ModelShape) -> float:
    """Self-attention's QK^T and PV among the operations of all matrix products of one forward."""
    tokens, width, text = shape.grid.tokens + shape.joint_text, shape.heads * shape.head_dim, shape.text_tokens
    attention = 4 * tokens**2 * width
    projections = 8 * tokens * width**2
    cross = 4 * (tokens + text) * width**2 + 4 * tokens * text * width if text else 0
    feed_forward = 4 * tokens * width * shape.ffn_dim
    return attention / (attention + projections + cross + feed_forward)


def attention_work(
    shape: ModelShape, config: SparseConfig, steps: int, *, visits_once: bool = False
) -> tuple[float, float]:
    """Self-attention work of a run relative to dense, done by the dense and by the block-sparse kernel. visits_once:
    whether anchors visit each pair once, see `dit_sparse.kernels.dense_attention.visits_once`."""
    tokens, text = shape.grid.tokens, shape.joint_text
    layout = config.layout(shape.grid, text)
    padding = (layout.blocks * layout.block / tokens) * (layout.key_blocks * layout.key_size / tokens)
    tail = layout.key_blocks / tokens if config.has_tail else 0.0
    # Text attends to all, and all attend to text.
    whole, of_text = (tokens + text) ** 2, 2 * tokens * text + text**2

    def sparse_pairs(share: float, stand_in: float) -> float:
        return (tokens**2 * (padding * share + stand_in) + of_text) / whole

    sparse_call = sparse_pairs(_share(config, layout), tail)
    in_full = dense_layers(config, shape.layers)
    dense_steps = named(config, "dense_steps", steps)
    dense = sparse = 0.0
    for layer in range(shape.layers):
        told = phases(config, steps, layer if config.stagger else 0)
        for step, phase in enumerate(told):
            if layer in in_full or phase == "dense":
                dense += 1
                continue
            # Choosing the kind of each head takes a few rows, which are not counted.
            if phase == "anchor" and visits_once:
                sparse += tail * tokens**2 / whole
            elif config.method != "svg" or phase != "anchor":
                sparse += sparse_call
            if phase == "anchor":
                # It computes what it outputs, too: densely, or from an anchor before it, with the denser plan.
                if config.anchor_density is None or step in dense_steps or "anchor" not in told[:step]:
                    dense += 1
                else:
                    sparse += sparse_pairs(_kept(config.anchor_density, layout.key_blocks) / layout.key_blocks, tail)
    return dense / (steps * shape.layers), sparse / (steps * shape.layers)


def state_bytes(shape: ModelShape, config: SparseConfig) -> dict[str, int]:
    """Storage -> bytes that the method remembers between steps: one residual row per query, and the plan."""
    if not config.keeps_rows:
        return {}
    sparse_layers = shape.layers - len(dense_layers(config, shape.layers))
    heads = sparse_layers * shape.branches * shape.heads
    return {kind: int(heads * bytes_per_head(config, shape.grid, shape.head_dim, kind)) for kind in get_args(Storage)}


def dense_layers(config: SparseConfig, layers: int) -> frozenset[int]:
    """Which of a transformer's layers are dense at every step."""
    return named(config, "dense_layers", layers)


@lru_cache(maxsize=256)
def phases(config: SparseConfig, steps: int, offset: int = 0) -> tuple[Phase, ...]:
    """What each of `steps` steps is, for a layer whose anchors are shifted by `offset`."""
    return tuple(planned_phase(config, step, steps, offset) for step in range(steps))


def _share(config: SparseConfig, layout: Layout) -> float:
    """Share of the pairs of blocks in the plan of a sparse call."""
    blocks = layout.key_blocks
    if config.method == "topp":
        return max(int(config.density * blocks**2), blocks) / blocks**2
    if not config.has_pattern:
        return _kept(config.density, blocks) / blocks
    kinds: tuple[Pattern, ...] = ("spatial", "temporal") if config.method == "svg" else (config.method,)  # type: ignore[assignment]
    # Which heads are of which kind depends on the input, and both patterns are cut to the same density.
    masks = [pattern_mask(kind, layout.grid, layout.block, config.density, config.first_frame) for kind in kinds]
    return sum(mask.float().mean().item() for mask in masks) / len(masks)


def _kept(density: float, blocks: int) -> int:
    """Key blocks that top-k leaves a query block."""
    return max(1, int(density * blocks))
