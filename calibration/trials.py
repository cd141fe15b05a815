"""Trials: what would be chosen by all that is known, played on a prompt, and what is kept of it.

Some are of a whole run, and bands of a few steps, where all others are dense.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dit_sparse.calibration.fit import lasted, try_out
from dit_sparse.calibration.job import Job, Latents
from dit_sparse.calibration.metrics import psnr
from dit_sparse.calibration.paths import Problem
from dit_sparse.calibration.probe import put_in_place
from dit_sparse.calibration.replay import Tape, forwards
from dit_sparse.calibration.steady import steady, timed_again
from dit_sparse.pipelines.session import Session, sparsify
from dit_sparse.profile import Header, Profile

# Qualities in dB that the trials of a prompt aim at, one prompt after the other: what comes of them is right where
# targets are. Two of one prompt say how quality grows with what is spent, whatever the prompt.
TRIED = ((30.0, 36.0), (33.0, 27.0), (27.0, 33.0), (36.0, 30.0))
# Into how many parts the steps of a run are cut, and how many of these are tried alone with each prompt: all of them
# would take longer than all the rest, and prompts that have two in common with others can be compared.
BANDS, OF_A_PROMPT = 5, 2


def trials(prompts: int) -> list[tuple[int, float]]:
    """Number of the prompt, and the quality to try. Of a single prompt once: how it differs from others, which is
    not known then, is more than a second trial would tell."""
    aims = [TRIED[number % len(TRIED)] for number in range(prompts)]
    count = 1 if prompts == 1 else 2
    return [(number, aim) for turn in range(count) for number, aim in enumerate(each[turn] for each in aims)]


def bands(prompts: int, steps: int) -> list[tuple[int, float, int, range]]:
    """Number of the prompt, the quality to try, and the part of the steps that is not dense: for each prompt other
    parts, and each part as often as others, or once less. Of a single prompt none, which could not be compared."""
    count = min(BANDS, steps)
    if prompts == 1 or count < 2:
        return []
    ends = [round(i * steps / count) for i in range(count + 1)]
    parts = [sorted((number + i * (count // 2)) % count for i in range(OF_A_PROMPT)) for number in range(prompts)]
    return [
        (number, TRIED[number % len(TRIED)][0], part, range(ends[part], ends[part + 1]))
        for number, tried in enumerate(parts)
        for part in tried
    ]


def trial(job: Job, work: Path, place: int, profile: Profile) -> dict[str, Any]:
    """The prompt of `trials` at this place with what the profile's measurements would choose: how its error grows from
    step to step, and by how much predictions are off."""
    number, aim = trials(len(job.prompts))[place]
    fitted, told = try_out(profile, aim)
    measured, took = _play(job, work, number, fitted, told, f"trial {place + 1}")
    if timed_again(job.pipe._execution_device, fitted.header.seconds["transformers"]):
        # Of each step the shorter time counts.
        _, again = _play(replace(job, tick=lambda *_: None), work, number, fitted, told, "")
        took = {step: min(seconds, again[step]) for step, seconds in took.items()}
    problem = Problem(fitted, by="work")
    return told | measured | {"seconds": lasted(problem, problem.chosen(), took)}


def band(job: Job, work: Path, place: int, profile: Profile) -> dict[str, Any]:
    """The same where all but the steps of `bands` at this place are dense: what the errors of these alone come to in
    the end."""
    number, aim, part, span = bands(len(job.prompts), job.steps)[place]
    fitted, told = try_out(profile, aim, span)
    measured, _ = _play(job, work, number, fitted, told, "bands")
    return {"prompt": number, "part": part, "direct": told["direct"], "error": measured["error"]}


def _play(
    job: Job, work: Path, number: int, fitted: Profile, told: dict[str, Any], said: str
) -> tuple[dict[str, Any], dict[int, float]]:
    """A prompt with a fitted profile that is dense before the step told as "start", and seconds by step from there on,
    see `_seconds`.

    "error" is the mean square of the frames' error, "found" the error of the latents after each step."""
    start = told["start"]
    fitted.save(work / "trial.safetensors")
    dense = load_file(work / f"dense-{number}.safetensors")
    tape = Tape.from_tensors(load_file(work / f"tape-{number}.safetensors"))
    found: list[Session] = []

    def wrap(part: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return tape.play(found[0].generation, lambda step: step >= start)(part, original, *args, **kwargs)

    with forwards(job.transformers, wrap), sparsify(job.pipe, profile=str(work / "trial.safetensors")) as session:
        found.append(session)
        probe = put_in_place(job.transformers, session.generation)
        latents = Latents(partial(job.tick, said, 1))
        frames = job.run(job.prompts[number], job.seed + number, latents)
        steps = {step.step: step.seconds for step in session.report().steps}
        took = _seconds(steps, probe.by_step(), fitted.header, session.generation.device)
    job.tick(said, job.steps - latents.steps)
    error = 10 ** (-psnr(frames, dense["frames"].numpy()) / 10)
    off = latents.off(dense["latents"], len(told["direct"]))
    return {"prompt": number, "error": error, "found": off}, took


def _seconds(
    steps: Mapping[int, float], attention: Mapping[int, float], header: Header, device: torch.device
) -> dict[int, float]:
    """What steps would have taken in the dense run's place. What is not attention is the same there, a step like the
    other, and tells how much faster or slower a CPU was then; a GPU does nothing else. Where a GPU waits longer
    than in the dense run, for launches or for weights that are kept elsewhere, that is left out."""
    beside = header.costs["other"] / len(header.levels)
    here = steady([seconds - attention.get(step, 0.0) for step, seconds in steps.items()])
    pace = beside * len(steps) / here if device.type == "cpu" and here > 0 and beside > 0 else 1.0
    return {step: beside + attention.get(step, 0.0) * pace for step in steps}
