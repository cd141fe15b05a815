"""Routing against the definitions of BiFormer and Rectified SpaAttn, in float64."""

import itertools
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from dit_sparse.config import SparseConfig
from dit_sparse.kernels import reference
from dit_sparse.kernels.block_attention import block_attention
from dit_sparse.kernels.block_select import block_select
from dit_sparse.kernels.block_stats import block_stats
from dit_sparse.layout import Layout, TokenGrid, block_lengths
from dit_sparse.order import first_frame_blocks, neighbours, token_order
from dit_sparse.routing import fine_scores, joined, pool, route

CPU = torch.device("cpu")
EVEN = Layout(TokenGrid(4, 4, 8), block=16)
RAGGED = Layout(TokenGrid(3, 5, 7), block=16)  # 105 tokens: 6 blocks and 9 tokens
LAYOUTS = pytest.mark.parametrize("layout", [EVEN, RAGGED], ids=["even", "ragged"])


def inputs(layout, text=0, batch=1, heads=2, dim=16):
    return torch.randn(3, batch, heads, layout.grid.tokens + text, dim, dtype=torch.float64)


def routed(q, k, v, layout, config, density=0.3, **text):
    pooled = pool(q, k, v, layout, config)
    return route(pooled, layout, config, density=density, scale=q.shape[-1] ** -0.5, **text)


def scores_by_error(pooled, scale):
    """Up to a factor of each row, which makes them add up to 1."""
    means, deviations = (pooled.q.mean, pooled.k.mean, pooled.lengths), pooled.v.var.sum(-1)
    return reference.block_scores(*means, scale=scale, variances=pooled.k.var, deviations=deviations).softmax(-1)


def blocks_of(x, layout):
    return x[:, :, : layout.grid.tokens].split(layout.block, dim=2)


def sets(plan):
    return [[set(row.nonzero().flatten().tolist()) for row in head] for head in plan.mask()[0]]


class TestBiFormersGoldenVectors:
    """2 heads of 4 channels on a 4 x 4 map in 2 x 2 regions of 4 tokens; 4 channels of zeros beside them."""

    lengths = torch.full((4,), 4)

    def inputs(self):
        i = torch.arange(128, dtype=torch.float64)
        maps = (2 * torch.sin(0.7 * i + 0.1), torch.sin(1.3 * i + 0.2), torch.sin(0.37 * i + 0.3))
        take = token_order("tile", TokenGrid(1, 4, 4), (1, 2, 2), CPU).take
        tokens = [x.reshape(2, 4, 16).mT[None, :, take] for x in maps]
        return [torch.nn.functional.pad(x, (0, 4)) for x in tokens]

    def adjacency(self):
        q, k, _ = self.inputs()
        means = [block_stats(x, self.lengths, block=4, want="mean").mean for x in (q, k)]
        return means[0] @ means[1].mT

    def test_adjacency(self):
        expected = [
            [0.07664, -0.16664, 0.11913, -0.01274],
            [-0.26324, 0.11212, 0.32986, -0.33134],
            [0.23641, -0.21920, -0.10594, 0.20099],
            [-0.12640, -0.03200, 0.29622, -0.22906],
        ]
        torch.testing.assert_close(self.adjacency().sum(1)[0], torch.tensor(expected).double(), atol=6e-6, rtol=0)

    def test_regions_shared_by_the_heads_and_per_head(self):
        shared = block_select(self.adjacency().sum(1, keepdim=True).softmax(-1), density=0.5)
        assert sets(shared) == [[{2, 0}, {2, 1}, {0, 3}, {2, 1}]]
        per_head = block_select(self.adjacency().softmax(-1), density=0.5)
        assert sets(per_head) == [[{0, 3}, {2, 0}, {3, 0}, {0, 3}], [{2, 1}, {1, 2}, {2, 0}, {1, 2}]]

    def test_route_chooses_the_same_and_adds_the_blocks_own(self):
        layout = Layout(TokenGrid(1, 4, 4), block=4)
        q, k, v = self.inputs()
        config = SparseConfig("none", order="tile", tile=(1, 2, 2))
        plan = route(pool(q, k, v, layout, config), layout, config, density=0.5, scale=1.0).plan
        own = [[{0, 3}, {2, 0, 1}, {3, 0, 2}, {0, 3}], [{2, 1, 0}, {1, 2}, {2, 0}, {1, 2, 3}]]
        assert sets(plan) == own

    def test_outputs(self):
        q, k, v = self.inputs()
        shared = block_select(self.adjacency().sum(1, keepdim=True).softmax(-1).expand(1, 2, 4, 4), density=0.5)
        out, _ = block_attention(q, k, v, shared, block=4, scale=8**-0.5)
        out = out[:, :, token_order("tile", TokenGrid(1, 4, 4), (1, 2, 2), CPU).place, :4]
        for actual, expected in (
            (out[0, 0, 0], [0.092328, 0.005500, -0.082045, -0.158887]),
            (out[0, 1, 15], [0.382068, 0.287996, 0.156353, 0.004312]),
        ):
            torch.testing.assert_close(actual, torch.tensor(expected).double(), atol=6e-7, rtol=0)


@LAYOUTS
def test_a_pooled_logit_is_the_mean_of_the_logits_of_its_tokens(layout):
    q, k, v = inputs(layout)
    pooled = pool(q, k, v, layout, SparseConfig("none"))
    logits = pooled.q.mean @ pooled.k.mean.mT
    for (n, a), (m, b) in itertools.product(*map(enumerate, (blocks_of(q, layout), blocks_of(k, layout)))):
        torch.testing.assert_close(logits[..., n, m], (a @ b.mT).mean((-1, -2)))


@LAYOUTS
def test_pool_computes_what_the_config_uses(layout):
    q, k, v = inputs(layout, text=5)
    wanted = {
        ("none", True): ("mean", "mean", "mean"),
        ("rectify", True): ("mean var mad", "mean var mad", "mean"),
        ("tail", True): ("mean var", "mean var", "mean var"),
        ("anchor", False): ("mean var", "mean var", "mean"),
        ("anchor, first order", False): ("", "mean", "mean"),
    }
    for (method, routes), names in wanted.items():
        second_order = {"second_order": False} if "first order" in method else {}
        config = SparseConfig(method.split(",")[0], **second_order)
        pooled = pool(q, k, v, layout, config, routes=routes)
        for stats, name, x in zip((pooled.q, pooled.k, pooled.v), names, (q, k, v), strict=True):
            if not name:
                assert stats is None
                continue
            parts = blocks_of(x, layout)
            mean = torch.stack([p.mean(2) for p in parts], 2)
            off = [p - p.mean(2, keepdim=True) for p in parts]
            torch.testing.assert_close(stats.mean, mean)
            for what, expected in (("var", lambda x: x.square()), ("mad", lambda x: x.abs())):
                if what in name:
                    torch.testing.assert_close(
                        getattr(stats, what), torch.stack([expected(x).mean(2) for x in off], 2)
                    )
                else:
                    assert getattr(stats, what) is None
    assert pooled.lengths.tolist() == [p.shape[2] for p in blocks_of(q, layout)]


@LAYOUTS
@pytest.mark.parametrize("text", [0, 6])
def test_mass_is_the_softmax_of_a_sequence_of_repeated_mean_keys(layout, text):
    """Block m stands for its n_m tokens, all with the mean key; each text token for itself."""
    q, k, v = inputs(layout, text)
    texts = dict(text_keys=k[:, :, layout.grid.tokens :]) if text else {}
    mass = routed(q, k, v, layout, SparseConfig("none"), **texts).mass
    assert mass.shape[-1] == layout.blocks + (text > 0)
    torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass[..., 0]))
    lengths = [p.shape[2] for p in blocks_of(k, layout)]
    keys = [p.mean(2, keepdim=True).expand_as(p) for p in blocks_of(k, layout)]
    queries = torch.stack([p.mean(2) for p in blocks_of(q, layout)], 2)
    whole = (queries @ torch.cat([*keys, k[:, :, layout.grid.tokens :]], 2).mT / 4).softmax(-1)
    expected = [part.sum(-1) for part in whole.split([*lengths, text] if text else lengths, dim=-1)]
    torch.testing.assert_close(mass, torch.stack(expected, -1))


def test_mass_is_the_codes_softmax_then_reallocation():
    """Rectified SpaAttn's two steps: softmax over blocks and text tokens, vision times the block size, renormalise."""
    q, k, v = inputs(EVEN, text=6)
    pooled = pool(q, k, v, EVEN, SparseConfig("rectify"))
    two_step = (pooled.q.mean @ torch.cat([pooled.k.mean, k[:, :, -6:]], 2).mT / 4).softmax(-1)
    two_step[..., : EVEN.blocks] *= EVEN.block
    two_step = torch.cat([two_step[..., : EVEN.blocks], two_step[..., EVEN.blocks :].sum(-1, keepdim=True)], -1)
    mass = routed(q, k, v, EVEN, SparseConfig("rectify"), text_keys=k[:, :, -6:]).mass
    torch.testing.assert_close(mass, two_step / two_step.sum(-1, keepdim=True))


def test_masked_text_has_no_mass():
    q, k, v = inputs(RAGGED, text=6, batch=2)
    mask = torch.tensor([[True] * 4 + [False] * 2, [False] * 6])
    text = k[:, :, -6:].clone()
    before = routed(q, k, v, RAGGED, SparseConfig("none"), text_keys=text, text_mask=mask).mass
    text[0, :, 4:], text[1] = 1e3, -1e3
    after = routed(q, k, v, RAGGED, SparseConfig("none"), text_keys=text, text_mask=mask).mass
    assert torch.equal(before, after)
    alone = routed(q, k, v, RAGGED, SparseConfig("none"), text_keys=text[:, :, :4]).mass
    torch.testing.assert_close(before[0], alone[0])
    none = routed(q, k, v, RAGGED, SparseConfig("none")).mass
    torch.testing.assert_close(before[1], torch.nn.functional.pad(none[1], (0, 1)))


@pytest.mark.parametrize(("drop", "kept"), [(0.8, 179), (0.9, 89), (0.0, 900)])
def test_the_number_of_blocks_is_truncated(drop, kept):
    """Rectified SpaAttn's top_k of 900 blocks, with the float product it makes of 1 - drop."""
    plan = block_select(torch.rand(1, 2, 3, 900), density=1 - drop)
    assert (plan.counts == kept).all()


@LAYOUTS
@pytest.mark.parametrize("density", [0.01, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("text", [0, 6])
def test_the_best_blocks_by_mass_and_the_blocks_own(layout, density, text):
    q, k, v = inputs(layout, text)
    texts = dict(text_keys=k[:, :, layout.grid.tokens :]) if text else {}
    result = routed(q, k, v, layout, SparseConfig("none"), density, **texts)
    places = max(1, int(density * layout.blocks))
    if density == 1:
        places = layout.blocks + (text > 0)
    best = result.mass.topk(places).indices
    expected = torch.zeros_like(result.mass, dtype=torch.bool).scatter_(-1, best, True)[..., : layout.blocks]
    assert torch.equal(result.plan.mask(), expected | torch.eye(layout.blocks, dtype=torch.bool))
    assert result.plan.key_blocks == layout.blocks
    result.plan.check()


@pytest.mark.parametrize(("density", "counts"), [(0.5, {3, 4}), (1.0, {8})])
def test_text_takes_a_place_but_where_all_blocks_are_kept(density, counts):
    """Of 4 places for 8 blocks, a text with nearly all the mass takes one; the block's own comes beside them."""
    q, k, v = inputs(EVEN, text=1)
    q = q.abs() + 1
    k[:, :, -1:] = 30
    plan = routed(q, k, v, EVEN, SparseConfig("none"), density, text_keys=k[:, :, -1:]).plan
    assert set(plan.counts.flatten().tolist()) == counts


@pytest.mark.parametrize("order", ["hilbert", "tile", "raster", "pixel"])
@pytest.mark.parametrize(("near", "first"), [(False, False), (False, True), (True, False), (True, True)])
def test_forced_blocks_are_always_there(order, near, first):
    q, k, v = inputs(RAGGED)
    config = SparseConfig("none", order=order, neighbours=near, first_frame=first)
    mask = routed(q, k, v, RAGGED, config, density=0.01).plan.mask()
    forced = torch.eye(RAGGED.blocks, dtype=torch.bool)
    if near:
        forced |= neighbours(order, RAGGED.grid, config.tile, RAGGED.block, CPU)
    if first:
        forced |= first_frame_blocks(order, RAGGED.grid, config.tile, RAGGED.block, CPU)
    assert (mask | ~forced).all()
    assert (mask & ~forced).sum(-1).max() <= 1


@pytest.mark.parametrize("order", ["hilbert", "raster"])
@pytest.mark.parametrize(("near", "first"), [(False, False), (True, True)])
def test_a_query_block_keeps_what_its_parts_keep(order, near, first):
    layout = Layout(RAGGED.grid, block=64, key_block=16)
    q, k, v = inputs(layout)
    config = SparseConfig("none", order=order, neighbours=near, first_frame=first)
    plan = routed(q, k, v, layout, config, density=0.01).plan
    assert plan.counts.shape == (1, 2, 2) and plan.key_blocks == 7
    forced = torch.eye(7, dtype=torch.bool)
    if near:
        forced |= neighbours(order, layout.grid, config.tile, 16, CPU)
    if first:
        forced |= first_frame_blocks(order, layout.grid, config.tile, 16, CPU)
    forced = torch.stack([forced[:4].any(0), forced[4:].any(0)])
    assert (plan.mask() | ~forced).all()
    assert (plan.mask() & ~forced).sum(-1).max() <= 1
    plan.check()


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("tokens", [4 * 64, 4 * 64 - 3, 3 * 64 + 1, 5])
def test_statistics_of_parts_make_those_of_the_whole(tokens, count):
    x = 5 + torch.randn(2, 3, tokens, 8, dtype=torch.float64)
    parts = block_lengths(tokens, 16, CPU)
    got = joined(block_stats(x, parts, block=16, want="mean+var"), parts, count)
    expected = block_stats(x, block_lengths(tokens, 16 * count, CPU), block=16 * count, want="mean+var")
    torch.testing.assert_close(got.mean, expected.mean, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(got.var, expected.var, atol=1e-12, rtol=1e-12)
    assert joined(block_stats(x, parts, block=16, want="mean"), parts, count).var is None


@LAYOUTS
@pytest.mark.parametrize("top_p", [0.2, 0.6, 0.95])
@pytest.mark.parametrize("method", ["none", "tail"])
def test_top_p_keeps_at_least_its_share(layout, top_p, method):
    q, k, v = inputs(layout)
    config = SparseConfig(method, top_p=top_p)
    result = routed(3 * q, k, v, layout, config, density=0.01)
    scores = result.mass
    if method == "tail":
        scores = scores_by_error(pool(3 * q, k, v, layout, config), 0.25)
    kept = scores.masked_fill(~result.plan.mask(), 0).sum(-1)
    assert (kept >= top_p * scores.sum(-1) - 1e-12).all()
    fewer = [
        scores[0, h, n].sort(descending=True).values.cumsum(0).ge(top_p * scores[0, h, n].sum()).int().argmax() + 1
        for h in range(2)
        for n in range(layout.blocks)
    ]
    # Beyond the fewest that do: the block's own at most.
    assert (result.plan.counts.flatten() - torch.stack(fewer) <= 1).all()


@LAYOUTS
@pytest.mark.parametrize("text", [0, 6])
def test_error_aware_scores(layout, text):
    """A_nm sqrt(a^2 sum_d q_nd^2 var_md) sqrt(mean_j |v_j - v_m|^2), by loops over blocks and tokens."""
    q, k, v = inputs(layout, text, dim=16)
    config = SparseConfig("tail")
    texts = dict(text_keys=k[:, :, layout.grid.tokens :]) if text else {}
    result = routed(q, k, v, layout, config, 0.4, **texts)
    a = 16**-0.5
    expected = torch.zeros(2, layout.blocks, layout.blocks, dtype=torch.float64)
    for h, n, m in itertools.product(range(2), range(layout.blocks), range(layout.blocks)):
        mean = blocks_of(q, layout)[n][0, h].mean(0)
        keys, values = blocks_of(k, layout)[m][0, h], blocks_of(v, layout)[m][0, h]
        of_logits = sum(a**2 * mean[d] ** 2 * keys[:, d].var(correction=0) for d in range(16))
        of_values = sum((value - values.mean(0)).square().sum() for value in values) / len(values)
        expected[h, n, m] = result.mass[0, h, n, m] * math.sqrt(of_logits) * math.sqrt(of_values)
    torch.testing.assert_close(
        scores_by_error(pool(q, k, v, layout, config), a)[0], expected / expected.sum(-1, keepdim=True)
    )
    best = expected.topk(int(0.4 * layout.blocks)).indices
    mask = torch.zeros_like(expected, dtype=torch.bool).scatter_(-1, best, True)
    assert torch.equal(result.plan.mask()[0], mask | torch.eye(layout.blocks, dtype=torch.bool))
    by_mass = routed(q, k, v, layout, SparseConfig("tail", routing="mass"), 0.4, **texts)
    assert not torch.equal(by_mass.plan.mask(), result.plan.mask())


@LAYOUTS
@pytest.mark.parametrize("key_block", [None, 8])
def test_fine_scores(layout, key_block):
    """The softmax of each quarter block's mean query over single keys, by loops over quarters and blocks of keys."""
    layout = replace(layout, key_block=key_block)
    tokens, keys = layout.grid.tokens, layout.key_size
    q, k, v = inputs(layout, text=6)
    expected = torch.zeros(2, layout.blocks, layout.key_blocks, dtype=torch.float64)
    for h, n in itertools.product(range(2), range(layout.blocks)):
        quarters = blocks_of(q, layout)[n][0, h].split(layout.block // 4)
        for quarter in quarters:
            shares = (k[0, h, :tokens] @ quarter.mean(0) * 0.25).softmax(0).split(keys)
            expected[h, n] += torch.stack([share.sum() for share in shares]) / len(quarters)
    scores = fine_scores(q, k, layout, scale=0.25)
    torch.testing.assert_close(scores[0].exp(), expected)
    config = SparseConfig("anchor")
    plan = routed(q, k, v, layout, config, 0.4, fine=lambda: scores).plan
    best = expected.topk(int(0.4 * layout.key_blocks)).indices
    own = torch.eye(layout.blocks, dtype=torch.bool).repeat_interleave(layout.block // keys, 1)[:, : layout.key_blocks]
    mask = torch.zeros_like(expected, dtype=torch.bool).scatter_(-1, best, True)
    assert torch.equal(plan.mask()[0], mask | own)
    by_error = routed(q, k, v, layout, SparseConfig("tail"), 0.4).plan
    assert not torch.equal(by_error.mask(), plan.mask())


@LAYOUTS
@pytest.mark.parametrize("method", ["none", "rectify", "tail", "anchor"])
def test_some_query_blocks_are_routed_as_among_all(layout, method):
    q, k, v = inputs(layout, text=6, batch=2)
    blocks = (0, 2, layout.blocks - 1)
    config, rows = SparseConfig(method), torch.tensor(blocks)
    pooled = pool(q, k, v, layout, config)
    sampled = replace(pooled, q=pooled.q._replace(mean=pooled.q.mean[:, :, rows]))
    with_text = {"text_keys": k[:, :, layout.grid.tokens :]} if method == "rectify" else {}

    def plan(pooled, **of):
        fine = partial(fine_scores, q, k, layout, scale=0.25, **{"blocks": blocks} if of else {})
        return route(pooled, layout, config, density=0.4, scale=0.25, fine=fine, **with_text, **of).plan.mask()

    assert torch.equal(plan(sampled, rows=rows), plan(pooled)[:, :, rows])


def test_fine_routing_of_repeated_tokens_is_that_of_means():
    """Where all tokens of a block are alike, so are its means, and the mass that they hold."""
    layout = EVEN
    q, k = (x.repeat_interleave(16, 2) for x in torch.randn(2, 1, 2, 8, 16, dtype=torch.float64))
    mass = routed(q, k, k, layout, SparseConfig("none")).mass
    torch.testing.assert_close(fine_scores(q, k, layout, scale=0.25).exp(), mass)


@pytest.mark.parametrize("method", ["none", "rectify", "tail"])
def test_batch_rows_are_routed_apart(method):
    q, k, v = inputs(RAGGED, text=4, batch=2)
    mask = torch.tensor([[True] * 4, [True] * 2 + [False] * 2])
    config = SparseConfig(method)
    both = routed(q, k, v, RAGGED, config, text_keys=k[:, :, -4:], text_mask=mask)
    for b in range(2):
        at = slice(b, b + 1)
        one = routed(*(x[at] for x in (q, k, v)), RAGGED, config, text_keys=k[at, :, -4:], text_mask=mask[at])
        assert torch.equal(one.plan.mask(), both.plan.mask()[at])
        torch.testing.assert_close(one.mass, both.mass[at])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("method", ["rectify", "tail"])
def test_low_precision_inputs_are_pooled_and_scored_in_float32(method, dtype):
    q, k, v = inputs(RAGGED, text=4).to(dtype)
    config = SparseConfig(method)
    pooled = pool(q, k, v, RAGGED, config)
    mass = routed(q, k, v, RAGGED, config, text_keys=k[:, :, -4:]).mass
    exact = pool(q.double(), k.double(), v.double(), RAGGED, config)
    exact_mass = routed(q.double(), k.double(), v.double(), RAGGED, config, text_keys=k[:, :, -4:].double()).mass
    for low, high in ((pooled.q, exact.q), (pooled.k, exact.k), (pooled.v, exact.v)):
        for a, b in zip(low, high, strict=True):
            if a is not None:
                assert a.dtype == torch.float32
                torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)
    assert mass.dtype == torch.float32
    torch.testing.assert_close(mass.double(), exact_mass, atol=1e-5, rtol=1e-5)
