from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit_sparse import generate
from dit_sparse.cli import main
from tests.tiny import tiny_wan
from tests.worded import worded

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = ("--height", "16", "--width", "32", "--num_frames", "5", "--num_inference_steps", "6")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("visualize") / "tiny-wan"
    tiny_wan().save_pretrained(folder)
    return folder


@pytest.fixture
def command(model, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return ["visualize", "--model_id", str(model), "--prompt", "a red ball", *SIZE]


def test_pictures_and_the_numbers_behind_them(command, tmp_path, capsys):
    asked = ("--method", "none", "--density", "0.2", "--order", "raster", "--step", "3", "--layer", "0")
    query = ("--heads", "1", "--query", "0", "0", "0", "4", "7", "15")
    assert main([*command, *asked, *query]) == 0
    found = np.load(tmp_path / "visualize" / "routing.npz")
    # 640 tokens in blocks of 16, in raster order: a block is a row of the grid.
    assert found["blocks"].shape == (1, 40, 40) and found["grid"].tolist() == [5, 8, 16]
    assert (str(found["layer"]), int(found["step"])) == ("transformer.blocks.0.attn1", 3)
    kept = found["kept"]
    assert kept.shape == (1, 2, 5, 8, 16)
    assert np.array_equal(kept[0, 0].all(-1), found["blocks"][0, 0].reshape(5, 8))
    assert np.array_equal(kept[0, 1].any(-1), found["blocks"][0, 39].reshape(5, 8))
    assert (found["blocks"].sum(-1) >= 8).all() and found["blocks"].mean() < 0.26
    for name in ("blocks.png", "frames.png"):
        with Image.open(tmp_path / "visualize" / name) as picture:
            assert min(picture.size) > 200 and len(np.unique(picture.convert("L"))) > 20
    assert "none, step 3, transformer.blocks.0.attn1: heads 1 keep " in capsys.readouterr().out


def test_without_a_choice_it_is_the_middle(command, tmp_path):
    assert main([*command, "--output_dir", "a/b"]) == 0
    found = np.load(tmp_path / "a" / "b" / "routing.npz")
    assert (str(found["layer"]), int(found["step"])) == ("transformer.blocks.1.attn1", 3)
    assert found["heads"].tolist() == [0, 1] and found["queries"].tolist() == [[2, 4, 8]]
    assert found["kept"][:, 0, 2, 4, 8].all()


def test_an_image_has_one_frame(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    worded("pixart-sigma").save_pretrained("pixart")
    size = ("--height", "224", "--width", "240", "--num_inference_steps", "4")
    assert main(["visualize", "--model_id", "pixart", "--prompt", "a red ball", *size, "--method", "sta"]) == 0
    assert np.load(tmp_path / "visualize" / "routing.npz")["kept"].shape == (2, 1, 1, 14, 15)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--method", "dense"), "Method dense keeps every block"),
        (("--step", "6"), "step is from 0 to 5 in a run of 6, not 6."),
        (("--step", "0"), "Step 0 is dense, so that every block is kept; not dense are 1, 2, 3, 4, 5."),
        (("--query", "1", "2"), "query takes frame, row and column of each token, so three numbers each, not 2."),
        (("--query", "1", "2", "16"), "There is no token 1 2 16: frames go to 4, rows to 7 and columns to 15."),
        (("--output_dir", "taken"), "'taken' cannot be made"),
    ],
)
def test_it_refuses_in_one_sentence_before_any_model_work(command, tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.setattr(generate, "load", lambda *_: pytest.fail("read weights"))
    (tmp_path / "taken").write_text("")
    assert main([*command, *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--layer", "2"), "layer is from 0 to 1, or a name from transformer.blocks.0.attn1 to transformer.blocks.1."),
        (("--layer", "blocks.0"), "not 'blocks.0'."),
        (("--heads", "0", "2"), "heads are from 0 to 1 in this model, not 2."),
        (("--dense_layers", "0-0", "--layer", "0"), "transformer.blocks.0.attn1 was dense at "),
    ],
)
def test_what_only_the_model_tells_is_refused_too(command, capsys, arguments, said):
    assert main([*command, *arguments]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
