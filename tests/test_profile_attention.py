"""The data path under a profile: each head does what a uniform config would make it do."""

import logging
from dataclasses import replace

import pytest
import torch

from dit_sparse.attention import Call, attend_part, sparse_attention
from dit_sparse.choices import DENSE, Choice, Rung, per_block
from dit_sparse.config import SparseConfig
from dit_sparse.kernels.block_attention import block_attention
from dit_sparse.kernels.dense_attention import dense_attention
from dit_sparse.kernels.reference import per_row
from dit_sparse.layout import Layout, TokenGrid
from dit_sparse.residual import unpack
from dit_sparse.state import GIB, Generation, Layer, StateTooLarge
from tests import profiles

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
GRID = TokenGrid(5, 8, 8)
LEVELS = (1.0, 0.8, 0.6, 0.4, 0.2)
RUNG = profiles.LADDER[0]


def layer(heads=2):
    return Layer("transformer.blocks.0.attn1", 0, 1, heads, 16)


def generation(choices, index, anchor, heads=2, branches=("cond",), **config):
    made = profiles.profile(
        ((layer(heads).name, heads, 16),), branches, 5, LEVELS, block=16, order=config.pop("order", "hilbert")
    )
    made = profiles.chosen(made, choices, torch.as_tensor(index), torch.as_tensor(anchor))
    return Generation(SparseConfig(profile="p", **config), [layer(heads)], made)


def enter(g, step, branch="cond", levels=LEVELS, grid=GRID):
    g.enter(grid, batch=1, device=CPU, timestep=0.0, step=step, total=len(levels), branch=branch, levels=levels)


def inputs(heads=2, text=0):
    return [torch.randn(1, heads, GRID.tokens + text, 16, dtype=torch.float64) for _ in range(3)]


def run(g, step, q, k, v, **options):
    enter(g, step, **options)
    return sparse_attention(q, k, v, g.layers[0], g)


@pytest.mark.parametrize("text", [0, 7])
@pytest.mark.parametrize("method", ["none", "rectify", "tail", "anchor", "reshape", "dense"])
def test_one_choice_for_all_is_the_uniform_config(method, text):
    learns = method in ("anchor", "reshape")
    choice = DENSE if method == "dense" else Choice(method, RUNG, "int4" if learns else None)
    one = generation([choice], 0, [1, 0, 0, 0, 0] if learns else 0)
    options = {} if method == "dense" else {"density": RUNG.density, "block": 16, "dense_steps": 0}
    if learns:
        options |= {"refresh_every": 5, "residual": "int4"}
    other = Generation(SparseConfig(method, **options), [layer()])
    for step in range(5):
        q, k, v = inputs(text=text)
        assert torch.equal(run(one, step, q, k, v), run(other, step, q, k, v))
    assert one.tally.work() == other.tally.work() and one.peak_state_bytes == other.peak_state_bytes


@pytest.mark.parametrize("kind", ["bf16", "fp8", "int4"])
def test_an_anchors_residual_fades_as_the_profile_says(kind):
    g = generation([Choice("anchor", RUNG, kind)], 0, [1, 0, 0, 0, 0], order="raster")
    fade = torch.rand_like(g.profile.tensors["fade"].float())
    g.profile = replace(g.profile, tensors=g.profile.tensors | {"fade": fade})
    options = {"density": RUNG.density, "block": 16, "dense_steps": 0, "refresh_every": 5, "residual": kind}
    other = Generation(SparseConfig("anchor", order="raster", **options), [layer()])
    for step in range(5):
        q, k, v = inputs()
        out, whole = run(g, step, q, k, v), run(other, step, q, k, v)
        if step == 0:
            assert torch.equal(out, whole)
            continue
        [learned] = g.learned.values()
        # Distances are 1, 2 and 4: three lies in the middle of the last two.
        known = fade[:, 0, step, :, 0]
        share = {1: known[:, 0], 2: known[:, 1], 3: (known[:, 1] + known[:, 2]) / 2, 4: known[:, 2]}[step]
        expected = whole - (1 - share[:, None, None]) * unpack(learned.residual)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_what_was_learned_later_than_planned_fades_by_its_own_age():
    g = generation([Choice("anchor", RUNG, "bf16")], 0, [1, 0, 0, 0, 0], order="raster")
    fade = torch.rand_like(g.profile.tensors["fade"].float())
    g.profile = replace(g.profile, tensors=g.profile.tensors | {"fade": fade})
    options = {"density": RUNG.density, "block": 16, "dense_steps": 0, "refresh_every": 9, "residual": "bf16"}
    other = Generation(SparseConfig("anchor", order="raster", **options), [layer()])
    # As under a cache of whole steps: the anchor's step is skipped, and the next one learns.
    for step in (2, 3, 4):
        q, k, v = inputs()
        out, whole = run(g, step, q, k, v), run(other, step, q, k, v)
        share = None if step == 2 else fade[:, 0, step, step - 3, 0, None, None]
        [learned] = g.learned.values()
        expected = whole if share is None else whole - (1 - share) * unpack(learned.residual)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    # A second look at the step that learned is at all of it.
    g.learned.clear()
    q, k, v = inputs()
    run(g, 2, q, k, v)
    [part] = g.parts(g.layers[0])
    assert part.phase == "sparse" and part.fade is None


def test_a_soft_anchor_is_its_denser_plan_from_the_first_on():
    choice = Choice("anchor", RUNG, "bf16", 0.5)
    g = generation([choice], 0, [1, 0, 0, 1, 0])
    told = dict(block=16, routing="fine", dense_steps=0)
    tails = {x: Generation(SparseConfig("tail", density=x, **told), [layer()]) for x in (RUNG.density, 0.5)}
    q, k, v = inputs()
    dense = run(generation([DENSE], 0, 0), 0, q, k, v)
    soft, part = (run(tails[density], 0, q, k, v) for density in (0.5, RUNG.density))
    out = run(g, 0, q, k, v)
    assert torch.equal(out, soft) and not torch.allclose(soft, dense, atol=1e-3)
    # With the same queries, keys and values the step after it is the soft anchor again.
    torch.testing.assert_close(run(g, 1, q, k, v), soft, atol=2e-2, rtol=0)
    assert not torch.allclose(part, soft, atol=5e-2) and g.tally.work() < 0.8


def test_heads_that_differ_do_not_disturb_each_other():
    choices = [DENSE, Choice("anchor", RUNG, "bf16"), Choice("tail", RUNG), Choice("reshape", Rung(0.3), "fp8")]
    index = torch.tensor([[1, 1, 1, 2, 0], [2, 2, 0, 0, 2], [1, 1, 1, 3, 3], [3, 3, 3, 1, 1]])[:, None]
    anchor = torch.tensor([[1, 0, 0, 0, 0], [0] * 5, [1, 0, 0, 1, 0], [1, 0, 0, 1, 0]])[:, None]
    together = generation(choices, index, anchor, heads=4)
    alone = [generation(choices, index[h : h + 1], anchor[h : h + 1], heads=1) for h in range(4)]
    for step in range(5):
        q, k, v = inputs(heads=4)
        out = run(together, step, q, k, v)
        for h, g in enumerate(alone):
            assert torch.equal(out[:, h : h + 1], run(g, step, *(x[:, h : h + 1] for x in (q, k, v))))


@pytest.mark.parametrize(
    ("group", "picks"),
    [
        ((0,), slice(0, 1, 1)),
        ((3,), slice(3, 4, 1)),
        ((1, 2, 3), slice(1, 4, 1)),
        ((0, 2), slice(0, 3, 2)),
        ((0, 2, 4), slice(0, 5, 2)),
        ((0, 1, 4), [0, 1, 4]),
        ((0, 2, 3), [0, 2, 3]),
    ],
)
def test_heads_that_are_equally_far_apart_are_not_copied(group, picks):
    index = torch.tensor([int(h not in group) for h in range(6)])[:, None, None]
    g = generation([Choice("tail", RUNG), DENSE], index, 0, heads=6)
    run(g, 0, *inputs(heads=6))
    [part] = (part for part in g.parts(g.layers[0]) if part.phase == "sparse")
    assert part.heads == picks and torch.arange(6)[part.heads].tolist() == list(group)


def test_what_no_later_step_uses_is_forgotten():
    g = generation([Choice("anchor", RUNG, "bf16"), Choice("tail", RUNG)], [0, 0, 1, 1, 1], [1, 0, 0, 0, 0])
    kept = []
    for step in range(5):
        run(g, step, *inputs())
        kept.append(len(g.learned))
    assert kept == [1, 1, 0, 0, 0]


def test_an_anchor_that_was_skipped_is_made_up_for():
    g = generation([Choice("anchor", RUNG, "bf16")], 0, [1, 0, 0, 0, 0])
    q, k, v = inputs()
    out = run(g, 2, q, k, v)
    torch.testing.assert_close(out, dense_attention(q, k, v)[0])
    assert set(g.tally.phases[2]) == {"anchor"} and len(g.learned) == 1


def test_calibrated_weighs_sparse_part_and_tail_by_the_profiles_rho():
    g = generation([Choice("calibrated", RUNG)], 0, 0, order="raster")
    q, k, v = inputs(text=7)
    out = run(g, 3, q, k, v)
    k_index = profiles.LADDER.index(RUNG)
    rho = per_block(g.profile.tensors["rho"][:, 0, 3, k_index].float(), 20)
    # The same from a tail whose own softmax says how much the routed blocks hold.
    config = SparseConfig("tail", routing="mass", density=RUNG.density, block=16, order="raster", dense_steps=0)
    tails = Generation(config, [layer()])
    merged = run(tails, 3, q, k, v)[:, :, : GRID.tokens]
    none = Generation(SparseConfig("none", density=RUNG.density, block=16, order="raster", dense_steps=0), [layer()])
    exact = run(none, 3, q, k, v)
    alone = exact[:, :, : GRID.tokens]
    # merged = a alone + (1 - a) direction for some a in each row, so all three outputs lie on one line.
    share = per_row(rho, GRID.tokens, -1, 16)[None, ..., None]
    direction = (out[:, :, : GRID.tokens] - share * alone) / (1 - share)
    a = ((merged - direction) * (alone - direction)).sum(-1) / (alone - direction).square().sum(-1)
    assert ((a > 0) & (a < 1)).all()
    torch.testing.assert_close(a[..., None] * alone + (1 - a[..., None]) * direction, merged, atol=1e-5, rtol=1e-5)
    # Text rows see everything and are left alone.
    assert torch.equal(out[:, :, GRID.tokens :], exact[:, :, GRID.tokens :])


def test_calibrated_is_dense_where_every_block_is_kept_or_rho_is_right_and_keys_are_flat():
    q, k, v = inputs()
    whole = generation([Choice("calibrated", Rung(1.0))], 0, 0)
    header = replace(whole.profile.header, rungs=((1.0, None), *whole.profile.header.rungs[1:]))
    whole.profile = replace(whole.profile, header=header)
    torch.testing.assert_close(run(whole, 0, q, k, v), dense_attention(q, k, v)[0], atol=1e-6, rtol=1e-6)
    # Equal keys and queries in each block: rho is the same for all rows of one, and known exactly.
    g = generation([Choice("calibrated", RUNG)], 0, 0, order="raster")
    q, k = (x.unflatten(2, (20, 16))[:, :, :, :1].expand(-1, -1, -1, 16, -1).flatten(2, 3) for x in (q, k))
    enter(g, 0)
    parts = g.parts(g.layers[0])
    call = Call(q, k, v, Layout(GRID, 0, 16), parts[0].config, None, routes=True)
    plan = call.route(RUNG.density).plan
    dense, lse = dense_attention(q, k, v)
    _, held = block_attention(q, k, v, plan, block=16)
    rho = (held - lse).exp()[0, :, ::16].float()
    out = attend_part(q, k, v, replace(parts[0], rho=rho), g, None)
    torch.testing.assert_close(out, dense, atol=1e-5, rtol=1e-5)


def test_the_work_of_a_calibrated_step_counts_its_tail():
    one, other = (generation([Choice(method, RUNG)], 0, 0) for method in ("calibrated", "tail"))
    for g in (one, other):
        run(g, 0, *inputs())
    assert one.tally.work() == pytest.approx(other.tally.work(), rel=0.05)


def test_stretching_is_warned_of_once(caplog):
    g = generation([DENSE], 0, 0)
    with caplog.at_level(logging.WARNING, logger="dit_sparse"):
        for branch in ("cond",) * 2:
            run(g, 0, *inputs(), branch=branch, levels=(1.0, 0.5))
            g.reset()
    [said] = [record.message for record in caplog.records]
    assert said.endswith("is stretched to 2 steps instead of 5, up to 0.100 from the nearest noise level")


def test_a_run_without_noise_levels_cannot_have_a_profile():
    g = generation([DENSE], 0, 0)
    with pytest.raises(ValueError, match="goes by the noise level of each step"):
        g.enter(GRID, batch=1, device=CPU, timestep=0.0, step=0, total=5)


def test_a_run_that_begins_in_the_middle_has_the_last_levels():
    g = generation([DENSE, Choice("tail", RUNG)], [0, 0, 0, 1, 1], 0)
    g.enter(GRID, batch=1, device=CPU, timestep=0.0, step=0, total=2, branch="cond", levels=LEVELS)
    assert [part.phase for part in g.parts(g.layers[0])] == ["sparse"]


def test_memory_that_does_not_fit_is_refused_before_anything_runs():
    index, anchor = [0, 0, 0, 1, 1], [1, 0, 0, 0, 0]
    g = generation([Choice("anchor", RUNG, "bf16"), Choice("tail", RUNG)], index, anchor)
    for step in range(5):
        run(g, step, *inputs())
    need = g.peak_state_bytes
    made = generation([Choice("anchor", RUNG, "bf16")], 0, anchor, max_state_gib=0.99 * need / GIB)
    with pytest.raises(StateTooLarge, match="The profile remembers"):
        enter(made, 0)
    enter(generation([Choice("anchor", RUNG, "bf16")], 0, anchor, max_state_gib=1.3 * need / GIB), 0)
