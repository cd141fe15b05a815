"""Context parallelism of diffusers, in two processes on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def two(tmp_path, name, method="anchor", order="before", degree="ulysses_degree"):
    """What the processes print, and how they fail."""
    file = tmp_path / "meeting"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.pipelines.parallel_worker"]
    started = [
        subprocess.Popen(
            [*command, str(rank), name, method, order, degree, str(file)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ended = [process.communicate(timeout=300) for process in started]
    lines = [line for out, _ in ended for line in out.splitlines() if line.startswith("RANK")]
    return lines, "".join(error for _, error in ended)


def parsed(lines, error):
    """For each process: how far it is from one process alone, its work, and that of one alone; what else it said is
    that sparse attention changed something, and no fallback."""
    assert len(lines) == 2, error[-3000:]
    found = []
    for line in lines:
        _, _, worst, work, alone, *told = line.split(maxsplit=6)
        assert told == ["True", "{}"], lines
        found.append((float(worst), float(work), float(alone)))
    return found


SLOW = pytest.mark.slow
CASES = [
    ("flux", "anchor", "after"),
    ("wan", "profile", "after"),
    ("wan", "lopsided", "after"),
    *(
        pytest.param(*case, marks=SLOW)
        for case in (
            ("wan", "anchor", "before"),
            ("wan", "rectify", "after"),
            ("wan", "svg", "before"),
            ("wan", "dense", "before"),
            ("flux", "reshape", "before"),
            ("qwen-image", "tail", "before"),
            ("qwen-image", "anchor", "after"),
            ("ltx", "anchor", "before"),
            ("wan", "profile", "before"),
            ("flux", "profile", "before"),
            ("qwen-image", "profile", "after"),
            ("wan", "lopsided", "before"),
            ("wan", "anchor", "after, compiled"),
            ("wan", "lopsided", "before, compiled"),
            ("qwen-image", "profile", "after, compiled"),
        )
    ),
]


@pytest.mark.parametrize(("name", "method", "order"), CASES)
def test_ulysses_gives_what_one_process_gives(tmp_path, name, method, order):
    worst, works, (alone, _) = zip(*parsed(*two(tmp_path, name, method, order)), strict=True)
    assert max(worst) < 1e-4
    # Each counts its own heads, which are dealt out by what a profile says that they do.
    assert sum(works) / 2 == pytest.approx(alone, rel=1e-6)
    if method == "profile":
        assert works[0] != works[1]
    else:
        assert max(works) < 1.05 * min(works), works


@pytest.mark.slow
def test_topp_shares_blocks_out_among_the_heads_of_a_process(tmp_path):
    """And so gives something else than one process, but every process does as much as any other."""
    for worst, work, alone in parsed(*two(tmp_path, "wan", "topp")):
        assert 1e-4 < worst < 0.1
        assert work == pytest.approx(alone, rel=1e-3)


TENSOR = [
    ("flux", "anchor", "after"),
    *(
        pytest.param(*case, marks=SLOW)
        for case in (
            ("flux", "tail", "before"),
            ("qwen-image", "anchor", "before"),
            ("flux2", "anchor", "before"),
            ("flux", "profile", "after"),
        )
    ),
]


@pytest.mark.parametrize(("name", "method", "order"), TENSOR)
def test_tensor_parallelism_gives_what_one_process_gives(tmp_path, name, method, order):
    worst, works, (alone, _) = zip(*parsed(*two(tmp_path, name, method, order, "tp_degree")), strict=True)
    assert max(worst) < 1e-4
    assert sum(works) / 2 == pytest.approx(alone, rel=1e-6)


@pytest.mark.slow
def test_a_profile_cannot_be_told_to_fit_weights_in_parts(tmp_path):
    lines, error = two(tmp_path, "flux", "profile", "before", "tp_degree")
    assert not lines
    assert "call sparsify() before enable_parallelism()" in error


@pytest.mark.slow
def test_a_ring_is_dense_and_says_so(tmp_path):
    """On the CPU no backend of diffusers can do it either."""
    lines, error = two(tmp_path, "wan", "anchor", "before", "ring_degree")
    assert not lines
    assert "dense fallback: context parallelism passes keys around" in error
    assert "Native attention does not support return_lse" in error
