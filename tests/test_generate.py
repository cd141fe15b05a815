import json
import shutil
from dataclasses import fields, replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import yaml

from dit_sparse import generate, models
from dit_sparse.cli import main
from dit_sparse.config import SparseConfig
from tests.tiny import tiny_wan
from tests.worded import worded

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = ("--height", "32", "--width", "48", "--num_frames", "3", "--num_inference_steps", "5")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generate") / "tiny-wan"
    tiny_wan(vae="1x1").save_pretrained(folder)
    return folder


@pytest.fixture
def command(model, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return ["generate", "--model_id", str(model), "--prompt", "a red ball", *SIZE]


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def frames(folder: Path, name: str) -> np.ndarray:
    return np.stack([iio.imread(file) for file in sorted(folder.glob(f"{name}-*.png"))])


def test_a_video_and_all_there_is_to_know_about_it(command, model, tmp_path, capsys):
    assert main([*command, "--density", "0.2", "--seed", "7"]) == 0
    name = "tiny-wan.32x48x3.5steps.anchor-d0.2.seed7"
    assert files(tmp_path) == [f"{name}.json", f"{name}.mp4"]
    assert iio.imread(tmp_path / f"{name}.mp4", plugin="FFMPEG").shape == (3, 32, 48, 3)
    record = json.loads((tmp_path / f"{name}.json").read_text())
    settings = record["settings"]
    assert {field.name for field in fields(SparseConfig)} <= set(settings)
    wanted = {"model_id": str(model), "prompt": "a red ball", "height": 32, "num_frames": 3, "seed": 7, "density": 0.2}
    assert settings == settings | wanted | {"dtype": "float32", "device": "cpu", "guidance_scale": 5.0}
    assert record["versions"]["torch"] == torch.__version__ and record["device"]
    assert record["peak_memory_bytes"] > 2**20
    attention = record["attention"]
    assert [step["phase"] for step in attention["steps"]] == ["dense", "anchor", "sparse", "sparse", "sparse"]
    assert {phase: entry["steps"] for phase, entry in record["seconds_by_phase"].items()} == {
        "dense": 1,
        "anchor": 1,
        "sparse": 3,
    }
    assert sum(entry["seconds"] for entry in record["seconds_by_phase"].values()) == pytest.approx(
        record["seconds"]["steps"]
    )
    assert 0 < record["seconds"]["steps"] < record["seconds"]["generate"]
    assert 0.2 <= attention["density"] < 0.25 and 0.4 < attention["work"] < 0.8
    assert attention["fallbacks"] == {} and attention["state_bytes"] > 0
    out, err = capsys.readouterr()
    assert f"{name}.mp4: " in out and f"attention work {attention['work']:.3f} of dense" in out
    assert "step 5/5" in err


def test_the_record_is_a_config_that_makes_the_same_video(command, tmp_path):
    assert main([*command, "--method", "tail", "--density", "0.3", "--output_file", "a.png"]) == 0
    settings = json.loads((tmp_path / "a.json").read_text())["settings"]
    settings = {
        name: value for name, value in settings.items() if value is not None and name not in ("config", "tile")
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings | {"output_file": "b.png"}))
    assert main(["generate", "--config", "run.yaml"]) == 0
    assert np.array_equal(frames(tmp_path, "a"), frames(tmp_path, "b"))
    assert main(["generate", "--config", "run.yaml", "--seed", "1", "--output_file", "c.png"]) == 0
    assert not np.array_equal(frames(tmp_path, "a"), frames(tmp_path, "c"))


def test_dense_is_what_the_stock_pipeline_makes(command, model, tmp_path):
    assert main([*command, "--method", "dense", "--negative_prompt", "blue", "--output_file", "a.png"]) == 0
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    stock = pipe(
        prompt="a red ball",
        negative_prompt="blue",
        height=32,
        width=48,
        num_frames=2,  # Where one latent is one frame, WanPipeline makes one more than it is asked for.
        num_inference_steps=5,
        generator=torch.Generator().manual_seed(0),
    ).frames[0]
    mine = frames(tmp_path, "a")
    assert mine.shape == (3, 32, 48, 3)
    assert np.abs(mine - 255.0 * stock).max() <= 0.5 + 255e-4
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["attention"]["work"] == 1 and set(record["seconds_by_phase"]) == {"dense"}


def test_sparse_is_not_dense(command, tmp_path):
    assert main([*command, "--method", "dense", "--output_file", "a.png"]) == 0
    assert main([*command, "--method", "none", "--output_file", "b.png"]) == 0
    assert not np.array_equal(frames(tmp_path, "a"), frames(tmp_path, "b"))


def test_frames_are_as_many_as_asked_for(tmp_path, monkeypatch):
    tiny_wan(vae="2x2").save_pretrained(tmp_path / "wan")
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--model_id", "wan", "--prompt", "a", *SIZE, "--fps", "5", "--output_file", "a.gif"]) == 0
    assert iio.imread(tmp_path / "a.gif").shape[0] == 3
    assert iio.immeta(tmp_path / "a.gif")["duration"] == 200


def test_defaults_come_from_the_pipeline_or_the_demo(model, monkeypatch):
    options = generate.GenerateOptions(model_id=str(model), prompt="a", width=64)
    assert generate.request_of(options, models.find(str(model))) == generate.Request("a", 480, 64, 81, 50, 5.0)
    monkeypatch.setattr(models, "demo_directory", lambda: model)
    found = generate.request_of(generate.GenerateOptions(height=96), models.find(None))
    assert found == replace(generate.DEMO, height=96)


def test_seconds_left_take_the_mean_of_each_phase():
    seen = [("dense", 4.0), ("anchor", 5.0), ("sparse", 1.0), ("sparse", 2.0)]
    assert generate.seconds_left(seen, ["sparse", "anchor", "sparse"]) == pytest.approx(1.5 + 5 + 1.5)
    assert generate.seconds_left(seen[:1], ["anchor", "sparse"]) == pytest.approx(8)
    assert generate.seconds_left(seen, []) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--method", "magic"), "radial, ditfastattn or dense, not 'magic'."),
        (("--densty", "0.2"), "Unknown option '--densty': did you mean --density?"),
        (("--density", "0"), "density is a share above 0 and at most 1, not 0.0."),
        (("--top_p", "1.5"), "top_p is a share above 0 and at most 1, not 1.5."),
        (("--height", "40"), "height is a multiple of 16 for this model, not 40: nearest are 32 and 48."),
        (("--width", "1"), "width is a multiple of 16 for this model, not 1: nearest is 16."),
        (("--num_frames", "0"), "num_frames is 1 more than a multiple of 1 for this model, not 0: nearest is 1."),
        (("--num_inference_steps", "0"), "num_inference_steps is at least 1, not 0."),
        (("--dense_steps", "4-9"), "dense_steps: '4-9' in '4-9' lies outside 0..4."),
        (("--dense_layers", "0-2"), "dense_layers: '0-2' in '0-2' lies outside 0..1."),
        (("--guidance_scale", "nan"), "guidance_scale is a number from 0 on, not nan."),
        (("--seed", "-1"), "seed is a whole number from 0 to 2**63 - 1, not -1."),
        (("--fps", "0"), "fps is from 1 to 240, not 0."),
        (("--device", "abacus"), "Unknown device 'abacus': choose from auto, cpu, cuda"),
        (("--device", "meta"), "device is cpu or cuda, not 'meta'."),
        (("--device", "cuda:99"), "There is no device 'cuda:99' here"),
        (("--device", "cpu", "--offload", "model"), "offload 'model' moves weights to a GPU"),
        (("--dtype", "int8"), "dtype takes auto, bfloat16, float16 or float32, not 'int8'."),
        (("--output_file", "no/where.mp4"), "output_file 'no/where.mp4' is in no directory that exists"),
        (("--output_file", "a.avi"), "output_file ends in .mp4, .gif or .png, not '.avi'."),
        (("--model_id", "./nowhere"), "model_id './nowhere' is no directory here"),
        (("--config", "no.yaml"), "config 'no.yaml' is no file"),
    ],
)
def test_bad_input_is_refused_before_any_model_work(command, tmp_path, capsys, monkeypatch, arguments, said):
    def load(*_: object) -> None:
        raise AssertionError("a weight was about to be read")

    monkeypatch.setattr(generate, "load", load)
    assert main([*command, *arguments]) == 2
    out, err = capsys.readouterr()
    assert said in err and err.count("\n") == 1 and out == ""
    assert files(tmp_path) == []


def test_a_prompt_is_needed_where_the_model_has_none(model, capsys):
    assert main(["generate", "--model_id", str(model), *SIZE]) == 2
    assert "prompt is missing: give --prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pipeline", "said"),
    [
        ("WanImageToVideoPipeline", "which starts from an existing image; generate only makes"),
        ("WanVideoToVideoPipeline", "which starts from an existing video; generate only makes"),
        ("PipelineOfTomorrow", "is a PipelineOfTomorrow, which diffusers"),
    ],
)
def test_pipelines_it_cannot_drive_are_refused(command, model, tmp_path, capsys, pipeline, said):
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": pipeline}))
    assert main([*command, "--model_id", str(copy)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["transformer", "vae"])
def test_parts_of_unknown_kind_are_refused_before_any_model_work(command, model, tmp_path, capsys, broken):
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    index = json.loads((copy / "model_index.json").read_text())
    index[broken] = ["diffusers", "AuraFlowTransformer2DModel"] if broken == "transformer" else ["mine", "Autoencoder"]
    (copy / "model_index.json").write_text(json.dumps(index))
    assert main([*command, "--model_id", str(copy)]) == 2
    said = {
        "transformer": "has a AuraFlowTransformer2DModel as its transformer",
        "vae": "only classes of diffusers and",
    }
    assert said[broken] in capsys.readouterr().err


def test_strict_refuses_nan_in_attention(command, model, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["blocks.1.attn1.to_v.weight"][0, 0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    assert main([*command, "--model_id", str(copy), "--strict"]) == 2
    err = capsys.readouterr().err
    assert "v of transformer.blocks.1.attn1 holds NaN or Inf" in err and "Traceback" not in err
    assert main([*command, "--model_id", str(copy)]) == 2
    assert "values of the video are NaN or Inf" in capsys.readouterr().err
    assert files(tmp_path) == ["copy"]


def test_interrupting_a_generation_leaves_no_file(command, tmp_path, capsys, monkeypatch):
    def interrupted(*_: object) -> float:
        raise KeyboardInterrupt

    (tmp_path / "a.mp4").write_bytes(b"made before")
    monkeypatch.setattr(generate, "seconds_left", interrupted)
    assert main([*command, "--output_file", "a.mp4"]) == 130
    assert "Interrupted" in capsys.readouterr().err
    assert files(tmp_path) == ["a.mp4"] and (tmp_path / "a.mp4").read_bytes() == b"made before"


IMAGE = ("--prompt", "a red ball", "--height", "224", "--width", "240", "--num_inference_steps", "4")


def test_an_image_is_a_png_and_what_the_stock_pipeline_makes(tmp_path, capsys, monkeypatch):
    from diffusers import DiffusionPipeline

    monkeypatch.chdir(tmp_path)
    for name, guided in (("flux", {}), ("pixart-sigma", {"negative_prompt": "blue"})):
        worded(name).save_pretrained(tmp_path / name)
        command = ["generate", "--model_id", name, *IMAGE, *(f"--{key}={value}" for key, value in guided.items())]
        assert main([*command, "--method", "dense"]) == 0
        capsys.readouterr()
        pipe = DiffusionPipeline.from_pretrained(tmp_path / name)
        pipe.set_progress_bar_config(disable=True)
        asked = {} if name == "flux" else {"use_resolution_binning": False}
        stock = pipe(
            prompt="a red ball", height=224, width=240, num_inference_steps=4, output_type="np",
            generator=torch.Generator().manual_seed(0), **guided, **asked,
        ).images[0]  # fmt: skip
        made = iio.imread(tmp_path / f"{name}.224x240x1.4steps.dense.seed0.png")
        assert np.abs(made - 255.0 * stock).max() <= 0.5 + 255e-4
        # Both tell of their steps, each in its own way.
        assert main([*command, "--method", "tail", "--density", "0.3", "--output_file", f"{name}.png"]) == 0
        assert "step 4/4" in capsys.readouterr().err
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert record["files"] == [f"{name}.png"] and record["settings"]["num_frames"] == 1
        assert record["attention"]["work"] < 1 and record["attention"]["fallbacks"] == {}
        assert not np.array_equal(iio.imread(tmp_path / f"{name}.png"), made)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--output_file", "a.mp4"), "output_file of an image ends in .png, not '.mp4'."),
        (("--num_frames", "5"), "num_frames is 1 for this model, which makes images, not 5."),
        (("--negative_prompt", "blue"), "FluxPipeline goes by its guidance_scale in one forward"),
        (("--height", "225"), "height is a multiple of 16 for this model, not 225"),
    ],
)
def test_what_makes_no_sense_for_an_image_is_refused(tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    worded("flux").save_pretrained(tmp_path / "flux")
    monkeypatch.setattr(generate, "load", lambda *_: pytest.fail("read weights"))
    assert main(["generate", "--model_id", "flux", *IMAGE, *arguments]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert said in err


@pytest.mark.slow
def test_compiled_blocks_make_the_same_video(command, tmp_path):
    assert main([*command, "--output_file", "a.png"]) == 0
    assert main([*command, "--compile", "--output_file", "b.png"]) == 0
    assert np.abs(frames(tmp_path, "a").astype(int) - frames(tmp_path, "b")).max() <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["none", "model", "sequential", "group"])
def test_offload_makes_the_same_video(command, tmp_path, offload):
    plain = [*command, "--dtype", "float32", "--device", "cuda"]
    assert main([*plain, "--output_file", "a.png"]) == 0
    assert main([*plain, "--offload", offload, "--output_file", "b.png"]) == 0
    assert np.abs(frames(tmp_path, "a").astype(int) - frames(tmp_path, "b")).max() <= 2
