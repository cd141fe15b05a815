"""Seconds of a run without what is done once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.calibration.fit import Targets, Verified, fit, learned
from dit_sparse.calibration.steady import FAR, sampled, steady
from tests import profiles


@given(st.lists(st.floats(0.5, 1.0), min_size=3, max_size=30), st.integers(0, 29), st.floats(0, 100))
def test_a_step_that_compiled_counts_as_any_other(took, at, more):
    at %= len(took)
    compiled = [x + more * (i == at) for i, x in enumerate(took)]
    assert steady(took) == pytest.approx(sum(took))
    assert sum(took) - 0.5 <= steady(compiled) <= sum(took) + FAR


def test_steps_of_two_forwards_are_no_outliers():
    took = [1.0] * 15 + [2.0] * 5
    assert steady(took) == pytest.approx(sum(took)) and steady([]) == 0


@pytest.mark.parametrize(
    ("steps", "found"),
    [(range(10), [0, 3, 6, 9]), (range(3), [0, 1, 2]), ([4], [4]), ([1, 2, 3, 5, 8, 13], [1, 3, 5, 13])],
)
def test_sampled_steps_are_spread_over_all(steps, found):
    assert sampled(steps) == found


def test_anchors_beside_what_follows_them():
    """Dense anchors take six times as long as the steps between, which is expected of them."""
    known, rest = [0.1] * 8, [0.6, 0.1, 0.1, 0.1] * 2
    took = [k + 1.4 * r for k, r in zip(known, rest, strict=True)]
    assert steady(took, known, rest) == pytest.approx(sum(took))
    took[0] += 20
    took[1] += 3
    assert steady(took, known, rest) == pytest.approx(0.8 + 1.4 * 1.8)
    # Nothing is sparse, or takes less than what it is made of.
    assert steady([0.1, 0.1, 9.0], [0.1] * 3, [0.0] * 3) == pytest.approx(0.3)
    assert steady([0.05, 0.05, 9.0], [0.1] * 3, [0.1] * 3) == pytest.approx(0.2)


def test_what_was_compiled_in_a_prompt_that_verifies_is_not_learned():
    made = fit(profiles.profile(), Targets(psnr=30.0))
    whole = made.header.seconds["transformers"]
    seconds = [whole / 12] * 6
    clean, compiled = (
        learned(made, [Verified("a", 1e-3, took, whole)]).header.effects["trials"][-1]["seconds"]
        for took in (seconds, [*seconds[:3], seconds[3] + 500.0, *seconds[4:]])
    )
    assert compiled == pytest.approx(clean, rel=0.3) and clean <= whole / 2
