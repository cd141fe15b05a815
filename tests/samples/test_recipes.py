"""Each recipe of samples/ runs as it stands, on a tiny pipeline that is saved here with tokenizer and text encoder."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from dit_sparse.profile import Profile
from dit_sparse.video import read_video
from tests.tiny import tiny_wan
from tests.worded import worded

SAMPLES = Path(__file__).parents[2] / "samples"
WAN = ("--height", "16", "--width", "32", "--num_frames", "5", "--num_inference_steps", "6")


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("recipes") / "tiny-wan"
    tiny_wan().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """(recipe, arguments) -> what it printed, in an empty directory, by name or by number."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        runpy.run_path(str(SAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    yield run
    torch.set_num_threads(threads)


def test_every_recipe_has_a_test_and_is_short():
    scripts = {path.stem: path.read_text() for path in SAMPLES.glob("*.py")}
    modules = ("demo_world", "dense_calls")
    recipes = {name for name, text in scripts.items() if "def main" not in text and name not in modules}
    tested = set(re.findall(r'run\(\s*"(\w+)"', Path(__file__).read_text()))
    assert recipes == tested and len(recipes) == 7
    for name in recipes:
        assert len(scripts[name].splitlines()) <= 70, name


def test_generate_wan(run, wan, tmp_path):
    said = run("generate_wan", "--model_id", wan, "--prompt", "a red ball", *WAN, "--density", "0.3")
    work, quality = map(float, re.search(r"work ([\d.]+) of dense, PSNR ([\d.]+) dB", said).groups())
    assert 0.3 < work < 0.9 and quality > 15
    assert [phase for phase, _ in re.findall(r"(\w+) ([\d.]+) s", said)] == ["dense", "anchor"] + ["sparse"] * 3 + [
        "anchor"
    ]
    clips = [read_video(tmp_path / f"{name}.mp4") for name in ("dense", "sparse")]
    assert clips[0].shape == clips[1].shape == (5, 16, 32, 3)


def test_generate_cogvideox(run, tmp_path):
    worded("cogvideox-2b").save_pretrained(tmp_path / "tiny")
    size = ("--height", "160", "--width", "160", "--num_frames", "25", "--num_inference_steps", "6")
    said = run("generate_cogvideox", "--model_id", "tiny", "--prompt", "a red ball", *size, "--output_file", "a.gif")
    assert "a.gif: 2 dense, 1 anchor, 3 sparse steps" in said
    assert float(re.search(r"work ([\d.]+)", said)[1]) < 1 and re.search(r"between steps: [\d.]+ MiB as bf16", said)
    assert read_video(tmp_path / "a.gif").shape == (25, 160, 160, 3)


def test_generate_flux(run, tmp_path):
    worded("flux").save_pretrained(tmp_path / "tiny")
    size = ("--height", "224", "--width", "240", "--num_inference_steps", "4")
    said = run("generate_flux", "--model_id", "tiny", "--prompt", "a red ball", *size)
    assert said.startswith("210 tokens, attention is ") and "Sparse attention does not pay at this size" in said
    assert float(re.search(r"work ([\d.]+)", said)[1]) < 1
    assert read_video(tmp_path / "flux.png").shape == (1, 224, 240, 3)


def test_calibrate_then_generate(run, wan, tmp_path):
    (tmp_path / "told.txt").write_text("a red ball\n")
    arguments = ("--model_id", wan, "--prompts_file", "told.txt", *WAN, "--target_psnr", "18")
    said = run("calibrate_then_generate", *arguments)
    assert "measured.profile.safetensors: " in said and "chosen.profile.safetensors: " in said
    # On a model this small dense attention is the fastest, and may be what is chosen.
    assert 0 < float(re.search(r"calibrated.mp4: attention work ([\d.]+)", said)[1]) <= 1
    assert Profile.load(tmp_path / "chosen.profile.safetensors").header.targets == {"psnr": 18.0}
    assert read_video(tmp_path / "calibrated.mp4").shape == (5, 16, 32, 3)


def test_compose_with_a_cache(run, wan):
    said = run("compose_with_a_cache", "--model_id", wan, "--prompt", "a red ball", *WAN, "--threshold", "0.5")
    rows = re.findall(r"^([a-z ]+?) +[\d.]+ s(?:, [\d.]+x, PSNR ([\d.]+) dB)?$", said, re.M)
    assert [name for name, _ in rows] == ["dense", "cache", "sparse", "cache and sparse"]
    quality = [float(text) for _, text in rows[1:]]
    # Together they cost more than either, and each costs something.
    assert quality[2] < min(quality[:2]) and max(quality) < 80


def test_compare_three_methods(run, wan):
    said = run(
        "compare_three_methods", "--model_id", wan, "--prompt", "a red ball", *WAN, "--methods", "anchor", "tail",
        "none", "--density", "0.3",
    )  # fmt: skip
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if line.startswith("│")]
    assert [row[0] for row in cells] == ["dense", "anchor", "tail", "none"] and cells[0][4] == "-"
    assert all(float(row[2]) < 1 and 10 < float(row[4]) < 100 for row in cells[1:])


def test_use_the_kernel(run):
    said = run("use_the_kernel", "--tokens", "1500", "--heads", "2", "--density", "0.25")
    errors = [float(text) for text in re.findall(r"error ([\d.]+)%", said)]
    # What stands in for the rest helps.
    assert len(errors) == 2 and errors[1] < errors[0] < 60
    assert said.count("25.0% of the blocks") == 2
