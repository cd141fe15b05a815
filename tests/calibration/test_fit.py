import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_sparse.calibration import paths
from dit_sparse.calibration.fit import Targets, Verified, fit, learned, solve, try_out
from dit_sparse.calibration.measured import SLOPE
from dit_sparse.calibration.paths import Problem
from dit_sparse.choices import Choice
from dit_sparse.config import SparseConfig
from dit_sparse.layout import TokenGrid
from dit_sparse.profile import METHODS, Profile
from dit_sparse.state import GIB, Generation, Layer
from tests import profiles

ONE_HEAD = ((("transformer.blocks.0.attn1", 1, 32),), ("cond",))


def everything(problem: Problem):
    """Every way of one head through the steps, accounted for."""

    def ways(t):
        if t == problem.steps:
            yield [], [], []
            return
        for option in range(problem.singles):
            for rest in ways(t + 1):
                yield [option, *rest[0]], [False, *rest[1]], [t, *rest[2]]
        for q in range(problem.singles, len(problem.options)):
            for length in range(2, min(problem.longest + 1, problem.steps - t) + 1):
                for rest in ways(t + length):
                    yield (
                        [q] * length + rest[0],
                        [True] + [False] * (length - 1) + rest[1],
                        [t] * length + rest[2],
                    )

    for way in ways(0):
        yield problem.account(*(np.array([row]) for row in way))


@pytest.mark.parametrize("methods", [("tail",), ("tail", "reshape"), ("anchor",)])
@pytest.mark.parametrize("rent", [0, 1e-11, 1e-10, 1e-9])
@pytest.mark.parametrize(("price", "by"), [(1e-7, "seconds"), (1e-6, "seconds"), (1e-5, "seconds"), (1e-4, "work")])
@pytest.mark.parametrize("steady", [0.0, 0.8])
def test_each_head_takes_the_cheapest_of_all_ways(methods, price, rent, by, steady):
    made = profiles.profile(*ONE_HEAD, steps=4)
    made.tensors["persist"].fill_(steady)
    made.tensors["fade"].uniform_(0.3, 1)
    header = replace(made.header, rungs=made.header.rungs[:1])
    keep = {name: x[..., :1, :] if name == "rho" else x[..., :1] for name, x in made.tensors.items() if name in
            ("rho", "recall", "kept", "error", "stale", "fade", "together", "persist")}  # fmt: skip
    problem = Problem(replace(made, header=header, tensors=made.tensors | keep), methods, by)
    rent = np.array([0.0, 3.0, 1.0, 0.5]) * rent

    def whole(way):
        return way.added + price * way.cost + (rent * way.state).sum()

    best, found = min(everything(problem), key=whole), problem.cheapest(price, rent)
    if steady == 0:
        assert np.array_equal(found.option, best.option) and np.array_equal(found.anchor, best.anchor)
        assert (found.error, found.seconds) == pytest.approx((best.error, best.seconds))
    else:
        # What a step adds depends on all others, so the way is looked for, and not always found.
        assert whole(best) * (1 - 1e-9) <= whole(found) < 1.05 * whole(best)


def test_the_least_price_buys_dense():
    problem = Problem(profiles.profile())
    path = problem.cheapest(1e-30, np.zeros(6))
    assert path.error == 0 and path.psnr == math.inf and (path.option == 0).all()
    assert path.seconds == pytest.approx(problem.header.seconds["transformers"])


@pytest.mark.parametrize("speedup", [1.05, 1.3, 1.7])
def test_a_speed_is_reached_with_the_least_error(speedup):
    problem = Problem(profiles.profile())
    whole = problem.header.seconds["transformers"]
    path = solve(problem, Targets(speedup=speedup))
    assert speedup <= whole / path.seconds < speedup + 0.1
    # No uniform setting as fast is as good.
    for method, k, every in itertools.product(("tail", "none", "anchor", "reshape"), range(3), (2, 4)):
        config = SparseConfig(method, dense_steps=1, refresh_every=every)
        uniform = problem.uniform(config, k)
        if uniform.seconds <= path.seconds:
            assert path.error < uniform.error


def test_a_quality_is_reached_in_the_least_time():
    problem = Problem(profiles.profile())
    for psnr in (31.0, 35.0, 40.0):
        path = solve(problem, Targets(psnr=psnr))
        assert psnr <= path.psnr < psnr + 2
        assert solve(problem, Targets(speedup=problem.header.seconds["transformers"] / path.seconds)).psnr >= psnr


def test_heads_alike_part_where_a_target_lies_between_their_ways(monkeypatch):
    made = profiles.profile()
    for x in made.tensors.values():
        if len(x) == 4:
            x[:] = x[:1].clone()
    problem = Problem(made, by="work")
    works, qualities = np.linspace(0.3, 0.95, 14), (22.0, 25.0, 28.0)
    mixed = [solve(problem, Targets(work=work)) for work in works]
    cheap = [solve(problem, Targets(psnr=psnr, by="work")) for psnr in qualities]
    monkeypatch.setattr(
        "dit_sparse.calibration.fit._mixed", lambda _, few, many, __, last_false: (few, many)[last_false]
    )
    together = [solve(problem, Targets(work=work)) for work in works]
    for work, a, b in zip(works, mixed, together, strict=True):
        assert b.work <= a.work <= work and a.psnr >= b.psnr
        assert a.price.sum() == pytest.approx(a.work) and a.apart.sum() == pytest.approx(a.added)
    # What is left is less than a head's step from one way to the next.
    assert max(works - [a.work for a in mixed]) < 0.5 * max(works - [b.work for b in together])
    for psnr, a in zip(qualities, cheap, strict=True):
        assert psnr <= a.psnr and a.work <= solve(problem, Targets(psnr=psnr, by="work")).work
    assert any(len(np.unique(a.option, axis=0)) > 1 for a in cheap)


def test_targets_combine(monkeypatch):
    # Prices of memory are looked for in many rounds, each of which would take these.
    monkeypatch.setattr(paths, "ROUNDS", 2)
    problem = Problem(profiles.profile())
    speed = solve(problem, Targets(speedup=1.3))
    both = solve(problem, Targets(speedup=1.3, psnr=speed.psnr - 1))
    assert both.psnr >= speed.psnr - 1 and both.seconds <= problem.header.seconds["transformers"] / 1.3
    assert speed.state.max() > 0
    limit = 0.5 * speed.state.max() / GIB
    small = solve(problem, Targets(speedup=1.3, max_state_gib=limit))
    assert 0 < small.state.max() <= limit * GIB and small.error >= speed.error
    # Memories are spread over time: where all had to fit at once there would be half as many.
    assert solve(problem, Targets(max_state_gib=limit)).state.max() <= limit * GIB


def test_what_is_out_of_reach_is_said_with_what_is_not():
    problem = Problem(profiles.profile())
    most = problem.header.seconds["transformers"] / problem.cheapest(1e9, np.zeros(6)).seconds
    with pytest.raises(ValueError, match=rf"target_speedup 9 is out of reach: {most:.2f} times dense is the most, at"):
        solve(problem, Targets(speedup=9))
    best = solve(problem, Targets(speedup=1.5)).psnr
    with pytest.raises(ValueError, match=rf"are out of reach together: {best:.1f} dB is the best there, and 1"):
        solve(problem, Targets(speedup=1.5, psnr=best + 10))
    least = (works := Problem(profiles.profile(), by="work")).cheapest(1e9, np.zeros(6)).work
    with pytest.raises(ValueError, match=rf"target_work 0.01 is out of reach: {least:.3f} of dense work is the most"):
        solve(works, Targets(work=0.01))


@pytest.mark.parametrize("work", [0.3, 0.5, 0.9])
def test_work_is_kept_to_whatever_it_costs(work):
    made = profiles.profile()
    path = solve(Problem(made, by="work"), Targets(work=work))
    assert work - 0.05 < path.work <= work * (1 + 1e-6) and path.cost == path.work
    slow = {name: [9.0] * 3 if isinstance(x, list) else x for name, x in made.header.costs.items()}
    other = solve(Problem(replace(made, header=replace(made.header, costs=slow)), by="work"), Targets(work=work))
    assert np.array_equal(other.option, path.option) and other.seconds > path.seconds
    same = solve(Problem(made, by="work"), Targets(psnr=path.psnr, by="work"))
    assert same.work == pytest.approx(path.work, abs=0.02)


def test_work_and_speed_are_not_asked_for_together():
    with pytest.raises(ValueError, match="target_speedup is about seconds"):
        Targets(speedup=1.5, work=0.5)


@pytest.mark.parametrize("name", ["psnr", "speedup", "work", "max_state_gib"])
@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf])
def test_targets_are_positive_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name} is a positive number, not"):
        Targets(**{name: value})


def test_a_target_is_needed():
    with pytest.raises(ValueError, match="Give a target"):
        Targets()


def test_methods_can_be_left_out():
    for methods in (("tail",), ("calibrated",), ("anchor", "none")):
        problem = Problem(profiles.profile(), methods)
        path = solve(problem, Targets(speedup=1.3))
        assert {problem.options[i].method for i in path.option.flatten()} <= {"dense", *methods}


def test_errors_count_by_what_they_do():
    """A layer that matters more is left more exact, at the same errors and costs."""
    made = profiles.profile()
    gain = made.header.effects["gain"]
    first, second = gain
    gain[second] = {step: [100 * value for value in each] for step, each in gain[first].items()}
    same = {name: x[:2].repeat(2, *[1] * (x.dim() - 1)) for name, x in made.tensors.items()}
    problem = Problem(replace(made, tensors=same))
    path = solve(problem, Targets(speedup=1.4))
    dense = (path.option == 0).sum(1)
    assert dense[2:].sum() > dense[:2].sum()


def test_what_branches_have_in_common_cancels():
    """Guidance 4 makes 4 c - 3 u of the branches: an error that both make is there once."""
    made = profiles.profile()
    even = {name: x[:, :1].repeat(1, 2, *[1] * (x.dim() - 2)) for name, x in made.tensors.items()}
    tail, found = METHODS.index("tail"), {}
    for cosine in (1.0, 0.0, -1.0):
        together = even["together"].clone()
        together[:, 1] = cosine
        problem = Problem(replace(made, tensors=even | {"together": together}))
        found[cosine] = problem._joint(problem.stats["error"][..., tail, :], "tail")
    one = problem.stats["error"][:, 0, :, tail] ** 2 * problem.energy[:, 0, :, None]
    assert np.allclose(found[0.0], 25 * one) and np.allclose(found[-1.0], 49 * one)
    assert np.allclose(found[1.0], one)


def test_what_the_text_of_a_branch_makes_of_an_error_does_not_cancel():
    """The first layer of a model errs alike in both branches, which the layers after it do not pass on alike."""
    made = profiles.profile()
    even = {name: x[:, :1].repeat(1, 2, *[1] * (x.dim() - 2)) for name, x in made.tensors.items()}
    effects, tail, found = made.header.effects, METHODS.index("tail"), []
    for agree, louder in ((1.0, 1.0), (0.5, 1.0), (0.5, 4.0)):
        for name, gain in effects["gain"].items():
            effects["agree"][name] = {"1": [1.0, agree], "4": [1.0, 1.0]}
            gain["1"] = [1e-3, louder * 1e-3]
        problem = Problem(replace(made, tensors=even | {"together": torch.ones_like(even["together"])}))
        one = problem.stats["error"][:, 0, :, tail] ** 2 * problem.energy[:, 0, :, None]
        found.append(problem._joint(problem.stats["error"][..., tail, :], "tail") / one)
    # 4 c - 3 u: where they agree by half, 16 + 9 - 12; where u counts twice, too, 16 + 36 - 24.
    for ratio, at_one in zip(found, (1.0, 13.0, 28.0), strict=True):
        assert np.allclose(ratio[:, 1], at_one) and np.allclose(ratio[:, 4:], 1.0)
    assert ((found[1][:, 2] > 1) & (found[1][:, 2] < 13)).all()
    assert np.allclose(problem._gains[:, :, 1], [1e-3, 4e-3]) and np.allclose(
        problem._gains[:, 0], problem._gains[:, 0]
    )


def test_a_profile_from_before_both_branches_were_probed_is_refused():
    made = profiles.profile()
    gain = made.header.effects["gain"]
    for name in gain:
        gain[name] = {"1": 1e-3}
    with pytest.raises(ValueError, match=r"has no probe of both branches in transformer\.blocks\.0\.attn1"):
        fit(made, Targets(psnr=30.0))


def test_predictions_of_a_trial_are_the_trial():
    problem = Problem(profiles.profile())
    tried = problem.header.effects["trials"][0]
    added = (problem.grown * tried["direct"]).sum()
    assert problem.frames_error(added) == pytest.approx(tried["error"]) and problem.frames_error(0.0) == 0
    assert problem.frames_error(3 * added) == pytest.approx(3**SLOPE * tried["error"])
    # The mean of two is the mean of their decibels.
    problem.header.effects["trials"].append(profiles.trial(6, error=4 * tried["error"]))
    both = Problem(problem.profile)
    assert both.frames_error(added) == pytest.approx(2 * tried["error"])


def test_choices_that_were_written_come_to_what_was_solved():
    made = profiles.profile()
    for targets in (Targets(work=0.5), Targets(speedup=1.3), Targets(psnr=30.0, by="work")):
        by = "work" if targets.counts_work else "seconds"
        path, chosen = solve(Problem(made, by=by), targets), Problem(fit(made, targets), by=by).chosen()
        assert np.array_equal(chosen.option, path.option) and np.array_equal(chosen.anchor, path.anchor)
        assert np.array_equal(chosen.direct, path.direct) and chosen.seconds == path.seconds
        assert (chosen.psnr, chosen.work, chosen.cost) == (path.psnr, path.work, path.cost)


def test_what_was_verified_is_a_trial_of_another_prompt():
    made = fit(profiles.profile(), Targets(work=0.5))
    predicted, whole = Problem(made).chosen(), made.header.seconds["transformers"]
    seconds = [predicted.seconds / 6 / 4] * 6
    known = learned(made, [Verified(name, 4 * predicted.error, seconds, whole / 4) for name in ("a", "b")])
    assert known.header.predicted == made.header.predicted and known.header.seen == ("a red ball", "a", "b")
    assert [t["prompt"] for t in known.header.effects["trials"][1:]] == [1, 2]
    # Two prompts of three say four times the error, and the third, of other choices, leaves room for a slope.
    lower = predicted.psnr - Problem(known).chosen().psnr
    assert 10 * math.log10(4) * 2 / 3 <= lower <= 10 * math.log10(4)
    # The machine was four times as fast, and no choice faster than it should be.
    assert Problem(known).chosen().seconds == pytest.approx(predicted.seconds, rel=0.05)
    third = learned(known, [Verified("c", predicted.error, seconds, whole / 4)])
    assert third.header.effects["trials"][-1]["prompt"] == 3 and third.header.seen[-1] == "c"


def test_frames_that_are_the_same_say_nothing_of_how_errors_grow():
    made = fit(profiles.profile(), Targets(psnr=60.0, by="work"))
    whole = made.header.seconds["transformers"]
    # Nor is what is predicted better known for them.
    assert learned(made, [Verified("a", 0.0, [10.0] * 6, whole)]).header == made.header
    same = learned(made, [Verified("a", 1e-9, [10.0] * 6, whole)])
    same.header.effects["trials"][-1]["error"] = 0.0
    found, before = (fit(x, Targets(psnr=30.0, by="work")).header.predicted for x in (same, made))
    assert all(found[name] == before[name] for name in ("psnr_db", "psnr_spread_db", "work"))


def test_a_prompt_verified_twice_is_one_prompt():
    made = fit(profiles.profile(), Targets(work=0.5))
    whole = made.header.seconds["transformers"]
    known = learned(made, [Verified(name, 1e-3, [10.0] * 6, whole) for name in ("a", "b", "a")])
    assert [t["prompt"] for t in known.header.effects["trials"][1:]] == [1, 2, 1]
    more = learned(known, [Verified("c", 1e-3, [10.0] * 6, whole)])
    assert more.header.effects["trials"][-1]["prompt"] == 3 and more.header.seen == ("a red ball", "a", "b", "c")


def test_seconds_of_another_machine_do_not_count():
    made = fit(profiles.profile(), Targets(work=0.5))
    slow = Verified("a", 1e-3, [100.0] * 6, made.header.seconds["transformers"], alike=False)
    known, alike = learned(made, [slow]), learned(made, [replace(slow, alike=True)])
    assert known.header.effects["trials"][-1]["seconds"] is None and known.header.seen[-1] == "a"
    assert Problem(alike).slower > Problem(known).slower == Problem(made).slower
    assert Problem(known).chosen().psnr == Problem(alike).chosen().psnr


def test_seconds_of_what_was_verified_count_before_those_of_trials():
    made = fit(profiles.profile(), Targets(work=0.5))
    predicted, whole = Problem(made).chosen(), made.header.seconds["transformers"]
    seconds = [predicted.seconds / 6] * 6
    made.header.effects["trials"] += [profiles.trial(6) | {"seconds": 80.0, "prompt": n} for n in range(1, 6)]
    assert Problem(made).slower == 2.0
    known = learned(made, [Verified("a", predicted.error, seconds, whole)])
    assert Problem(known).chosen().seconds == pytest.approx(predicted.seconds, rel=0.01)


def test_trials_far_apart_say_how_errors_add_up():
    """Where a hundredth of the error was measured as a tenth, some of that is believed."""
    made = profiles.profile()
    [tried] = made.header.effects["trials"]
    small = [0.01 * x for x in tried["direct"]]
    made.header.effects["trials"].append(profiles.trial(6, direct=small, error=0.1 * tried["error"]))
    problem = Problem(made)
    added = (problem.grown * tried["direct"]).sum()
    slope = math.log(problem.frames_error(added) / problem.frames_error(0.01 * added)) / math.log(100)
    assert 0.5 < slope < 0.75
    assert problem.frames_error(0.1 * added) == pytest.approx(0.1**0.5 * tried["error"])


def test_the_slope_that_is_expected_is_that_of_the_profiles_that_come_along():
    problem = Problem(Profile.load(Path(__file__).parents[2] / "samples" / "demo_work35.profile.safetensors"))
    own = [trial for trial in problem.header.effects["trials"] if "verified" not in trial]
    x = np.array([math.log((np.array(trial["direct"]) * problem.grown).sum()) for trial in own])
    y = np.array([math.log(trial["error"]) for trial in own])
    pairs = [[i for i, trial in enumerate(own) if trial["prompt"] == prompt] for prompt in range(8)]
    # What two trials of a prompt differ in has no part of the prompt's own.
    dx, dy = (np.array([told[i] - told[j] for i, j in pairs]) for told in (x, y))
    assert len(own) == 16 and (dx * dy).sum() / (dx * dx).sum() == pytest.approx(SLOPE, abs=0.1)


def test_two_trials_of_a_prompt_say_how_quality_grows():
    """Prompts that differ by a hundred times hide it, unless each is seen twice."""
    made = profiles.profile()
    [tried] = made.header.effects["trials"]
    trials = made.header.effects["trials"]
    trials.clear()
    for prompt, easier in enumerate((1.0, 0.01, 0.1, 1e-3)):
        for part in (1.0, 0.04):
            # The harder prompts are tried with more, as if more did not help at all.
            added = part * math.sqrt(easier)
            direct = [added * x for x in tried["direct"]]
            trials.append(
                profiles.trial(6, direct=direct, error=easier**-0.5 * added**0.5 * tried["error"]) | {"prompt": prompt}
            )
    problem = Problem(made)
    assert problem._seen[2] == pytest.approx(0.5, abs=0.03)
    whole = (problem.grown * tried["direct"]).sum()
    between = problem.frames_error(whole) / problem.frames_error(0.04 * whole)
    assert between == pytest.approx(0.04**-0.5, rel=0.15)
    # Of the mean of the trials it is the mean.
    x, y, _ = problem._tried
    assert math.log(problem.frames_error(math.exp(x.mean()))) == pytest.approx(y.mean())
    for trial in trials:
        del trial["prompt"]
    assert Problem(made)._seen[2] < 0.4


def test_how_prompts_differ_is_told():
    made = profiles.profile()
    [tried] = made.header.effects["trials"]
    trials = made.header.effects["trials"]
    assert Problem(made).spread == pytest.approx(10 / math.log(10))
    trials.clear()
    for prompt in range(8):
        # Two trials of a prompt are one prompt.
        error = tried["error"] * (100.0 if prompt % 2 else 1.0)
        trials += [profiles.trial(6, error=error) | {"prompt": prompt}] * 2
    expected = math.sqrt((8 * 10.0**2 + (10 / math.log(10)) ** 2) / 8)
    found = fit(made, Targets(work=0.6)).header.predicted["psnr_spread_db"]
    assert found == Problem(made).spread == pytest.approx(expected)


def test_an_anchor_that_visits_each_pair_once_is_less_work():
    """By its plan; and what is pooled it visits for each of its outputs that have it."""
    twice, once = (Problem(profiles.profile(block=16), by="work") for _ in range(2))
    once.header = replace(once.header, kernel="gluon, dense block", grid=(5, 128, 128))
    assert not replace(once.header, grid=(5, 8, 8)).visits_once and not twice.header.visits_once
    assert once.header.visits_once and not replace(once.header, kernel="gluon, 8bit, dense block").visits_once
    plans = {rung: once._kept("anchor")[..., k].sum(1) for k, rung in enumerate(once.header.ladder)}
    learning = [(q, choice) for q, choice in enumerate(once.options[once.singles :]) if choice.learns]
    assert {choice.anchor_density for _, choice in learning} == {None, 0.3}
    for q, choice in learning:
        if choice.method == "anchor":
            less = twice.followed.work_at[..., q] - once.followed.work_at[..., q]
            assert np.allclose(less, plans[choice.rung])
        assert np.array_equal(twice.followed.work[..., q], once.followed.work[..., q])


@pytest.mark.parametrize("fade", [1.0, 0.5])
def test_a_soft_anchor_is_as_wrong_as_its_tail_and_stays_so(fade):
    made = profiles.profile()
    made.tensors["persist"].zero_()
    made.tensors["fade"].fill_(fade)
    problem = Problem(made, ("anchor", "tail"), "work")
    soft, hard = (problem.options.index(Choice("anchor", made.header.ladder[0], "bf16", x)) for x in (0.3, None))
    tail = problem.options.index(Choice("tail", made.header.ladder[2]))
    f, t, q, one = problem.followed, 2, soft - problem.singles, hard - problem.singles
    # As anchors route, the tail is off by 0.59, and by itself by 0.6, see tests/profiles.py.
    assert np.allclose(f.begun[..., q] * problem.weight, problem.single[0][..., tail] * (0.59 / 0.6) ** 2, rtol=2e-3)
    assert (f.begun[..., one] == 0).all() and (f.lost[..., (one, q)] == 0).all()
    assert np.allclose(f.work_at[..., one] - f.work_at[..., q], 2 - problem.single[2][..., tail])
    assert np.array_equal(f.aged[..., q], f.aged[..., one]) and np.array_equal(f.work[..., q], f.work[..., one])
    coarse = problem.options.index(Choice("anchor", made.header.ladder[0], "int4"))
    # Followed for two steps, the same error is there three times, as much of it as is added, and adds up as it is.
    ways = {}
    for option in (soft, hard, coarse):
        chosen = np.where((np.arange(6) >= t) & (np.arange(6) < t + 3), option, 0)[None].repeat(4, 0)
        ways[option] = problem.account(
            chosen, (np.arange(6) == t) & (chosen > 0), np.where(chosen > 0, t, np.arange(6))
        )
    root = np.sqrt(problem.weight[:, t : t + 3]) * [1, fade, fade]
    assert ways[soft].added - ways[hard].added == pytest.approx((f.begun[:, t, q] * root.sum(1) ** 2).sum())
    # What storage loses is not in the anchor's own output.
    lost = f.lost[:, t, coarse - problem.singles] * root[:, 1:].sum(1) ** 2
    assert ways[coarse].added - ways[hard].added == pytest.approx(lost.sum())


@pytest.mark.parametrize(
    ("branches", "signed"),
    [
        (("cond", "uncond"), [4, -3]),
        (("pred_cond", "pred_uncond"), [4, -3]),
        (("branch 0", "branch 1"), [4, -3]),
        (("cond_uncond",), [1]),
        (("branch 0",), [1]),
        (("cond", "uncond", "perturbed"), [4, -3, 1]),
    ],
)
def test_branches_count_as_guidance_weighs_them(branches, signed):
    made = profiles.profile()
    assert Problem(replace(made, header=replace(made.header, branches=branches))).signed.tolist() == signed


def test_cosmos_goes_beyond_what_the_prompt_says():
    """p + w (p - n), as test_families.py finds of its pipeline."""
    made = profiles.profile()
    weights = {"transformer": made.header.weights["transformer"] | {"class": "CosmosTransformer3DModel"}}
    header = replace(made.header, branches=("branch 0", "branch 1"), weights=weights)
    assert Problem(replace(made, header=header)).signed.tolist() == [5, -4]


def test_errors_that_stay_the_same_add_up_faster():
    made = profiles.profile()
    alone, steady = made, replace(made, tensors=made.tensors | {"persist": 0 * made.tensors["persist"] + 1.0})
    made.tensors["persist"].zero_()
    option = Problem(made).options.index(Choice("tail", made.header.ladder[0]))
    anchors = Problem(made).options.index(Choice("anchor", made.header.ladder[0], "bf16"))
    none = np.zeros((4, 6), bool)
    told = [
        [
            p.account(np.full((4, 6), option), none, np.arange(6)[None].repeat(4, 0)).added,
            p.account(np.full((4, 6), anchors), none | (np.arange(6) == 0), np.zeros((4, 6), int)).added,
        ]
        for p in (Problem(alone), Problem(steady))
    ]
    # Six steps that add up as they are: at most six times as much.
    assert 3 * told[0][0] < told[1][0] < 6 * told[0][0]
    # Five steps follow the anchor; errors grow with age, so all at once is less than five times as much.
    assert 2 * told[0][1] < told[1][1] < 5 * told[0][1]


def test_a_component_that_does_not_run_costs_nothing():
    made = profiles.profile(
        (("transformer.blocks.0.attn1", 2, 32), ("transformer_2.blocks.0.attn1", 2, 32)),
    )
    tensors = {name: x.clone() for name, x in made.tensors.items()}
    for x in tensors.values():
        x[:2, :, 3:] = math.nan
        x[2:, :, :3] = math.nan
    problem = Problem(replace(made, tensors=tensors))
    # The header of a profile that ran all layers at all steps says 58 seconds.
    path = solve(problem, Targets(speedup=58 / 25))
    assert math.isfinite(path.error) and path.error > 0
    assert (path.option[:2, 3:] == 0).all()
    assert problem.cheapest(1e-30, np.zeros(6)).seconds == pytest.approx(10 + 4 * 2 * 3 * 1.0)


def test_predicted_memory_is_what_the_engine_plans():
    made = fit(profiles.profile(), Targets(speedup=1.5), ("anchor",))
    layers = [Layer(name, i, 2, heads, dim) for i, (name, heads, dim) in enumerate(made.header.layers)]
    g = Generation(SparseConfig(profile="p"), layers, made)
    g.enter(
        TokenGrid(5, 8, 8), batch=1, device=torch.device("cpu"), timestep=0.0, step=0, total=6, branch="cond",
        levels=made.header.levels,
    )  # fmt: skip
    assert g._planned_bytes(g._table) / GIB == pytest.approx(made.header.predicted["state_gib"])


def test_the_profile_holds_what_was_chosen():
    made = fit(profiles.profile(), Targets(psnr=30.0))
    problem = Problem(made)
    path = solve(problem, Targets(psnr=30.0))
    choices = [Choice.from_dict(values) for values in made.header.choices]
    told = [choices[i] for i in made.tensors["choice"].flatten().tolist()]
    assert told == [problem.options[i] for row in path.option for _ in range(2) for i in row]
    assert made.header.predicted["psnr_db"] == pytest.approx(path.psnr) and made.header.targets == {"psnr": 30.0}
    # Fitted again, it starts from the measurements.
    assert fit(made, Targets(psnr=30.0)).header == made.header


def test_a_trial_corrects_what_is_predicted():
    made = profiles.profile()
    before = solve(Problem(made), Targets(speedup=1.4))
    [tried] = made.header.effects["trials"]
    tried |= {"error": 4 * tried["error"], "seconds": 43.0}
    after = Problem(made)
    assert after.slower == pytest.approx(1.3)
    begin = np.maximum.accumulate(np.where(before.anchor, np.arange(6), 0), 1)
    path = after.account(before.option, before.anchor, begin)
    assert path.error == pytest.approx(4 * before.error)
    dense = 10 + (before.option == 0).sum() * 2.0
    assert path.seconds - dense == pytest.approx(1.3 * (before.seconds - dense))
    # Dense is dense.
    assert after.cheapest(1e-30, np.zeros(6)).seconds == pytest.approx(made.header.seconds["transformers"])


def test_a_band_is_the_same_choices_at_some_steps():
    made = profiles.profile(steps=8)
    problem = Problem(made, ("tail", "anchor"), by="work")
    path = solve(problem, Targets(work=0.5))
    found = problem.within(path, range(2, 5))
    outside, inside = [0, 1, 5, 6, 7], slice(2, 5)
    assert (found.option[:, outside] == 0).all() and not found.anchor[:, outside].any()
    assert (found.direct[outside] == 0).all() and (found.direct[inside] > 0).any()
    # A head does the same there, but for memories that the band leaves with nobody to use them.
    kept = found.option[:, inside] == path.option[:, inside]
    assert kept.any() and (found.option[:, inside][~kept] == 0).all()
    learns = found.option >= problem.singles
    assert learns.any() and (found.anchor[:, 2] == learns[:, 2]).all()
    assert (path.anchor[:, 2] != learns[:, 2]).any() and path.anchor[:, 3].any()
    short = problem.within(path, range(2, 4))
    assert (short.option[path.anchor[:, 3], 3] == 0).all() and not short.anchor[:, 3].any()
    for t in range(2, 5):
        used = learns[:, t + 1] & ~found.anchor[:, t + 1] & (found.option[:, t + 1] == found.option[:, t])
        assert (used | ~found.anchor[:, t]).all()
    whole = problem.within(path, range(8))
    assert np.array_equal(whole.option, path.option) and whole.added == pytest.approx(path.added)
    tried, told = try_out(made, 20.0, range(2, 5))
    sparse = (tried.tensors["choice"] > 0).any(1).any(0).tolist()
    assert told["start"] == 2 and sparse == [x > 0 for x in told["direct"]] == [2 <= t < 5 for t in range(8)]


def test_bands_that_err_more_than_predicted_are_left_more_exact():
    made = profiles.profile(steps=8)
    path = solve(Problem(made, by="work"), Targets(work=0.5))
    bands = []
    for prompt in range(8):
        for first, times in ((0, 10.0), (4, 1.0)):
            _, told = try_out(made, 20.0, range(first, first + 4))
            grown = Problem(made).grown
            bands.append({"prompt": prompt, "part": first // 4, "direct": told["direct"],
                          "error": times * float((grown * told["direct"]).sum())})  # fmt: skip
    made.header.effects["bands"] = bands
    after = solve(Problem(made, by="work"), Targets(work=0.5))
    early = [(p.direct[:4] / p.direct.sum()).sum() for p in (path, after)]
    assert early[1] < 0.7 * early[0]


def test_what_is_tried_is_what_is_asked_for():
    made = profiles.profile()
    tried, told = try_out(made, 20.0)
    problem = Problem(made, by="work")
    path = solve(problem, Targets(psnr=20.0, by="work"))
    assert tried.fitted and told["work"] == path.work < 1
    assert (problem.grown * told["direct"]).sum() == pytest.approx(path.added)
    start = told["start"]
    assert (path.option[:, :start] == 0).all() and (path.option[:, start] > 0).any()
    dense = (path.option[:, start:] == 0).sum() * 2.0 + 10 * (6 - start) / 6
    assert told["seconds_known"] == pytest.approx(dense) and told["predicted_seconds"] > dense
    # A quality that only dense has is tried with dense.
    tried, told = try_out(made, 150.0)
    assert told["start"] == 5 and (tried.tensors["choice"] == 0).all() and sum(told["direct"]) == 0
