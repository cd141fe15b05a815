"""What the simulation of the cache says of the smallest cases."""

import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "samples" / "cache_misses.py"
made = runpy.run_path(str(PROGRAM))
Setting, misses = made["Setting"], made["misses"]

SMALL = Setting(tokens=128 * 200, density=0.3, heads=4, cache_mib=4, programs=20)


def test_a_cache_that_holds_a_head_misses_each_block_once():
    setting = replace(SMALL, cache_mib=2 * 200 / 16)
    every = len(setting.counts()) * setting.heads
    copied = setting.counts().sum() * setting.heads
    for turned in (False, True):
        assert misses(setting, turned=turned, apart=turned) == pytest.approx(every / copied, rel=0.02)


def test_turned_lists_miss_less_where_a_head_outgrows_the_cache():
    start, turned, apart = (misses(SMALL, turned=t, apart=a) for t, a in ((False, False), (True, False), (True, True)))
    assert apart < turned < 0.7 * start


def test_counts_are_as_many_as_the_density_says_whatever_their_spread():
    for spread in (1.0, 10.0):
        counts = replace(SMALL, spread=spread).counts()
        assert counts.mean() == pytest.approx(60, abs=0.5) and (counts[:-1] >= counts[1:]).all()
        assert counts[0] / counts[-1] == pytest.approx(spread, rel=0.1)


def test_the_command_prints_a_row_for_each_setting():
    arguments = ["--tokens", "6400", "--density", "0.2", "--spread", "1", "2", "--heads", "1"]
    said = subprocess.run(
        [sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, check=True
    ).stdout
    assert len(said.splitlines()) == 3 and said.splitlines()[2].split()[:2] == ["0.2", "2"]
