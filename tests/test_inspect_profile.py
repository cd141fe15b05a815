import csv
from dataclasses import replace

import imageio.v3 as iio
import pytest
import torch

from dit_sparse.calibration.fit import Targets, Verified, fit, learned
from dit_sparse.choices import DENSE, Choice, Rung
from dit_sparse.cli import main
from dit_sparse.profile import Profile
from tests import profiles


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Measured, fitted, and fitted otherwise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "150")
    made = profiles.profile()
    made.save("m.profile.safetensors")
    fit(made, Targets(psnr=35.0)).save("a.safetensors")
    fit(made, Targets(speedup=1.6)).save("b.safetensors")
    return tmp_path


def said(capsys, *arguments):
    assert main(["profile", *arguments]) == 0
    return capsys.readouterr().out


def test_show_says_what_it_was_made_for_and_what_is_predicted(folder, capsys):
    out = said(capsys, "show", "a.safetensors")
    assert "tiny (transformer WanTransformer3DModel)" in out
    assert "6 steps of FlowMatchEulerDiscreteScheduler, 5 x 16 x 16, 5 x 8 x 8 tokens, guidance 4, 1 prompts" in out
    assert "targets    psnr 35" in out and "psnr_db 35" in out and "0.1, 0.1+p0.7, 0.3" in out
    assert "What each head does, branch cond" in out
    # The calibrated version of Re-ttention beside the online one.
    assert "calibrated" in out and "reshape, 1 on" in out


def test_show_says_how_much_of_a_residual_is_added(folder, capsys):
    made = profiles.profile()
    fade = torch.tensor([[0.9, 0.8, 0.7], [0.6, 0.5, 0.4], [0.3, 0.2, torch.nan]]).expand(4, 2, 6, 3, 3).clone()
    fade[0, 0, 0] = torch.nan
    fade[1, :, :, 2, 2] = 0.1
    replace(made, tensors=made.tensors | {"fade": fade}).save("f.safetensors")
    lines = [" ".join(line.split()) for line in said(capsys, "show", "f.safetensors").splitlines()]
    # As bytes, which the file has.
    assert "│ 0.1 │ 0.901 │ 0.599 │ 0.299 │" in lines and "│ 0.3 │ 0.701 │ 0.402 │ 0.098 │" in lines


def test_show_diff_and_plot_take_what_was_verified(folder, capsys):
    made = fit(profiles.profile(), Targets(psnr=35.0))
    learned(made, [Verified(name, 1e-4, [10.0] * 6, 58.0, alike=False) for name in ("b", "c")]).save("v.safetensors")
    assert "guidance 4, 1 prompts and 2 verified" in " ".join(said(capsys, "show", "v.safetensors").split())
    assert "2 verified" in said(capsys, "diff", "a.safetensors", "v.safetensors")
    assert "v.rho.png" in said(capsys, "plot", "v.safetensors")


def test_the_heat_map_is_what_was_chosen(folder, capsys):
    choices = [DENSE, Choice("anchor", Rung(0.1), "int4"), Choice("none", Rung(0.3))]
    index, anchor = torch.tensor([0, 1, 1, 2, 2, 1]).repeat(4, 2, 1), torch.tensor([0, 1, 0, 0, 0, 1])
    index[1, 0] = 0
    profiles.chosen(profiles.profile(), choices, index, anchor).save("c.safetensors")
    lines = said(capsys, "show", "c.safetensors").splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("transformer.blocks.0.attn1"))
    assert [line.split()[-1] for line in lines[at : at + 4]] == ["DAa..A", "DDDDDD", "DAa..A", "DAa..A"]
    other = said(capsys, "show", "--profile", "c.safetensors", "--branch", "uncond")
    assert other.count("DAa..A") == 4


def test_show_draws_errors_where_nothing_is_chosen(folder, capsys):
    out = said(capsys, "show", "m.profile.safetensors")
    assert "Error of the tail, branch cond" in out and "No choices yet" in out and "@" in out


def test_diff_says_what_differs(folder, capsys):
    out = said(capsys, "diff", "a.safetensors", "b.safetensors")
    assert "psnr 35" in out and "speedup 1.6" in out and "share of choices" in out and "#" in out
    assert "model" not in out
    same = said(capsys, "diff", "a.safetensors", "a.safetensors")
    assert "The headers say the same." in same and "0.0% of the choices of branch cond differ" in same
    profiles.chosen(profiles.profile(steps=4), [DENSE], torch.tensor(0), torch.tensor(0)).save("d.safetensors")
    assert "cannot be compared one by one" in said(capsys, "diff", "a.safetensors", "d.safetensors")


def test_plot_writes_pictures_and_their_numbers(folder, capsys):
    (folder / "out").mkdir()
    written = said(capsys, "plot", "m.profile.safetensors", "--output_dir", "out").split()
    names = [f"m.profile.{what}.{kind}" for what in ("recall", "rho", "error") for kind in ("png", "csv")]
    assert written == [f"out/{name}" for name in names] and sorted(names) == sorted(
        file.name for file in (folder / "out").iterdir()
    )
    made = Profile.load("m.profile.safetensors")
    for name in names[::2]:
        assert iio.imread(folder / "out" / name).std() > 5
    rows = {name: list(csv.DictReader((folder / "out" / name).open())) for name in names[1::2]}
    recall = rows["m.profile.recall.csv"]
    assert len(recall) == 4 * 6 and recall[13]["layer"] == "transformer.blocks.1.attn1" and recall[13]["head"] == "0"
    assert float(recall[13]["recall"]) == pytest.approx(
        made.tensors["recall"][2, :, 1, 1].float().mean().item(), abs=1e-4
    )
    rho = rows["m.profile.rho.csv"]
    assert len(rho) == 4 * 6 * 3 and {row["density"] for row in rho} == {"0.1", "0.1+p0.7", "0.3"}
    assert float(rho[4]["rho"]) == pytest.approx(made.tensors["rho"][0, :, 1, 1].float().mean().item(), abs=1e-4)
    error = {(row["layer"], row["method"]): float(row["error"]) for row in rows["m.profile.error.csv"]}
    expected = made.tensors["error"][2:, ..., 2, 1].float().mean().item()
    assert error["transformer.blocks.1.attn1", "tail"] == pytest.approx(expected, abs=1e-4)
    assert ("transformer.blocks.0.attn1", "anchor, 2 steps on") in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "profile takes show, diff or plot first, not ''."),
        (("sow", "a.safetensors"), "profile takes show, diff or plot first, not 'sow'."),
        (("show",), "Give one profile, not 0."),
        (("show", "a.safetensors", "b.safetensors"), "Give one profile, not 2."),
        (("show", "no.safetensors"), "profile 'no.safetensors' is no file"),
        (("show", "a.safetensors", "--branch", "x"), "Unknown branch 'x': choose from cond, uncond."),
        (("diff", "a.safetensors"), "profile diff takes two files, not 1."),
        (("plot", "a.safetensors", "--output_dir", "no"), "output_dir 'no' is no directory that exists"),
    ],
)
def test_what_cannot_be_shown_is_refused(folder, capsys, arguments, message):
    assert main(["profile", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_help(capsys):
    assert "show FILE | diff FILE FILE | plot FILE" in said(capsys, "--help")
