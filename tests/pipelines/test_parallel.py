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
    """Of each process how far it is from one process alone, its work, that of one alone, and how many graphs it made;
    what else it said is that sparse attention changed something, and no fallback."""
    assert len(lines) == 2, error[-3000:]
    found = []
    for line in lines:
        _, _, worst, work, alone, graphs, *told = line.split(maxsplit=7)
        assert told == ["True", "{}"], lines
        found.append((float(worst), float(work), float(alone), int(graphs)))
    return found


SLOW = pytest.mark.slow
CASES = [
    ("flux", "anchor", "after"),
    ("wan", "profile", "after"),
    *(
        pytest.param(*case, marks=SLOW)
        for case in (
            # Compiled, it is below.
            ("wan", "lopsided", "after"),
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
        )
    ),
]


@pytest.mark.parametrize(("name", "method", "order"), CASES)
def test_ulysses_gives_what_one_process_gives(tmp_path, name, method, order):
    worst, works, (alone, _), graphs = zip(*parsed(*two(tmp_path, name, method, order)), strict=True)
    assert graphs == (0, 0)
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
    for worst, work, alone, _ in parsed(*two(tmp_path, "wan", "topp")):
        assert 1e-4 < worst < 0.1
        assert work == pytest.approx(alone, rel=1e-3)


COMPILED = [
    ("wan", "lopsided", "after, eager", 3),
    *(
        pytest.param(*case, marks=SLOW)
        for case in (
            ("wan", "anchor", "before, eager", 3),
            ("wan", "lopsided", "before, inductor", 3),
            ("qwen-image", "profile", "after, eager", 2),
            ("flux", "anchor", "after, eager", 2),
            ("flux", "profile", "before, eager", 2),
            # Without parallelism there was one for all of Wan's layers, and one for each of Flux's kinds.
            ("wan", "lopsided", "after a run, eager", 1 + 3),
            ("flux", "anchor", "after a run, eager", 2 + 2),
        )
    ),
]


@pytest.mark.parametrize(("name", "method", "order", "graphs"), COMPILED)
def test_compiled_blocks_deal_their_heads_out_too(tmp_path, name, method, order, graphs):
    """A graph for each kind of block, whichever heads a layer deals out; diffusers' hook on the first block makes one
    more of Qwen-Image, and two of Wan."""
    worst, works, (alone, _), compiled = zip(*parsed(*two(tmp_path, name, method, order)), strict=True)
    assert max(worst) < 1e-4
    assert sum(works) / 2 == pytest.approx(alone, rel=1e-6)
    assert compiled == (graphs, graphs)


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
    worst, works, (alone, _), _ = zip(*parsed(*two(tmp_path, name, method, order, "tp_degree")), strict=True)
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
