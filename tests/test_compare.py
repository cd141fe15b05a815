import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_sparse import compare, generate, models
from dit_sparse.calibration import metrics, table
from dit_sparse.cli import main
from dit_sparse.config import SparseConfig
from dit_sparse.video import read_video
from tests.tiny import tiny_wan

SIZE = ("--height", "16", "--width", "32", "--num_frames", "5", "--num_inference_steps", "5")
PROMPTS = ("a red ball", "the blue square moves left")
# Whatever else is in a row must be the same when it is made again.
TIMES = {
    "dit_seconds",
    "seconds",
    "attention_seconds",
    "peak_memory_bytes",
    "peak_memory_gib",
    "dit_speedup",
    "speedup",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "tiny-wan"
    tiny_wan(vae="1x1").save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def command(model, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return ["compare", "--model_id", str(model), "--prompts_file", "prompts.txt", *SIZE]


def without_times(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def refused(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("dit-sparse: ")
    return said


def test_a_comparison_and_all_it_writes(command, tmp_path, capsys):
    arguments = [*command, "--methods", "dense,tail", "anchor", "--density", "0.1", "0.3", "--seed", "3"]
    assert main(arguments) == 0
    out = tmp_path / "compare"
    rows, layers = table.read_rows(out / "results.csv"), table.read_rows(out / "layers.csv")
    names = ["dense", "tail 0.1", "tail 0.3", "anchor 0.1", "anchor 0.3"]
    assert [(row["setting"], row["prompt"], row["seed"]) for row in rows] == [
        (name, prompt, 3.0 + number) for name in names for number, prompt in enumerate(PROMPTS)
    ]
    dense, tail = rows[0], rows[2]
    assert dense["work"] == dense["density"] == dense["dense_share"] == 1 and dense["psnr_db"] is None
    assert 0.1 <= tail["density"] < 0.2 and tail["density"] < tail["work"] < 0.5 and tail["dense_share"] == 0.2
    for row in rows:
        assert 0 < row["attention_seconds"] < row["dit_seconds"] < row["seconds"] and row["peak_memory_bytes"] > 2**20
        assert row["fallbacks"] == 0 and row["prompt_score"] is None
    # 5 settings, 2 layers, 5 steps.
    assert len(layers) == 50 and {row["step"] for row in layers} == {0.0, 1.0, 2.0, 3.0, 4.0}
    by_setting = {name: [row for row in layers if row["setting"] == name] for name in names}
    assert all(row["work"] == 1 and row["error"] < 1e-5 for row in by_setting["dense"])
    assert all((row["work"] == 1) == (row["step"] == 0) for row in by_setting["tail 0.1"])
    assert all((row["error"] > 1e-3) == (row["step"] != 0) for row in by_setting["tail 0.1"])
    # Every setting's share of its run is what the run reported.
    assert np.mean([row["work"] for row in by_setting["anchor 0.1"]]) == pytest.approx(rows[6]["work"])
    # The table, in JSON and on the terminal, is made of the CSV.
    record = json.loads((out / "results.json").read_text())
    assert record["summary"] == table.plain(table.summary(rows))
    assert record["settings"]["anchor 0.3"]["density"] == 0.3 and record["seeds"] == [3, 4]
    shown = capsys.readouterr().out
    assert "tail 0.1" in shown and f"{record['summary'][1]['psnr_db']:.2f}" in shown
    assert "LPIPS is left out" in shown or rows[2]["lpips"] is not None
    # The videos, though lossy, are those that were scored.
    frames = [read_video(out / "videos" / f"{name}.1.mp4") for name in ("dense", "tail-0.1")]
    assert all(clip.shape == (5, 16, 32, 3) for clip in frames)


def test_what_is_scored_is_what_generate_makes(command, model, tmp_path):
    assert main([*command, "--methods", "none", "--density", "0.1", "--no_maps"]) == 0
    scored = {}
    for method in ("dense", "none"):
        same = ["generate", "--model_id", str(model), "--prompt", PROMPTS[0], *SIZE, "--method", method]
        assert main([*same, "--output_file", f"{method}.png"]) == 0
        scored[method] = read_video(tmp_path / f"{method}.png").astype(np.float64)
    row = table.read_rows(tmp_path / "compare" / "results.csv")[2]
    assert row["setting"] == "none 0.1" and row["prompt_number"] == 1
    assert row["psnr_db"] == pytest.approx(metrics.psnr(scored["none"], scored["dense"]), abs=1e-4)
    assert row["flicker"] == pytest.approx(metrics.flicker(scored["none"], scored["dense"]), abs=1e-7)
    assert not (tmp_path / "compare" / "layers.csv").exists()


def test_it_resumes_and_the_same_seed_gives_the_same_table(command, tmp_path, monkeypatch):
    arguments = [*command, "--methods", "anchor", "--density", "0.1"]
    assert main(arguments) == 0
    first = (tmp_path / "compare" / "results.csv").read_bytes()
    runs = sorted((tmp_path / "compare" / "runs").glob("*.json"))
    assert len(runs) == 2 * 3  # two prompts and one for the maps, dense and sparse
    made = []
    original = generate.frames_of
    monkeypatch.setattr(generate, "frames_of", lambda *given: made.append(given[1].prompt) or original(*given))
    assert main(arguments) == 0
    assert made == [] and (tmp_path / "compare" / "results.csv").read_bytes() == first
    # A run that was torn is made again, and nothing else.
    torn = next(run for run in runs if json.loads(run.read_text())["prompt"] == PROMPTS[1])
    torn.with_suffix(".npz").write_bytes(b"PK\x03\x04 half")
    assert main(arguments) == 0
    assert made == [PROMPTS[1]]
    # Elsewhere, from nothing: the same but for the times.
    assert main([*arguments, "--output_dir", "again"]) == 0
    assert len(made) == 1 + 6
    ours, theirs = (table.read_rows(tmp_path / name / "results.csv") for name in ("compare", "again"))
    assert without_times(ours) == without_times(theirs)
    layers = [(tmp_path / name / "layers.csv").read_bytes() for name in ("compare", "again")]
    assert layers[0] == layers[1]


def test_dense_runs_serve_another_comparison(command, monkeypatch):
    made = []
    original = generate.frames_of
    monkeypatch.setattr(generate, "frames_of", lambda *given: made.append(given[4]) or original(*given))
    shared = [*command, "--cache_dir", "cache", "--no_maps"]
    assert main([*shared, "--methods", "dense"]) == 0
    assert made == [0, 1]
    assert main([*shared, "--methods", "none", "--output_dir", "other"]) == 0
    assert made == [0, 1, 0, 1]
    # Another seed, size or number of steps is another dense run.
    assert main([*shared, "--methods", "dense", "--seed", "1"]) == 0
    assert made == [0, 1, 0, 1, 1, 2]
    assert main([*shared, "--methods", "dense", "--num_inference_steps", "4"]) == 0
    assert made == [0, 1, 0, 1, 1, 2, 0, 1]


def test_a_named_dense_backend_is_what_runs(command, tmp_path, capsys):
    assert main([*command, "--methods", "dense:native", "--no_maps"]) == 0
    rows = table.read_rows(tmp_path / "compare" / "results.csv")
    assert [row["setting"] for row in rows] == ["dense", "dense", "dense:native", "dense:native"]
    assert rows[2]["dense_kernel"] == "native" != rows[0]["dense_kernel"]
    assert rows[2]["psnr_db"] > 50 and rows[2]["work"] == 1
    capsys.readouterr()
    assert "dense:nothing cannot be had: " in refused(capsys, *command, "--methods", "dense:nothing")


def test_equal_work_is_equal_as_measured(command, tmp_path, capsys):
    equal = [*command, "--methods", "anchor,none,tail", "--density", "0.1", "--equal_work", "--no_maps"]
    assert main(equal) == 0
    rows = {row["setting"]: row for row in table.read_rows(tmp_path / "compare" / "results.csv")}
    grid_blocks = -(-(5 * 8 * 16) // 16)
    for name in ("none 0.1", "tail 0.1"):
        gap = rows["anchor 0.1"]["work"] - rows[name]["work"]
        assert 0 <= gap <= 1 / grid_blocks + 1e-6, name
        assert rows[name]["density"] > 0.2
    assert rows["tail 0.1"]["density"] < rows["none 0.1"]["density"]
    capsys.readouterr()
    said = refused(capsys, *[*equal, "--methods", "none,anchor", "--density", "0.05"])
    assert "anchor does " in said and "give a higher density" in said


def test_the_demo_model_is_scored_by_what_its_prompts_ask_for(tmp_path, model, monkeypatch):
    from dit_sparse.calibration.prompt_score import prompt_score
    from dit_sparse.samples import demo_world as world

    batch = world.sample_scenes(1, torch.Generator().manual_seed(5))
    clip = world.render(world.scene_tensors(batch, 144 / 128), 7, 128, 144)[0].permute(1, 2, 3, 0).numpy() / 2 + 0.5
    caption = world.caption(batch.scenes[0])
    assert prompt_score(caption, clip) == 1
    assert prompt_score(caption, np.full_like(clip, 0.5)) == 0
    assert prompt_score("a fox in the snow", clip) is None
    monkeypatch.setattr(models, "demo_directory", lambda: model)
    monkeypatch.setattr(generate, "DEMO", replace(generate.DEMO, height=16, width=32, num_frames=5))
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "--methods", "none", "--num_inference_steps", "4", "--no_maps"]) == 0
    rows = table.read_rows(tmp_path / "compare" / "results.csv")
    assert [row["prompt"] for row in rows] == [generate.DEMO.prompt] * 2
    assert all(0 <= row["prompt_score"] <= 1 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--methods", "anker"), "Unknown method 'anker': choose from anchor, "),
        (("--methods", "profile"), "Method profile needs --profile"),
        (("--density", "0"), "density is a share above 0 and at most 1, not 0"),
        (("--density",), "density takes"),
        (("--prompt", "a"), "Give --prompt or --prompts_file, not both."),
        (("--height", "30"), "height is a multiple of 16 for this model, not 30"),
        (("--prompts_file", "gone.txt"), "is no file"),
        (("--dense_steps", "7-9"), "dense_steps"),
        (("--methods", "anchor", "--refresh_every", "0"), "refresh_every is a number of steps from 1 on"),
        (("--methods", "none", "--refresh_every", "3"), "refresh_every only means something to methods that remember"),
        (("--output_dir", "prompts.txt"), "'prompts.txt' cannot be made"),
        (("--block", "17"), "Unknown block 17"),
    ],
)
def test_it_refuses_in_one_sentence_before_any_run(command, capsys, monkeypatch, arguments, said):
    monkeypatch.setattr(generate, "load", lambda *_: pytest.fail("read weights"))
    assert said in refused(capsys, *command, *arguments)


def test_summary_is_of_means_and_speedups_of_sums():
    def row(setting, number, dit, whole, psnr):
        return {
            "setting": setting, "method": setting, "density_asked": None, "prompt_number": number,
            "dit_seconds": dit, "seconds": whole, "psnr_db": psnr, "peak_memory_bytes": 2**30,
        }  # fmt: skip

    rows = [row("dense", 1, 4.0, 6.0, None), row("dense", 2, 8.0, 10.0, None)]
    rows += [row("x", 1, 1.0, 3.0, 30.0), row("x", 2, 2.0, 5.0, 40.0)]
    dense, x = table.summary(rows)
    assert (x["dit_speedup"], x["speedup"], x["psnr_db"], x["dit_seconds"]) == (4, 2, 35, 1.5)
    assert dense["dit_speedup"] == 1 and dense["psnr_db"] is None and x["peak_memory_gib"] == 1


def test_every_default_is_that_of_generate():
    options = compare.CompareOptions()
    for name in ("dense_steps", "dense_layers", "block"):
        assert getattr(options, name) == getattr(SparseConfig(), name)
