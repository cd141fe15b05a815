import json
import runpy
import sys
from argparse import Namespace
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from diffusers import WanTransformer3DModel

from dit_sparse.profile import Profile

SAMPLES = Path(__file__).parents[2] / "samples"
# The scripts import each other by name.
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "path", [str(SAMPLES), *sys.path])
    script = runpy.run_path(str(SAMPLES / "profile_table.py"))
between, front, read, uniform, verdict = (script[name] for name in ("between", "front", "read", "uniform", "verdict"))

ROWS = [
    {"work": 0.2, "psnr_db": 20.0},
    {"work": 0.4, "psnr_db": 30.0},
    {"work": 0.5, "psnr_db": 28.0},
    {"work": 0.8, "psnr_db": 40.0},
    {"work": 0.8, "psnr_db": 35.0},
]


def test_the_front_is_what_nothing_beats():
    assert front(ROWS, "work") == [(0.2, 20.0), (0.4, 30.0), (0.8, 40.0)]


@pytest.mark.parametrize(("x", "y"), [(0.2, 20.0), (0.3, 25.0), (0.6, 35.0), (0.8, 40.0), (0.1, None), (0.9, None)])
def test_between_two_settings_lies_a_line(x, y):
    assert between(x, front(ROWS, "work")) == (y if y is None else pytest.approx(y))


def test_a_profile_is_compared_at_equal_work_and_at_equal_quality():
    told = verdict({"work": 0.3, "psnr_db": 30.0}, ROWS, "work")
    assert told["gain_db"] == pytest.approx(5.0) and told["ratio"] == pytest.approx(4 / 3)
    assert verdict({"work": 0.1, "psnr_db": 50.0}, ROWS, "work") == {"gain_db": None, "ratio": None}


def test_every_method_is_among_the_uniform_settings_and_the_quick_ones_are_some_of_them():
    every, quick = uniform(False), uniform(True)
    methods = {config.method for config in every.values()}
    assert methods == {"anchor", "tail", "reshape", "rectify", "none", "topp", "svg", "sta", "radial", "ditfastattn"}
    assert {config.method for config in quick.values()} == {"anchor", "reshape", "tail"}
    assert quick.items() <= every.items() and len(quick) < len(every) / 3
    assert any(config.anchor_density for config in every.values())


def test_the_profiles_that_come_along_belong_to_the_weights_that_do():
    found = sorted(SAMPLES.glob("*.profile.safetensors"))
    assert len(found) == 3
    demo = WanTransformer3DModel.from_pretrained(SAMPLES / "demo" / "transformer")
    for path in found:
        profile = Profile.load(path)
        profile.check({"transformer": demo})
        assert abs(profile.header.predicted["work"] - profile.header.targets["work"]) < 0.01
    demo.blocks[0].attn1.to_q.weight.data *= 1.01
    with pytest.raises(ValueError, match="other weights"):
        profile.check({"transformer": demo})


def test_only_some_settings_by_how_they_begin():
    some = uniform(quick=False, only=["anchor 0.1, every 8"])
    assert len(some) > 3 and all(name.startswith("anchor 0.1, every 8,") for name in some)
    with pytest.raises(SystemExit, match="No setting begins with"):
        uniform(quick=False, only=["ankor"])


def test_profiles_alone_and_uniform_settings_made_before(monkeypatch, tmp_path):
    made, asked = script["made"], []
    monkeypatch.setitem(made.__globals__, "measure", lambda _, configs, *rest: asked.append((list(configs), *rest)))
    monkeypatch.setitem(made.__globals__, "WanPipeline", MagicMock())
    args = Namespace(device="cpu", model_id="demo", num_frames=15, height=128, width=144, steps=20, batch=4,
                     profile=["a.safetensors"], num_prompts=2, seed=80_000, quick=True, only=[])  # fmt: skip
    made(args)
    [(names, scenes, seed, settings)] = asked
    assert names == ["dense", "a.safetensors"] and seed == 80_000 and len(scenes) == 2 and settings.batch == 4
    args.seed = 80_001
    made(args)
    assert asked[1][1] != scenes
    rows = [{"setting": name, "psnr_db": 30.0 + i, "each": [30.0 + i]} for i, name in enumerate(("dense", "a", "b"))]
    for name, some in (("first", rows[:2]), ("second", [rows[0] | {"psnr_db": 1.0}, rows[2]])):
        (tmp_path / name).write_text(json.dumps(some))
    assert read([tmp_path / "first", tmp_path / "second"]) == rows
    (tmp_path / "odd").write_text(json.dumps([rows[2] | {"each": [1.0, 2.0]}]))
    with pytest.raises(SystemExit, match="odd has clips of 2 prompts, and .*first of another number"):
        read([tmp_path / "first", tmp_path / "odd"])


def test_quality_and_seconds_measured_apart(tmp_path, monkeypatch, capsys):
    def row(setting, work, seconds, db):
        return {"setting": setting, "work": work, "seconds": seconds, "psnr_db": db, "each": [db]}

    profile = SAMPLES / "demo_work39.profile.safetensors"
    quality = [row("dense", 1, 9, 200), row(profile.name, 0.4, 9, 32), row("a", 0.3, 9, 28), row("b", 0.5, 9, 34)]
    seconds = [row("dense", 1, 9, 1), row(profile.name, 0.4, 5, 1), row("a", 0.3, 4, 1), row("b", 0.5, 8, 1)]
    for name, rows in (("quality", quality), ("seconds", [*seconds, row("c", 1, 1, 1)])):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    out = tmp_path / "out.json"
    files = ["--rows", tmp_path / "quality.json", "--seconds", tmp_path / "seconds.json", "--output_file", out]
    monkeypatch.setattr("sys.argv", ["profile_table.py", "--profile", str(profile), *map(str, files)])
    script["main"]()
    told = json.loads(out.read_text())[1]["verdict"]
    # On the line from a to b: 31 dB at work 0.4, 29.5 at 5 seconds, and 32 dB at work 0.433 and 6.67 seconds.
    assert told["work"] == {"gain_db": pytest.approx(1), "ratio": pytest.approx(0.26 / 0.6 / 0.4)}
    assert told["seconds"] == {"gain_db": pytest.approx(2.5), "ratio": pytest.approx(20 / 3 / 5)}
