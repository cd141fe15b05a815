import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_sparse import compare, generate, models
from dit_sparse.calibration import metrics, probe, runs, table
from dit_sparse.calibration.maps import read_maps
from dit_sparse.cli import main
from dit_sparse.config import SparseConfig
from dit_sparse.video import read_video
from tests.tiny import tiny_wan
from tests.worded import worded

pytestmark = pytest.mark.usefixtures("one_thread")

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
    assert len(runs) == 2 * 2  # two prompts, dense and sparse; on a CPU the first one's run is the one for the maps
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
    assert len(made) == 1 + 4
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


def test_maps_are_made_of_the_runs_that_lie_beside_them(command, tmp_path):
    assert main([*command, "--methods", "none,anchor,dense", "--density", "0.1"]) == 0
    out = tmp_path / "compare"
    rows, maps = table.read_rows(out / "results.csv"), read_maps(out / "maps.npz")
    frames = {(row["setting"], row["prompt_number"]): np.load(out / "runs" / f"{row['run']}.npz")["frames"]
              for row in rows}  # fmt: skip
    assert set(maps.error) == set(maps.kept) == {"none 0.1", "anchor 0.1"}
    for name, error in maps.error.items():
        gaps = [np.abs(frames[name, n].astype(float) - frames["dense", n]).mean((0, 3)) / 255 for n in (1.0, 2.0)]
        assert error == pytest.approx(np.mean(gaps, 0), abs=1e-6) and error.max() > 0
    # The tokens are 5 x 8 x 16; all of one head's are shown.
    assert maps.query == (2, 4, 8) and maps.frames == (0, 1, 2, 3, 4) and maps.layer == "transformer.blocks.1.attn1"
    for name, kept in maps.kept.items():
        assert kept.shape == (2, 5, 8, 16) and kept[:, 2, 4, 8].all() and maps.step[name] == 2
        # A tenth of the blocks, and the query's own.
        assert 0.1 <= kept.mean() <= 0.1 + 2 / 40
    patches = frames["dense", 1.0].reshape(5, 8, 2, 16, 2, 3).mean((2, 4))
    assert np.abs(maps.picture - patches).max() <= 0.5
    page = (out / "report.html").read_text()
    assert page.count('data-map="kept"') == page.count('data-map="place"') == 2


def test_what_is_on_beside_a_method(command, tmp_path, model, monkeypatch):
    loaded = []
    original = generate.load
    monkeypatch.setattr(generate, "load", lambda *given: loaded.append(original(*given)) or loaded[-1])
    beside_tail = ("firstblock=0.2", "taylorseer", "magcache", "fp8", "fp8+taylorseer")
    methods = ",".join(["dense+firstblock=0.2,tail,none,none+8bit", *(f"tail+{extra}" for extra in beside_tail)])
    (tmp_path / "prompts.txt").write_text(PROMPTS[0])
    assert main([*command, "--num_inference_steps", "12", "--methods", methods, "--density", "0.3"]) == 0
    rows = {row["setting"]: row for row in table.read_rows(tmp_path / "compare" / "results.csv")}
    plain = rows["tail 0.3"]
    assert plain["skipped"] is None and rows["dense"]["skipped"] is None
    # Steps 0 to 2, 4 and 9 are computed, unless a change of what is predicted is a change here, too.
    assert rows["tail 0.3 +taylorseer"]["skipped"] == pytest.approx(1 - 5 / 12)
    assert rows["tail 0.3 +fp8 +taylorseer"]["skipped"] == pytest.approx(1 - 5 / 12)
    assert rows["tail 0.3 +fp8"]["skipped"] is None
    for name in ("dense +firstblock=0.2", "tail 0.3 +firstblock=0.2", "tail 0.3 +magcache"):
        # Of two blocks, the first is never skipped by the one, and both are by the other.
        assert 0 < rows[name]["skipped"] < (0.5 if "first" in name else 0.8), name
    for name, row in rows.items():
        if name.startswith("tail 0.3 "):
            assert row["method"] == "tail" + name.removeprefix("tail 0.3").replace(" ", "")
            # Work counts what was skipped, as work not done.
            assert row["work"] <= plain["work"] + 1e-3 and row["psnr_db"] != plain["psnr_db"], name
    assert rows["dense +firstblock=0.2"]["work"] == rows["dense +firstblock=0.2"]["dense_share"] < 1
    settings = json.loads((tmp_path / "compare" / "results.json").read_text())["settings"]
    assert (
        settings["tail 0.3 +fp8"]["fp8"] is True and "use_lite_mode=True" in settings["tail 0.3 +taylorseer"]["cache"]
    )
    # Where there is no kernel for it, as each call of each layer says.
    low, full = rows["none 0.3 +8bit"], rows["none 0.3"]
    assert settings["none 0.3 +8bit"]["precision"] == "8bit" and low["psnr_db"] == full["psnr_db"]
    assert low["fallbacks"] > 0 == full["fallbacks"]
    # The pipeline is as it was loaded.
    [pipe] = loaded
    fresh = original(generate.GenerateOptions(), models.find(str(model)), torch.device("cpu"), torch.float32)
    assert not pipe.transformer.is_cache_enabled
    weights = fresh.transformer.state_dict()
    for name, x in pipe.transformer.state_dict().items():
        assert x.dtype == torch.float32 and torch.equal(x, weights[name])


def test_what_a_model_cannot_take_is_said_in_one_sentence(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "frames_of", lambda *_: pytest.fail("made a video"))
    worded("pixart-sigma").save_pretrained("pixart")
    command = ["compare", "--model_id", "pixart", "--prompt", "a", "--height", "224", "--width", "240"]
    said = refused(capsys, *command, "--methods", "tail,tail+firstblock")
    assert "PixArtTransformer2DModel takes none of diffusers' caches, so not firstblock." in said


def test_an_error_of_somebody_elses_is_one_sentence_only_where_theirs_is_on(command, monkeypatch, capsys):
    original = generate.frames_of

    def fails(pipe, *given):
        if cached and not pipe.transformer.is_cache_enabled:
            return original(pipe, *given)
        raise TypeError("lists are not tensors.\nmore")

    monkeypatch.setattr(generate, "frames_of", fails)
    cached = False
    with pytest.raises(TypeError, match="lists are not tensors"):
        main([*command, "--methods", "tail"])
    cached = True
    assert main([*command, "--methods", "dense+firstblock", "--no_maps"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "dit-sparse: dense +firstblock fails with this model: TypeError, lists are not tensors."


def test_the_probes_own_time_is_in_no_time(command, tmp_path, monkeypatch):
    measured = []
    original = probe._error

    def slow(*given):
        time.sleep(0.1)
        measured.append(1)
        return original(*given)

    monkeypatch.setattr(probe, "_error", slow)
    (tmp_path / "prompts.txt").write_text(PROMPTS[0])
    assert main([*command, "--methods", "dense"]) == 0
    row = table.read_rows(tmp_path / "compare" / "results.csv")[0]
    # Two layers, two branches, five steps.
    assert len(measured) == 20 and row["attention_seconds"] < row["dit_seconds"] < row["seconds"] < 0.1 * 20


def test_on_a_gpu_nothing_compiled_at_first_use_is_in_a_time(command, tmp_path, monkeypatch):
    """There the maps have a run of their own, which comes first; without maps, a run is made that counts nowhere."""
    made = []
    original = runs.Maker._run
    monkeypatch.setattr(runs.Maker, "on_gpu", True)
    monkeypatch.setattr(runs.Maker, "_run", lambda self, on, setting, job, done: made.append((job.number, job.probed))
                        or original(self, on, setting, job, done))  # fmt: skip
    assert main([*command, "--methods", "dense"]) == 0
    assert made == [(0, True), (0, False), (1, False)]
    assert main([*command, "--methods", "dense", "--no_maps", "--output_dir", "other"]) == 0
    assert made[3:] == [(0, False), (0, False), (1, False)]
    assert len(table.read_rows(tmp_path / "other" / "results.csv")) == 2


@pytest.mark.slow
def test_compiled_blocks_are_timed_without_what_compiling_takes(command, tmp_path):
    assert main([*command, "--methods", "tail,tail+compile,tail+firstblock+compile", "--density", "0.3"]) == 0
    rows = {row["setting"]: row for row in table.read_rows(tmp_path / "compare" / "results.csv")}
    plain, compiled = rows["tail 0.3"], rows["tail 0.3 +compile"]
    assert compiled["attention_seconds"] is None and compiled["dit_seconds"] < 10
    assert compiled["psnr_db"] == pytest.approx(plain["psnr_db"], abs=1)
    assert compiled["work"] == pytest.approx(plain["work"]) and compiled["dense_share"] == plain["dense_share"]
    # The second prompt's run finds the blocks compiled.
    assert len(list((tmp_path / "compare" / "runs").glob("*.json"))) == 8
    assert {row["setting"] for row in table.read_rows(tmp_path / "compare" / "layers.csv")} == {"dense", "tail 0.3"}


def test_images_are_compared_as_one_frame(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    worded("flux").save_pretrained("flux")
    size = ("--height", "224", "--width", "240", "--num_inference_steps", "4")
    command = ["compare", "--model_id", "flux", "--prompt", "a red ball", *size]
    assert main([*command, "--methods", "none,tail", "--density", "0.2"]) == 0
    row = table.read_rows(tmp_path / "compare" / "results.csv")[1]
    images = [read_video(tmp_path / "compare" / "videos" / f"{name}.1.png") for name in ("none-0.2", "dense")]
    assert images[0].shape == (1, 224, 240, 3) and row["flicker"] is None
    # A png holds what was scored.
    assert row["psnr_db"] == pytest.approx(metrics.psnr(*images), abs=1e-4)
    page = (tmp_path / "compare" / "report.html").read_text()
    assert "data:image/png" in page and "data:video" not in page and '"still": true' in page
    assert "images of 224 x 240" in page
    assert read_maps(tmp_path / "compare" / "maps.npz").kept["tail 0.2"].shape == (2, 1, 14, 15)


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


def test_blocks_of_keys_are_smaller_for_the_methods_that_take_it(command, tmp_path):
    sizes = ("--block", "64", "--key_block", "16", "--density", "0.1", "--equal_work", "--no_maps")
    assert main([*command, "--methods", "anchor,none,rectify", *sizes]) == 0
    settings = json.loads((tmp_path / "compare" / "results.json").read_text())["settings"]
    told = {name: (values["block"], values["key_block"]) for name, values in settings.items() if name != "dense"}
    assert told == {"anchor 0.1": (64, 16), "none 0.1": (64, 16), "rectify 0.1": (64, "auto")}
    # Work is made equal by whole blocks of keys, of which there are 40 or 10.
    for name, blocks in (("none 0.1", 40), ("rectify 0.1", 10)):
        assert settings[name]["density"] * blocks % 1 == pytest.approx(0.5)


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
        (("--key_block", "17"), "Unknown key_block 17"),
        (("--key_block", "64"), "key_block is at most the block of 16 tokens, not 64"),
        (("--key_block", "16", "--methods", "sta,rectify"), "key_block only means something to method anchor or"),
        (("--methods", "tail+teacache"), "Unknown 'teacache' in 'tail+teacache': after a + comes one of firstblock, "),
        (("--methods", "tail+fp8+fp8"), "fp8 is in 'tail+fp8+fp8' twice"),
        (("--methods", "tail+firstblock+magcache"), "one step cache at a time"),
        (("--methods", "tail+magcache+compile"), "magcache's blocks outside of torch.compile"),
        (("--methods", "tail+compile=2"), "compile takes no number, and 'tail+compile=2' gives it one"),
        (("--methods", "tail+firstblock=-1"), "After firstblock= comes a threshold from 0 on, not '-1'."),
        (
            ("--methods", "tail+taylorseer=1.5"),
            "After taylorseer= comes a whole number of steps from 1 on",
        ),
        (("--methods", "dense+8bit"), "precision only means something to method"),
        (("--methods", "tail+8bit=4"), "8bit takes no number"),
        (("--methods", "tail+compile+fp8"), "which torch.compile cannot trace"),
        (("--methods", "tail,none+firstblock", "--equal_work"), "How much work 'none+firstblock' skips is not known"),
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
    for name in ("dense_steps", "dense_layers", "block", "key_block"):
        assert getattr(options, name) == getattr(SparseConfig(), name)
