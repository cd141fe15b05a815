"""A profile out of thin air, with the shape of a real one."""

import numpy as np
import torch

from dit_sparse.calibration.growth import lasting
from dit_sparse.calibration.record import Plan
from dit_sparse.choices import Choice, Rung
from dit_sparse.config import SparseConfig
from dit_sparse.profile import ERRORS, ROUTINGS, Header, Profile

LADDER = (Rung(0.1), Rung(0.1, 0.7), Rung(0.3))


def statistics(heads: int, branches: int, steps: int, plan: Plan, seed: int = 0) -> dict[str, torch.Tensor]:
    """Errors that fall with density and rise with age, different for each head."""
    random = torch.Generator().manual_seed(seed)
    shape = (heads, branches, steps)
    each = 0.5 + torch.rand(*shape, generator=random)
    k, d = len(plan.ladder), len(plan.distances)
    by_rung = torch.linspace(1, 0.3, k)
    by_method = torch.tensor([1.0, 0.9, 0.6, 0.8, 2.0, 0.59])
    by_learner = torch.tensor([0.6, 1.5])[:, None, None]
    by_age = torch.tensor(plan.distances).float() * 0.15
    density = torch.tensor([rung.density + 0.1 * bool(rung.top_p) for rung in plan.ladder])
    return {
        "rho": (0.4 + 0.5 * torch.rand(*shape, k, plan.bins, generator=random)).half(),
        "recall": (0.8 + 0.2 * torch.rand(*shape, k, generator=random)).half(),
        "kept": density.expand(*shape, len(ROUTINGS), k).half().contiguous(),
        "error": (0.2 * each[..., None, None] * by_method[:, None] * by_rung).half(),
        "stale": (0.2 * each[..., None, None, None] * by_learner * by_age[:, None] * by_rung).half(),
        "fade": torch.ones(*shape, d, k).half(),
        "coarse": torch.tensor([0.03, 0.12]).expand(*shape, 2, 2).half().contiguous(),
        "drift": by_age.expand(*shape, d).half().contiguous(),
        "persist": torch.full((*shape, len(ERRORS), k), 0.5).half(),
        "together": torch.tensor([1.0, 0.6])[:branches, None, None, None]
        .expand(*shape, len(ERRORS), k)
        .half()
        .contiguous(),
        "energy": torch.rand(*shape, generator=random) + 0.5,
    }  # fmt: skip


TWO_LAYERS = (("transformer.blocks.0.attn1", 2, 32), ("transformer.blocks.1.attn1", 2, 32))


def trial(steps: int, **told) -> dict:
    """A run whose error grew as it usually does, measured as predicted."""
    levels = [1 - i / steps for i in range(steps)]
    direct, grown = np.linspace(2e-4, 1e-4, steps), lasting(levels) ** 2
    found = np.cumsum(direct * grown) / grown
    return {
        "work": 0.5, "direct": direct.tolist(), "start": 0, "predicted_seconds": 40.0, "seconds_known": 30.0,
        "seconds": 40.0, "found": found.tolist(), "error": float((direct * grown).sum()),
    } | told  # fmt: skip


def profile(
    layers: tuple[tuple[str, int, int], ...] = TWO_LAYERS,
    branches: tuple[str, ...] = ("cond", "uncond"),
    steps: int = 6,
    levels: tuple[float, ...] | None = None,
    weights: dict[str, dict[str, str]] | None = None,
    grid: tuple[int, int, int] = (5, 8, 8),
    **base,
) -> Profile:
    plan = Plan(LADDER, (1, 2, 4), 4, 16, SparseConfig("tail", **base))
    heads, both = sum(heads for _, heads, _ in layers), len(branches)
    at_once = {name: [0.2, 0.35, 0.5] for name in ("none", "rectify", "tail", "calibrated", "anchor", "reshape")}
    header = Header(
        model_id="tiny",
        weights=weights or {"transformer": {"class": "WanTransformer3DModel", "bfloat16": "0", "float16": "0"}},
        layers=layers,
        branches=branches,
        ran={name.partition(".")[0]: tuple(range(steps)) for name, _, _ in layers},
        levels=levels or tuple(1 - i / steps for i in range(steps)),
        grid=grid,
        size=(16, 16, 5),
        scheduler={"class": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
        guidance_scale=4.0,
        config=plan.base.to_dict(),
        rungs=tuple((rung.density, rung.top_p) for rung in LADDER),
        distances=plan.distances,
        bins=plan.bins,
        rows=plan.rows,
        created="2026-01-01",
        device="a machine",
        dtype="float32",
        kernel="torch",
        versions={"torch": torch.__version__},
        prompts=("a red ball",),
        seconds={"transformers": heads * len(branches) * steps * 1.0 + 10.0, "attention": 1.0, "recording": 1.0},
        costs={"dense": 1.0, "other": 10.0, **at_once, "anchor at anchor": [1.3] * 3, "reshape at anchor": [1.2] * 3},
        effects={
            "gain": {name: {"1": [1e-3] * both, str(steps - 2): [2e-3] * both} for name, _, _ in layers},
            "agree": {name: {"1": [1.0] * both} for name, _, _ in layers},
            "trials": [trial(steps)],
            "scale": 1.0,
        },
    )
    return Profile(header, statistics(heads, len(branches), steps, plan), "tiny.profile.safetensors")


def chosen(profile: Profile, choices: list[Choice], index: torch.Tensor, anchor: torch.Tensor) -> Profile:
    """The profile with `choices[index]` everywhere; index and anchor broadcast to [heads, branches, steps]."""
    shape = profile.tensors["energy"].shape
    whole = [x.to(torch.uint8).expand(shape).contiguous() for x in (index, anchor)]
    said = {"psnr_db": 30.0, "speedup": 1.5, "seconds": 20.0, "state_gib": 0.1}
    return profile.with_choices(*whole, choices, {"psnr": 30.0}, said)
