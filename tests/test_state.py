"""Where a generation is, what it does there, and what it may remember."""

import copy
import logging
import re
from dataclasses import replace

import pytest
import torch

from dit_sparse import memory, state
from dit_sparse.config import SparseConfig
from dit_sparse.correction import Learned
from dit_sparse.layout import TokenGrid
from dit_sparse.plan import BlockPlan, Residual
from dit_sparse.schedule import span
from dit_sparse.state import GIB, Generation, Layer, StateTooLarge

CPU = torch.device("cpu")
GRID = TokenGrid(2, 4, 4)
ONE = object()


def layers(count=1, part="transformer", heads=2, dim=16):
    return [Layer(f"{part}.blocks.{i}.attn1", i, count, heads, dim) for i in range(count)]


def generation(method="anchor", count=1, **options):
    return Generation(SparseConfig(method, **options), layers(count))


def enter(g, step=None, branch=None, timestep=0.0, grid=GRID, batch=1, **options):
    g.enter(grid, batch=batch, device=CPU, timestep=timestep, step=step, branch=branch, **options)


def remember(g, layer=0, step=None):
    """Record something of the size that a layer remembers in bf16."""
    step = g.moment.step if step is None else step
    plan = BlockPlan.full(1, 2, 2, 2, CPU)
    g.record(
        g.layers[layer], Learned(plan, Residual(torch.zeros(1, 2, 32, 16).bfloat16()), None, step, torch.tensor(8))
    )


# --- where it is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", ["named", "prompts", "copied prompts", "one prompt for both"])
@pytest.mark.parametrize("steps", ["given", "inferred"])
@pytest.mark.parametrize("timesteps", [(999.0, 700.0, 300.0), (999.0,)], ids=["3 steps", "1 step"])
@pytest.mark.parametrize("count", [1, 2], ids=["1 branch", "2 branches"])
def test_two_generations_in_a_row(count, timesteps, steps, told):
    g, seen = generation(dense_steps=0), []
    prompts = [torch.full((1, 3), float(i)) for i in range(count)]
    if told == "one prompt for both":
        prompts = [torch.zeros(1, 3) for _ in range(count)]
    for number in range(2):
        # A pipeline makes its timesteps anew; without it, only a repeated prompt tells of a second run of one step.
        run = number if "copied" in told else None
        for step, timestep in enumerate(timesteps):
            for i in range(count):
                enter(
                    g,
                    step if steps == "given" else None,
                    f"name {i}" if told == "named" else None,
                    timestep,
                    prompt=prompts[i].clone() if "copied" in told else prompts[i],
                    run=run,
                )
                seen.append((g.moment.step, g.moment.branch, bool(g.learned)))
                remember(g)
                g.leave()
    name = "name" if told == "named" else "branch"
    once = [(s, f"{name} {i}", s + i > 0) for s in range(len(timesteps)) for i in range(count)]
    assert seen == once * 2
    assert list(g.learned) == [(g.layers[0].name, f"{name} {i}") for i in range(count)]


def test_a_branch_that_joins_late_is_another_one():
    """As with guidance in some of the steps only; whoever comes first."""
    g, cond, uncond = generation(dense_steps=0), torch.zeros(3), torch.ones(3)
    for step, prompts in enumerate([[cond], [uncond, cond], [cond], [cond, uncond]]):
        told = []
        for prompt in prompts:
            enter(g, step, prompt=prompt)
            told.append(g.moment.branch)
        assert told == [f"branch {int(prompt is uncond)}" for prompt in prompts]


def test_a_run_known_by_its_object():
    g = generation(dense_steps=0)
    first, second = [1.0], [1.0]  # equal, and not the same
    enter(g, 0, "cond", run=first)
    remember(g)
    enter(g, 1, "cond", run=first)
    assert g.learned
    # The second run was stopped before its first step ended, and the third begins ahead of where it was.
    enter(g, 2, "cond", run=second)
    assert not g.learned and g.moment.step == 2


def test_named_branches_of_other_batches_are_one_generation():
    g = generation("anchor", dense_steps=0)
    for step in range(2):
        for branch, batch in (("cond_uncond", 2), ("perturbed", 1)):
            enter(g, step, branch, batch=batch)
            remember(g)
        assert set(g.learned) == {(g.layers[0].name, "cond_uncond"), (g.layers[0].name, "perturbed")}
    enter(g, 2, "perturbed", batch=3)
    assert not g.learned


@pytest.mark.parametrize("where", ["forward", "attention"])
def test_rows_that_are_left_out_in_a_run_are_remembered_apart(where):
    """As FasterCache does with half of a batch; some see it before the transformer, some in its attention."""
    g = generation(dense_steps=0, refresh_every=9)
    for step, rows in enumerate([2, 1, 2, 1]):
        enter(g, step, "cond_uncond", batch=rows if where == "forward" else 2, run=ONE)
        g.attending(rows)
        assert g.phase(g.layers[0]) == ("anchor" if step < 2 else "sparse")
        if step < 2:
            remember(g)
        assert len(g.learned) == min(step + 1, 2) and g.moment.branch == "cond_uncond"
    assert len(g.tally.marks) == 4


@pytest.mark.parametrize("told", ["named", "prompts", "copied prompts"])
@pytest.mark.parametrize("steps", ["given", "inferred"])
@pytest.mark.parametrize("run", [ONE, None], ids=["run", "no run"])
def test_a_sampler_that_runs_each_branch_twice_a_step(told, steps, run):
    """Heun's method: the noise level that a step ends at, and the next begins at, is looked at twice."""
    g, seen = generation(dense_steps=0, refresh_every=3), []
    prompts = [torch.zeros(1, 3), torch.ones(1, 3)]
    for step, timestep in enumerate([1000.0, 800.0, 600.0, 400.0, 200.0]):
        for look in range(2):
            if look and not step and run is None:
                # Nobody can tell it from a second run of one step.
                continue
            for i, prompt in enumerate(prompts):
                enter(
                    g,
                    step if steps == "given" else None,
                    ("cond", "uncond")[i] if told == "named" else None,
                    timestep if steps == "inferred" else 0.0,
                    prompt=prompt.clone() if told == "copied prompts" else prompt,
                    run=run,
                )
                phase = g.phase(g.layers[0])
                if told != "copied prompts":
                    assert phase == ("anchor" if step % 3 == 0 and not look else "sparse")
                    assert g.moment.branch in (("cond", "uncond")[i], f"branch {i}")
                if phase == "anchor":
                    remember(g)
                seen.append((g.moment.step, look))
                g.leave()
    assert seen == [(s, look) for s in range(5) for look in range(2) for _ in prompts if s or not look or run]
    assert len(g.tally.marks) == len(seen)


def test_a_second_look_at_a_dense_step_is_dense():
    g = generation(dense_steps="0,3", refresh_every=10)
    for step, first, second in ((0, "dense", "dense"), (1, "anchor", "sparse"), (3, "anchor", "dense")):
        for expected in (first, second):
            enter(g, step, "cond", total=9, run=ONE)
            assert g.phase(g.layers[0]) == expected
            if expected == "anchor":
                remember(g)


def test_an_anchor_at_a_dense_step_is_computed_in_full():
    g = generation(dense_steps="0,3", anchor_density=0.5, refresh_every=4)
    densities = {}
    for step in range(6):
        enter(g, step, "cond", total=6, run=ONE)
        (part,) = g.parts(g.layers[0])
        if part.phase == "anchor":
            densities[step] = part.config.anchor_density
            remember(g)
    assert densities == {1: 0.5, 3: None, 5: 0.5}


def test_a_transformer_that_another_one_relieves_is_forgotten():
    both = layers(2) + layers(2, "transformer_2")
    g = Generation(SparseConfig("anchor", dense_steps=0), both)
    for step in range(4):
        part = "transformer" if step < 2 else "transformer_2"
        for branch in ("cond", "uncond"):
            enter(g, step, branch, part=part, run=ONE)
            for i, layer in enumerate(both):
                if layer.name.startswith(f"{part}.") and g.phase(layer) == "anchor":
                    remember(g, i)
        # The second learns at its first step, and nothing of the first is left then.
        assert {name.split(".")[0] for name, _ in g.learned} == {part}
        assert len(g.learned) == 4
    assert g.peak_state_bytes == memory.size(g.learned.values())


def test_transformers_that_run_at_the_same_step_both_remember():
    both = layers(1) + layers(1, "transformer_2")
    g = Generation(SparseConfig("anchor", dense_steps=0), both)
    for step in range(3):
        for i, part in enumerate(("transformer", "transformer_2")):
            enter(g, step, part, part=part, run=ONE)
            assert g.phase(both[i]) == ("sparse" if step else "anchor")
            if not step:
                remember(g, i)
        assert len(g.learned) == 2


@pytest.mark.parametrize("change", [{"grid": TokenGrid(1, 4, 4)}, {"batch": 2}, {"run": ONE}])
def test_another_grid_batch_or_run_begins_anew(change):
    g = generation(dense_steps=0)
    enter(g, 0, "cond")
    remember(g)
    g.tally.dense(0, 5.0)
    enter(g, 1, "cond", **change)
    assert not g.learned and g.peak_state_bytes == 0 and g.tally.dense_pairs == 0
    assert g.moment.step == 1 and g.grid == change.get("grid", GRID)


@pytest.mark.parametrize("steps", ["given", "inferred"])
@pytest.mark.parametrize("stopped_at", [0, 2])
def test_an_aborted_generation_leaves_nothing(steps, stopped_at):
    g = generation(dense_steps=0)
    for step in range(stopped_at + 1):
        enter(g, step if steps == "given" else None, "cond", 1000.0 - step)
        remember(g)
    # No leave(): the forward raised.
    enter(g, 0 if steps == "given" else None, "cond", 1000.0)
    assert not g.learned and g.moment.step == 0 and len(g.tally.marks) == 1
    assert g.tally.steps() == ()


def test_steps_that_a_cache_skips_are_skipped():
    g = generation(dense_steps=0)
    for step in (0, 1, 5):
        enter(g, step, "cond")
        remember(g)
        assert g.moment.step == step
    assert len(g.tally.marks) == 3


def test_reset_forgets_but_keeps_the_report():
    g = generation(dense_steps=0)
    enter(g, 0, "cond", run=ONE)
    remember(g)
    g.tally.dense(0, 5.0)
    g.leave()
    g.reset()
    assert not g.learned and g.moment is None and g.phase(g.layers[0]) == "dense"
    assert g.peak_state_bytes > 0 and g.tally.dense_pairs == 5
    enter(g, 1, "cond", run=ONE)
    assert g.tally.dense_pairs == 0


def test_a_config_changed_between_runs_or_in_one():
    g = generation("anchor", dense_steps=0)
    enter(g, 3, "cond")
    assert g.storage == "bf16" and g.phase(g.layers[0]) == "anchor"
    g.reset()
    g.config = SparseConfig("rectify", dense_steps=2)
    enter(g, 4, "cond")
    assert g.storage is None and g.phase(g.layers[0]) == "sparse"
    g.reset()
    g.config = SparseConfig("reshape", residual="int4", dense_steps=2)
    enter(g, 5, "cond")
    assert g.storage == "int4" and g.phase(g.layers[0]) == "anchor"


def test_a_copy_begins_anew():
    g = generation(dense_steps=0)
    enter(g, 0, "cond")
    remember(g)
    twin = copy.deepcopy(g)
    assert (twin.config, twin.layers, twin.learned, twin.moment) == (g.config, g.layers, {}, None)
    assert g.learned and twin.layers is not g.layers


def test_peak_state_is_the_sum_over_layers_and_branches():
    g = generation(count=2, dense_steps=0)
    one = 2 * 2 * 4 + 2 * 2 * 2 * 4 + 2 * 32 * 16 * 2  # counts, indices, residual
    for step in range(2):
        for branch in ("cond", "uncond"):
            enter(g, step, branch)
            for layer in range(2):
                remember(g, layer)
    assert g.peak_state_bytes == 4 * one
    enter(g, 0, "cond")
    assert g.peak_state_bytes == 0


# --- what it does ----------------------------------------------------------------------------------------------------


def plan(g, steps, offset=0):
    return "".join(g.phase_at(step, steps, offset)[0] for step in range(steps))


@pytest.mark.parametrize("dense", [0, 2, "0-1,6", "0,5-7"])
@pytest.mark.parametrize("every", [1, 3, 4])
def test_a_run_that_skips_nothing_follows_the_plan(dense, every):
    for stagger in (False, True):
        g = generation(count=5, dense_steps=dense, refresh_every=every, stagger=stagger)
        told = dict.fromkeys(g.layers, "")
        for step in range(15):
            enter(g, step, "cond", total=15)
            for i, layer in enumerate(g.layers):
                told[layer] += g.phase(layer)[0]
                if told[layer][-1] == "a":
                    remember(g, i)
        for layer in g.layers:
            assert told[layer] == plan(g, 15, layer.index if stagger else 0)
            # Never longer than the interval from one anchor to the next, but for dense steps.
            assert all(len(between) < every for between in re.findall("s+", told[layer]))


def test_stagger_spreads_the_anchors_after_the_first():
    g = generation(count=4, dense_steps=1, refresh_every=4, stagger=True)
    plans = [plan(g, 13, layer.index) for layer in g.layers]
    assert plans == ["dasssasssasss", "dassasssasssa", "dasasssasssas", "daasssasssass"]


def test_dense_layers():
    g = generation("tail", count=5, dense_layers="0,3-4", dense_steps=0)
    enter(g, 0, "cond")
    assert [g.phase(layer)[0] for layer in g.layers] == list("dssdd")


def test_dense_layers_are_counted_in_each_transformer():
    g = Generation(SparseConfig("tail", dense_layers="-1", dense_steps=0), layers(2) + layers(3, "transformer_2"))
    enter(g, 0, "cond")
    assert [g.phase(layer)[0] for layer in g.layers] == list("sdssd")


def test_a_late_anchor():
    g = generation(dense_steps=0)
    enter(g, 0, "cond")
    remember(g)
    for step, expected in ((1, "sparse"), (3, "sparse"), (4, "anchor"), (5, "anchor"), (8, "anchor")):
        enter(g, step, "cond")  # and learns nothing
        assert g.phase(g.layers[0]) == expected
    remember(g)
    assert g.phase(g.layers[0]) == "sparse"  # the same forward again
    enter(g, 8, "uncond")
    assert g.phase(g.layers[0]) == "anchor"


@pytest.mark.parametrize("dense_steps", [0.15, "0.2", "-1", "0-1,-1"])
def test_a_share_of_an_unknown_number_of_steps_is_an_error(dense_steps):
    g = generation(dense_steps=dense_steps)
    with pytest.raises(ValueError, match=f"dense_steps={dense_steps!r} counts against the number of steps"):
        enter(g, 0, "cond", total=None)
    assert g.moment is None
    enter(g, 0, "cond", total=20)


@pytest.mark.parametrize("dense_steps", [2, "2", "0-1", "0, 1"])
def test_a_count_of_an_unknown_number_of_steps_is_none(dense_steps):
    g = generation("tail", dense_steps=dense_steps)
    phases = []
    for step in range(4):
        enter(g, step, "cond", total=None)
        phases.append(g.phase(g.layers[0]))
    assert phases == ["dense", "dense", "sparse", "sparse"]


def test_steps_and_layers_that_are_not_there():
    with pytest.raises(ValueError, match="dense_steps: '20' in '0,20' lies outside 0..19"):
        enter(generation(dense_steps="0,20"), 0, "cond", total=20)
    g = Generation(SparseConfig("tail", dense_layers="0,2", dense_steps=0), layers(3) + layers(2, "transformer_2"))
    with pytest.raises(ValueError, match="dense_layers: '2' in '0,2' lies outside 0..1"):
        enter(g, 0, "cond", total=20)


# --- what it may remember --------------------------------------------------------------------------------------------

# 4000 tokens are fewer than 128 blocks of 32, so they make 250 of 16.
LARGE = TokenGrid(10, 20, 20)


def needed(kind, *, heads=4, dim=64, kept=25, rho=0, calls=1):
    """By hand: the residual's bytes a row, and a list of kept blocks and the block's own, with its count, a block."""
    row = {"bf16": 2 * dim, "fp8": dim + 4, "int4": dim // 2 + 4}[kind]
    return calls * heads * (4000 * (row + rho) + 250 * 4 * (1 + kept + 1))


def large(count=2, parts=("transformer",), **options):
    found = [layer for part in parts for layer in layers(count, part, heads=4, dim=64)]
    return Generation(SparseConfig(**(dict(method="anchor", dense_steps=0) | options)), found)


@pytest.mark.parametrize(("kind", "finer"), [("bf16", None), ("fp8", "bf16"), ("int4", "fp8")])
@pytest.mark.parametrize("method", ["anchor", "reshape"])
def test_storage_is_the_finest_that_fits(method, kind, finer):
    """To the byte."""
    rho = 4 if method == "reshape" else 0
    need = needed(kind, rho=rho, calls=2 * 3 * 2)  # layers, batch, branches
    for limit, expected in ((need, kind), (needed(finer, rho=rho, calls=12) - 1 if finer else 2 * need, kind)):
        g = large(method=method, max_state_gib=limit / GIB)
        g.branches = 2
        enter(g, 0, "cond", grid=LARGE, batch=3)
        assert g.storage == expected


@pytest.mark.parametrize("kind", ["bf16", "fp8", "int4"])
def test_storage_that_was_asked_for_is_taken_or_refused(kind):
    need = needed(kind, calls=2)
    g = large(residual=kind, max_state_gib=need / GIB)
    enter(g, 0, "cond", grid=LARGE)
    assert g.storage == kind
    g = large(residual=kind, max_state_gib=(need - 1) / GIB)
    with pytest.raises(StateTooLarge, match=f"in {kind}"):
        enter(g, 0, "cond", grid=LARGE)


@pytest.mark.parametrize(
    ("options", "kept"),
    [({"density": 0.3}, 75), ({"top_p": 0.1}, 249), ({"density": 1.0}, 249), ({"density": 0.001}, 1)],
)
def test_plans_are_counted(options, kept):
    need = needed("int4", kept=kept, calls=2)
    enter(large(residual="int4", max_state_gib=need / GIB, **options), 0, "cond", grid=LARGE)
    with pytest.raises(StateTooLarge):
        enter(large(residual="int4", max_state_gib=(need - 1) / GIB, **options), 0, "cond", grid=LARGE)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}, {"neighbours": True}, {"first_frame": True, "density": 0.4}])
@pytest.mark.parametrize("residual", ["bf16", "fp8", "int4"])
@pytest.mark.parametrize("method", ["anchor", "reshape"])
def test_the_estimate_is_what_is_remembered(method, residual, options):
    from dit_sparse.attention import sparse_attention

    grid = TokenGrid(3, 5, 7)
    g = generation(method, count=2, dense_steps=0, residual=residual, **options)
    enter(g, 0, "cond", grid=grid)
    for layer in g.layers:
        sparse_attention(*torch.randn(3, 1, 2, 105, 16), layer, g)
    assert g.peak_state_bytes == sum(g.state_bytes(layer, residual) for layer in g.layers)


@pytest.mark.parametrize("dense_layers", [0, 3, "9", "0,5-8", "-1"])
@pytest.mark.parametrize("share", [0.0001, 0.35, 0.8])
@pytest.mark.parametrize("parts", [("transformer",), ("transformer", "transformer_2")])
def test_what_is_suggested_fits(dense_layers, share, parts):
    g = large(10, parts, dense_layers=dense_layers)
    sparse = 10 - len(span(dense_layers, 10))
    # Transformers take turns.
    limit = share * needed("int4", calls=sparse) / GIB
    g.config = replace(g.config, max_state_gib=limit)
    with pytest.raises(StateTooLarge) as error:
        enter(g, 0, "cond", grid=LARGE)
    assert g.moment is None
    message = str(error.value)
    dense = int(re.search(r"dense_layers=(\d+) fits", message)[1])
    enough = float(re.search(r"max_state_gib=([\d.]+) where", message)[1])
    for options in ({"dense_layers": dense}, {"max_state_gib": enough}):
        fits = large(10, parts, **{"dense_layers": dense_layers, "max_state_gib": limit, **options})
        enter(fits, 0, "cond", grid=LARGE)
        assert fits.storage is not None
    with pytest.raises(StateTooLarge):
        enter(large(10, parts, dense_layers=dense - 1, max_state_gib=limit), 0, "cond", grid=LARGE)
    assert enough - needed("int4", calls=sparse) / GIB < 0.01


def test_a_branch_that_nobody_told_of_is_counted_when_it_comes():
    """True guidance of Flux, HunyuanVideo, Qwen-Image: their pipelines say nowhere that they run twice."""
    g = large(max_state_gib=needed("bf16", calls=2) / GIB)
    enter(g, 0, "cond", grid=LARGE, run=ONE)
    remember(g)
    assert g.storage == "bf16"
    enter(g, 0, "uncond", grid=LARGE, run=ONE)
    # What is remembered in the coarser storage does not go beside what is there.
    assert g.storage == "int4" and not g.learned
    enter(g, 1, "cond", grid=LARGE, run=ONE)
    assert g.phase(g.layers[0]) == "anchor"
    for branch, step in (("cond", 1), ("uncond", 1), ("cond", 2)):
        enter(g, step, branch, grid=LARGE, run=ONE)
        assert g.storage == "int4"


@pytest.mark.parametrize("run", [ONE, None], ids=["run", "no run"])
def test_a_branch_that_does_not_fit_is_refused_before_its_forward(run):
    g = large(max_state_gib=(needed("int4", calls=2 * 2) - 1) / GIB)
    for _ in range(2):
        enter(g, 0, "cond", grid=LARGE, run=run)
        with pytest.raises(StateTooLarge, match="must remember"):
            enter(g, 0, "uncond", grid=LARGE, run=run)
        assert g.moment is None and not g.learned


def test_branches_of_other_batches_are_counted_by_their_rows():
    g = large(residual="int4", max_state_gib=needed("int4", calls=2 * 3) / GIB)
    enter(g, 0, "cond_uncond", grid=LARGE, batch=2)
    enter(g, 0, "perturbed", grid=LARGE, batch=1)
    with pytest.raises(StateTooLarge):
        enter(g, 0, "modality", grid=LARGE, batch=1)


def test_transformers_that_run_at_the_same_step_are_counted_together():
    limit = needed("bf16", calls=2) / GIB
    g = large(parts=("transformer", "transformer_2"), max_state_gib=limit)
    for step, part in enumerate(("transformer", "transformer_2")):
        enter(g, step, "cond", grid=LARGE, part=part, run=ONE)
        assert g.storage == "bf16"
    enter(g, 1, "cond", grid=LARGE, part="transformer", run=ONE)
    assert g.storage == "int4"


def test_a_run_that_did_not_fit_leaves_nothing_behind():
    g = large(max_state_gib=1e-6)
    for _ in range(2):
        with pytest.raises(StateTooLarge):
            enter(g, 1, "cond", grid=LARGE, run=ONE)
    g.config = SparseConfig("tail", dense_steps=0)
    enter(g, 2, "cond", grid=LARGE, run=ONE)
    assert g.phase(g.layers[0]) == "sparse"


def test_what_remembers_nothing_always_fits():
    g = Generation(SparseConfig("rectify", dense_steps=0), layers(1))
    enter(g, 0, "cond", grid=TokenGrid(10**4, 10**4, 10**4))
    assert g.storage is None
    g = large(dense_layers=2, max_state_gib=1e-9)
    enter(g, 0, "cond", grid=LARGE)
    assert g.storage == "bf16"


def test_without_a_limit_what_is_free_counts(monkeypatch):
    monkeypatch.setattr(state, "free_bytes", lambda device: needed("fp8", calls=2))
    g = large()
    enter(g, 0, "cond", grid=LARGE)
    assert g.storage == "fp8"


# --- fallbacks -------------------------------------------------------------------------------------------------------


def test_a_fallback_is_counted_and_logged_once(caplog):
    g = generation(dense_steps=0)
    enter(g, 0, "cond")
    with caplog.at_level(logging.WARNING, "dit_sparse"):
        for reason in ("a mask was given", "a mask was given", "it rained"):
            g.fall_back(reason)
    assert dict(g.tally.fallbacks) == {"a mask was given": 2, "it rained": 1}
    assert [record.getMessage() for record in caplog.records] == [
        "dense fallback: a mask was given",
        "dense fallback: it rained",
    ]


def test_strict_allows_no_fallback():
    g = generation(dense_steps=0, strict=True)
    with pytest.raises(ValueError, match="A mask was given, and strict=True allows no dense fallback"):
        g.fall_back("a mask was given")
    assert not g.tally.fallbacks
