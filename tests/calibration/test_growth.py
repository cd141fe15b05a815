import numpy as np
import pytest

from dit_sparse.calibration.growth import USUAL, Band, Run, corrected, fit_slopes, lasting

# Evenly spaced, but for a shift of 8, as video models have it.
LEVELS = tuple(8 * s / (1 + 7 * s) for s in (1 - i / 16 for i in range(16)))


def run(slopes, scale=1.0, direct=None):
    """What is measured where errors grow by these slopes."""
    direct = np.linspace(1.0, 2.0, 16) if direct is None else direct
    grown = lasting(LEVELS, slopes) ** 2
    return Run(direct, scale * np.cumsum(direct * grown) / grown)


def test_what_is_put_in_last_stays_as_it_is_and_what_was_first_has_grown_most():
    grown = lasting(LEVELS)
    assert grown[-1] == 1 and (np.diff(grown) < 0).all() and np.isfinite(grown).all()
    assert np.allclose(lasting(LEVELS, (0, 0, 0)), 1)
    # With slope 1 it is the change of scale from noise to video.
    assert np.allclose(lasting((0.9, 0.5), (1, 1, 1)), [2.0, 1.0])


@pytest.mark.parametrize("slopes", [(0.6, 1.2, 1.5), (1.0, 2.0, 1.0)])
def test_slopes_are_found_again_whatever_the_runs_are_off(slopes):
    found = fit_slopes(LEVELS, [run(slopes, scale) for scale in (0.1, 1.0, 7.0)] * 20)
    assert found == pytest.approx(slopes, abs=0.1)


def test_without_runs_they_are_the_usual_ones():
    nothing = Run(np.zeros(16), np.full(16, np.nan))
    for runs in ([], [nothing], [run(USUAL)]):
        assert fit_slopes(LEVELS, runs) == pytest.approx(USUAL, abs=1e-6)


def test_one_run_moves_them_some_of_the_way():
    [first, second, third] = fit_slopes(LEVELS, [run((0.8, 2.4, 1.3))])
    assert 1.6 < second < 2.4 and abs(first - 0.8) < 0.2 and abs(third - 1.3) < 0.4


def bands(grown, prompts, level=1.0, late=()):
    """Four bands of four steps, of prompts that are more or less easily changed; those of `late` (prompt, part) have
    a dense step first."""
    found = []
    for prompt in range(prompts):
        for part, first in enumerate(range(0, 16, 4)):
            begin = first + ((prompt, part) in late)
            direct = np.where((np.arange(16) >= begin) & (np.arange(16) < first + 4), 1e-3, 0.0)
            found.append(Band(direct, level * 4.0**prompt * float((direct * grown).sum()), prompt, part))
    return found


def test_bands_correct_growth_and_not_what_all_have_in_common():
    thought = lasting(LEVELS) ** 2
    tilt = np.exp(np.linspace(1.5, -1.5, 16))
    found = corrected(thought, bands(thought * tilt, 200, level=1e-3 / 4.0**199)) / thought
    # In the middle of bands it is what was measured, and what is beyond the outer ones is as off as they are.
    assert found[6] / found[9] == pytest.approx(tilt[6] / tilt[9], rel=0.1)
    assert found[0] / found[15] == pytest.approx(np.exp(2.4), rel=0.2) and found[14] == found[15]
    assert np.log(found).mean() == pytest.approx(0.0, abs=0.2)
    # A few prompts are believed less.
    some = corrected(thought, bands(thought * tilt, 2)) / thought
    assert 1.3 < some[0] / some[15] < 0.7 * found[0] / found[15]


def test_without_bands_to_compare_growth_stays():
    thought = lasting(LEVELS) ** 2
    nothing = Band(np.zeros(16), 1e-9, 0, 0)
    for some in ([], [nothing], bands(3 * thought, 4)[:1], [nothing, *bands(3 * thought, 1)[:1]]):
        assert np.array_equal(corrected(thought, some), thought)
    assert np.allclose(corrected(thought, bands(3 * thought, 4)), thought)


def test_prompts_that_differ_are_no_growth():
    """Where some have no band in a part, or one that begins later."""
    thought = lasting(LEVELS) ** 2
    every = bands(3 * thought, 4, late=((3, 1),))
    assert np.allclose(corrected(thought, every), thought)
    assert np.allclose(corrected(thought, [band for band in every if band.part > 0 or band.prompt < 2]), thought)
