import errno
import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from dit_sparse import codes
from dit_sparse import profile as module
from dit_sparse.calibrate import BINS, DISTANCES, CalibrateOptions, _ladder
from dit_sparse.calibration.record import Plan
from dit_sparse.choices import DENSE, Choice, Rung
from dit_sparse.config import SparseConfig
from dit_sparse.layout import TokenGrid
from dit_sparse.profile import Profile, fingerprint
from tests import profiles
from tests.tiny import tiny_wan

CPU = torch.device("cpu")


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "a.profile.safetensors"
    profiles.profile().save(path)
    return path


def test_a_profile_is_read_as_it_was_written(saved):
    one = profiles.profile()
    other = Profile.load(saved)
    assert json.dumps(asdict(other.header)) == json.dumps(asdict(one.header))
    assert other.source == str(saved) and not other.fitted
    assert other.tensors.keys() == one.tensors.keys()
    for name, x in one.tensors.items():
        assert other.tensors[name].dtype == x.dtype
        # Of bytes: half of 1/254 or 2/254, half of 4.4 %.
        kind = dict(atol=0.002, rtol=1e-3) if name in codes.BETWEEN else dict(atol=0, rtol=0)
        kind = dict(atol=0.004, rtol=1e-3) if name in ("together", "persist") else kind
        kind = dict(atol=2.0**-12, rtol=0.0225) if name in codes.RELATIVE else kind
        torch.testing.assert_close(other.tensors[name], x, equal_nan=True, msg=name, **kind)


def test_what_was_read_is_written_as_it_was(saved, tmp_path):
    """However often a fit reads a file and writes it again."""
    other = Profile.load(saved)
    other.save(tmp_path / "again.safetensors")
    again = Profile.load(tmp_path / "again.safetensors")
    for name, x in other.tensors.items():
        torch.testing.assert_close(again.tensors[name], x, atol=0, rtol=0, equal_nan=True, msg=name)


def test_every_byte_of_a_statistic_is_one_number():
    every = torch.arange(256, dtype=torch.uint8)
    for name in (*codes.BETWEEN, *codes.RELATIVE):
        numbers = codes.decoded({name: every})[name]
        assert numbers[255].isnan() and (numbers[1:255] > numbers[:254]).all()
        assert torch.equal(codes.encoded({name: numbers})[name], every)
    beyond = torch.tensor([-1e9, 0.0, 1e9, torch.nan])
    assert codes.encoded({"rho": beyond})["rho"].tolist() == [0, 0, 254, 255]
    assert codes.encoded({"persist": beyond})["persist"].tolist() == [0, 127, 254, 255]
    assert codes.encoded({"error": beyond[1:]})["error"].tolist() == [0, 254, 255]


def test_files_of_the_schema_before_are_read(saved):
    """Which had statistics as they are."""
    one = profiles.profile()
    told = json.loads(json.dumps(asdict(one.header)))
    told |= {"schema": 4, "digest": module._digest(told, one.tensors)}
    save_file(one.tensors, saved, metadata={"dit_sparse_profile": json.dumps(told)})
    other = Profile.load(saved)
    assert all(torch.equal(other.tensors[name], x) for name, x in one.tensors.items())


def test_a_profile_of_a_large_model_is_less_than_50_megabytes(saved):
    """Wan 14B: 40 layers of 40 heads, two branches, 50 steps, by the ladder and distances that calibrate has."""
    plan = Plan(_ladder(CalibrateOptions()), DISTANCES, BINS, 128, SparseConfig("tail"))
    assert set(plan.axes()) < set(Profile.load(saved).tensors) | {"choice", "anchor"}
    told = {name: torch.zeros(1, *axes).half() for name, axes in plan.axes().items()} | {"energy": torch.zeros(1)}
    each = sum(x.numel() * x.element_size() for x in codes.encoded(told).values()) + 2
    # README says so.
    assert each == 244
    assert 40 * 40 * 2 * 50 * each < 45e6


def test_choices_are_written_too(tmp_path):
    one = profiles.chosen(profiles.profile(), [DENSE, Choice("tail", Rung(0.3))], torch.tensor(1), torch.tensor(0))
    one.save(tmp_path / "b.safetensors")
    other = Profile.load(tmp_path / "b.safetensors")
    assert other.fitted and other.header.choices[1]["method"] == "tail" and other.header.targets == {"psnr": 30.0}
    assert torch.equal(other.tensors["choice"], one.tensors["choice"])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_truncated_files_are_refused(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="is truncated or no safetensors file"):
        Profile.load(saved)


def test_one_changed_byte_is_found(saved):
    content = bytearray(saved.read_bytes())
    content[-5] ^= 1
    saved.write_bytes(content)
    with pytest.raises(ValueError, match="was damaged or changed after it was written"):
        Profile.load(saved)


def rewritten(path, change):
    """The file with its header changed by hand."""
    with safe_open(path, framework="pt") as file:
        told = json.loads(file.metadata()["dit_sparse_profile"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={"dit_sparse_profile": change(told)})


def test_a_changed_header_is_found(saved):
    rewritten(saved, lambda told: json.dumps(told | {"guidance_scale": 1.0}))
    with pytest.raises(ValueError, match="was damaged or changed"):
        Profile.load(saved)


def test_another_schema_is_refused(saved):
    rewritten(saved, lambda told: json.dumps(told | {"schema": 99}))
    with pytest.raises(ValueError, match="has schema 99, and this version of dit-sparse reads 4 and 5."):
        Profile.load(saved)


def test_a_header_that_is_no_json_is_refused(saved):
    rewritten(saved, lambda told: "{")
    with pytest.raises(ValueError, match="its header is not JSON"):
        Profile.load(saved)


def test_other_files_are_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="but no profile"):
        Profile.load(tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"profile '.*none.safetensors' is no file"):
        Profile.load(tmp_path / "none.safetensors")


def test_a_full_disk_leaves_nothing_half_written(saved, monkeypatch):
    before = saved.read_bytes()

    def full(_tensors, part, metadata):
        part.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(ValueError, match="cannot be written, and nothing was: No space left on device."):
        profiles.profile(steps=8).save(saved)
    assert saved.read_bytes() == before and [file.name for file in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_recognised_in_another_precision(dtype):
    model = nn.Linear(300, 20)
    model.weight.data, model.bias.data = (x.bfloat16().float() for x in (model.weight.data, model.bias.data))
    known = fingerprint(model)
    assert fingerprint(model.to(dtype)) == known
    assert fingerprint(model.to(torch.float16))["float16"] == known["float16"]
    with torch.no_grad():
        model.weight[0, 0] += 1
    assert fingerprint(model.float())["bfloat16"] != known["bfloat16"]


def test_only_the_calibrated_model_is_accepted():
    pipe, other = tiny_wan(), tiny_wan(seed=1)
    weights = {"transformer": {"class": "WanTransformer3DModel"} | fingerprint(pipe.transformer)}
    one = profiles.profile(weights=weights)
    with pytest.raises(ValueError, match="has measurements, but no choices yet: run dit-sparse fit"):
        one.check({"transformer": pipe.transformer})
    one = profiles.chosen(one, [DENSE], torch.tensor(0), torch.tensor(0))
    one.check({"transformer": pipe.transformer})
    one.check({"transformer": pipe.transformer.half()})
    with pytest.raises(ValueError, match="was made for tiny, and the transformer here has other weights"):
        one.check({"transformer": other.transformer})
    with pytest.raises(ValueError, match="was made for transformer WanTransformer3DModel, and this is"):
        one.check({"transformer_2": pipe.transformer})


def test_what_a_run_is_away_from_calibration_is_one_sentence():
    one = profiles.profile(steps=4, levels=(1.0, 0.75, 0.5, 0.25))
    assert one.distance((1.0, 0.75, 0.5, 0.25), TokenGrid(5, 8, 8)) == ""
    assert one.distance((1.0, 0.7502, 0.5, 0.25), TokenGrid(5, 8, 8)) == ""
    assert "is stretched to 3 steps instead of 4, up to 0.100 from the nearest noise level" in one.distance(
        (1.0, 0.6, 0.25), TokenGrid(5, 8, 8)
    )
    both = one.distance((1.0, 0.5), TokenGrid(5, 16, 8))
    assert both.endswith("and 5 x 16 x 8 tokens instead of 5 x 8 x 8, 2.00 times as many")


def test_other_layers_are_refused():
    one = profiles.chosen(profiles.profile(), [DENSE], torch.tensor(0), torch.tensor(0))
    with pytest.raises(ValueError, match="was made for other layers"):
        one.table(one.header.levels, {"transformer.blocks.0.attn1": 3}, CPU)


def test_a_table_follows_the_choices_by_noise_level():
    levels, steps = (1.0, 0.8, 0.6, 0.4, 0.2), torch.arange(5)
    choices = [DENSE, Choice("anchor", Rung(0.1), "int4"), Choice("calibrated", Rung(0.3))]
    index = torch.tensor([0, 1, 1, 2, 2]).repeat(4, 2, 1)
    index[1] = 0  # the second head of the first layer stays dense
    one = profiles.chosen(profiles.profile(steps=5, levels=levels), choices, index, steps == 1)
    layers = {name: heads for name, heads, _ in one.header.layers}
    table = one.table((1.0, 0.78, 0.62, 0.41), layers, CPU)
    name = one.header.layers[0][0]
    told = [[(g.heads, g.choice.method, g.phase) for g in table.at(name, "cond", step)] for step in range(4)]
    assert told == [
        [((0, 1), "dense", "dense")],
        [((0,), "anchor", "anchor"), ((1,), "dense", "dense")],
        [((0,), "anchor", "sparse"), ((1,), "dense", "dense")],
        [((0,), "calibrated", "sparse"), ((1,), "dense", "dense")],
    ]
    [rho] = [g.rho for g in table.at(name, "cond", 3) if g.rho is not None]
    # 0.41 lies a twentieth of the way from 0.4 to 0.6.
    known = one.tensors["rho"][:1, 0, :, 2].float()
    torch.testing.assert_close(rho, 0.95 * known[:, 3] + 0.05 * known[:, 2])
    assert table.phase(0) == "dense" and table.phase(1) == "anchor"
    with pytest.raises(ValueError, match="knows the branches cond, uncond, not 'other'"):
        table.at(name, "other", 0)
    with pytest.raises(ValueError, match="laid out for 4 steps, and step 4 lies past"):
        table.at(name, "cond", 4)


def test_what_fades_goes_by_age_and_noise_level():
    levels, steps = (1.0, 0.8, 0.6, 0.4, 0.2), torch.arange(5)
    made = profiles.profile(steps=5, levels=levels)
    fade = torch.rand(4, 2, 5, 3, 3)
    fade[:, :, 1, 1:] = fade[:, :, 2, 2] = fade[:, :, 3, 2] = fade[:, :, 0] = torch.nan
    made = replace(made, tensors=made.tensors | {"fade": fade})
    one = profiles.chosen(
        made, [Choice("anchor", Rung(0.3), "fp8")], torch.zeros(4, 2, 5, dtype=torch.long), steps == 0
    )
    layers, name = {name: heads for name, heads, _ in one.header.layers}, one.header.layers[1][0]

    def at(run, step, since=0):
        [group] = one.table(run, layers, CPU).at(name, "uncond", step)
        return group.fade if group.fade is None or since is None else group.fade[since]

    own = fade[2:, 1, ..., 2]
    assert at(levels, 0) is None
    torch.testing.assert_close(at(levels, 1), own[:, 1, 0])
    torch.testing.assert_close(at(levels, 2), own[:, 2, 1])
    # Age 3 lies between 2 and 4; of what is not known of 4 it is told by how fast it went until 2.
    further = (1 - 2 * (1 - own[:, 3, 1])).clamp(min=0)
    torch.testing.assert_close(at(levels, 3), (own[:, 3, 1] + further) / 2)
    torch.testing.assert_close(at(levels, 4), own[:, 4, 2])
    # What was learned later is younger.
    assert at(levels, 4, None).shape == (4, 2)
    torch.testing.assert_close(at(levels, 4, 3), own[:, 4, 0])
    torch.testing.assert_close(at(levels, 4, 1), (own[:, 4, 1] + own[:, 4, 2]) / 2)
    # 0.26 lies seven tenths of the way from the fourth level to the fifth, 3.7 steps from the first.
    three, four = (own[:, 3, 1] + further) / 2, further
    early = torch.lerp(three, four, 0.7)
    late = torch.lerp((own[:, 4, 1] + own[:, 4, 2]) / 2, own[:, 4, 2], 0.7)
    torch.testing.assert_close(at((1.0, 0.8, 0.6, 0.26, 0.2), 3), torch.lerp(early, late, 0.7))


def test_a_table_for_some_of_the_heads():
    """They do what they do in the whole table, in the order asked for."""
    heads, steps = 8, 5
    layers = (("transformer.blocks.0.attn1", 2, 32), ("transformer.blocks.1.attn1", heads, 32))
    choices = [Choice("calibrated", Rung(0.1)), Choice("anchor", Rung(0.3), "fp8"), DENSE]
    index = torch.arange(2 + heads)[:, None, None] % 3 + torch.zeros(2 + heads, 2, steps, dtype=torch.long)
    made = profiles.profile(layers, steps=steps)
    one = profiles.chosen(made, choices, index, torch.arange(steps) == 0)
    known, name, held = {name: heads for name, heads, _ in layers}, layers[1][0], (6, 1, 2, 4)
    whole = one.table(one.header.levels, known, CPU)
    some = one.table(one.header.levels, known, CPU, {layers[0][0]: (1,), name: held})

    def by_head(groups):
        return {
            head: (
                group.choice,
                group.phase,
                *(
                    None if x is None else x[i].tolist()
                    for x in (group.rho, None if group.fade is None else group.fade.T)
                ),
            )
            for group in groups
            for i, head in enumerate(group.heads)
        }

    for step in range(steps):
        all_told, told = (by_head(table.at(name, "uncond", step)) for table in (whole, some))
        assert told == {i: all_told[head] for i, head in enumerate(held)}
    assert {choice.method for choice, *_ in told.values()} == {"calibrated", "anchor", "dense"}
