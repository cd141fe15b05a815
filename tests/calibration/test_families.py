"""What calibrating takes of each family, on real diffusers classes: its calls repeated, its outputs played back, and a
profile that is measured, fitted and run."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dit_sparse import attention, calibrate, generate, models, sparsify
from dit_sparse.calibration.collect import collect
from dit_sparse.calibration.effects import taken
from dit_sparse.calibration.fit import Targets, fit
from dit_sparse.calibration.job import Job
from dit_sparse.calibration.record import Plan, Recorder
from dit_sparse.calibration.replay import Tape, forward_once, forwards
from dit_sparse.calibration.values import sample_of
from dit_sparse.choices import Rung
from dit_sparse.config import SparseConfig
from dit_sparse.pipelines.registry import family_of, known_of
from dit_sparse.pipelines.session import levels_of
from tests import families, tiny
from tests.calibration.test_values import same

pytestmark = pytest.mark.usefixtures("quiet")

CPU = torch.device("cpu")
STEPS = 3
PLAN = Plan((Rung(0.1), Rung(0.3)), (1, 2), 4, 32, SparseConfig("tail", block=16))
# Self-attention modules of all transformers of each.
WAN = {"wan2.1": 2, "wan2.2": 4, "wan-vace": 5}
MODULES = {name: family.modules for name, family in families.FAMILIES.items()} | WAN
PASSES = {*WAN, *(name for name, family in families.FAMILIES.items() if family.passes)}


@dataclass(frozen=True)
class Case:
    """A tiny pipeline, and how it makes latents: (seed, diffusers' callback or None) -> latents."""

    name: str
    pipe: Any
    run: Callable[..., Tensor]

    @property
    def transformers(self) -> dict[str, torch.nn.Module]:
        return known_of(self.pipe.components)


@pytest.fixture(params=MODULES)
def case(request: pytest.FixtureRequest) -> Case:
    name = request.param
    if name not in WAN:
        pipe = families.make(name)
        return Case(name, pipe, lambda seed=1, **told: families.generate(name, pipe, steps=STEPS, seed=seed, **told))
    made = tiny.tiny_vace() if name == "wan-vace" else tiny.tiny_wan("2x1", text=False, wan22=name == "wan2.2")
    size = {} if name == "wan-vace" else {"size": 32}
    return Case(name, made, lambda seed=1, **told: tiny.generate(made, steps=STEPS, seed=seed, **size, **told))


@pytest.mark.parametrize("case", ["wan2.1", "cosmos", "kandinsky5"], indirect=True)
def test_guidance_goes_as_far_as_its_family_says(case: Case) -> None:
    """By what a change of either forward of the last step does to the latents: w and 1 - w, or 1 + w and -w."""
    before, moved = case.run(), []
    for number in (2 * STEPS - 2, 2 * STEPS - 1):
        calls = 0

        def change(_transformer: torch.nn.Module, _: tuple[()], output: Any, number: int = number) -> None:
            nonlocal calls
            if calls == number:
                sample_of(output).add_(0.1)
            calls += 1

        hook = case.pipe.transformer.register_forward_hook(change)
        moved.append((case.run() - before).norm().item())
        hook.remove()
        assert calls == 2 * STEPS
    own = case.pipe.guidance_scale + family_of(case.pipe.transformer).beyond
    assert own > 2 and moved[0] / moved[1] == pytest.approx(own / (own - 1), rel=2e-3)


def test_what_is_not_taken_of_an_output_changes_nothing(case: Case) -> None:
    before, dropped = case.run(), []

    def spoil(transformer: torch.nn.Module, _: tuple[()], output: Any) -> None:
        sample = sample_of(output)
        kept = taken(transformer, sample)
        if kept.shape != sample.shape:
            sample[:, kept.shape[1] :] = float("nan")
            dropped.append(sample.shape[1] - kept.shape[1])

    hooks = [transformer.register_forward_hook(spoil) for transformer in case.transformers.values()]
    assert torch.equal(before, case.run())
    assert bool(dropped) == (case.name in ("pixart-sigma", "hunyuan-dit"))
    for hook in hooks:
        hook.remove()


def taped(case: Case, keep: frozenset[int]) -> tuple[Tape, Tensor]:
    """The tape of a dense run, and what it made."""
    tape, found = Tape(), []

    def wrap(part, original, *args, **kwargs):
        return tape.record(found[0].generation, keep)(part, original, *args, **kwargs)

    with forwards(case.transformers, wrap), sparsify(case.pipe, "dense") as session:
        found.append(session)
        return tape, case.run()


def test_a_forward_is_repeated_with_all_of_its_arguments(case):
    """Whether these come by place or by name, as tensors, numbers or lists of tuples: in Qwen-Image the shapes of
    images, in LTX how RoPE is scaled."""
    tape, _ = taped(case, frozenset({1}))
    again = Tape.from_tensors(tape.tensors())
    assert again.calls.keys() == tape.calls.keys() and again.outputs.keys() == tape.outputs.keys()
    assert len({branch for _, _, branch in tape.calls}) == 1 + (case.name in PASSES)
    for key, call in again.calls.items():
        transformer = case.transformers[key[0]]
        assert same((tape.calls[key].args, tape.calls[key].kwargs), (call.args, call.kwargs))
        with sparsify(transformer, "dense", dense_steps=0):
            out = forward_once(transformer, call, CPU)
        torch.testing.assert_close(out, sample_of(tape.outputs[key]).float(), rtol=1e-5, atol=1e-6)


def test_what_was_said_is_played_to_the_pipeline(case):
    """In the form that it reads, with all that is said beside the sample: LTX-2 makes sound, too."""
    tape, dense = taped(case, frozenset())
    again, found, ran = Tape.from_tensors(tape.tensors()), [], []

    def wrap(part, original, *args, **kwargs):
        def watched(*args, **kwargs):
            ran.append(found[0].generation.moment.step)
            return original(*args, **kwargs)

        return again.play(found[0].generation, lambda step: step == STEPS - 1)(part, watched, *args, **kwargs)

    with forwards(case.transformers, wrap), sparsify(case.pipe, "dense") as session:
        found.append(session)
        played = case.run()
    assert set(ran) == {STEPS - 1}
    torch.testing.assert_close(played, dense, rtol=1e-5, atol=1e-6)


def test_a_profile_is_measured_and_fitted_and_run(case, tmp_path):
    made = collect(job(case), tmp_path / "parts")
    h = made.header
    heads = {name: heads for name, heads, _ in h.layers}
    assert len(heads) == MODULES[case.name] and set(heads.values()) == {2}
    assert len(h.branches) == 1 + (case.name in PASSES) and len(h.levels) == STEPS
    # From noise to what is made, whatever the scheduler counts by.
    assert list(h.levels) == sorted(h.levels, reverse=True) and 1 >= h.levels[0] > h.levels[-1] >= 0
    # Each layer in each branch has been recorded at each step that its transformer ran at, and probed.
    assert sum(heads.values()) == len(made.tensors["energy"]) and set(h.ran) == set(case.transformers)
    for name, rows in h.rows_of.items():
        ran = list(h.ran[name.partition(".")[0]])
        for kind in ("energy", "error"):
            x = made.tensors[kind][rows].float()
            assert ran and x[:, :, ran].isfinite().all() and (x[:, :, ran] > 0).all()
    gains = h.effects["gain"]
    assert set(gains) == set(heads)
    told = [gain for steps in gains.values() for branches in steps.values() for gain in branches]
    assert all(len(branches) == len(h.branches) for steps in gains.values() for branches in steps.values())
    assert all(0 < gain < math.inf for gain in told) and len(set(told)) == len(told)
    [trial] = h.effects["trials"]
    assert 0 < trial["error"] < math.inf and len(trial["found"]) == len(trial["direct"]) == STEPS
    # HunyuanVideo 1.5 has no callback that would tell its latents.
    assert all((x is None) == (case.name == "hunyuan-video-1.5") for x in trial["found"])
    fitted = fit(made, Targets(work=0.5))
    fitted.save(tmp_path / "f.safetensors")
    assert 20 < fitted.header.predicted["psnr_db"] < 200
    dense = case.run(seed=9)
    with sparsify(case.pipe, profile=tmp_path / "f.safetensors") as session:
        sparse = case.run(seed=9)
        report = session.report()
    # Text comes on top of what a fit counts: of Z-Image's tokens here it is a quarter.
    assert report.fallbacks == {} and report.work < (0.9 if case.name == "z-image" else 0.75)
    assert sparse.isfinite().all() and 0 < (sparse - dense).square().mean() < dense.square().mean()


@pytest.mark.parametrize("case", [name for name, tiny in families.FAMILIES.items() if tiny.masked], indirect=True)
def test_dense_attention_is_timed_as_a_dense_step_has_it(case, monkeypatch):
    """With a mask of text alone, and text last: kernels take longer with a mask of all keys. It begins with a call of
    that kind that is not timed."""
    dense, calls, made = attention.dense_attention, [], []

    def spy(q, k, v, *, key_mask):
        calls[-1].append((k, key_mask))
        return dense(q, k, v, key_mask=key_mask)

    monkeypatch.setattr(attention, "dense_attention", spy)
    for kernel in (lambda _: None, lambda generation: Recorder(PLAN, generation, STEPS)):
        calls.append([])
        with sparsify(case.pipe, "dense") as session:
            session.generation.dense = kernel(session.generation)
            made.append(case.run())
    untimed, calls[1] = calls[1][:1], calls[1][1:]
    assert torch.equal(*made) and same(*calls) and same(untimed, calls[1][:1])
    widths = {mask.shape[1] for _, mask in calls[1] if mask is not None}
    assert widths == {sum(families.FAMILIES[case.name].text)}


def job(case: Case) -> Job:
    def run(_prompt: str, seed: int, done: Callable[[Tensor | None], None]) -> np.ndarray:
        def step_done(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            done(tensors["latents"])
            return {}

        told: dict[str, Any] = {}
        parameters = inspect.signature(type(case.pipe).__call__).parameters
        if "callback_on_step_end" in parameters:
            told["callback_on_step_end"] = step_done
        elif "callback" in parameters:
            told["callback"] = lambda step, timestep, latents: step_done(None, step, timestep, {"latents": latents})
        return (
            case.run(seed=seed, **told).detach().float().sigmoid().reshape(1, 1, -1, 1).expand(-1, -1, -1, 3).numpy()
        )

    facts = dict(
        model_id=case.name, size=(1, 1, 1), guidance_scale=3.0, created="2026-01-01", device="cpu", dtype="float32",
        versions={},
    )  # fmt: skip
    return Job(case.pipe, run, ("a red ball",), 0, STEPS, PLAN, facts, lambda _what, _steps: None)


def test_the_number_of_rows_goes_by_the_size_of_any_model(case):
    """What transformers call their layers and heads differs."""
    configs = {part: (type(module).__name__, dict(module.config)) for part, module in case.transformers.items()}
    files = models.ModelFiles("tiny", {}, configs, dict(case.pipe.vae.config))
    request = generate.Request("a", height=512, width=832, num_frames=81, num_inference_steps=5, guidance_scale=4.0)
    assert calibrate._rows(calibrate.CalibrateOptions(rows=128), files, request, 5) == 128
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "MEMORY_BYTES", 1)
        assert calibrate._rows(calibrate.CalibrateOptions(rows=128), files, request, 5) == 16


def test_what_cannot_be_repeated_is_refused():
    pipe = families.make("flux")
    found = []

    def wrap(part, original, *args, **kwargs):
        told = kwargs | {"joint_attention_kwargs": {"on": object()}}
        return Tape().record(found[0].generation, frozenset())(part, original, *args, **told)

    said = (
        "This model cannot be calibrated: joint_attention_kwargs of transformer holds a object, and what is repeated"
    )
    with forwards({"transformer": pipe.transformer}, wrap), sparsify(pipe, "dense") as session:
        found.append(session)
        with pytest.raises(ValueError, match=said):
            families.generate("flux", pipe)


def test_noise_levels_fall_from_one_to_zero_by_any_clock():
    levels = {}
    for name in ("mochi", "cosmos", "flux"):
        pipe = families.make(name)
        families.generate(name, pipe, steps=5)
        levels[name] = levels_of(pipe.scheduler)
    # Mochi's scheduler says how much of the video there is, and its first steps are short.
    assert levels["mochi"][0] == 1.0 and 0.9 < levels["mochi"][1] < 1 and 0 < levels["mochi"][-1] < 0.8
    # Cosmos's noise goes from 80 to 0.002, beside data of 0.5.
    assert levels["cosmos"][0] == pytest.approx(80 / 80.5) and levels["cosmos"][-1] == pytest.approx(0.002 / 0.502)
    assert levels["flux"] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    for told in levels.values():
        assert list(told) == sorted(told, reverse=True)
