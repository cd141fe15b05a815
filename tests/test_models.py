import json
import shutil
from pathlib import Path

import pytest

from dit_sparse import models
from dit_sparse.pipelines import wan
from dit_sparse.pipelines.session import FAMILIES
from tests.tiny import tiny_wan

WAN = {"patch_size": [1, 2, 2]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "wan"
    tiny_wan(vae="8x4", wan22=True).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "wan"))


def refused(folder: Path | str | None) -> str:
    with pytest.raises(ValueError) as caught:
        models.find(folder if folder is None else str(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_whole_directory_is_found(saved):
    files = models.find(str(saved))
    assert files.is_local and files.index["_class_name"] == "WanPipeline"
    assert {name: kind for name, (kind, _) in files.transformers.items()} == {
        "transformer": "WanTransformer3DModel",
        "transformer_2": "WanTransformer3DModel",
    }
    assert files.transformers["transformer"][1]["num_layers"] == 2
    assert files.vae["scale_factor_spatial"] == 8


def test_a_directory_that_is_not_there_is_no_hub_id(tmp_path):
    for name in (tmp_path / "no", "./no", "no", "a/b/c", "../x/y"):
        assert f"model_id {str(name)!r} is no directory" in refused(name)


def test_a_directory_without_an_index(tmp_path):
    assert "has no model_index.json" in refused(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    assert "model_index.json is not JSON" in refused(tmp_path)
    (tmp_path / "model_index.json").write_text("[]")
    assert "should hold a JSON object" in refused(tmp_path)


@pytest.mark.parametrize("part", ["vae", "scheduler", "tokenizer", "text_encoder", "transformer", "transformer_2"])
def test_a_missing_part_is_named(folder, part):
    shutil.rmtree(folder / part)
    assert f"lacks {part}: model_index.json names it" in refused(folder)


def test_missing_weights_are_named(folder):
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    assert "lacks the weights of transformer" in refused(folder)


def test_pickles_are_refused(folder):
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    assert "vae/diffusion_pytorch_model.bin, a pickle, and only safetensors" in refused(folder)


def test_a_missing_shard_is_named(folder):
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    part = folder / "transformer"
    (part / "diffusion_pytorch_model.safetensors").rename(part / "model-1-of-2.safetensors")
    (part / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks transformer/model-2-of-2.safetensors, one of the 2 files" in refused(folder)
    shutil.copy(part / "model-1-of-2.safetensors", part / "model-2-of-2.safetensors")
    assert models.find(str(folder)).is_local


def test_foreign_code_is_refused(folder):
    edit(folder / "model_index.json", vae=["my_code", "Autoencoder"])
    assert "wants Autoencoder from my_code as its vae" in refused(folder)
    edit(folder / "model_index.json", _class_name=["pipeline", "Mine"])
    assert "brings its own pipeline code" in refused(folder)


def test_only_the_configuration_of_a_hub_id_is_fetched(saved, tmp_path, monkeypatch):
    asked = []

    def snapshot(name: str, allow_patterns: str) -> str:
        asked.append((name, allow_patterns))
        shutil.copytree(saved, tmp_path / "hub", ignore=shutil.ignore_patterns("*.safetensors"))
        return str(tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    files = models.find("some/wan")
    assert asked == [("some/wan", "*.json")]
    assert files.source == "some/wan" and not files.is_local and len(files.transformers) == 2


def test_a_hub_id_that_cannot_be_had_is_one_sentence(monkeypatch):
    def snapshot(*_: object, **__: object) -> str:
        raise OSError("404 not found.\nlong\nstory")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    said = "model_id 'some/wan' is neither a directory nor to be had from Hugging Face: 404 not found."
    assert refused("some/wan") == said


def test_the_demo_is_the_default_and_its_absence_says_what_to_do(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "demo_directory", lambda: saved)
    assert models.find(None).source == str(saved)
    monkeypatch.setattr(models, "demo_directory", lambda: tmp_path)
    assert f"The demo model is not at {tmp_path}: give --model_id" in refused(None)


def test_unknown_transformers_are_refused(folder):
    models.check_known(models.find(str(folder)), ["WanTransformer3DModel"])
    with pytest.raises(
        ValueError, match="has a WanTransformer3DModel as its transformer; known transformers are A, B"
    ):
        models.check_known(models.find(str(folder)), ["B", "A"])
    edit(folder / "model_index.json", transformer=[None, None], transformer_2=[None, None])
    with pytest.raises(ValueError, match="is a WanPipeline without a transformer"):
        models.check_known(models.find(str(folder)), ["A"])


@pytest.mark.parametrize(
    ("vae", "size", "said"),
    [
        ((8, 4), (480, 832, 80), "num_frames is 1 more than a multiple of 4 for this model, not 80: nearest are 77"),
        ((8, 4), (481, 832, 81), "height is a multiple of 16 for this model, not 481: nearest are 480 and 496."),
        ((8, 4), (480, 830, 81), "width is a multiple of 16 for this model, not 830: nearest are 816 and 832."),
        ((16, 4), (720, 1280, 81), "height is a multiple of 32 for this model, not 720: nearest are 704 and 736."),
        ((1, 1), (40, 32, 5), "height is a multiple of 16 for this model, not 40: nearest are 32 and 48."),
        ((8, 4), (0, 832, 81), "height is a multiple of 16 for this model, not 0: nearest is 16."),
        ((8, 4), (-16, 832, 81), "not -16: nearest is 16."),
        ((8, 4), (7, 832, 81), "not 7: nearest is 16."),
        ((8, 4), (480, 832, 0), "not 0: nearest is 1."),
        ((8, 4), (480, 832, 3), "not 3: nearest are 1 and 5."),
    ],
)
def test_sizes_a_model_cannot_take_come_with_the_nearest_it_can(vae, size, said):
    config = {"scale_factor_spatial": vae[0], "scale_factor_temporal": vae[1]}
    with pytest.raises(ValueError) as caught:
        models.check_size(wan.FAMILY.size(WAN, config), *size)
    assert said in str(caught.value)


def test_legal_sizes_are_those_the_pipeline_takes_unchanged():
    models.check_size(wan.FAMILY.size(WAN, {}), 480, 832, 81)
    models.check_size(wan.FAMILY.size(WAN, {"scale_factor_spatial": 16, "scale_factor_temporal": 4}), 704, 1280, 121)
    models.check_size(wan.FAMILY.size(WAN, {"scale_factor_spatial": 1, "scale_factor_temporal": 1}), 16, 32, 7)
    models.check_size(wan.FAMILY.size({"patch_size": [1, 1, 1]}, {"scale_factor_spatial": 8}), 160, 192, 33)
    models.check_size(wan.FAMILY.size(WAN, {}), 16, 16, 1)


def test_published_models():
    assert models.published("Wan2.1-14B").transformer["num_attention_heads"] == 40
    assert models.published("wan2.2-a14b").transformers == 2
    assert models.published("wan2.2-ti2v-5b").vae == {"scale_factor_spatial": 16, "scale_factor_temporal": 4}
    for model in models.PUBLISHED.values():
        size = FAMILIES[model.class_name].size(model.transformer, model.vae)
        models.check_size(size, model.height, model.width, model.num_frames)
    with pytest.raises(ValueError, match="Unknown family 'wan2.1-1.4b': did you mean 'wan2.1-14b'"):
        models.published("wan2.1-1.4b")
    with pytest.raises(ValueError, match="choose from wan2.1-1.3b, wan2.1-14b, wan2.2-a14b, wan2.2-ti2v-5b, "):
        models.published("zzz")
