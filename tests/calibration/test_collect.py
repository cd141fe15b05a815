"""From a tiny pipeline to a profile and back, by the command line."""

import errno
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from dit_sparse import generate
from dit_sparse.calibration import collect, effects, steady, trials
from dit_sparse.calibration.metrics import psnr
from dit_sparse.calibration.replay import Tape, forward_once, forwards
from dit_sparse.calibration.values import sample_of
from dit_sparse.choices import DENSE, Choice, Rung
from dit_sparse.cli import main
from dit_sparse.config import SparseConfig
from dit_sparse.pipelines.session import sparsify
from dit_sparse.profile import Profile
from tests import profiles, tiny
from tests.families import FAMILIES

SIZE = ("--height", "32", "--width", "48", "--num_frames", "3")
FILE = "m.profile.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-wan"
    tiny.tiny_wan(vae="1x1").save_pretrained(folder)
    return folder


def command(model: Path, *more: str) -> list[str]:
    return ["calibrate", "--model_id", str(model), "--prompts_file", "p.txt", *SIZE, "--num_inference_steps", "5",
            "--guidance_scale", "4", "--rows", "64", "--density", "0.05", "0.1", "0.3", "--top_p", "0.6",
            "--output_file", FILE, *more]  # fmt: skip


@pytest.fixture(scope="module")
def calibrated(model, tmp_path_factory) -> Path:
    """A directory with a profile in it."""
    folder = tmp_path_factory.mktemp("calibrated")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.set_num_threads(1)
        (folder / "p.txt").write_text("a red ball\na green square moves left\n")
        assert main(command(model)) == 0
    return folder


@pytest.fixture
def here(calibrated, tmp_path, monkeypatch) -> Path:
    """A copy of it, to be in."""
    copy = Path(shutil.copytree(calibrated, tmp_path / "here"))
    monkeypatch.chdir(copy)
    return copy


def refused(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    [line] = [line for line in err.splitlines() if line.startswith("dit-sparse: ")]
    return line


def listened(monkeypatch, module, name) -> list:
    """What a function returns from now on."""
    found, call = [], getattr(module, name)

    def listening(*args):
        found.append(call(*args))
        return found[-1]

    monkeypatch.setattr(module, name, listening)
    return found


def test_where_steps_are_short_runs_are_made_again_to_be_timed(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a red ball\n")
    monkeypatch.setattr(collect, "waits", lambda *_: True)
    monkeypatch.setattr(trials, "timed_again", lambda *_: True)
    monkeypatch.setattr(trials, "lasted", lambda problem, path, took: took)
    dense, played = listened(monkeypatch, collect, "_unrecorded"), listened(monkeypatch, trials, "_play")
    assert main(command(model)) == 0
    header = Profile.load(FILE).header
    [unrecorded], [first, second] = dense, [took for _, took in played]
    assert 0 < unrecorded["attention"] < unrecorded["transformers"]
    assert unrecorded.items() <= header.seconds.items() and header.seconds["recording"] > 0
    [trial] = header.effects["trials"]
    assert trial["seconds"] == {str(step): min(seconds, second[step]) for step, seconds in first.items()}


def test_a_run_is_timed_by_a_step_that_no_weights_had_to_come_before(monkeypatch):
    """With two transformers and weights that are elsewhere, two of the steps that are timed wait for them."""
    pipe = tiny.tiny_wan("1x1", text=False, wan22=True)
    transformers = {"transformer": pipe.transformer, "transformer_2": pipe.transformer_2}
    tape, found, ran = Tape(), [], []

    def run(*_):
        tiny.generate(pipe, steps=8, size=16, frames=2)

    def wrap(part, original, *args, **kwargs):
        return tape.record(found[0].generation, frozenset())(part, original, *args, **kwargs)

    with forwards(transformers, wrap), sparsify(pipe, "dense") as session:
        found.append(session)
        run()
    reported = type(session).report

    def report(self):
        told = reported(self)
        ran.extend(step.step for step in told.steps)
        slow = {0: 3.0, 5: 9.0}
        return replace(told, steps=[replace(step, seconds=slow.get(step.step, 0.5)) for step in told.steps])

    monkeypatch.setattr(type(session), "report", report)
    monkeypatch.setattr("dit_sparse.calibration.probe.Probe.by_step", lambda _: {0: 0.9, 2: 0.2, 5: 0.9, 7: 0.3})
    job = SimpleNamespace(transformers=transformers, pipe=pipe, prompts=("a",), seed=0, run=run)
    # Two branches at each of eight steps, and no step but those that are timed.
    assert collect._unrecorded(job, 0, tape) == pytest.approx({"transformers": 8 * 0.5, "attention": 8 * 0.2})
    assert ran == [0, 2, 5, 7]


@pytest.mark.parametrize(
    ("device", "seconds", "again"), [("cuda", 3.0, True), ("cuda", 100.0, False), ("cpu", 3.0, False)]
)
def test_which_runs_are_short(device, seconds, again):
    assert steady.timed_again(torch.device(device), seconds) is again


def test_a_profile_holds_what_was_measured(calibrated):
    made = Profile.load(calibrated / FILE)
    h = made.header
    assert sorted(file.name for file in calibrated.iterdir()) == [FILE, "p.txt"]
    assert (h.model_id, h.size, h.grid, h.branches) == ("tiny-wan", (32, 48, 3), (3, 16, 24), ("cond", "uncond"))
    assert len(h.levels) == 5 and h.levels[0] == 1.0 and list(h.levels) == sorted(h.levels, reverse=True)
    assert str(calibrated) not in json.dumps(h.__dict__) and h.prompts == ("a red ball", "a green square moves left")
    assert h.ran["transformer"] == (0, 1, 2, 3, 4) and [heads for _, heads, _ in h.layers] == [2, 2]
    trials = h.effects["trials"]
    assert [trial["prompt"] for trial in trials] == [0, 1, 0, 1] and h.effects["scale"] > 0
    for trial in trials:
        assert len(trial["direct"]) == len(trial["found"]) == 5 and trial["error"] > 0 and trial["seconds"] > 0
        # Until the first sparse step there is nothing to find; after it errors stay.
        start = trial["start"]
        assert max(trial["found"][:start], default=0.0) == 0 and min(trial["found"][start:]) > 0
    # Each prompt in two bands; before and after them all is dense.
    assert [band["prompt"] for band in h.effects["bands"]] == [0, 0, 1, 1]
    assert [band["part"] for band in h.effects["bands"]] == [0, 2, 1, 3]
    for step, band in zip([0, 2, 1, 3], h.effects["bands"], strict=True):
        sparse = [i for i, added in enumerate(band["direct"]) if added > 0]
        assert sparse in ([step], []) and (band["error"] > 1e-12) == bool(sparse)
    assert any(sum(band["direct"]) > 0 for band in h.effects["bands"])
    for gain, agree in zip(h.effects["gain"].values(), h.effects["agree"].values(), strict=True):
        assert set(gain) == set(agree) == {"1", "3"} and min(map(min, gain.values())) > 0
        assert all(own[0] == pytest.approx(1.0) and 0 <= own[1] <= 1 for own in agree.values())
    for name, x in made.tensors.items():
        assert x.shape[:3] == (4, 2, 5), name
        assert name in ("stale", "fade", "drift", "together", "persist") or not x.isnan().any(), name
    assert made.tensors["together"][:, :, 2:].isnan().sum() == 0
    assert made.tensors["stale"][:, :, 2:, :, 0].isnan().sum() == 0
    error = made.tensors["error"].float()
    assert (error[..., -1].mean((0, 1, 2)) < error[..., 0].mean((0, 1, 2))).all()
    assert h.seconds["recording"] > 0 and h.costs["dense"] > 0 and len(h.costs["anchor at anchor"]) == 4
    assert h.ladder == (Rung(0.05), Rung(0.05, 0.6), Rung(0.1), Rung(0.3))


@pytest.mark.parametrize("count", [1, 2, 8])
def test_prompts_are_tried_twice_where_there_are_several(count):
    tried = trials.trials(count)
    assert [number for number, _ in tried] == list(range(count)) * min(count, 2)
    if count > 1:
        # Far enough apart to tell how quality grows.
        assert all(abs(a - b) >= 6 for (_, a), (_, b) in zip(tried[:count], tried[count:], strict=True))


def test_the_statistics_of_a_run_do_not_change_it(model, here):
    pipe = generate.load(
        generate.GenerateOptions(model_id=str(model), prompt="a"), generate.models.find(str(model)),
        torch.device("cpu"), torch.float32,
    )  # fmt: skip
    tape, found = Tape(), []

    def wrap(part, original, *args, **kwargs):
        return tape.record(found[0].generation, frozenset({1}))(part, original, *args, **kwargs)

    before = tiny.generate(pipe)
    with forwards({"transformer": pipe.transformer}, wrap), sparsify(pipe, "dense") as session:
        found.append(session)
        recorded = tiny.generate(pipe)
    assert torch.equal(before, recorded) and "forward" not in pipe.transformer.__dict__
    branches = ("cond", "uncond")
    assert len(tape.outputs) == 8 and set(tape.calls) == {("transformer", i, b) for i in (0, 1) for b in branches}
    again = Tape.from_tensors(tape.tensors())
    assert again.outputs.keys() == tape.outputs.keys() and again.calls.keys() == tape.calls.keys()

    def play(part, original, *args, **kwargs):
        return again.play(found[1].generation, lambda step: step == 3)(part, original, *args, **kwargs)

    with forwards({"transformer": pipe.transformer}, play), sparsify(pipe, "none", density=0.1, dense_steps=3) as one:
        found.append(one)
        played = tiny.generate(pipe)
        assert {step.step for step in one.report().steps} == {3}
    with sparsify(pipe, "none", density=0.1, dense_steps=3):
        assert torch.equal(played, tiny.generate(pipe))
    # One layer sparse changes the output by what it is worth; none changes nothing.
    config = SparseConfig("tail", density=0.1)
    names = [f"blocks.{i}.attn1" for i in (0, 1)]

    def probed(config, layer, said):
        return effects.probe("transformer", pipe.transformer, tape, 1, layer, names, said, config)

    said = {branch: effects.Blocks(pipe.transformer) for branch in branches}
    changes = {layer: probed(config, layer, said) for layer in (1, 0)}
    offs = []
    for branch in branches:
        with sparsify(pipe.transformer, "tail", density=0.1, dense_steps=0, dense_layers="0-0"):
            out = forward_once(pipe.transformer, tape.calls["transformer", 1, branch], torch.device("cpu"))
        offs.append(out - sample_of(tape.outputs["transformer", 1, branch]))
    assert changes[1]["squares"] == [off.square().mean().item() for off in offs] and min(changes[1]["squares"]) > 0
    assert changes[1]["along"] == [(off * offs[0]).mean().item() for off in offs]
    assert changes[0] != changes[1]
    assert max(probed(SparseConfig("tail", density=1.0), 0, said)["squares"]) < 1e-9
    # Guidance may have ended before that step.
    del tape.calls["transformer", 1, "uncond"]
    alone = probed(config, 0, said)
    assert alone == {"squares": [changes[0]["squares"][0], 0.0], "along": [changes[0]["along"][0], 0.0]}


def test_blocks_before_a_probed_layer_do_not_run_again(model):
    """Whatever the order of probes, and whatever fits: the outputs are those of the whole forward."""
    pipe = tiny.tiny_wan(vae="1x1", layers=3)
    config, calls, ran = SparseConfig("tail", density=0.1), {}, []
    names = [f"blocks.{i}.attn1" for i in range(3)]
    tape, found = Tape(), []

    def wrap(part, original, *args, **kwargs):
        return tape.record(found[0].generation, frozenset({1}))(part, original, *args, **kwargs)

    with forwards({"transformer": pipe.transformer}, wrap), sparsify(pipe, "dense") as session:
        found.append(session)
        tiny.generate(pipe)

    def probed(order, blocks):
        told = {}
        for layer in order:
            ran.clear()
            told[layer] = effects.probe(
                "transformer", pipe.transformer, tape, 1, layer, names, {"cond": blocks}, config
            )
            calls[layer] = list(ran)
        return told

    hooks = [
        block.attn1.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, block in enumerate(pipe.transformer.blocks)
    ]
    alone = {layer: probed([layer], effects.Blocks(pipe.transformer))[layer] for layer in range(3)}
    assert probed((2, 1, 0), effects.Blocks(pipe.transformer)) == alone
    assert calls == {2: [0, 1, 2], 1: [1, 2], 0: [0, 1, 2]}
    # Heard in a dense forward before, it is known at once.
    heard = effects.Blocks(pipe.transformer)
    with heard.listening(), sparsify(pipe.transformer, "dense", dense_steps=0):
        forward_once(pipe.transformer, tape.calls["transformer", 1, "cond"], torch.device("cpu"))
    assert probed((2, 0, 1), heard) == alone and calls == {2: [2], 1: [1, 2], 0: [0, 1, 2]}
    # Of what ran after the first probed layer nothing is known.
    assert probed((1, 2, 0), effects.Blocks(pipe.transformer)) == alone
    assert calls == {1: [0, 1, 2], 2: [1, 2], 0: [0, 1, 2]}
    pipe.transformer.blocks[0]._hf_hook = object()
    assert probed((2, 1, 0), effects.Blocks(pipe.transformer)) == alone and calls[1] == [0, 1, 2]
    del pipe.transformer.blocks[0]._hf_hook
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(effects, "KEPT_BYTES", 0)
        assert probed((2, 1, 0), effects.Blocks(pipe.transformer)) == alone and calls[1] == [0, 1, 2]
    for hook in hooks:
        hook.remove()
    assert all("forward" not in block.__dict__ for block in pipe.transformer.blocks)


def blocks(count: int, kind: str = "blocks") -> list[str]:
    return [f"transformer_2.{kind}.{i}.attn" for i in range(count)]


@pytest.mark.parametrize(
    ("names", "steps", "probed"),
    [
        (blocks(3), 50, [0, 1, 2]),
        (blocks(1), 1, [0]),
        (blocks(2), 1, [0, 1]),
        (blocks(7), 4, [0, 2, 4, 6]),
        (blocks(30), 2, [0, 29]),
        # Errors of one kind may be before a projection, and of another behind it.
        (blocks(4) + blocks(8, "single"), 6, [0, 3, 4, 6, 9, 11]),
        (blocks(2) + blocks(4, "single"), 2, [0, 1, 2, 5]),
    ],
)
def test_about_as_many_layers_are_probed_as_a_run_has_steps(names, steps, probed):
    assert effects.probed_layers(names, steps) == probed


def test_layers_are_of_a_kind_whatever_their_number():
    assert len({effects.kind_of(name) for name in blocks(12)}) == 1
    others = ["transformer_3.blocks.0.attn", "transformer_2.blocks.0.attn2", "transformer_2.single.0.attn"]
    assert len({effects.kind_of(name) for name in [*blocks(1), *others]}) == 4


@pytest.mark.parametrize(
    ("device", "free", "expected"),
    [("cpu", 1e12, ("cpu", 1 << 30)), ("cuda:1", 48e9, ("cuda:1", 2e9)), ("cuda:1", 24e9, ("cpu", 1 << 30))],
)
def test_outputs_of_blocks_stay_on_a_gpu_with_room(device, free, expected, monkeypatch):
    monkeypatch.setattr(effects, "free_bytes", lambda _: free)
    where, room = effects.room_for_outputs(torch.device(device))
    assert (str(where), room) == (expected[0], pytest.approx(expected[1]))


def test_layers_that_are_not_probed_are_between_those_around(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.tiny_wan(vae="1x1", layers=3).save_pretrained("wan")
    Path("p.txt").write_text("a red ball\n")
    probes = listened(monkeypatch, effects, "probe")
    assert main(command(Path("wan"), "--num_inference_steps", "2")) == 0
    effect = Profile.load(FILE).header.effects
    assert len(probes) == 4
    for step in ("0", "1"):
        first, second, third = (np.array(gain[step]) for gain in effect["gain"].values())
        assert second == pytest.approx(np.sqrt(first * third)) and (first != third).all()
        first, second, third = (np.array(agree[step]) for agree in effect["agree"].values())
        assert second == pytest.approx((first + third) / 2)


def test_the_metric_is_the_output_projection():
    pipe = tiny.tiny_wan()
    metric = effects.output_metric(pipe.transformer, "transformer")
    attention = pipe.transformer.blocks[1].attn1
    error = torch.randn(7, 2, 32)
    whole = (error.flatten(1) * torch.tensor([1.0] * 32 + [0.0] * 32)) @ attention.to_out[0].weight.T
    root = metric["transformer.blocks.1.attn1"][0]
    torch.testing.assert_close((error[:, 0] @ root).norm(dim=1), whole.norm(dim=1), rtol=1e-4, atol=1e-5)
    # Flux.2's single blocks project attention and feed-forward by one matrix.
    found = effects.output_metric(FAMILIES["flux2"].make().transformer, "transformer")
    assert found and not any("single" in name for name in found)


@pytest.mark.parametrize("steps", [2, 3, 13])
@pytest.mark.parametrize("count", range(2, 9))
def test_every_prompt_is_in_two_bands_and_every_band_as_often(count, steps):
    found = trials.bands(count, steps)
    spans = {part: span for *_, part, span in found}
    tried = Counter(part for *_, part, _ in found)
    assert [number for number, *_ in found] == [number for number in range(count) for _ in range(2)]
    assert len({(number, part) for number, _, part, _ in found}) == len(found)
    assert max(tried.values()) - min(tried.values()) <= 1
    # Of three prompts on, together they are all of the steps.
    assert count < 3 or [step for part in sorted(spans) for step in spans[part]] == list(range(steps))


def test_a_single_prompt_has_no_bands():
    assert trials.bands(1, 13) == [] and trials.bands(2, 1) == []


@pytest.mark.parametrize("at", ["dense", "probe", "trial", "band"])
def test_an_interrupted_run_is_resumed(model, here, monkeypatch, capsys, at):
    expected = Profile.load(FILE)
    (here / FILE).unlink()
    module, name = {
        "dense": (collect.costs, "measure"),
        "probe": (effects, "probe"),
        "trial": (trials, "try_out"),
        "band": (trials, "try_out"),
    }[at]
    original, calls = getattr(module, name), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == {"dense": 1, "probe": 3, "trial": 2, "band": 5}[at]:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, interrupted)
    assert main(command(model)) == 130
    assert not (here / FILE).exists() and (here / f"{FILE}.parts").is_dir()
    monkeypatch.setattr(module, name, original)
    ran = []
    dense = collect.Recorder.__call__
    monkeypatch.setattr(collect.Recorder, "__call__", lambda self, *a: ran.append(1) or dense(self, *a))
    assert main(command(model)) == 0
    # What was finished is not done again: five steps, two branches and two layers of each prompt, or of the second
    # one, which comes after the probes, or none of it.
    assert len(ran) == {"dense": 40, "probe": 20}.get(at, 0)
    assert not (here / f"{FILE}.parts").exists()
    made = Profile.load(FILE)
    for name in ("rho", "error", "stale"):
        assert torch.equal(made.tensors[name].nan_to_num(), expected.tensors[name].nan_to_num())
    assert made.header.effects["gain"] == expected.header.effects["gain"]
    tried = [[trial["prompt"] for trial in made.header.effects[kind]] for kind in ("trials", "bands")]
    assert tried == [[0, 1, 0, 1], [0, 0, 1, 1]]
    tried, before = (x.header.effects["trials"] for x in (made, expected))
    assert tried[0]["direct"] == pytest.approx(before[0]["direct"])
    assert tried[0]["error"] == pytest.approx(before[0]["error"])


def test_another_calibration_is_not_resumed(model, here, monkeypatch, capsys):
    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(collect, "_dense", stop)
    assert main(command(model)) == 130
    said = refused(capsys, *command(model, "--seed", "3"))
    assert "holds an unfinished calibration with other seed: finish that one, or delete it." in said
    (here / "p.txt").write_text("a blue ball\n")
    assert "with other prompts" in refused(capsys, *command(model))


def test_a_full_disk_leaves_nothing_half_written(model, here, monkeypatch, capsys):
    (here / FILE).unlink()

    def full(_tensors, part, metadata):
        part.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(collect, "save_file", full)
    assert "cannot be written, and was not: No space left on device." in refused(capsys, *command(model))
    assert sorted(file.name for file in (here / f"{FILE}.parts").iterdir()) == ["job.json"]
    assert not (here / FILE).exists()


@pytest.mark.parametrize(
    ("content", "more", "said"),
    [
        (None, (), "prompts_file 'p.txt' is no file"),
        (b"", (), "p.txt holds no prompt"),
        (b"a\n\nb\n", (), "Line 2 of p.txt is empty"),
        (b"\xff\n", (), "p.txt is not UTF-8"),
        (b"a\n", ("--output_file", "a.json"), "output_file ends in .safetensors"),
        (b"a\n", ("--output_file", "no/a.safetensors"), "is in no directory that exists"),
        (b"a\n", ("--density", "0"), "density is a share above 0 and at most 1"),
        (b"a\n", ("--rows", "0"), "rows is at least 1, not 0."),
        (b"a\n", ("--height", "33"), "height is a multiple of"),
        (b"a\n", ("--num_inference_steps", "0"), "num_inference_steps is at least 1, not 0."),
    ],
)
def test_bad_input_is_refused_before_any_model_work(model, tmp_path, monkeypatch, capsys, content, more, said):
    def load(*_: object) -> None:
        raise AssertionError("a weight was about to be read")

    monkeypatch.setattr(generate, "load", load)
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "p.txt").write_bytes(content)
    assert said in refused(capsys, *command(model, *more))
    assert [file.name for file in tmp_path.iterdir()] == ["p.txt"] * (content is not None)


def test_a_prompts_file_is_needed(capsys):
    assert "Give --prompts_file" in refused(capsys, "calibrate", "--output_file", "a.safetensors")


def fitted(*more: str) -> list[str]:
    return ["fit", "--profile", FILE, "--output_file", "f.safetensors", *more]


def frames(folder: Path, name: str) -> np.ndarray:
    return np.stack([iio.imread(file) for file in sorted(folder.glob(f"{name}-*.png"))]) / 255


def test_fit_generate_and_the_report(model, here, capsys):
    made = Profile.load(FILE)
    reach = made.header.seconds["transformers"] / (made.header.costs["other"] + 0.9 * made.header.seconds["attention"])
    assert main(fitted("--target_psnr", "45")) == 0
    assert "f.safetensors: predicted" in capsys.readouterr().out and reach > 1
    sparse = Profile.load("f.safetensors")
    assert sparse.header.predicted["psnr_db"] >= 45
    make = ["generate", "--model_id", str(model), "--prompt", "a blue ball", *SIZE, "--guidance_scale", "4",
            "--num_inference_steps", "5"]  # fmt: skip
    assert main([*make, "--method", "dense", "--output_file", "a.png"]) == 0
    assert main([*make, "--profile", "f.safetensors", "--output_file", "b.png"]) == 0
    record = json.loads((here / "b.json").read_text())
    assert record["settings"]["profile"] == "f.safetensors" and record["attention"]["fallbacks"] == {}
    assert psnr(frames(here, "b"), frames(here, "a")) > 30
    # Without a name for the file, the profile names it; with other steps it is stretched.
    assert main([*make[:-1], "8", "--profile", "f.safetensors"]) == 0
    assert (here / "tiny-wan.32x48x3.8steps.f.seed0.mp4").is_file()


def test_verify_measures_on_unseen_prompts(model, here, capsys):
    (here / "u.txt").write_text("a blue ball\n")
    assert main(fitted("--target_psnr", "40", "--verify", "u.txt", "--model_id", str(model))) == 0
    out = capsys.readouterr().out
    assert all(f"{name:10} predicted" in out for name in ("psnr_db", "speedup", "work", "seconds"))
    measured = Profile.load("f.safetensors").header.measured
    assert set(measured) == {"psnr_db", "speedup", "work", "seconds"} and measured["psnr_db"] > 25
    said = refused(capsys, *fitted("--target_psnr", "40", "--verify", "p.txt"))
    assert "verify is for prompts that were not calibrated or verified on" in said


def test_a_later_fit_knows_what_was_verified(model, here, capsys):
    unseen = [f"a ball of size {number}" for number in range(9)]
    (here / "u.txt").write_text("\n".join(unseen))
    assert main(fitted("--target_work", "0.5", "--verify", "u.txt", "--model_id", str(model))) == 0
    first = Profile.load("f.safetensors").header
    assert first.seen == (*first.prompts, *unseen)
    *_, tried = first.effects["trials"]
    assert tried["error"] > 0 and tried["seconds"] > 0 and len(tried["direct"]) == len(first.levels)
    assert main(["fit", "--profile", "f.safetensors", "--output_file", "g.safetensors", "--target_work", "0.5"]) == 0
    second = Profile.load("g.safetensors").header
    assert second.measured == {} and second.seen == first.seen
    # Of nine prompts beside two, that quality is most of what the next fit goes by.
    gap, before = (abs(first.measured["psnr_db"] - h.predicted["psnr_db"]) for h in (second, first))
    assert gap < 0.3 * before + 0.2
    again = ["fit", "--profile", "g.safetensors", "--output_file", "h.safetensors", "--target_work", "0.4"]
    assert "'a ball of size 0' was" in refused(capsys, *again, "--verify", "u.txt")
    # Errors of other steps say nothing of those of these.
    (here / "v.txt").write_text("a blue ball\n")
    other = ["--verify", "v.txt", "--num_inference_steps", "3", "--model_id", str(model)]
    assert main([*again, *other]) == 0 and Profile.load("h.safetensors").header.seen == first.seen
    assert "so later fits do not predict by these prompts" in capsys.readouterr().out


@pytest.mark.parametrize("other", [{}, {"device": "another"}, {"dtype": "bfloat16"}])
def test_only_the_machine_that_was_calibrated_on_says_how_long_choices_take(model, here, other):
    made = Profile.load(FILE)
    replace(made, header=replace(made.header, **{"device": generate.device_name(torch.device("cpu"))} | other)).save(
        FILE
    )
    (here / "u.txt").write_text("a blue ball\n")
    assert main(fitted("--target_work", "0.5", "--verify", "u.txt", "--model_id", str(model))) == 0
    *_, tried = Profile.load("f.safetensors").header.effects["trials"]
    assert tried["verified"] == "a blue ball" and (tried["seconds"] is None) == bool(other)
    # A file that holds it is read as any other.
    assert main(["profile", "show", "f.safetensors"]) == 0
    assert main(["fit", "--profile", "f.safetensors", "--output_file", FILE, "--target_psnr", "30"]) == 0


def test_frames_that_are_the_same_are_verified_as_200_db(model, here, monkeypatch):
    made = generate.frames_of
    monkeypatch.setattr(generate, "frames_of", lambda *arguments: np.zeros_like(made(*arguments)))
    (here / "u.txt").write_text("a blue ball\n")
    assert main(fitted("--target_work", "0.5", "--verify", "u.txt", "--model_id", str(model))) == 0
    h = Profile.load("f.safetensors").header
    assert h.measured["psnr_db"] == 200 and h.seen == h.prompts


def test_a_share_of_work_is_a_target(model, here, capsys):
    (here / "u.txt").write_text("a blue ball\n")
    assert main(fitted("--target_work", "0.6", "--verify", "u.txt", "--model_id", str(model))) == 0
    h = Profile.load("f.safetensors").header
    assert h.targets == {"work": 0.6} and 0.4 < h.predicted["work"] <= 0.6 + 1e-6
    # Text and short blocks are not counted beforehand.
    assert h.measured["work"] == pytest.approx(h.predicted["work"], abs=0.05)
    said = refused(capsys, *fitted("--target_work", "0.6", "--target_speedup", "1.1"))
    assert "target_speedup is about seconds: leave out target_work" in said
    assert "target_work 0.001 is out of reach" in refused(capsys, *fitted("--target_work", "0.001"))


def test_fit_says_what_is_in_reach(here, capsys):
    assert "Give a target" in refused(capsys, *fitted())
    assert "target_speedup 99 is out of reach" in refused(capsys, *fitted("--target_speedup", "99"))
    assert "target_psnr is a positive number" in refused(capsys, *fitted("--target_psnr", "-3"))
    assert "Give --profile" in refused(capsys, "fit", "--output_file", "a.safetensors", "--target_psnr", "30")
    assert sorted(file.name for file in here.iterdir()) == [FILE, "p.txt"]


def test_generate_refuses_profiles_that_do_not_fit(model, here, tmp_path, capsys):
    make = ["generate", "--prompt", "a", *SIZE, "--num_inference_steps", "2", "--output_file", "a.png"]
    tiny.tiny_wan(vae="1x1", seed=5).save_pretrained(tmp_path / "other")
    assert main(fitted("--target_psnr", "40")) == 0
    said = refused(capsys, *make, "--model_id", str(tmp_path / "other"), "--profile", "f.safetensors")
    assert "was made for tiny-wan, and the transformer here has other weights" in said
    own = [*make, "--model_id", str(model)]
    assert "has measurements, but no choices yet" in refused(capsys, *own, "--profile", FILE)
    assert "profile 'no.safetensors' is no file" in refused(capsys, *own, "--profile", "no.safetensors")
    said = refused(capsys, *own, "--profile", "f.safetensors", "--density", "0.2")
    assert "A profile decides on density: leave out either of the two." in said
    (here / "half.safetensors").write_bytes((here / "f.safetensors").read_bytes()[:900])
    assert "is truncated" in refused(capsys, *own, "--profile", "half.safetensors")
    assert not list(here.glob("a*"))


def test_in_python_a_profile_is_an_option(model, here):
    choices = [DENSE, Choice("calibrated", Rung(0.1)), Choice("anchor", Rung(0.1), "fp8")]
    index, anchor = torch.tensor([0, 2, 2, 1, 1]), torch.tensor([0, 1, 0, 0, 0])
    profiles.chosen(Profile.load(FILE), choices, index, anchor).save("f.safetensors")
    pipe = generate.load(
        generate.GenerateOptions(model_id=str(model), prompt="a"), generate.models.find(str(model)),
        torch.device("cpu"), torch.float32,
    )  # fmt: skip
    with sparsify(pipe, profile=here / "f.safetensors") as session:
        first = tiny.generate(pipe, steps=5, frames=2, size=32)
        assert session.report().work < 0.7 and session.phase(1) == "anchor" and session.phase(4) == "sparse"
        pipe.set_attn_processor("dense")
        dense = tiny.generate(pipe, steps=5, frames=2, size=32)
        pipe.set_attn_processor(SparseConfig(profile=str(here / "f.safetensors")))
        assert torch.equal(tiny.generate(pipe, steps=5, frames=2, size=32), first)
    assert not torch.equal(first, dense)


def test_two_transformers_share_a_profile(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.tiny_wan(vae="1x1", wan22=True).save_pretrained("wan22")
    (tmp_path / "p.txt").write_text("a red ball")
    assert main(command(Path("wan22"), "--num_inference_steps", "8")) == 0
    made = Profile.load(FILE)
    assert made.header.ran == {"transformer": (0, 1, 2), "transformer_2": (3, 4, 5, 6, 7)}
    assert made.tensors["energy"][:4, :, 3:].isnan().all() and made.tensors["energy"][4:, :, :3].isnan().all()
    assert all(made.header.effects["gain"].values())
    assert main(fitted("--target_psnr", "40")) == 0
    make = ["generate", "--model_id", "wan22", "--prompt", "a", *SIZE, "--guidance_scale", "4", "--profile"]
    assert main([*make, "f.safetensors", "--num_inference_steps", "6", "--output_file", "a.png"]) == 0
    record = json.loads((tmp_path / "a.json").read_text())
    assert len(record["attention"]["steps"]) == 6 and record["attention"]["fallbacks"] == {}
