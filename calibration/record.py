"""A dense run that looks on: what each setting of the ladder would have made of the same queries, keys and values.

Only a sample of query blocks, and of rows in them, is looked at, with all keys: memory and time do not grow with the
number of tokens squared. Everything is computed from float32 logits and their log-sum-exp.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_sparse.attention import fastest_dense
from dit_sparse.choices import Choice, Rung, per_block
from dit_sparse.config import SparseConfig
from dit_sparse.correction import gain, pooled_tail
from dit_sparse.kernels.block_stats import Want, block_stats
from dit_sparse.kernels.permute import permute
from dit_sparse.kernels.reference import BlockStats
from dit_sparse.kernels.tail_weights import tail_weights
from dit_sparse.layout import Layout
from dit_sparse.order import vision_first
from dit_sparse.plan import Residual
from dit_sparse.profile import ERRORS, LEARNERS, METHODS, ROUTINGS, STORAGES
from dit_sparse.report import Mark
from dit_sparse.residual import pack, unpack
from dit_sparse.routing import Pooled, Routing, fine_scores, route
from dit_sparse.state import Generation, Layer

# Least logarithm of a share: what is below would be subnormal further on, where a CPU is many times slower.
FLOOR = -60.0
# Rows looked at in one query block, until all blocks are. A few blocks hold most of an error: eight blocks of sixteen
# rows miss them, and tell too little of it.
ROWS_PER_BLOCK = 4
# Random directions that errors of two branches are compared along: their angle is wanted to some per cent only.
SKETCH = 16
# Logits, or parts of outputs by block, of the heads that a GPU looks at together: 256 MiB in float32.
AT_ONCE = 1 << 26


@dataclass(frozen=True)
class Plan:
    """What a recording looks at.

    ladder     settings to try; distances, in steps, at which a memory's age is judged, ascending
    bins       parts of the routing order that rho is averaged over
    rows       query rows looked at per head
    base       block, order and forced blocks
    """

    ladder: tuple[Rung, ...]
    distances: tuple[int, ...]
    bins: int
    rows: int
    base: SparseConfig

    @property
    def middle(self) -> int:
        """The rung that effects and the drift of rho are measured at."""
        return len(self.ladder) // 2

    def axes(self) -> dict[str, tuple[int, ...]]:
        """The trailing axes of each statistic, see dit_sparse.profile.AXES."""
        k, d = len(self.ladder), len(self.distances)
        return {
            "rho": (k, self.bins),
            "recall": (k,),
            "kept": (len(ROUTINGS), k),
            "error": (len(METHODS), k),
            "stale": (len(LEARNERS), d, k),
            "fade": (d, k),
            "coarse": (len(LEARNERS), len(STORAGES)),
            "drift": (d,),
            "together": (len(ERRORS), k),
            "persist": (len(ERRORS), k),
            "energy": (),
        }


@dataclass
class Memory:
    """What heads would remember from a step: masks [H, n, K, N], residuals [H, n, K, r, D] of both methods that learn,
    rho [H, n, K, r]."""

    plan: Tensor
    anchor: Tensor
    reshape: Tensor
    rho: Tensor


@dataclass
class Recorder:
    """Put in a generation's place for dense attention, it answers with dense attention and records.

    metric  layer name -> [heads, D, D]; errors are measured after each head's channels are multiplied by it
    found   branch -> statistic -> [heads of all layers, steps, ...] float32, NaN where nothing ran; error, stale and
            energy are mean squares over rows
    inputs  q, k, v of one call in the middle of the run, for timing
    """

    plan: Plan
    generation: Generation
    steps: int
    metric: dict[str, Tensor] = field(default_factory=dict)
    found: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    inputs: tuple[Layer, Tensor, Tensor, Tensor] | None = None
    _marks: list[tuple[int, Mark, Mark, Mark]] = field(default_factory=list)  # step; before, behind, when recorded
    _before: list[Mark] = field(default_factory=list)  # a call that is not timed: begin and end
    _memory: dict[tuple[str, str, int, int], dict[int, Memory]] = field(default_factory=dict)
    _first: dict[tuple[str, int], tuple[int, str, Tensor]] = field(default_factory=dict)
    _last: dict[tuple[str, int, str], tuple[int, Tensor]] = field(default_factory=dict)
    _rows: dict[str, int] = field(default_factory=dict)

    @property
    def seconds(self) -> tuple[dict[int, float], dict[int, float]]:
        """In dense attention, and beside it, by step."""
        dense: dict[int, float] = {}
        beside: dict[int, float] = {}
        for step, a, b, c in self._marks:
            dense[step] = dense.get(step, 0.0) + a.until(b)
            beside[step] = beside.get(step, 0.0) + b.until(c)
        if self._before:
            beside[self._marks[0][0]] += self._before[0].until(self._before[1])
        return dense, beside

    def __call__(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        text_mask = None if key_mask is None else self.generation.text_of(layer, key_mask)
        if not self._before:
            # At first use a kernel is compiled, which may take longer than all of the run.
            self._before.append(Mark(q.device))
            fastest_dense(q, k, v, layer, self.generation, text_mask)
            self._before.append(Mark(q.device))
        start = Mark(q.device)
        out = fastest_dense(q, k, v, layer, self.generation, text_mask)
        middle = Mark(q.device)
        moment = self.generation.moment
        if moment is not None:
            self._look(layer, moment.step, moment.branch, q, k, v, text_mask)
        self._marks.append((-1 if moment is None else moment.step, start, middle, Mark(q.device)))
        return out

    def _look(
        self, layer: Layer, step: int, branch: str, q: Tensor, k: Tensor, v: Tensor, text_mask: Tensor | None
    ) -> None:
        grid, base = self.generation.grid, self.plan.base
        assert grid is not None
        if branch not in self.found:
            self.found[branch] = self._empty(q.device)
        before, behind = self.generation.around(layer, q.shape[2])
        layout = base.layout(grid, before + behind)
        order = vision_first(base.order, grid, base.tile, q.device, before)
        if step >= self.steps // 2 and self.inputs is None:
            self.inputs = (layer, q.clone(), k.clone(), v.clone())
        if not order.is_raster:
            q, k, v = permute((q, k, v), order.take)
        bank = Bank(self.plan, layout, q, k, v, text_mask)
        root = self.metric.get(layer.name)
        for first in range(0, q.shape[1], bank.at_once):
            heads = slice(first, min(first + bank.at_once, q.shape[1]))
            told: list[tuple[dict[str, Tensor], Tensor]] = []
            # Rows of a batch are other prompts, or the branches of guidance where these are one batch: each remembers.
            for b in range(q.shape[0]):
                memory = self._memory.setdefault((layer.name, branch, first, b), {})
                for old in [old for old in memory if step - old > self.plan.distances[-1]]:
                    del memory[old]
                found, memory[step], sketch = bank.look(b, heads, None if root is None else root[heads], memory, step)
                told.append((found, sketch))
            mean = {name: torch.stack([t[0][name] for t in told]).mean(0) for name in told[0][0]}
            # A run adds the same share in every row of a batch.
            mean["fade"], mean["stale"][:, 0] = faded(*mean.pop("sums").unbind(1))
            rows = slice(self._rows[layer.name] + heads.start, self._rows[layer.name] + heads.stop)
            for name, x in mean.items():
                self.found[branch][name][rows, step] = x
            self._compare((layer.name, first), rows, step, branch, told[0][1])

    def _compare(self, key: tuple[str, int], rows: slice, step: int, branch: str, sketch: Tensor) -> None:
        """Cosines between the errors, of length 1, of this branch and the first, and of this step and the one before;
        of methods that learn at the second distance, before at the first, of one memory. key names the heads, which
        have these rows."""
        now = sketch[:, : len(ERRORS)]
        begun, of, first = self._first.get(key, (-1, "", now))
        if begun != step or of == branch:
            self._first[key] = (step, branch, now)
            first = now
        self.found[branch]["together"][rows, step] = (first * now).sum(-1)
        at, before = self._last.get((*key, branch), (-2, sketch))
        if at == step - 1:
            before = torch.cat([before[:, : len(METHODS)], before[:, len(ERRORS) :]], 1)
            self.found[branch]["persist"][rows, step] = (before * now).sum(-1)
        self._last[(*key, branch)] = (step, sketch)

    def _empty(self, device: torch.device) -> dict[str, Tensor]:
        moment, heads = self.generation.moment, 0
        # A scheduler of second order makes more steps than it was asked for.
        steps = max(self.steps, (moment.total if moment else None) or 0)
        for layer in self.generation.layers:
            self._rows[layer.name] = heads
            heads += layer.heads
        return {
            name: torch.full((heads, steps, *axes), float("nan"), device=device)
            for name, axes in self.plan.axes().items()
        }


def faded(lacks: Tensor, both: Tensor, had: Tensor) -> tuple[Tensor, Tensor]:
    """How much of an anchor's residual is best added later, from 0 to 1, and the squared error that leaves.

    lacks, had: mean squares of what a later step lacks and of what the anchor did; both: of their products. Least
    squares: what was lacking then and is no longer would be wrong in one direction for steps on end.
    """
    fade = (both / had.clamp(min=1e-30)).clamp(0, 1)
    return fade, (lacks - fade * (2 * both - fade * had)).clamp(min=0)


def _heads_at_once(numbers: int, device: torch.device) -> int:
    """How many heads of so many numbers are looked at together: of a GPU's time most would be launches, while one head
    fills a CPU's cache."""
    return 1 if device.type == "cpu" else max(1, AT_ONCE // numbers)


def squares(x: Tensor) -> Tensor:
    """Mean over rows of the squared length, [H, P] for [H, n, P, r, D]."""
    return x.square().sum(-1).mean((1, 3))


@dataclass(frozen=True)
class Sample:
    """What of a call is looked at.

    numbers, blocks  of query blocks, [n] int64
    rows             in them, [n, r] int64
    directions       along which errors in these rows are compared, [r, D, SKETCH] float32
    """

    numbers: tuple[int, ...]
    blocks: Tensor
    rows: Tensor
    directions: Tensor


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def drawn(rows: int, layout: Layout, dim: int, device: torch.device) -> Sample:
    """Made once: a copy to a GPU waits for all that it was asked for before."""
    per = min(layout.block, max(ROWS_PER_BLOCK, rows // layout.blocks))
    blocks = torch.linspace(0, layout.blocks - 1, min(layout.blocks, max(1, rows // per))).round().long()
    inside = torch.linspace(0, 1, per) * (layout.lengths("cpu")[blocks][:, None] - 1)
    signs = torch.randint(0, 2, (per, dim, SKETCH), generator=torch.Generator().manual_seed(0))
    places = blocks[:, None] * layout.block + inside.round().long()
    return Sample(tuple(blocks.tolist()), blocks.to(device), places.to(device), (2.0 * signs - 1).to(device))


class Bank:
    """Routing of one call at every rung, and what each head's sampled rows would get by it."""

    def __init__(self, plan: Plan, layout: Layout, q: Tensor, k: Tensor, v: Tensor, text_mask: Tensor | None):
        self.plan, self.layout, self.q, self.k, self.v, self.text_mask = plan, layout, q, k, v, text_mask
        self.scale = q.shape[-1] ** -0.5
        sample = drawn(plan.rows, layout, v.shape[-1], q.device)
        self.blocks, self.rows, self.directions = sample.blocks, sample.rows, sample.directions
        self.lengths = layout.lengths(q.device)
        widest = max(k.shape[2], layout.blocks * v.shape[-1])
        self.at_once = _heads_at_once(self.rows.numel() * widest, q.device)
        mass, error, fine = (self._config(method) for method in ("rectify", "tail", "anchor"))
        # What each routing takes, in one pass over the tokens.
        wants: tuple[Want, ...] = ("all", "all", "mean+var")
        of_q, of_k, of_v = (
            block_stats(x[:, :, : layout.grid.tokens], self.lengths, block=layout.block, want=want)
            for x, want in zip((q, k, v), wants, strict=True)
        )
        pooled = Pooled(of_q, of_k, of_v, self.lengths)
        sampled = replace(pooled, q=BlockStats(*(x[:, :, self.blocks] for x in of_q)))
        by_mass = [self._route(sampled, mass, rung) for rung in plan.ladder]
        self.masks = {"mass": self._masks(by_mass)}
        scores = fine_scores(q, k, layout, scale=self.scale, blocks=sample.numbers)
        for name, config in (("error", error), ("fine", fine)):
            self.masks[name] = self._masks([self._route(sampled, config, rung, scores) for rung in plan.ladder])
        # What Rectified SpaAttn adds, and how much it leaves to the exact part; routing's estimate of the mass.
        self.compensable = by_mass[0].mass[..., : layout.blocks].masked_fill(~gain(sampled), 0)
        self.tail = pooled_tail(
            pooled,
            torch.float32,
            second_order=plan.base.second_order,
            limit=plan.base.second_order_limit,
        )

    def _config(self, method: str) -> SparseConfig:
        return Choice(method, self.plan.ladder[0]).config(self.plan.base)  # type: ignore[arg-type]

    def _route(self, pooled: Pooled, config: SparseConfig, rung: Rung, fine: Tensor | None = None) -> Routing:
        text = self.k[:, :, self.layout.grid.tokens :] if self.layout.text else None
        config = Choice(config.method, rung).config(self.plan.base)  # type: ignore[arg-type]
        return route(
            pooled, self.layout, config, density=rung.density, scale=self.scale, text_keys=text,
            text_mask=self.text_mask, fine=None if fine is None else lambda: fine, rows=self.blocks,
        )  # fmt: skip

    def _masks(self, routings: list[Routing]) -> Tensor:
        """[B, H, n, K, N] bool."""
        return torch.stack([routing.plan.mask() for routing in routings], dim=3)

    def look(
        self, b: int, heads: slice, root: Tensor | None, memory: dict[int, Memory], step: int
    ) -> tuple[dict[str, Tensor], Memory, Tensor]:
        """The statistics of some heads, [H, ...], what they would remember of this step, and their errors along random
        directions, each of length 1: those of ERRORS, then of LEARNERS at the first distance."""
        n, r = self.rows.shape
        blocks, size, vision = self.layout.blocks, self.layout.block, self.layout.grid.tokens
        q, k, v = self.q[b, heads, self.rows.flatten()].float(), self.k[b, heads].float(), self.v[b, heads].float()
        h, _, dim = v.shape
        means = self.tail.values[b, heads].float()
        if root is not None:
            v, means = v @ root, means @ root
        logits = (q @ k.mT).mul_(self.scale)
        if self.text_mask is not None:
            logits[..., vision:].masked_fill_(~self.text_mask[b], float("-inf"))
        lse = logits.logsumexp(-1, keepdim=True)
        shares = logits.sub_(lse).clamp_(min=FLOOR).exp_()
        # By key block: softmax mass [H, n, r, N], what it adds to the output [H, n, N, r * D]; the last block padded.
        pad = blocks * size - vision
        mine = F.pad(shares[..., :vision], (0, pad)).unflatten(-1, (blocks, size))
        mass = mine.sum(-1).view(h, n, r, blocks)
        values = F.pad(v[:, :vision], (0, 0, 0, pad)).unflatten(1, (blocks, size))
        parts = (mine.transpose(1, 2) @ values).view(h, blocks, n, r * dim).transpose(1, 2)
        text_mass = shares[..., vision:].sum(-1).view(h, n, 1, r)
        text = (shares[..., vision:] @ v[:, vision:]).view(h, n, 1, r, dim)
        dense = parts.sum(2).view(h, n, 1, r, dim) + text
        # The same for each block as one pooled key.
        added = tail_weights(self.tail, (b, heads, self.blocks), scale=self.scale)
        if added.shape[1] > 1:
            added = added.repeat_interleave(r, 1)
        pooled = (q @ self.tail.keys[b, heads].mT).mul_(self.scale) + added
        weights = (pooled - lse).clamp_(FLOOR, 30).exp_().view(h, n, r, blocks)
        stand_ins = (weights.mT[..., None] * means[:, None, :, None]).reshape(h, n, blocks, r * dim)

        by_mass, by_error, by_fine = (self.masks[name][b, heads] for name in ("mass", "error", "fine"))
        old = {at: memory[step - back] for at, back in enumerate(self.plan.distances) if step - back in memory}
        # One product for all masks: it reads what every block adds, which is much.
        masks = torch.cat([by_mass, by_error, by_fine, *(m.plan for m in old.values())], 2)
        kept, left = masks.float(), (~masks).float()
        # Mass [H, n, P, r] in the routed blocks and text, and what it adds [H, n, P, r, D]; of the others, pooled.
        mass_kept, out = kept @ mass.mT + text_mass, (kept @ parts).view(h, n, -1, r, dim) + text
        mass_left, pooled_out = left @ weights.mT, (left @ stand_ins).view(h, n, -1, r, dim)
        tails = (out + pooled_out) / (mass_kept + mass_left)[..., None]
        held, missing, out, direction, tails = (
            x.split(len(self.plan.ladder), 2) for x in (mass_kept, mass_left, out, pooled_out, tails)
        )
        alone = out[0] / held[0].clamp(min=1e-20)[..., None]
        bins = F.adaptive_avg_pool1d(held[0].mean(-1).mT, self.plan.bins)
        rho = per_block(bins.flatten(0, 1), blocks)[:, self.blocks].unflatten(0, (h, -1)).mT
        all_kept = by_mass.all(-1)
        rho = torch.where(all_kept, 1.0, rho)[..., None, None]
        weighed = rho * alone + (1 - rho) * torch.where(
            all_kept[..., None, None], 0.0, direction[0] / missing[0].clamp(min=1e-20)[..., None]
        )
        added = self.compensable[b, heads][:, :, None].masked_fill(by_mass, 0)
        rectified = (1 - added.sum(-1))[..., None, None] * alone + (added @ means[:, None])[..., None, :]
        told = (alone, rectified, tails[1], weighed, out[2], tails[2])
        errors = torch.stack([x - dense for x in told], 1)
        found = {
            "rho": bins,
            "recall": self._recall(by_mass, mass, held[0] - text_mass),
            "kept": torch.stack([x.float().mean((1, 3)) for x in (by_mass, by_error, by_fine)], 1),
            "error": torch.stack([squares(error) for error in errors.unbind(1)], 1),
            "energy": squares(dense)[:, 0],
        }
        now = Memory(by_fine, (dense - tails[2]).bfloat16(), (dense - out[2]).bfloat16(), held[2].clone())
        found["coarse"] = torch.stack(
            [self._coarse(x[:, :, self.plan.middle].float()) for x in (now.anchor, now.reshape)], 1
        )
        aged, learned = self._aged(old, dense, held[3:], out[3:], tails[3:])
        vectors = torch.einsum("henkrd,rds->heknrs", torch.cat([errors, learned], 1), self.directions)
        return found | aged, now, F.normalize(vectors.flatten(3), dim=-1)

    def _recall(self, masks: Tensor, mass: Tensor, held: Tensor) -> Tensor:
        """[H, K]: mass found over what the best blocks of that number hold, the mean over query blocks."""
        ranked = mass.mean(2).sort(-1, descending=True).values.cumsum(-1)
        best = ranked.gather(-1, masks.sum(-1) - 1)
        return (held.mean(-1) / best.clamp(min=1e-20)).mean(1)

    def _coarse(self, residual: Tensor) -> Tensor:
        """[H, storages]: relative error of the stored residual [H, n, r, D]."""

        def size(x: Tensor) -> Tensor:
            return x.square().sum((1, 2, 3))

        whole = size(residual).clamp(min=1e-30)
        stored: list[Residual] = [pack(residual, storage) for storage in STORAGES]  # type: ignore[arg-type]
        return torch.stack([(size(unpack(x) - residual) / whole).sqrt() for x in stored], -1)

    def _aged(
        self,
        old: dict[int, Memory],
        dense: Tensor,
        held: Sequence[Tensor],
        out: Sequence[Tensor],
        tails: Sequence[Tensor],
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Errors of following a memory but an anchor's, of which there is what `faded` takes, and how far rho of its
        plan has moved, for each distance there is; and the errors [H, ..., n, K, r, D] of all learners at the second
        distance and then at the first, NaN where there is none. old is by distance's number, and held, out and tails
        are of its plans, see `look`."""
        distances, k, middle = len(self.plan.distances), len(self.plan.ladder), self.plan.middle
        h, n, _, r, dim = dense.shape

        def nothing(*shape: int) -> Tensor:
            return dense.new_full(shape, float("nan"))

        stale, drift = nothing(h, len(LEARNERS), distances, k), nothing(h, distances)
        sums, learned = nothing(h, 3, distances, k), nothing(h, 2, len(LEARNERS), n, k, r, dim)
        for i, (at, m) in enumerate(old.items()):
            scaled = out[i] * (m.rho / held[i].clamp(min=1e-20))[..., None]
            lacks, had = dense - tails[i], m.anchor.float()
            sums[:, :, at] = torch.stack([squares(lacks), (lacks * had).sum(-1).mean((1, 3)), squares(had)], 1)
            fade, _ = faded(*sums[:, :, at].unbind(1))
            errors = [fade[:, None, :, None, None] * had - lacks, scaled + m.reshape.float() - dense]
            stale[:, 1, at] = squares(errors[1])
            if at <= 1:
                learned[:, 1 - at] = torch.stack(errors, 1)
            drift[:, at] = (held[i][:, :, middle] - m.rho[:, :, middle]).abs().mean((1, 2))
        return {"stale": stale, "sums": sums, "drift": drift}, learned.flatten(1, 2)
