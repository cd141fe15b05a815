"""The corrections against their formulas, in float64."""

import itertools
import math

import pytest
import torch

from dit_sparse.config import SparseConfig
from dit_sparse.correction import LEAST_REST, Learned, gain, learn_anchor, learn_reshape, pooled_tail, rectify, reshape
from dit_sparse.kernels.block_attention import block_attention
from dit_sparse.kernels.dense_attention import dense_attention
from dit_sparse.layout import Layout, TokenGrid
from dit_sparse.plan import BlockPlan, Correction, Residual
from dit_sparse.residual import pack, unpack
from dit_sparse.routing import pool, route

EVEN = Layout(TokenGrid(4, 4, 8), block=16)
RAGGED = Layout(TokenGrid(3, 5, 7), block=16)  # 105 tokens: 6 blocks and 9 tokens
LAYOUTS = pytest.mark.parametrize("layout", [EVEN, RAGGED], ids=["even", "ragged"])
TEXTS = pytest.mark.parametrize("text", [0, 6])


def inputs(layout, text=0, batch=1, heads=2, dim=16, mean=0.0):
    """mean shifts all tokens of a block together, which lets blocks pass the gain test."""
    shift = torch.randn(3, batch, heads, layout.blocks, dim, dtype=torch.float64).repeat_interleave(layout.block, 3)
    tokens = torch.randn(3, batch, heads, layout.grid.tokens + text, dim, dtype=torch.float64)
    tokens[:, :, :, : layout.grid.tokens] += mean * shift[:, :, :, : layout.grid.tokens]
    return tokens


def flat(x, layout):
    """The first token of each block in place of all of its tokens; text is left as it is."""
    first = torch.arange(layout.grid.tokens) // layout.block * layout.block
    return torch.cat([x[:, :, first], x[:, :, layout.grid.tokens :]], 2)


def rectified(q, k, v, layout, density=0.4, **options):
    config = SparseConfig("rectify")
    pooled = pool(q, k, v, layout, config)
    text = k[:, :, layout.grid.tokens :]
    texts = dict(text_keys=text) if text.shape[2] else {}
    routing = route(pooled, layout, config, density=density, scale=q.shape[-1] ** -0.5, **texts)
    return routing, pooled, rectify(routing, pooled, **options)


def by_definition(q, k, layout):
    """GAPR's test, by loops over heads and blocks."""
    passes = torch.zeros(2, layout.blocks, layout.blocks, dtype=torch.bool)
    parts = [x[:, :, : layout.grid.tokens].split(layout.block, 2) for x in (q, k)]
    for h, n, m in itertools.product(range(2), range(layout.blocks), range(layout.blocks)):
        a, b = parts[0][n][0, h], parts[1][m][0, h]
        mean_a, mean_b = a.mean(0), b.mean(0)
        off_a, off_b = (a - mean_a).abs().mean(0), (b - mean_b).abs().mean(0)
        passes[h, n, m] = (mean_a @ mean_b).abs() > (off_a @ mean_b).abs() + (mean_a @ off_b).abs()
    return passes


@LAYOUTS
def test_gain_is_its_definition(layout):
    q, k, v = inputs(layout, mean=1.5)
    passes = gain(pool(q, k, v, layout, SparseConfig("rectify")))[0]
    assert torch.equal(passes, by_definition(q, k, layout)) and 0.1 < passes.double().mean() < 0.9


@pytest.mark.parametrize(("key", "passes"), [(1.0, False), (1.5, False)])
def test_an_equal_gain_does_not_pass(key, passes):
    q, k = torch.zeros(2, 1, 1, 2, 8, dtype=torch.float64)
    q[..., 0] = torch.tensor([0.0, 2.0])  # mean 1, mean absolute deviation 1
    k[..., 0] = key
    pooled = pool(q, k, k, Layout(TokenGrid(1, 1, 2), block=2), SparseConfig("rectify"))
    assert gain(pooled).item() is passes
    q[..., 0, 0] += 1e-9
    pooled = pool(q, k, k, Layout(TokenGrid(1, 1, 2), block=2), SparseConfig("rectify"))
    assert gain(pooled).item()


@LAYOUTS
@TEXTS
def test_rectify_is_its_definition(layout, text):
    """R = 1 - the mass of C, the dropped blocks that pass; what is added is their mass times their mean value."""
    q, k, v = inputs(layout, text, mean=1.5)
    routing, _, correction = rectified(q, k, v, layout)
    mass = routing.mass[..., : layout.blocks]
    chosen = ~routing.plan.mask() & by_definition(q, k, layout)
    assert chosen.any() and (~chosen & ~routing.plan.mask()).any()
    given = mass.masked_fill(~chosen, 0)
    # T1: nothing is lost, and the text is on the exact side.
    torch.testing.assert_close(correction.scale + given.sum(-1), torch.ones_like(correction.scale))
    means = torch.stack([x.mean(2) for x in v[:, :, : layout.grid.tokens].split(layout.block, 2)], 2)
    torch.testing.assert_close(unpack(correction.residual), given @ means)
    assert correction.tail is None


@LAYOUTS
@TEXTS
def test_critical_mass_is_that_of_the_routed_blocks_and_the_text(layout, text):
    q, k, v = inputs(layout, text, mean=1.5)
    routing, _, correction = rectified(q, k, v, layout, critical_mass=True)
    kept = routing.plan.mask()
    if text:
        kept = torch.nn.functional.pad(kept, (0, 1), value=True)
    torch.testing.assert_close(correction.scale, (routing.mass * kept).sum(-1))
    code = rectified(q, k, v, layout)[2]
    assert (correction.scale < code.scale).any() and torch.equal(correction.residual.codes, code.residual.codes)


@LAYOUTS
@TEXTS
@pytest.mark.parametrize("density", [0.01, 0.3, 0.7, 1.0])
def test_rectify_is_dense_where_queries_and_keys_are_flat(layout, text, density):
    """T3, the sharpest test of sections 2 and 3; at density 1 it is T2."""
    q, k, v = inputs(layout, text)
    q, k = flat(q, layout), flat(k, layout)
    routing, _, correction = rectified(q, k, v, layout, density)
    out, _ = block_attention(q, k, v, routing.plan, correction, block=layout.block, text=text)
    torch.testing.assert_close(out, dense_attention(q, k, v)[0], atol=1e-12, rtol=1e-12)


@LAYOUTS
@TEXTS
def test_rectify_at_full_density_is_dense(layout, text):
    q, k, v = inputs(layout, text, mean=1.0)
    routing, _, correction = rectified(q, k, v, layout, 1.0)
    assert (correction.scale == 1).all() and (correction.residual.codes == 0).all()
    out, _ = block_attention(q, k, v, routing.plan, correction, block=layout.block, text=text)
    torch.testing.assert_close(out, dense_attention(q, k, v)[0], atol=1e-12, rtol=1e-12)


def tail_of(q, k, v, layout, second_order, limit=math.inf):
    pooled = pool(q, k, v, layout, SparseConfig("tail", second_order=second_order))
    return Correction(tail=pooled_tail(pooled, q.dtype, second_order=second_order, limit=limit))


def some_plan(layout, density=0.3):
    mask = torch.rand(1, 2, layout.blocks, layout.blocks) < density
    return BlockPlan.from_mask(mask | torch.eye(layout.blocks, dtype=torch.bool))


@LAYOUTS
@TEXTS
@pytest.mark.parametrize("second_order", [False, True])
def test_the_tail_is_exact_where_keys_are_flat(layout, text, second_order):
    """Queries and values may be anything, and so may the keys of blocks that every query block computes exactly."""
    q, k, v = inputs(layout, text)
    exact = slice(2 * layout.block, 3 * layout.block)
    k = torch.cat([flat(k, layout)[:, :, : exact.start], k[:, :, exact], flat(k, layout)[:, :, exact.stop :]], 2)
    mask = some_plan(layout).mask()
    mask[..., 2] = True
    correction = tail_of(q, k, v, layout, second_order)
    out, _ = block_attention(q, k, v, BlockPlan.from_mask(mask), correction, block=layout.block, text=text)
    torch.testing.assert_close(out, dense_attention(q, k, v)[0], atol=1e-12, rtol=1e-12)


@LAYOUTS
@TEXTS
@pytest.mark.parametrize(("second_order", "limit"), [(False, math.inf), (True, math.inf), (True, 0.3)])
def test_the_tail_is_its_formula(layout, text, second_order, limit):
    """anchor.md's section 1, by loops over rows and dropped blocks, with the mean square of a block's queries."""
    q, k, v = inputs(layout, text)
    plan, tokens, a = some_plan(layout), layout.grid.tokens, 16**-0.5
    correction = tail_of(q, k, v, layout, second_order, limit)
    out, _ = block_attention(q, k, v, plan, correction, block=layout.block, text=text)
    for h, i in itertools.product(range(2), range(0, tokens, 11)):
        logits, values = [], []
        first = i // layout.block * layout.block
        squares = q[0, h, first : min(first + layout.block, tokens)].square().mean(0)
        for m in range(layout.blocks):
            at = slice(m * layout.block, min((m + 1) * layout.block, tokens))
            keys = k[0, h, at]
            if plan.mask()[0, h, i // layout.block, m]:
                logits += [a * (q[0, h, i] @ key) for key in keys]
                values += list(v[0, h, at])
                continue
            t = a * (q[0, h, i] @ keys.mean(0)) + torch.tensor(float(len(keys))).double().log()
            if second_order:
                t = t + min(0.5 * a**2 * (squares * keys.var(0, correction=0)).sum(), limit)
            logits.append(t)
            values.append(v[0, h, at].mean(0))
        logits += [a * (q[0, h, i] @ key) for key in k[0, h, tokens:]]
        values += list(v[0, h, tokens:])
        expected = torch.stack(logits).softmax(0) @ torch.stack(values)
        torch.testing.assert_close(out[0, h, i], expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tail_has_the_type_of_the_inputs_and_its_statistics_as_many_bits_at_least(dtype):
    for second_order in (False, True):
        tail = tail_of(*inputs(RAGGED).to(dtype), RAGGED, second_order).tail
        assert {tail.keys.dtype, tail.values.dtype} == {dtype}
        assert tail.log_weights.dtype == torch.float32 and tail.log_weights.shape == (RAGGED.blocks,)
        assert (tail.second is not None) == second_order
        if second_order:
            assert {tail.second.q_mean.dtype, tail.second.q_var.dtype, tail.second.variances.dtype} == {torch.float32}


@pytest.mark.parametrize("storage", ["bf16", "fp8", "int4"])
def test_an_anchor_learns_the_difference(storage):
    dense, part = inputs(RAGGED, batch=2)[:2]
    learned = learn_anchor(dense, part, storage)
    expected = pack(dense - part, storage)
    assert learned.kind == expected.kind and torch.equal(learned.codes, expected.codes)
    assert (learned.scales is None) == (storage == "bf16")
    if storage != "bf16":
        assert torch.equal(learned.scales, expected.scales)


class TestReTtentionsGoldenVectors:
    """2 heads of 8 tokens, each attending to itself and its neighbours; 4 channels, and 4 of zeros beside them."""

    band = (torch.arange(8)[:, None] - torch.arange(8)).abs() <= 1
    plan = BlockPlan.from_mask(band.expand(1, 2, 8, 8))
    options = dict(block=1, scale=0.5)

    def inputs(self):
        i = torch.arange(64, dtype=torch.float64)
        flat = (3 * torch.sin(0.7 * i + 0.1), torch.sin(1.3 * i + 0.2), torch.sin(0.37 * i + 0.3))
        assert [x.sum().item() for x in flat] == pytest.approx([0.550196, 0.346247, 2.072461], abs=1e-6)
        return [torch.nn.functional.pad(x.reshape(1, 2, 8, 4), (0, 4)) for x in flat]

    def refresh(self):
        q, k, v = self.inputs()
        out, lse = dense_attention(q, k, v, scale=0.5)
        sparse, sparse_lse = block_attention(q, k, v, self.plan, **self.options)
        return out, sparse, *learn_reshape(out, lse, sparse, sparse_lse, "bf16")

    def learned(self):
        """As a refresh leaves it, but for the storage: the residual is not rounded."""
        out, sparse, _, rho = self.refresh()
        return Learned(self.plan, Residual(out - rho[..., None] * sparse), rho, 10, self.plan.counts.sum())

    def step(self, n, grow=1.1, **options):
        q, k, v = self.inputs()
        options = dict(ramp=0.04, clamp=False, keep_mass=False) | options
        return block_attention(grow * q, k, v, self.plan, reshape(self.learned(), n, **options), **self.options)[0]

    def test_rho(self):
        rho = [
            [0.383619, 0.071712, 0.665418, 0.210801, 0.164967, 0.693217, 0.087331, 0.377750],
            [0.356014, 0.162356, 0.789015, 0.051818, 0.550009, 0.527731, 0.026435, 0.439417],
        ]
        torch.testing.assert_close(self.refresh()[3][0], torch.tensor(rho).double(), atol=6e-7, rtol=0)

    def test_rho_is_the_mass_inside_and_the_residual_what_is_outside(self):
        q, k, v = self.inputs()
        mass = (q @ k.mT / 2).softmax(-1)
        _, _, residual, rho = self.refresh()
        torch.testing.assert_close(rho, mass.masked_fill(~self.band, 0).sum(-1))
        outside = mass.masked_fill(self.band, 0) @ v
        torch.testing.assert_close(unpack(self.learned().residual), outside)
        torch.testing.assert_close(unpack(residual).double(), outside, atol=0, rtol=2**-8)

    def test_outputs_and_residual(self):
        out, sparse, residual, _ = self.refresh()
        for actual, expected in (
            (out, [0.032513, -0.092625, -0.205225, -0.290050]),
            (sparse, [0.836446, 0.792067, 0.640485, 0.402217]),
            (unpack(self.learned().residual), [-0.288364, -0.396476, -0.450927, -0.444348]),
        ):
            torch.testing.assert_close(actual[0, 0, 0, :4], torch.tensor(expected).double(), atol=6e-7, rtol=0)

    @pytest.mark.parametrize(
        ("n", "options", "expected"),
        [
            (1, {}, [0.038057, -0.090871, -0.207500, -0.296045]),
            (2, {}, [0.072093, -0.059005, -0.182118, -0.280582]),
            (3, {}, [0.106129, -0.027140, -0.156736, -0.265118]),
            (3, {"keep_mass": True}, [0.143556, 0.024319, -0.098210, -0.207446]),
        ],
    )
    def test_steps(self, n, options, expected):
        actual = self.step(n, **options)[0, 0, 0, :4]
        torch.testing.assert_close(actual, torch.tensor(expected).double(), atol=6e-7, rtol=0)

    @pytest.mark.parametrize("keep_mass", [False, True])
    def test_without_a_ramp_the_same_inputs_give_the_dense_output(self, keep_mass):
        for n in (1, 4):
            actual = self.step(n, grow=1.0, ramp=0.0, clamp=True, keep_mass=keep_mass)
            torch.testing.assert_close(actual, self.refresh()[0], atol=1e-13, rtol=1e-13)


def of_rho(rho, storage="bf16"):
    rho = torch.tensor([[rho]], dtype=torch.float64)
    return Learned(BlockPlan.full(1, 1, 1, 1, "cpu"), pack(torch.randn(1, 1, rho.shape[2], 16), storage), rho, 0, None)


def test_the_ramp_is_clamped_on_request_only():
    learned = of_rho([0.5, 0.95, 1.0, 1 + 1e-9])
    ramped = [reshape(learned, 4, ramp=0.04, clamp=clamp, keep_mass=False).scale[0, 0] for clamp in (False, True)]
    torch.testing.assert_close(ramped[0], learned.rho[0, 0] + 0.12)
    torch.testing.assert_close(ramped[1], torch.tensor([0.62, 1.0, 1.0, 1 + 1e-9]).double())
    assert reshape(learned, 4, ramp=0.04, clamp=True, keep_mass=False).residual is learned.residual


@pytest.mark.parametrize("storage", ["bf16", "fp8", "int4"])
@pytest.mark.parametrize("clamp", [False, True])
def test_keep_mass_weighs_the_residual(storage, clamp):
    learned = of_rho([0.1, 0.5, 0.95, 0.99], storage)
    correction = reshape(learned, 3, ramp=0.04, clamp=clamp, keep_mass=True)
    weight = (1 - correction.scale) / (1 - learned.rho)
    torch.testing.assert_close(
        unpack(correction.residual).double(), unpack(learned.residual).double() * weight[..., None]
    )


@pytest.mark.parametrize("rho", [1 - LEAST_REST / 2, 1.0, 1 + 1e-6])
@pytest.mark.parametrize("clamp", [False, True])
def test_keep_mass_leaves_a_residual_of_no_mass_as_it_is(rho, clamp):
    """What a full row lacks is rounding alone, and (1 - ramped) / (1 - rho) is anything."""
    learned = of_rho([rho])
    correction = reshape(learned, 4, ramp=0.04, clamp=clamp, keep_mass=True)
    assert torch.equal(unpack(correction.residual).double(), unpack(learned.residual).double())


def test_a_full_plan_has_rho_1_and_no_residual():
    q, k, v = inputs(RAGGED)
    plan = BlockPlan.full(1, 2, RAGGED.blocks, RAGGED.blocks, "cpu")
    out, lse = dense_attention(q, k, v)
    residual, rho = learn_reshape(out, lse, *block_attention(q, k, v, plan, block=16), "bf16")
    torch.testing.assert_close(rho, torch.ones_like(rho))
    assert unpack(residual).abs().max() < 1e-13


@LAYOUTS
def test_short_blocks_count_in_rho_as_what_they_are(layout):
    """Padding adds nothing to either log-sum-exp."""
    q, k, v = inputs(layout)
    plan = some_plan(layout)
    out, lse = dense_attention(q, k, v)
    residual, rho = learn_reshape(out, lse, *block_attention(q, k, v, plan, block=16), "bf16")
    tokens = layout.grid.tokens
    inside = plan.mask().repeat_interleave(16, 2).repeat_interleave(16, 3)[..., :tokens, :tokens]
    mass = (q @ k.mT / 4).softmax(-1)
    torch.testing.assert_close(rho, (mass * inside).sum(-1))
    torch.testing.assert_close(unpack(residual).double(), (mass * ~inside) @ v, atol=1e-12, rtol=2**-8)
