import json

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import BaseOutput
from safetensors.torch import load_file, save_file

from dit_sparse.calibration.values import bytes_of, copied, from_tensors, sample_of, to_tensors

CPU = torch.device("cpu")
# [2, 3] and [3]: 24 and 12 bytes.
WIDE, ROW = torch.arange(6.0).view(3, 2).T, torch.arange(3.0)


def value():
    return {
        "latents": [WIDE, (ROW, None)],
        "shapes": [[(1, 14, 15)], []],
        "scale": (1.0, 0.1, float("inf")),
        "text": {"on": True, "name": "é", "none": {}},
        "said": Transformer2DModelOutput(sample=ROW),
        "empty": (),
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, BaseOutput) and not isinstance(b, BaseOutput):
        return False
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_a_value_comes_back_from_a_file(tmp_path):
    named = to_tensors("a/b", copied(value(), CPU)) | to_tensors("a", None) | to_tensors("c", (ROW.half(),))
    save_file(named, tmp_path / "x.safetensors")
    read = load_file(tmp_path / "x.safetensors")
    made = from_tensors("a/b", read)
    assert same(value(), made) and not same(value() | {"empty": []}, made)
    assert torch.equal(made["said"].sample, ROW) and torch.equal(made["said"][0], ROW)
    assert from_tensors("a", read) is None and same((ROW.half(),), from_tensors("c", read))
    # No class is named in the file, and so none is loaded from it.
    assert "Transformer2D" not in json.dumps([x.tolist() for x in named.values() if x.dtype == torch.uint8])
    assert b"Transformer2D" not in (tmp_path / "x.safetensors").read_bytes()


def test_a_copy_shares_nothing():
    mine = value()
    copy = copied(mine, CPU)
    assert same(mine, copy) and bytes_of(copy) == bytes_of(mine) == 24 + 12 + 12
    copy["latents"][0].zero_()
    copy["said"].sample.zero_()
    copy["text"]["on"] = False
    assert same(mine, value())


@pytest.mark.parametrize(
    ("odd", "name"), [(object(), "object"), ([{1: 2}], "dict"), ({"a": (torch.float16,)}, "dtype"), ({1}, "set")]
)
def test_what_cannot_be_told_again_is_named(odd, name):
    with pytest.raises(TypeError, match=f"^a {name}$"):
        copied(odd, CPU)


def test_the_sample_is_the_first_that_is_said():
    other = torch.ones(1)
    for said in (ROW, (ROW,), (ROW, other), Transformer2DModelOutput(sample=ROW), copied({"x": ROW}, CPU)["x"]):
        assert torch.equal(sample_of(said), ROW)
    # Rows of a batch, one after the other.
    assert torch.equal(sample_of(([ROW, ROW + 1], other)), torch.stack([ROW, ROW + 1]))


@pytest.mark.parametrize("said", [None, (), [], {"sample": ROW}, ("a",)])
def test_an_output_without_a_sample_is_refused(said):
    with pytest.raises(ValueError, match=r"in which no sample is known: it is to be a tensor, a list of tensors"):
        sample_of(said)
