"""One generation and all there is to know about it, kept on disk under a name that its content decides."""

import hashlib
import json
import logging
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import dit_sparse
from dit_sparse import generate, models
from dit_sparse.calibration import extras
from dit_sparse.calibration.kept import Kept
from dit_sparse.calibration.probe import Look, Probe, put_in_place
from dit_sparse.config import SparseConfig
from dit_sparse.layout import TokenGrid
from dit_sparse.pipelines.session import FAMILIES, Session, sparsify
from dit_sparse.profile import fingerprint
from dit_sparse.video import whole, write_record

logger = logging.getLogger(__name__)

# Query rows per call whose error is measured for the maps.
PROBED_ROWS = 64
# Of what is kept of a run; finished runs of another are made again.
_FORMAT = 2


@dataclass(frozen=True)
class Setting:
    """A way to compute attention, with the name it has in tables.

    density  what was asked for; None where the method has none
    backend  diffusers' name of a dense kernel; None leaves the choice to dit-sparse
    extras   what is on beside, of `extras.EXTRAS`
    ratios   what magcache goes by, see `extras.mag_ratios`
    """

    name: str
    config: SparseConfig
    density: float | None = None
    backend: str | None = None
    extras: tuple[str, ...] = ()
    ratios: tuple[float, ...] = ()

    @property
    def method(self) -> str:
        """What settings of other densities share."""
        method = self.config.method if self.config.profile is None else "profile"
        return "+".join((method, *self.extras))

    @property
    def compiled(self) -> bool:
        return "compile" in self.extras


@dataclass(frozen=True)
class Job:
    """One video of a setting; `number` counts prompts from 0. A probed one tells of layers and steps, too."""

    number: int
    prompt: str
    seed: int
    probed: bool = False


@dataclass(frozen=True)
class Made:
    """frames [F, H, W, 3] uint8 as they are scored; facts are what was measured; maps a row per layer and step.

    kept and kept_of are what the middle layer's heads keep, and its name and step; None if not probed, or all dense.
    """

    frames: np.ndarray
    facts: dict[str, Any]
    maps: list[dict[str, Any]]
    kept: Kept | None = None
    kept_of: tuple[str, int] | None = None


@dataclass(frozen=True)
class Maker:
    """Runs of one pipeline at one size.

    cache  directory for finished runs
    begin  called before each run with its setting and its job, None for a run whose times do not count
    done   called with a number of steps when they are done
    """

    pipe: Any
    request: generate.Request
    files: models.ModelFiles
    negative_prompt: str | None
    identity: Mapping[str, Any]
    cache: Path
    begin: Callable[[Setting, Job | None], None]
    done: Callable[[int], None]

    @property
    def transformers(self) -> dict[str, nn.Module]:
        return {part: m for part, m in self.pipe.components.items() if type(m).__name__ in FAMILIES}

    @property
    def on_gpu(self) -> bool:
        return self.pipe._execution_device.type != "cpu"

    def key(self, setting: Setting, job: Job) -> str:
        """The name of a run: a digest of all that decides what it makes and how long that takes."""
        dense = setting.config.method == "dense" and setting.backend is None and not setting.extras
        told = dict(self.identity) | {
            "request": [getattr(self.request, name) for name in sorted(vars(self.request)) if name != "prompt"],
            "prompts": [job.prompt, self.negative_prompt],
            "seed": job.seed,
            "method": None if dense else [setting.config.to_dict(), setting.backend, setting.extras, setting.ratios],
            # A dense run is worth keeping over changes of this library, which only sparse runs depend on.
            "code": None if dense else _source_digest(),
            "profile": setting.config.profile and _digest(Path(setting.config.profile).read_bytes()),
            "probed": PROBED_ROWS if job.probed else 0,
            "format": _FORMAT,
        }
        return _digest(json.dumps(told, sort_keys=True, default=str).encode())

    def make(self, setting: Setting, jobs: Sequence[Job]) -> Iterator[Made]:
        """Each job's run, from the cache, or made and kept. Of a probed run the times are without the probe's."""
        with ExitStack() as stack:
            on: _On | None = None
            for job in jobs:
                path = self.cache / self.key(setting, job)
                self.begin(setting, job)
                found = _read(path)
                if found is not None:
                    self.done(self.request.num_inference_steps)
                else:
                    if on is None:
                        on = self._switch_on(setting, stack)
                        # What a GPU or torch.compile compiles at first use is in no time that counts. On a GPU that
                        # holds for a probed run's times, too, so that one needs no run before it.
                        if setting.compiled or (self.on_gpu and not job.probed):
                            self.begin(setting, None)
                            self._run(on, setting, replace(job, probed=False), lambda _steps: None)
                            self.begin(setting, job)
                    found = self._run(on, setting, job, self.done)
                    _write(path, setting, job, found)
                yield found

    def mag_ratios(self, prompt: str, seed: int) -> tuple[float, ...]:
        """What magcache goes by, from a dense run, kept like any other."""
        job, steps = Job(0, prompt, seed), self.request.num_inference_steps
        path = self.cache / f"{self.key(Setting('dense', SparseConfig('dense')), job)}.mag.json"
        if path.is_file():
            return tuple(json.loads(path.read_text(encoding="utf-8"))["ratios"])
        [transformer] = self.transformers.values()
        with extras.mag_ratios(transformer, steps) as ratios:
            self._frames(job, lambda _steps: ratios.see())
        write_record(path, {"ratios": ratios.found})
        return tuple(ratios.found)

    def _switch_on(self, setting: Setting, stack: ExitStack) -> "_On":
        steps = self.request.num_inference_steps
        stack.enter_context(
            extras.switched_on(self.pipe, list(self.transformers), setting.extras, steps, setting.ratios)
        )
        if setting.backend is not None:
            for transformer in self.transformers.values():
                transformer.set_attention_backend(setting.backend)  # type: ignore[operator]  # diffusers'
                stack.callback(transformer.reset_attention_backend)  # type: ignore[arg-type]
        session = stack.enter_context(sparsify(self.pipe, setting.config))
        # A compiled block cannot stop for a clock.
        return _On(session, None if setting.compiled else put_in_place(self.transformers, session.generation))

    def _frames(self, job: Job, done: Callable[[int], None]) -> np.ndarray:
        def step_done(_pipe: Any, _step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
            done(1)
            return {}

        request = replace(self.request, prompt=job.prompt)
        return generate.frames_of(self.pipe, request, self.files, self.negative_prompt, job.seed, step_done)

    def _run(self, on: "_On", setting: Setting, job: Job, done: Callable[[int], None]) -> Made:
        probe, generation, device = on.probe, on.session.generation, self.pipe._execution_device
        if probe is not None:
            probe.forget()
            probe.rows = PROBED_ROWS if job.probed else 0
            # A step in the middle is sparse with most settings; of others, the next that is.
            first, last = self.request.num_inference_steps // 2, self.request.num_inference_steps
            layer = generation.layers[len(generation.layers) // 2].name
            probe.look = Look(layer, range(first, last)) if job.probed else None
        _forget_peak(device)
        start = time.perf_counter()
        try:
            frames = self._frames(job, done)
        except Exception as error:
            if not setting.extras or isinstance(error, ValueError | OSError | torch.OutOfMemoryError):
                raise
            # Not every cache, and not every compiler, can take every model, and each has errors of its own.
            said = (str(error).strip().splitlines() or [""])[0].rstrip(".")
            raise ValueError(f"{setting.name} fails with this model: {type(error).__name__}, {said}.") from error
        seconds = time.perf_counter() - start
        if not np.isfinite(frames).all():
            raise ValueError(f"{setting.name} made NaN or Inf of {job.prompt!r} at seed {job.seed}.")
        peak, report, tally = _peak(device), on.session.report(), generation.tally
        spent = sum(tally.phases.values(), Counter())
        own = 0.0 if probe is None else probe.own_seconds
        facts = {
            "dit_seconds": sum(step.seconds for step in report.steps) - own,
            "seconds": seconds - own,
            "attention_seconds": None if probe is None else probe.seconds,
            "peak_memory_bytes": peak,
            "density": report.density if setting.config.method != "dense" else 1.0,
            # Of all pairs in the calls that were made; a step cache leaves some out.
            "pairs": tally.dense_pairs,
            "work": report.work,
            # Dense calls and anchors, by the pairs in them.
            "dense_share": (spent["dense"] + spent["anchor"]) / spent.total() if spent else 0.0,
            "state_bytes": report.state_bytes,
            "fallbacks": sum(report.fallbacks.values()),
            "dense_kernel": report.dense_backend,
            "kernel": report.kernel,
        }
        pixels = (frames.clip(0, 1) * 255).round().astype(np.uint8)
        if probe is None or not job.probed:
            return Made(pixels, facts, [])
        look = probe.look
        assert look is not None
        return Made(pixels, facts, probe.maps(), look.found, (look.layer, look.at) if look.found else None)


@dataclass(frozen=True)
class _On:
    """A setting that is switched on; no probe where attention cannot be watched."""

    session: Session
    probe: Probe | None


def _read(path: Path) -> Made | None:
    """The run kept under this name; None where there is none, and for a damaged one, which is made again."""
    if not (path.with_suffix(".json").is_file() and path.with_suffix(".npz").is_file()):
        return None
    try:
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        with np.load(path.with_suffix(".npz")) as stored:
            kept = None
            if record["kept_of"]:
                grid = TokenGrid(*stored["grid"].tolist())
                heads, blocks = len(stored["dense"]), int(stored["home"].max()) + 1
                bits = np.unpackbits(stored["blocks"], axis=-1, count=blocks).astype(bool)
                kept = Kept(grid, bits.reshape(heads, blocks, blocks), stored["home"], stored["dense"])
            kept_of = record["kept_of"] and tuple(record["kept_of"])
            return Made(stored["frames"], record["facts"], record["maps"], kept, kept_of)
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        logger.warning("the kept run %s is damaged (%s) and is made again", path.name, error)
        return None


def _write(path: Path, setting: Setting, job: Job, made: Made) -> None:
    arrays = {"frames": made.frames}
    if made.kept is not None:
        k = made.kept
        grid = np.array((k.grid.frames, k.grid.height, k.grid.width))
        arrays |= {"blocks": np.packbits(k.blocks, axis=-1), "home": k.home, "dense": k.dense, "grid": grid}
    with whole(path.with_suffix(".npz")) as part:
        np.savez_compressed(part, **arrays)  # type: ignore[arg-type]  # numpy takes any names
    record = {"setting": setting.name, "prompt": job.prompt, "seed": job.seed, "facts": made.facts, "maps": made.maps}
    write_record(path.with_suffix(".json"), record | {"kept_of": made.kept_of})


def weights_of(pipe: Any) -> dict[str, str]:
    """Component -> what its weights look like, for every network of a pipeline."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {name: fingerprint(part)["bfloat16"] for name, part in parts.items()}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]


@lru_cache(maxsize=1)
def _source_digest() -> str:
    files = sorted(
        file
        for root in dit_sparse.__path__
        for folder in (Path(root), *(Path(root) / name for name in ("kernels", "pipelines", "calibration")))
        for file in folder.glob("*.py")
    )
    return _digest(b"".join(file.read_bytes() for file in files))


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        # Makes the kernel measure the peak of this process anew; where it may not, the peak so far counts.
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            return


def _peak(device: torch.device) -> int:
    """Bytes: of the GPU since `_forget_peak`, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
