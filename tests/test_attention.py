"""The data path as a whole: what holds exactly, what is remembered, and what is counted."""

import pytest
import torch

from dit_sparse import attention, predict
from dit_sparse.attend_op import address, attend
from dit_sparse.attention import Call, sparse_attention
from dit_sparse.config import SparseConfig
from dit_sparse.correction import pooled_tail, rectify
from dit_sparse.kernels import reference
from dit_sparse.kernels.block_attention import block_attention
from dit_sparse.kernels.dense_attention import dense_attention
from dit_sparse.layout import Layout, TokenGrid
from dit_sparse.order import token_order
from dit_sparse.patterns import order_of, pattern_mask, pattern_plan, tile_of
from dit_sparse.plan import BlockPlan, Correction, Residual, SecondOrder, Tail
from dit_sparse.residual import pack, unpack
from dit_sparse.routing import Routing, pool, route
from dit_sparse.state import Generation, Layer
from tests.close import assert_no_worse

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
GRID = TokenGrid(3, 5, 7)  # 105 tokens: 6 blocks of 16 and one of 9
METHODS = ["none", "tail", "rectify", "reshape", "anchor"]
PATTERNED = ["svg", "sta", "radial", "ditfastattn"]


def inputs(text=0, batch=1, heads=2, dim=16, dtype=torch.float64):
    return torch.randn(3, batch, heads, GRID.tokens + text, dim, dtype=torch.float64).to(dtype)


def generation(config, layers=1, heads=2, dim=16):
    return Generation(config, [Layer(f"blocks.{i}.attn1", i, layers, heads, dim) for i in range(layers)])


def enter(g, step, branch="cond", batch=1, total=20, grid=GRID):
    g.enter(grid, batch=batch, device=CPU, timestep=1000.0 - step, step=step, branch=branch, total=total)


def run(g, step, q, k, v, layer=0, branch="cond", **options):
    """One forward of one layer."""
    enter(g, step, branch, len(q))
    out = sparse_attention(q, k, v, g.layers[layer], g, **options)
    g.leave()
    return out


def at(method, step=0, text=0, **options):
    """A generation that is sparse from the start."""
    return generation(SparseConfig(method, **(dict(dense_steps=0) | options)))


def learned(g, layer=0, branch="cond"):
    return g.learned[g.layers[layer].name, branch]


def flat(x, order):
    """In routing order, the first token of each block of 16 in place of all of its tokens; text as it is."""
    first = order.take[torch.arange(GRID.tokens) // 16 * 16][order.place]
    return torch.cat([x[:, :, first], x[:, :, GRID.tokens :]], 2)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


# --- what is exact ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [0, 9])
@pytest.mark.parametrize("order", ["hilbert", "tile", "raster", "pixel"])
@pytest.mark.parametrize("method", METHODS)
def test_keeping_every_block_is_dense(method, order, text):
    g = at(method, density=1.0, order=order)
    for step in range(3):
        q, k, v = inputs(text)
        # What little an anchor has to remember was rounding on the inputs of its own step.
        close(run(g, step, q, k, v), dense_attention(q, k, v)[0])
    assert g.tally.density() == 1


@pytest.mark.parametrize("text", [0, 9])
@pytest.mark.parametrize("order", ["hilbert", "raster"])
@pytest.mark.parametrize("method", ["none", "tail", "reshape", "anchor"])
def test_keeping_every_smaller_block_of_keys_is_dense(method, order, text):
    g = at(method, density=1.0, order=order, block=64, key_block=16)
    for step in range(3):
        q, k, v = inputs(text, batch=2)
        close(run(g, step, q, k, v), dense_attention(q, k, v)[0])
    assert g.tally.density() == 1


@pytest.mark.parametrize("text", [0, 9])
@pytest.mark.parametrize("method", ["none", "tail"])
def test_smaller_blocks_of_keys_are_the_formula(method, text):
    """Pooled, chosen and put in place of by themselves, for blocks of 32 queries."""
    g = at(method, density=0.3, order="raster", block=32, key_block=16)
    q, k, v = inputs(text, batch=2)
    out = run(g, 0, q, k, v)
    layout = Layout(GRID, text, 32, 16)
    plan = Call(q, k, v, layout, g.config, None, True).route(0.3).plan
    assert plan.counts.shape == (2, 2, 4) and plan.key_blocks == 7
    of_q = reference.block_stats(q[:, :, : GRID.tokens], layout.lengths(CPU), 32)
    of_k, of_v = (reference.block_stats(x[:, :, : GRID.tokens], layout.key_lengths(CPU), 16) for x in (k, v))
    lengths, correction = layout.key_lengths(CPU), None
    if method == "tail":
        second = SecondOrder(of_q.mean, of_q.var, of_k.var, limit=2.0)
        correction = Correction(tail=Tail(of_k.mean, of_v.mean, lengths.double().log(), second))
    expected, _ = reference.block_attention(q, k, v, plan, correction, block=32, key_block=16, scale=0.25, text=text)
    close(out, expected)
    # As much work as the plan has keys for each row, and pooled ones.
    pairs = plan.counts.sum().item() * 32 * 16 + 4 * (GRID.tokens * 7 if method == "tail" else 0)
    pairs += 4 * (text * (GRID.tokens + text) + GRID.tokens * text)
    assert g.tally.work() == pytest.approx(pairs / (4 * (GRID.tokens + text) ** 2))


def test_blocks_of_keys_as_large_as_those_of_queries_change_nothing():
    (q, k, v), outs = inputs(9), []
    for options in ({}, {"key_block": 16}):
        g = at("anchor", density=0.3, block=16, **options)
        outs.append(torch.stack([run(g, step, q + step, k, v) for step in range(3)]))
    assert torch.equal(*outs)


@pytest.mark.parametrize("text", [0, 9])
@pytest.mark.parametrize("method", ["topp", *PATTERNED])
def test_keeping_every_block_is_dense_for_methods_of_others(method, text):
    g = at(method, density=1.0)
    for step in range(4):
        q, k, v = inputs(text, batch=2, heads=3)
        close(run(g, step, q, k, v), dense_attention(q, k, v)[0])
    assert g.tally.density() == 1


@pytest.mark.parametrize("method", ["tail", "svg"])
def test_the_kernel_that_ran_is_known(method, monkeypatch):
    g, (q, k, v) = at(method, density=0.3), inputs()
    assert g.kernel == ""
    for step in (0, 1):
        run(g, step, q, k, v)
    assert g.kernel == "torch"
    monkeypatch.setattr(attention, "chosen_impl", lambda *_, **__: "gluon")
    run(g, 2, q, k, v)
    assert g.kernel == "gluon"


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("method", ["tail", "topp", *PATTERNED])
def test_text_before_vision_is_text_behind_it(method, density):
    q, k, v = inputs(text=9)
    before = tuple(x.roll(9, 2) for x in (q, k, v))
    behind, ahead = (generation(SparseConfig(method, density=density, dense_steps=0)) for _ in range(2))
    for step in (0, 1):
        expected = run(behind, step, q, k, v)
        # Where the text lies is told anew at each forward.
        enter(ahead, step)
        ahead.text = (9, 0)
        close(sparse_attention(*before, ahead.layers[0], ahead), expected.roll(9, 2))


@pytest.mark.parametrize("text", [0, 9])
@pytest.mark.parametrize("method", ["sta", "radial"])
def test_a_pattern_is_attention_under_its_mask(method, text):
    g = at(method, density=0.4, first_frame=method == "radial")
    q, k, v = inputs(text)
    out = run(g, 0, q, k, v)
    place = token_order(order_of(method), GRID, tile_of(GRID, 16), CPU).place
    mask = pattern_mask(method, GRID, 16, 0.4, method == "radial")[place // 16][:, place // 16]
    allowed = torch.ones(GRID.tokens + text, GRID.tokens + text, dtype=torch.bool)
    allowed[: GRID.tokens, : GRID.tokens] = mask
    assert not allowed.all()
    close(out, ((q @ k.mT * 0.25).masked_fill(~allowed, float("-inf")).softmax(-1) @ v))


def one_sided(kind: str) -> tuple[torch.Tensor, ...]:
    """q, k, v of one head that looks at its own frame, or at its own place in all frames."""
    frame, row, column = (x.flatten() for x in torch.meshgrid(*map(torch.arange, (3, 5, 7)), indexing="ij"))
    group = frame if kind == "spatial" else row * 7 + column
    codes = torch.nn.functional.one_hot(group, 40).double()
    return 30 * codes[None, None], codes[None, None], torch.randn(1, 1, GRID.tokens, 40, dtype=torch.float64)


def test_svg_gives_each_head_the_pattern_that_fits_it():
    heads = [one_sided(kind) for kind in ("temporal", "spatial", "temporal")]
    q, k, v = (torch.cat(x, 1) for x in zip(*heads, strict=True))
    g = at("svg", density=0.5)
    enter(g, 0)
    dense = dense_attention(q, k, v)[0]
    close(run(g, 0, q, k, v), dense)
    assert learned(g).heads == ((1,), (0, 2)) and g.tally.work() == 1
    out = run(g, 1, q, k, v)
    for head, kind in enumerate(("temporal", "spatial", "temporal")):
        place = token_order(order_of(kind), GRID, tile_of(GRID, 16), CPU).place
        mask = pattern_mask(kind, GRID, 16, 0.5)[place // 16][:, place // 16]
        logits = (q[:, head] @ k[:, head].mT * 40**-0.5).masked_fill(~mask, float("-inf"))
        close(out[:, head], logits.softmax(-1) @ v[:, head])
    # It looks once: no later step is an anchor.
    for step in range(2, 9):
        run(g, step, q, k, v)
    assert [phases.most_common(1)[0][0] for phases in g.tally.phases.values()] == ["anchor", *["sparse"] * 8]


@pytest.mark.parametrize("before", [0, 4])
def test_svg_tells_heads_apart_by_what_no_mask_hides(before):
    heads = [one_sided(kind) for kind in ("temporal", "spatial", "temporal")]
    q, k, v = (torch.cat(x, 1) for x in zip(*heads, strict=True))
    # Loud enough that every row would go by them alone, whatever its pattern.
    text = [1e4 * torch.randn(1, 3, 70, x.shape[-1], dtype=x.dtype) for x in (q, k, v)]
    mask = torch.zeros(1, 70, dtype=torch.bool)
    g = at("svg", density=0.5)
    enter(g, 0)
    g.text = before, None
    q, k, v = (
        torch.cat([x[:, :, :before], vision, x[:, :, before:]], 2) for x, vision in zip(text, (q, k, v), strict=True)
    )
    sparse_attention(q, k, v, g.layers[0], g, text_mask=mask)
    assert learned(g).heads == ((1,), (0, 2))


def test_ditfastattn_adds_what_its_window_lacked_at_the_dense_step():
    g = at("ditfastattn", density=0.5, refresh_every=3)
    q, k, v = inputs()
    dense = dense_attention(q, k, v)[0]
    close(run(g, 0, q, k, v), dense)
    plan = pattern_plan("ditfastattn", GRID, 16, 0.5, False, (1, 2), CPU)
    other = inputs()
    lacked = unpack(pack(dense - block_attention(q, k, v, plan, block=16)[0], "bf16")).double()
    close(run(g, 1, q, k, v), block_attention(q, k, v, plan, block=16)[0] + lacked)
    close(run(g, 2, *other), block_attention(*other, plan, block=16)[0] + lacked)
    close(run(g, 3, *other), dense_attention(*other)[0])
    assert [phases.most_common(1)[0][0] for phases in g.tally.phases.values()] == [
        "anchor", "sparse", "sparse", "anchor",
    ]  # fmt: skip


def test_topp_shares_the_blocks_out_by_mass():
    """One head looks at a single block, one at all alike: the second gets the blocks that the first has no use for."""
    q, k, v = inputs()
    k[:, 1] *= 1e-3
    q[:, 0] *= 100
    g = at("topp", density=0.4, order="raster")
    enter(g, 0)
    call = Call(q, k, v, Layout(GRID, block=16), g.config, None, routes=True)
    plan = call.plan(0.4)
    plan.check()
    by_head = plan.counts.double().mean((0, 2)) / 7
    assert by_head[0] < 0.3 < 0.5 < by_head[1]
    assert plan.counts.sum() == int(0.4 * 98)
    mass = call.route(0.4).mass
    # Within a row the blocks kept are the heaviest, but for the row's own.
    off = ~torch.eye(7, dtype=torch.bool)
    lightest = mass.masked_fill(~plan.mask() | ~off, 2).amin(-1)
    heaviest = mass.masked_fill(plan.mask(), -1).amax(-1)
    assert (lightest >= heaviest - 1e-12).all()


@pytest.mark.parametrize("method", ["topp", *PATTERNED])
def test_work_of_methods_of_others_is_what_plan_predicts(method):
    shape = predict.ModelShape(TokenGrid(4, 8, 8), heads=2, head_dim=16, layers=1, ffn_dim=8, text_tokens=0)
    config = SparseConfig(method, density=0.3, dense_steps=2)
    g = generation(config)
    for step in range(10):
        q, k, v = torch.randn(3, 1, 2, 256, 16, dtype=torch.float64)
        enter(g, step, total=10, grid=shape.grid)
        sparse_attention(q, k, v, g.layers[0], g)
        g.leave()
    expected = sum(predict.attention_work(shape, config, 10))
    # Over two heads what is shared out rounds otherwise.
    assert g.tally.work() == pytest.approx(expected, abs=2e-3 if method == "topp" else 1e-9)


@pytest.mark.parametrize("text", [0, 9])
@pytest.mark.parametrize("order", ["hilbert", "tile", "raster", "pixel"])
@pytest.mark.parametrize("density", [0.01, 0.3, 0.7])
def test_rectify_is_dense_where_queries_and_keys_are_flat(order, density, text):
    g = at("rectify", density=density, order=order)
    q, k, v = inputs(text)
    q, k = (flat(x, token_order(order, GRID, g.config.tile, CPU)) for x in (q, k))
    close(run(g, 0, q, k, v), dense_attention(q, k, v)[0])
    assert g.tally.density() < 1


@pytest.mark.parametrize("text", [0, 9])
@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("method", ["tail", "anchor"])
def test_a_tail_is_dense_where_keys_are_flat(method, second_order, text):
    g = at(method, second_order=second_order, routing="mass")
    for step in range(3):
        q, k, v = inputs(text)
        k = flat(k, token_order("hilbert", GRID, g.config.tile, CPU))
        close(run(g, step, q, k, v), dense_attention(q, k, v)[0])
    assert g.tally.density() < 1


@pytest.mark.parametrize("grid", [GRID, TokenGrid(1, 1, 5), TokenGrid(2, 4, 16)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_values_of_one_give_one(method, grid):
    g = at(method, density=0.3)
    for step in range(3):
        q, k = torch.randn(2, 1, 2, grid.tokens, 16, dtype=torch.float64)
        enter(g, step, grid=grid)
        out = sparse_attention(q, k, torch.ones_like(q), g.layers[0], g)
        if method == "reshape" and step:  # its rows sum to 1 only on the inputs of the refresh
            continue
        torch.testing.assert_close(out, torch.ones_like(out), atol=1e-12, rtol=0)


@pytest.mark.parametrize("text", [0, 9])
@pytest.mark.parametrize("method", METHODS)
def test_an_order_is_a_permutation_beforehand(method, text):
    take = token_order("hilbert", GRID, (4, 4, 8), CPU).take
    take = torch.cat([take, torch.arange(GRID.tokens, GRID.tokens + text)])
    ordered, plain = (at(method, density=0.3, order=order) for order in ("hilbert", "raster"))
    for step in range(2):
        q, k, v = inputs(text)
        expected = run(plain, step, *(x[:, :, take] for x in (q, k, v)))
        close(run(ordered, step, q, k, v)[:, :, take], expected)


def test_dense_is_dense():
    g = generation(SparseConfig("dense"))
    q, k, v = inputs(9)
    assert torch.equal(run(g, 5, q, k, v), dense_attention(q, k, v)[0])


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*METHODS, "dense"])
def test_masked_text_has_no_influence_and_text_rows_are_dense(method):
    extra = {"ramp": 0.04, "clamp": False} if method == "reshape" else {}
    mask = torch.tensor([[True] * 6 + [False] * 3, [True, False] * 4 + [True]])
    key_mask = torch.cat([torch.ones(2, GRID.tokens, dtype=torch.bool), mask], 1)
    one, other = (at(method, **({} if method == "dense" else {"density": 0.3}), **extra) for _ in range(2))
    for step in range(4):
        q, k, v = inputs(9, batch=2)
        out = run(one, step, q, k, v, text_mask=mask)
        hidden = ~key_mask[:, None, :, None].expand_as(k)
        changed = run(other, step, q, k.masked_fill(hidden, 1e3), v.masked_fill(hidden, -1e3), text_mask=mask)
        assert torch.equal(out, changed)
        close(out[:, :, GRID.tokens :], dense_attention(q, k, v, key_mask=key_mask)[0][:, :, GRID.tokens :])


@pytest.mark.parametrize("method", METHODS)
def test_a_mask_that_hides_nothing_changes_nothing(method):
    with_mask, without = (at(method, density=0.3) for _ in range(2))
    for step in range(2):
        q, k, v = inputs(9)
        masked = run(with_mask, step, q, k, v, text_mask=torch.ones(1, 9, dtype=torch.bool))
        close(masked, run(without, step, q, k, v))


def test_outside_of_a_generation_attention_is_dense_and_masked():
    g = at("anchor")
    q, k, v = inputs(9)
    mask = torch.tensor([[True] * 4 + [False] * 5])
    key_mask = torch.cat([torch.ones(1, GRID.tokens, dtype=torch.bool), mask], 1)
    expected = dense_attention(q, k, v, key_mask=key_mask)[0]
    assert torch.equal(sparse_attention(q, k, v, g.layers[0], g, text_mask=mask), expected)
    # The grid of a generation that ended says nothing about other inputs.
    run(g, 0, q, k, v)
    g.reset()
    assert torch.equal(sparse_attention(q, k, v, g.layers[0], g, text_mask=mask), expected)


# --- anchors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["bf16", "fp8", "int4"])
@pytest.mark.parametrize("method", ["anchor", "reshape"])
def test_the_inputs_of_an_anchor_give_its_output_up_to_storage(method, storage):
    g, q, k, v = at(method, density=0.3, residual=storage), *inputs(9)
    dense = dense_attention(q, k, v)[0]
    close(run(g, 0, q, k, v), dense)
    error = run(g, 1, q, k, v) - dense
    # The same routed alone, without what was learned: what is missing is what was stored.
    alone = run(at("tail" if method == "anchor" else "none", density=0.3, routing="fine"), 0, q, k, v)
    if method == "reshape":
        alone[:, :, : GRID.tokens] *= learned(g).rho[:, :, token_order("hilbert", GRID, (4, 4, 8), CPU).place, None]
    lacking = (dense - alone)[:, :, : GRID.tokens]
    close(error[:, :, : GRID.tokens], unpack(pack(lacking, storage)).double() - lacking)
    close(error[:, :, GRID.tokens :], torch.zeros_like(error[:, :, GRID.tokens :]))


@pytest.mark.parametrize("text", [0, 9])
def test_between_anchors_plan_and_residual_stay_and_the_rest_is_fresh(text):
    g = at("anchor", density=0.3, order="raster", refresh_every=3)
    run(g, 0, *inputs(text))
    kept = learned(g)
    for step in (1, 2):
        q, k, v = inputs(text)
        out = run(g, step, q, k, v)
        assert learned(g) is kept
        pooled = pool(q, k, v, Layout(GRID, text, 16), g.config)
        correction = Correction(
            tail=pooled_tail(pooled, q.dtype, second_order=True, limit=2.0), residual=kept.residual
        )
        close(out, block_attention(q, k, v, kept.plan, correction, block=16, text=text)[0])
    q, k, v = inputs(text)
    close(run(g, 3, q, k, v), dense_attention(q, k, v)[0])
    assert learned(g) is not kept and learned(g).step == 3


def test_between_anchors_queries_are_pooled_for_the_second_order_only(monkeypatch):
    """Nothing is routed there, and pooling reads all of q."""
    given = []

    def pooled(*args, **options):
        found = pool(*args, **options)
        given.append(found.q is not None)
        return found

    monkeypatch.setattr(attention, "pool", pooled)
    g = at("anchor", refresh_every=3)
    for step in range(3):
        run(g, step, *inputs())
    assert given == [True, True, True]
    given.clear()
    g = at("anchor", refresh_every=3, second_order=False)
    for step in range(5):
        run(g, step, *inputs())
    assert given == [True, False, False, True, False]
    g = at("reshape")
    for step in range(3):
        run(g, step, *inputs())
    assert given[5:] == [True]


def test_reshape_ramps_from_the_second_step_after_its_refresh():
    g = at("reshape", density=0.3, ramp=0.04, clamp=False, order="raster")
    q, k, v = inputs()
    run(g, 0, q, k, v)
    routed, _ = block_attention(q, k, v, learned(g).plan, block=16)
    first = run(g, 1, q, k, v)
    for step in (2, 3, 4):
        close(run(g, step, q, k, v) - first, 0.04 * (step - 1) * routed)
    assert [record.phase for record in g.tally.steps()] == ["anchor"] + ["sparse"] * 4


def test_a_second_call_in_the_forward_of_the_anchor_uses_what_it_learned():
    """As under gradient checkpointing."""
    for method in ("anchor", "reshape"):
        g = at(method, density=0.3, **({"ramp": 0.04} if method == "reshape" else {}))
        q, k, v = inputs()
        dense = run(g, 0, q, k, v)
        kept = learned(g)
        again = sparse_attention(q, k, v, g.layers[0], g)
        assert learned(g) is kept
        torch.testing.assert_close(again, dense, atol=0.01, rtol=0)


def test_soft_anchors():
    g = at("anchor", density=0.2, anchor_density=0.6, refresh_every=2)
    q, k, v = inputs(9)
    close(run(g, 0, q, k, v), dense_attention(q, k, v)[0])
    run(g, 1, *inputs(9))
    q, k, v = inputs(9)
    soft, part = (run(at("tail", density=density, routing="fine"), 0, q, k, v) for density in (0.6, 0.2))
    close(run(g, 2, q, k, v), soft)
    place = token_order("hilbert", GRID, (4, 4, 8), CPU).take
    expected = pack((soft - part)[:, :, : GRID.tokens][:, :, place], "bf16")
    torch.testing.assert_close(learned(g).residual.codes, expected.codes, atol=1e-12, rtol=2**-7)
    assert learned(g).step == 2


@pytest.fixture
def visited_once(monkeypatch):
    """As where block attention is as fast as dense attention; the kernels are those of the CPU."""
    monkeypatch.setattr(Call, "visits_once", lambda self, plan: True)


@pytest.mark.parametrize(
    "options", [{}, {"anchor_density": 0.6}, {"block": 32, "key_block": 16}, {"density": 1.0}], ids=str
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("text", [0, 9])
@pytest.mark.parametrize("method", ["anchor", "reshape", "ditfastattn"])
def test_an_anchor_that_visits_each_pair_once_is_the_same(method, text, masked, options, monkeypatch):
    others = {"reshape": {"anchor_density"}, "ditfastattn": {"anchor_density", "key_block"}}
    if (masked and not text) or others.get(method, set()) & set(options):
        pytest.skip("there is nothing of that kind")
    options = {"density": 0.3, "refresh_every": 2} | options
    # Branches so different that the blocks of the first are not among those of the second's denser plan.
    calls = [(step, branch, inputs(text, batch=2)) for step in range(4) for branch in ("cond", "uncond")]
    mask = torch.arange(9) < torch.tensor([[3], [9]]) if masked else None
    twice, once = at(method, **options), at(method, **options)
    before = [run(twice, step, *qkv, branch=branch, text_mask=mask) for step, branch, qkv in calls]
    monkeypatch.setattr(Call, "visits_once", lambda self, plan: True)
    for (step, branch, qkv), wanted in zip(calls, before, strict=True):
        out = run(once, step, *qkv, branch=branch, text_mask=mask)
        # What is between is off by the rounding of what was stored.
        torch.testing.assert_close(out, wanted, atol=1e-12 if step % 2 == 0 else 1e-3, rtol=1e-12)
    for branch in ("cond", "uncond"):
        one, other = learned(once, branch=branch), learned(twice, branch=branch)
        torch.testing.assert_close(unpack(one.residual), unpack(other.residual), atol=1e-12, rtol=2**-7)
        if method == "reshape":
            close(one.rho, other.rho)


def test_a_soft_anchor_has_the_blocks_of_either_plan(visited_once, monkeypatch):
    """Nothing says that a denser plan has all of the blocks of another."""
    plans = {
        0.2: BlockPlan.from_mask(torch.eye(7, dtype=torch.bool).expand(1, 2, 7, 7)),
        0.6: BlockPlan.from_mask(torch.eye(7, dtype=torch.bool).roll(1, 1).expand(1, 2, 7, 7)),
    }
    monkeypatch.setattr(Call, "route", lambda self, density: Routing(plans[density], lambda: None))
    g = at("anchor", density=0.2, anchor_density=0.6, refresh_every=1, order="raster")
    run(g, 0, *inputs(9))
    q, k, v = inputs(9)
    out = run(g, 1, q, k, v)
    pooled = pool(q, k, v, Layout(GRID, 9, 16), g.config)
    tail = pooled_tail(pooled, q.dtype, second_order=True, limit=2.0)
    both = BlockPlan.from_mask(plans[0.2].mask() | plans[0.6].mask())
    close(out, block_attention(q, k, v, both, Correction(tail=tail), block=16, text=9)[0])
    lacking = (out - block_attention(q, k, v, plans[0.2], Correction(tail=tail), block=16, text=9)[0])[:, :, :105]
    torch.testing.assert_close(learned(g).residual.codes, lacking.bfloat16(), atol=1e-12, rtol=2**-7)


def test_staggered_anchors():
    g = generation(SparseConfig("anchor", dense_steps=2, stagger=True, refresh_every=3), layers=4)
    told = []
    for step in range(9):
        enter(g, step)
        for layer in g.layers:
            sparse_attention(*inputs(), layer, g)
        told.append([learned(g, i).step == step if step > 1 else None for i in range(4)])
    assert told[2] == [True] * 4
    rows = [[i for i, anchor in enumerate(row) if anchor] for row in told[3:]]
    assert rows == [[2], [1], [0, 3], [2], [1], [0, 3]]


@pytest.mark.parametrize("method", ["anchor", "reshape"])
def test_an_anchor_that_a_cache_skipped_is_made_up_for(method):
    g = at(method, density=0.3, refresh_every=4)
    phases = []
    for step in (0, 1, 2, 3, 6, 7, 8, 9, 12):
        q, k, v = inputs()
        out = run(g, step, q, k, v)
        if learned(g).step == step:
            phases.append(step)
            close(out, dense_attention(q, k, v)[0])
    # 4 was skipped: 6 makes up for it. 8 is the schedule's own again, and 12 too.
    assert phases == [0, 6, 8, 12]


def test_a_layer_that_remembers_nothing_anchors():
    """The second of two transformers, or a session that begins half-way."""
    g = generation(SparseConfig("anchor", dense_steps=1), layers=2)
    run(g, 1, *inputs(), layer=0)
    q, k, v = inputs()
    close(run(g, 3, q, k, v, layer=1), dense_attention(q, k, v)[0])
    assert g.tally.steps()[-1].phase == "anchor" and learned(g, layer=1).step == 3


def test_dense_layers_remember_nothing():
    g = generation(SparseConfig("anchor", dense_steps=0, dense_layers="1-1"), layers=2)
    q, k, v = inputs()
    enter(g, 0)
    for layer in g.layers:
        sparse_attention(q, k, v, layer, g)
    assert list(g.learned) == [("blocks.0.attn1", "cond")]


@pytest.mark.parametrize("before", [0, 4, 9])
def test_a_dense_step_has_a_mask_of_the_last_keys_wherever_text_stands(before, monkeypatch):
    """These are what the block kernel is fast with; a dense kernel that the user chose gets the tokens as they are."""
    g, widths, told = at("tail", dense_steps=1), [], []

    def spy(*given, key_mask):
        widths.append(key_mask.shape[1])
        return dense_attention(*given, key_mask=key_mask)

    monkeypatch.setattr(attention, "dense_attention", spy)
    g.dense = lambda *given: told.append(given)
    mask = torch.tensor([[True] * 3 + [False] * 6, [False, True, True] * 3])
    key_mask = torch.cat([mask[:, :before], torch.ones(2, GRID.tokens, dtype=torch.bool), mask[:, before:]], 1)
    q, k, v = inputs(9, batch=2)
    enter(g, 0, batch=2)
    g.text = before, None
    out = sparse_attention(q, k, v, g.layers[0], g, text_mask=mask)
    close(out, dense_attention(q, k, v, key_mask=key_mask)[0])
    assert widths == [9]
    [(_, *given, given_mask)] = told
    assert all(x is y for x, y in zip(given, (q, k, v), strict=True)) and torch.equal(given_mask, key_mask)


# --- rows of a batch, branches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_rows(method):
    mask = torch.tensor([[True] * 9, [True] * 4 + [False] * 5])
    both, *ones = (at(method, density=0.3) for _ in range(3))
    for step in range(3):
        q, k, v = inputs(9, batch=2)
        out = run(both, step, q, k, v, text_mask=mask)
        for b, one in enumerate(ones):
            row = slice(b, b + 1)
            close(out[row], run(one, step, q[row], k[row], v[row], text_mask=mask[row]))


@pytest.mark.parametrize("method", ["anchor", "reshape"])
def test_branches_do_not_mix(method):
    both, *alone = (at(method, density=0.3, share_plan=False) for _ in range(3))
    for step in range(3):
        for branch, one in zip(("cond", "uncond"), alone, strict=True):
            q, k, v = inputs()
            assert torch.equal(run(both, step, q, k, v, branch=branch), run(one, step, q, k, v, branch=branch))


@pytest.mark.parametrize("method", METHODS)
def test_two_generations_are_the_same(method):
    g, steps = at(method, density=0.3), [inputs() for _ in range(3)]
    first = [run(g, step, *x) for step, x in enumerate(steps)]
    second = [run(g, step, *x) for step, x in enumerate(steps)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [0, 1])
def test_strict_names_the_layer_of_a_nan(which, bad, step):
    g = generation(SparseConfig("anchor", strict=True, dense_steps=1))
    qkv = inputs()
    qkv[which, 0, 1, 50, 3] = bad
    with pytest.raises(ValueError, match=f"{'qkv'[which]} of blocks.0.attn1 holds NaN or Inf"):
        run(g, step, *qkv)


def test_without_strict_a_nan_stays_one():
    qkv = inputs()
    qkv[2, 0, 1] = float("nan")
    out = run(at("tail"), 0, *qkv)
    assert out[:, 1].isnan().all() and out[:, 0].isfinite().all()


def test_inputs_that_do_not_fit_the_grid():
    g = at("anchor")
    q, k, v = inputs()
    with pytest.raises(ValueError, match="blocks.0.attn1 was given 100 tokens, but its grid has 105"):
        run(g, 0, q[:, :, :100], k[:, :, :100], v[:, :, :100])
    q, k, v = inputs(9)
    with pytest.raises(ValueError, match="was given 114 tokens, but its grid has 105 and 8 of text"):
        run(g, 0, q, k, v, text_mask=torch.ones(1, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="text_mask must be bool"):
        run(g, 0, q, k, v, text_mask=torch.ones(1, 9))


# --- guidance --------------------------------------------------------------------------------------------------------


def both_branches(g, step, first=None, second=None, layer=0, names=("cond", "uncond")):
    """The outputs of two forwards, with other inputs."""
    return [
        run(g, step, *(inputs() if x is None else x), layer=layer, branch=name)
        for x, name in zip((first, second), names, strict=True)
    ]


@pytest.mark.parametrize("names", [("cond", "uncond"), ("uncond", "cond"), ("branch 0", "branch 1")], ids=str)
@pytest.mark.parametrize("method", ["anchor", "reshape"])
def test_the_second_branch_keeps_the_blocks_of_the_first_one(method, names):
    shared, own = at(method, density=0.2, refresh_every=2), at(method, density=0.2, refresh_every=2, share_plan=False)
    steps = [(inputs(), inputs()) for _ in range(4)]
    for step, qkvs in enumerate(steps):
        outs = [both_branches(g, step, *qkvs, names=names) for g in (shared, own)]
        plans = [[learned(g, branch=name).plan for name in names] for g in (shared, own)]
        assert torch.equal(plans[0][0].indices, plans[1][0].indices) and torch.equal(*(x[0] for x in outs))
        assert plans[0][0] is plans[0][1] and not torch.equal(plans[1][0].indices, plans[1][1].indices)
        if step % 2 == 0:
            close(outs[0][1], outs[1][1])
    # Its residual is what its own output lacks with that plan.
    q, k, v = steps[2][1]
    place = token_order("hilbert", GRID, (4, 4, 8), CPU).take
    q, k, v = (x[:, :, place] for x in (q, k, v))
    correction = Correction()
    if method == "anchor":
        tail = pooled_tail(pool(q, k, v, Layout(GRID, 0, 16), shared.config), q.dtype, second_order=True, limit=2.0)
        correction = Correction(tail=tail)
    found = learned(shared, branch=names[1])
    alone, lse = block_attention(q, k, v, found.plan, correction, block=16)
    dense, whole = dense_attention(q, k, v)
    if method == "reshape":
        alone = alone * (lse - whole).exp()[..., None]
    torch.testing.assert_close(
        unpack(found.residual).double(), unpack(pack(dense - alone, "bf16")).double(), atol=1e-12, rtol=2**-7
    )


def test_branches_share_no_plan_that_is_old_or_of_others():
    # A cache skipped the conditional branch where the other learned.
    g = at("anchor", density=0.2, refresh_every=2)
    both_branches(g, 0)
    assert learned(g, branch="uncond").plan is learned(g, branch="cond").plan
    run(g, 2, *inputs(), branch="uncond")
    assert learned(g, branch="uncond").plan is not learned(g, branch="cond").plan
    run(g, 2, *inputs(), branch="cond")
    assert learned(g, branch="uncond").plan is learned(g, branch="cond").plan
    # Of another number of prompts.
    g = at("anchor", density=0.2, refresh_every=2)
    g.enter(GRID, batch=2, device=CPU, timestep=1.0, step=0, branch="cond", total=20, run=g)
    sparse_attention(*inputs(batch=2), g.layers[0], g)
    g.enter(GRID, batch=1, device=CPU, timestep=1.0, step=0, branch="uncond", total=20, run=g)
    sparse_attention(*inputs(), g.layers[0], g)
    assert len(learned(g, branch="uncond").plan.counts) == 1 and len(learned(g, branch="cond").plan.counts) == 2
    # Of this branch itself, where it learns twice at one step.
    g = at("anchor", density=0.2)
    run(g, 0, *inputs())
    first = learned(g)
    g.learned.clear()
    g.record(g.layers[0], first)
    assert g.plan_at_step(g.layers[0], g.config) is None
    # By another config, as branches of a profile may have it.
    g.enter(GRID, batch=1, device=CPU, timestep=1000.0, step=0, branch="uncond", total=20)
    assert g.plan_at_step(g.layers[0], g.config) is first.plan
    assert g.plan_at_step(g.layers[0], SparseConfig("anchor", density=0.3, dense_steps=0)) is None
    # Of another layer.
    g = generation(SparseConfig("anchor", density=0.2, dense_steps=0), layers=2)
    run(g, 0, *inputs())
    run(g, 0, *inputs(), layer=1, branch="uncond")
    assert learned(g, layer=1, branch="uncond").plan is not learned(g).plan
    # A pattern is the same everywhere, and no plan is taken from elsewhere.
    g = at("ditfastattn", density=0.3)
    both_branches(g, 0)


# --- what is counted -------------------------------------------------------------------------------------------------


def test_work_and_density_are_what_was_computed():
    config = SparseConfig(
        "anchor", density=0.3, anchor_density=0.6, refresh_every=2, dense_steps=1, dense_layers=1, order="raster"
    )
    g, text, blocks = generation(config, layers=2), 5, 7
    steps = [inputs(text) for _ in range(4)]
    plans = []
    for step, (q, k, v) in enumerate(steps):
        enter(g, step)
        for layer in g.layers:
            sparse_attention(q, k, v, layer, g)
        if step:
            plans.append(learned(g, layer=1).plan.counts.sum().item())
    call = Call(*steps[3], Layout(GRID, text, 16), config, None, True)
    denser = call.route(0.6).plan.counts.sum().item()
    heads, tokens = 2, 105 + text
    whole = heads * tokens**2
    # A sparse pass visits whole blocks, all text from everywhere, and a pooled key a block for each vision row.
    besides = heads * (text * tokens + 105 * text + 105 * blocks)
    sparse = [plan * 16**2 + besides for plan in (*plans, denser)]
    dense_layer, other = 4 * whole, whole + (whole + sparse[0]) + sparse[1] + (sparse[2] + sparse[3])
    assert g.tally.work() == pytest.approx((dense_layer + other) / (8 * whole), rel=1e-12)
    assert g.tally.density() == pytest.approx(sum(plans) / (3 * heads * blocks**2), rel=1e-12)
    assert plans[0] == plans[1] and denser > plans[2]
    phases = [{phase: pairs / whole for phase, pairs in g.tally.phases[step].items()} for step in range(4)]
    assert phases == [{"dense": 2}] + [{"dense": 1, "anchor": 1}, {"dense": 1, "sparse": 1}, {"dense": 1, "anchor": 1}]


@pytest.mark.parametrize("anchor_density", [None, 0.6])
def test_an_anchor_that_visits_each_pair_once_is_so_much_work(anchor_density, visited_once):
    text, blocks, heads = 5, 7, 2
    options = dict(density=0.3, anchor_density=anchor_density, refresh_every=1, order="raster")
    g = at("anchor", **options)
    run(g, 0, *inputs(text))
    first = g.tally.work()
    q, k, v = inputs(text)
    run(g, 1, q, k, v)
    call = Call(q, k, v, Layout(GRID, text, 16), g.config, None, True)
    whole, pooled = heads * (105 + text) ** 2, heads * 105 * blocks
    besides = heads * (text * (105 + text) + 105 * text)
    every = heads * (blocks * 16) ** 2
    visited = every if anchor_density is None else call.route(0.6).plan.counts.sum().item() * 16**2 + pooled
    assert first == pytest.approx((every + besides + pooled) / whole, rel=1e-12)
    assert 2 * g.tally.work() - first == pytest.approx((visited + besides + pooled) / whole, rel=1e-12)


@pytest.mark.parametrize("method", ["none", "rectify", "reshape"])
def test_work_without_a_tail(method):
    g = at(method, density=0.3)
    enter(g, 0)
    sparse_attention(*inputs(), g.layers[0], g)
    whole, routed = 2 * 105**2, g.tally.blocks.item() * 16**2
    assert g.tally.work() == pytest.approx((routed + whole * (method == "reshape")) / whole, rel=1e-12)


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["none", "tail", "rectify", "anchor", "reshape"])
def test_error_is_at_most_twice_pytorchs(method, dtype):
    """Between anchors too. Eager computes every step, the pooling too, at low precision; plan and memory are given."""
    text = 9
    g = at(method, density=0.3, order="raster")
    layout = Layout(GRID, text, 16)
    run(g, 0, *inputs(text, dtype=dtype))
    q, k, v = inputs(text, dtype=dtype)
    out = run(g, 1, q, k, v)
    assert out.dtype == dtype
    if g.config.learns:
        kept = learned(g)
        plan, scale, residual = kept.plan, kept.rho, kept.residual
        assert residual.codes.dtype == torch.bfloat16 and (scale is None or scale.dtype == torch.float32)
    else:
        plan, scale, residual = Call(q, k, v, layout, g.config, None, True).route(0.3).plan, None, None

    def reckon(q, k, v):
        correction = Correction(scale, residual)
        wide = q.dtype
        stats = [reference.block_stats(x[:, :, : GRID.tokens], layout.lengths(CPU), 16) for x in (q, k, v)]
        if g.config.has_tail:
            second = SecondOrder(stats[0].mean, stats[0].var, stats[1].var, limit=2.0)
            tail = Tail(stats[1].mean, stats[2].mean, layout.lengths(CPU).to(wide).log(), second)
            correction = Correction(scale, residual, tail)
        if method == "rectify":
            pooled = pool(q, k, v, layout, g.config)
            routing = route(pooled, layout, g.config, density=0.3, scale=0.25, text_keys=k[:, :, GRID.tokens :])
            assert torch.equal(routing.plan.mask(), plan.mask())
            correction = rectify(routing, pooled)
            correction = Correction(correction.scale.to(wide), Residual(correction.residual.codes.to(wide)))
        return reference.block_attention(q, k, v, plan, correction, block=16, scale=0.25, text=text)[0]

    assert_no_worse(out, reckon(q, k, v), reckon(q.double(), k.double(), v.double()))


@pytest.mark.parametrize("method", ["anchor", "reshape"])
@pytest.mark.parametrize("storage", ["bf16", "fp8", "int4"])
def test_nothing_remembered_is_wider_than_it_should_be(method, storage):
    g = at(method, residual=storage)
    run(g, 0, *inputs(dtype=torch.bfloat16))
    kept = learned(g)
    assert kept.plan.counts.dtype == kept.plan.indices.dtype == torch.int32
    assert kept.residual.codes.dtype == (torch.bfloat16 if storage == "bf16" else torch.uint8)
    for x in (kept.rho, kept.residual.scales):
        assert x is None or x.dtype == torch.float32


# --- the op ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["anchor", "none"])
def test_the_op_is_the_function_with_the_memory_layout_of_the_queries(method):
    g, same = (at(method, density=0.3) for _ in range(2))
    where = address(g, 0)
    for step in range(2):
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(9))
        mask = torch.ones(1, 9, dtype=torch.bool)
        enter(g, step)
        whole = torch.ones(1, q.shape[2], dtype=torch.bool)
        out = attend(q, k, v, whole, where)
        assert out.stride() == q.stride()
        assert torch.equal(out, run(same, step, q, k, v, text_mask=mask))


def test_the_op_is_addressed_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        assert address(at("none"), 0).device.type == "cpu"


@pytest.mark.parametrize("method", METHODS)
def test_under_autocast_inputs_are_cast_and_statistics_are_not(method):
    """Norms under autocast return float32 queries and keys beside bfloat16 values."""
    plain, mixed = (at(method, density=0.3) for _ in range(2))
    for step in range(2):
        enter(plain, step)
        enter(mixed, step)
        q, k, v = inputs(9, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            out = attend(q.float(), k.float(), v, None, address(mixed, 0))
        assert out.dtype == torch.float32
        assert torch.equal(out, attend(q, k, v, None, address(plain, 0)).float())


# --- 8 bits ----------------------------------------------------------------------------------------------------------


def test_8_bits_fall_back_to_full_precision_where_they_are_not_there():
    q, k, v = inputs(dtype=torch.float32)
    low, full = at("tail", density=0.3, precision="8bit"), at("tail", density=0.3)
    assert torch.equal(run(low, 0, q, k, v), run(full, 0, q, k, v))
    ((reason, count),) = low.tally.fallbacks.items()
    assert reason == "attention in 8 bits needs CUDA tensors and triton 3.6 or newer" and count == 1
    assert not full.tally.fallbacks and not low.tally.precision_errors
    with pytest.raises(ValueError, match="in 8 bits needs CUDA .* no full-precision fallback"):
        run(at("tail", precision="8bit", strict=True), 0, q, k, v)


@pytest.mark.parametrize("method", ["tail", "anchor", "svg"])
def test_the_error_of_8_bits_is_told_once_a_layer(method, monkeypatch):
    """With a kernel that errs by a tenth in place of the one that needs Hopper."""
    exact, made = attention.block_attention, []

    def low(*args, precision, **options):
        made.append(precision)
        out, lse = exact(*args, **options)
        return (out * 1.1 if precision == "8bit" else out), lse

    monkeypatch.setattr(attention, "block_attention", low)
    monkeypatch.setattr(attention, "refused_8bit", lambda *_, **__: None)
    monkeypatch.setattr(attention, "chosen_impl", lambda *args, **_: f"for {args[-1]}")
    g = at(method, density=0.3, precision="8bit", refresh_every=2 if method == "anchor" else None)
    for step in range(3):
        run(g, step, *inputs(dtype=torch.float32))
    assert g.kernel == "for 8bit" and not g.tally.fallbacks
    (error,) = g.tally.precision_errors.values()
    assert error.item() == pytest.approx(0.1, rel=1e-3)
    # One call in full precision, to measure by.
    assert made.count("full") == 1


@pytest.mark.parametrize("before", [0, 4])
@pytest.mark.parametrize("method", ["tail", "anchor", "svg"])
def test_the_kernel_gets_a_mask_of_text_keys(method, before, monkeypatch):
    """In the order in which it gets the text, for every call and every question of what takes it."""
    exact, masks = attention.block_attention, []

    def spy(*args, key_mask=None, precision, **options):
        masks.append(key_mask)
        return exact(*args, key_mask=key_mask, **options)

    monkeypatch.setattr(attention, "block_attention", spy)
    monkeypatch.setattr(attention, "refused_8bit", lambda inputs: masks.append(inputs.key_mask))
    monkeypatch.setattr(attention, "chosen_impl", lambda _, inputs, *__: masks.append(inputs.key_mask) or "gluon")
    g = at(method, density=0.3, precision="8bit")
    mask = torch.tensor([[True] * 3 + [False] * 6, [False, True, True] * 3])
    for step in range(3):
        enter(g, step, batch=2)
        g.text = before, None
        sparse_attention(*inputs(9, batch=2, dtype=torch.float32), g.layers[0], g, text_mask=mask)
    # What ran, what was asked before, and what measured the error of 8 bits.
    assert len(masks) >= 8 and all(torch.equal(found, mask) for found in masks)


def test_a_mask_of_no_text_masks_nothing():
    q, k, v = inputs()
    nothing = torch.ones(1, 0, dtype=torch.bool)
    close(run(at("tail"), 0, q, k, v, text_mask=nothing), run(at("tail"), 0, q, k, v))
