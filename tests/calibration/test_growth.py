import numpy as np
import pytest

from dit_sparse.calibration.growth import USUAL, Run, fit_slopes, lasting

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
