"""One generation and all there is to know about it, kept on disk under a name that its content decides."""

import hashlib
import json
import logging
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import dit_sparse
from dit_sparse import generate, models
from dit_sparse.calibration.probe import put_in_place
from dit_sparse.config import SparseConfig
from dit_sparse.pipelines.session import FAMILIES, sparsify
from dit_sparse.profile import fingerprint
from dit_sparse.video import whole, write_record

logger = logging.getLogger(__name__)

# Query rows per call whose error is measured for the maps.
PROBED_ROWS = 64


@dataclass(frozen=True)
class Setting:
    """A way to compute attention, with the name it has in tables.

    density  what was asked for; None where the method has none
    backend  diffusers' name of a dense kernel; None leaves the choice to dit-sparse
    """

    name: str
    config: SparseConfig
    density: float | None = None
    backend: str | None = None


@dataclass(frozen=True)
class Made:
    """frames [F, H, W, 3] uint8 as they are scored; facts are what was measured; maps a row per layer and step."""

    frames: np.ndarray
    facts: dict[str, Any]
    maps: list[dict[str, Any]]


@dataclass(frozen=True)
class Maker:
    """Runs of one pipeline at one size.

    cache  directory for finished runs
    done   called after each step of a run
    """

    pipe: Any
    request: generate.Request
    files: models.ModelFiles
    negative_prompt: str | None
    identity: Mapping[str, Any]
    cache: Path
    done: Callable[[], None]

    @property
    def transformers(self) -> dict[str, nn.Module]:
        return {part: m for part, m in self.pipe.components.items() if type(m).__name__ in FAMILIES}

    def key(self, setting: Setting, prompt: str, seed: int, probed: bool) -> str:
        """The name of a run: a digest of all that decides what it makes and how long that takes."""
        dense = setting.config.method == "dense" and setting.backend is None
        told = dict(self.identity) | {
            "request": [getattr(self.request, name) for name in sorted(vars(self.request)) if name != "prompt"],
            "prompts": [prompt, self.negative_prompt],
            "seed": seed,
            "method": None if dense else [setting.config.to_dict(), setting.backend],
            # A dense run is worth keeping over changes of this library, which only sparse runs depend on.
            "code": None if dense else _source_digest(),
            "profile": setting.config.profile and _digest(Path(setting.config.profile).read_bytes()),
            "probed": PROBED_ROWS if probed else 0,
        }
        return _digest(json.dumps(told, sort_keys=True, default=str).encode())

    def is_kept(self, key: str) -> bool:
        return (self.cache / f"{key}.json").is_file() and (self.cache / f"{key}.npz").is_file()

    def make(self, setting: Setting, prompt: str, seed: int, *, probed: bool = False) -> Made:
        """The run from the cache, or made and kept. A probed run's times are not those of the method."""
        key = self.key(setting, prompt, seed, probed)
        if (kept := self._kept(key)) is not None:
            return kept
        made = self._run(setting, prompt, seed, probed)
        with whole(self.cache / f"{key}.npz") as part:
            np.savez_compressed(part, frames=made.frames)
        write_record(
            self.cache / f"{key}.json",
            {"setting": setting.name, "prompt": prompt, "seed": seed, "facts": made.facts, "maps": made.maps},
        )
        return made

    def _kept(self, key: str) -> Made | None:
        """None also for a damaged run, which is made again and written over."""
        if not self.is_kept(key):
            return None
        try:
            record = json.loads((self.cache / f"{key}.json").read_text(encoding="utf-8"))
            with np.load(self.cache / f"{key}.npz") as stored:
                return Made(stored["frames"], record["facts"], record["maps"])
        except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
            logger.warning("the kept run %s is damaged (%s) and is made again", key, error)
            return None

    def _run(self, setting: Setting, prompt: str, seed: int, probed: bool) -> Made:
        def step_done(_pipe: Any, _step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
            self.done()
            return {}

        if setting.backend is not None:
            for transformer in self.transformers.values():
                transformer.set_attention_backend(setting.backend)  # type: ignore[operator]  # diffusers'
        try:
            with sparsify(self.pipe, setting.config) as session:
                probe = put_in_place(self.transformers, session.generation, PROBED_ROWS if probed else 0)
                device = self.pipe._execution_device
                _forget_peak(device)
                start = time.perf_counter()
                frames = generate.frames_of(
                    self.pipe, replace(self.request, prompt=prompt), self.files, self.negative_prompt, seed, step_done
                )
                seconds = time.perf_counter() - start
                peak, report = _peak(device), session.report()
        finally:
            if setting.backend is not None:
                for transformer in self.transformers.values():
                    transformer.reset_attention_backend()  # type: ignore[operator]  # diffusers'
        facts = {
            "dit_seconds": sum(step.seconds for step in report.steps),
            "seconds": seconds,
            "attention_seconds": probe.seconds,
            "peak_memory_bytes": peak,
            "density": report.density if setting.config.method != "dense" else 1.0,
            "work": report.work,
            "dense_share": probe.dense_share,
            "state_bytes": report.state_bytes,
            "fallbacks": sum(report.fallbacks.values()),
            "dense_kernel": report.dense_backend,
            "kernel": report.kernel,
        }
        if not np.isfinite(frames).all():
            raise ValueError(f"{setting.name} made NaN or Inf of {prompt!r} at seed {seed}.")
        pixels = (frames.clip(0, 1) * 255).round().astype(np.uint8)
        return Made(pixels, facts, probe.maps() if probed else [])


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
