"""What is recorded in a dense run is what the engine does with the same queries, keys and values."""

import time

import pytest
import torch

from dit_sparse.attention import fastest_dense, sparse_attention
from dit_sparse.calibration import record
from dit_sparse.calibration.record import Plan, Recorder, faded
from dit_sparse.choices import Choice, Rung
from dit_sparse.config import SparseConfig
from dit_sparse.kernels.block_attention import block_attention
from dit_sparse.kernels.dense_attention import dense_attention
from dit_sparse.kernels.permute import permute
from dit_sparse.layout import Layout, TokenGrid
from dit_sparse.order import token_order
from dit_sparse.profile import ERRORS, METHODS, STORAGES
from dit_sparse.residual import pack, unpack
from dit_sparse.routing import pool, route
from dit_sparse.state import Generation, Layer

CPU = torch.device("cpu")
# 150 tokens in blocks of 16: the last block is short, and only 5 of its 6 tokens differ from the padding's row count.
GRID = TokenGrid(6, 5, 5)
LAYER = Layer("transformer.blocks.0.attn1", 0, 1, 2, 16)
LADDER = (Rung(0.15), Rung(0.15, 0.6), Rung(0.4))
BASE = SparseConfig("tail", block=16)
STEPS = 4


def sequence(steps=STEPS):
    """q, k, v that drift from step to step, with some structure for routing to find."""
    start, drift = torch.randn(2, 3, 1, 2, GRID.tokens, 16)
    smooth = torch.randn(3, 1, 2, 1, 16)
    return [tuple(start + 0.2 * step * drift + smooth) for step in range(steps)]


def recorded(inputs, plan, metric=None, grid=GRID):
    g = Generation(SparseConfig("dense"), [LAYER])
    recorder = Recorder(plan, g, len(inputs), metric or {})
    g.dense = recorder
    for step, (q, k, v) in enumerate(inputs):
        for branch in ("cond", "uncond"):
            g.enter(grid, batch=1, device=CPU, timestep=0.0, step=step, total=len(inputs), branch=branch)
            out = sparse_attention(q, k, v, LAYER, g)
            assert torch.equal(out, dense_attention(q, k, v)[0])
    return recorder


def plan(**changes):
    return Plan(**dict(ladder=LADDER, distances=(1, 2, 3), bins=2, rows=10_000, base=BASE) | changes)


def engine(method, rung, inputs, **config):
    """The outputs of a uniform setting, whose anchors come every `refresh_every` steps from the first on."""
    choice = Choice(method, rung).config(BASE)
    g = Generation(SparseConfig.from_dict(choice.to_dict() | {"dense_steps": 0} | config), [LAYER])
    outs = []
    for step, (q, k, v) in enumerate(inputs):
        g.enter(GRID, batch=1, device=CPU, timestep=0.0, step=step, total=len(inputs), branch="cond")
        outs.append(sparse_attention(q, k, v, LAYER, g))
    return outs


def seen(x):
    """The rows that are looked at, in routing order: all but one of the short last block, whose 6 fill 16 places."""
    order = token_order("hilbert", GRID, (4, 4, 8), CPU)
    rows = torch.arange(GRID.tokens - 6)
    inside = (torch.linspace(0, 1, 16) * 5).round().long() + GRID.tokens - 6
    return permute((x,), order.take)[0][:, :, torch.cat([rows, inside])]


def square(x):
    return x.float().square().sum(-1).mean((0, 2))


def test_what_the_first_use_of_a_kernel_takes_is_no_time_of_dense_attention(monkeypatch):
    calls = []

    def compiled_at_first(*args):
        calls.append(time.sleep(0.0 if calls else 0.5))
        return fastest_dense(*args)

    monkeypatch.setattr(record, "fastest_dense", compiled_at_first)
    dense, beside = recorded(sequence(1), plan(rows=4)).seconds
    assert 0 < dense[0] < 0.4 and beside[0] > 0.5 and len(calls) == 3


@pytest.mark.parametrize("method", ["none", "rectify", "tail", "soft"])
def test_errors_are_those_of_the_engine(method):
    inputs = sequence()
    found = recorded(inputs, plan()).found["cond"]
    setting = ("tail", {"routing": "fine"}) if method == "soft" else (method, {})
    for k, rung in enumerate(LADDER):
        for step, out in enumerate(engine(setting[0], rung, inputs, **setting[1])):
            dense = dense_attention(*inputs[step])[0]
            error = square(seen(out - dense))
            got = found["error"][:, step, METHODS.index(method), k]
            torch.testing.assert_close(got, error, atol=1e-6, rtol=1e-3)
            torch.testing.assert_close(found["energy"][:, step], square(seen(dense)), atol=1e-6, rtol=1e-4)


def test_errors_of_a_memory_by_its_age_are_those_of_the_engine():
    inputs = sequence()
    found = recorded(inputs, plan()).found["cond"]
    for k, rung in enumerate(LADDER):
        outs = engine("reshape", rung, inputs, refresh_every=STEPS, residual="bf16")
        for step in range(1, STEPS):
            error = square(seen(outs[step] - dense_attention(*inputs[step])[0]))
            torch.testing.assert_close(found["stale"][:, step, 1, step - 1, k], error, atol=1e-6, rtol=2e-2)
    assert found["stale"][:, 0].isnan().all() and found["stale"][:, 1, :, 1:].isnan().all()


def test_an_anchors_residual_fades_to_what_has_the_least_error():
    inputs = sequence()
    found = recorded(inputs, plan()).found["cond"]
    for k, rung in enumerate(LADDER):
        outs = engine("anchor", rung, inputs, refresh_every=STEPS, residual="bf16")
        # What the anchor remembers.
        without = engine("tail", rung, inputs[:1])[0]
        residual = seen(dense_attention(*inputs[0])[0] - without)
        for step in range(1, STEPS):
            off = seen(outs[step] - dense_attention(*inputs[step])[0])
            fade, error = found["fade"][:, step, step - 1, k], found["stale"][:, step, 0, step - 1, k]
            assert ((fade > 0) & (fade <= 1)).all()
            by = (1 - fade)[:, None, None]
            torch.testing.assert_close(square(off - by * residual), error, atol=1e-6, rtol=2e-2)
            for other in (0.9 * fade, (1.1 * fade).clamp(max=1)):
                assert (square(off - (1 - other)[:, None, None] * residual) > error * 0.999).all()
    assert (found["fade"] < 0.9).any()
    assert found["fade"][:, 0].isnan().all() and found["fade"][:, 1, 1:].isnan().all()


def test_rho_recall_and_density_are_those_of_the_softmax():
    inputs = sequence(1)
    found = recorded(inputs, plan()).found["uncond"]
    layout, order = Layout(GRID, 0, 16), token_order("hilbert", GRID, (4, 4, 8), CPU)
    q, k, v = permute(inputs[0], order.take)
    mass = (q @ k.mT * 16**-0.5).softmax(-1)
    blocks = torch.nn.functional.pad(mass, (0, 10)).unflatten(-1, (10, 16)).sum(-1)
    for i, rung in enumerate(LADDER):
        config = Choice("rectify", rung).config(BASE)
        routed = route(pool(q, k, v, layout, config), layout, config, density=rung.density, scale=16**-0.5).plan
        _, lse = block_attention(q, k, v, routed, block=16)
        rho = (lse - dense_attention(q, k, v)[1]).exp()
        # Nine whole blocks and six rows of the last one, which is looked at 16 times.
        last = rho[..., 144:][..., (torch.linspace(0, 1, 16) * 5).round().long()]
        by_block = torch.cat([rho[..., :144].unflatten(-1, (9, 16)).mean(-1), last.mean(-1, keepdim=True)], -1)
        halves = by_block.unflatten(-1, (2, 5)).mean(-1)[0]
        torch.testing.assert_close(found["rho"][:, 0, i], halves, atol=1e-5, rtol=1e-4)
        assert found["kept"][:, 0, 0, i].mean().item() == pytest.approx(routed.density(), rel=1e-5)
        first = blocks[..., :144, :].unflatten(2, (9, 16)).mean(3)[0]
        best = first.sort(-1, descending=True).values.cumsum(-1).gather(-1, routed.counts[0, :, :9, None].long() - 1)
        recall = by_block[0, :, :9] / best[..., 0]
        assert (found["recall"][:, 0, i] <= 1 + 1e-5).all()
        assert found["recall"][:, 0, i].mean().item() == pytest.approx(recall.mean().item(), abs=0.05)


def test_heads_looked_at_together_are_as_those_looked_at_apart(monkeypatch):
    metric = {LAYER.name: torch.randn(2, 16, 16)}
    inputs = sequence()
    apart = recorded(inputs, plan(rows=20), metric).found
    monkeypatch.setattr(record, "_heads_at_once", lambda *_: 2)
    together = recorded(inputs, plan(rows=20), metric).found
    for branch, named in apart.items():
        for name, x in named.items():
            torch.testing.assert_close(together[branch][name], x, equal_nan=True, msg=name)


def test_everything_kept_has_no_error_and_all_mass():
    found = recorded(sequence(2), plan(ladder=(Rung(0.2), Rung(1.0)))).found["cond"]
    assert found["error"][..., 1].max() < 1e-9 and found["error"][..., 0].min() > 1e-6
    torch.testing.assert_close(found["rho"][:, :, 1], torch.ones(2, 2, 2))
    torch.testing.assert_close(found["recall"][..., 1], torch.ones(2, 2))
    assert found["stale"][:, 1, :, 0, 1].max() < 1e-6


def test_calibrated_lies_between_its_parts():
    """At rho equal to the mass of every row, calibrated is the tail's direction at the true share."""
    found = recorded(sequence(), plan()).found["cond"]
    none, calibrated = (found["error"][..., METHODS.index(name), :] for name in ("none", "calibrated"))
    assert (calibrated.mean((0, 1)) < none.mean((0, 1))).all()


def test_errors_are_measured_after_the_output_projection():
    inputs = sequence(1)
    root = torch.stack([torch.diag(torch.linspace(0, 2, 16)), torch.zeros(16, 16)])
    found = recorded(inputs, plan(), {LAYER.name: root}).found["cond"]
    error = engine("tail", LADDER[0], inputs)[0] - dense_attention(*inputs[0])[0]
    torch.testing.assert_close(found["error"][0, 0, 2, 0], square(seen(error) @ root[0])[0], atol=1e-6, rtol=1e-3)
    assert found["energy"][1].item() == 0


def test_coarse_is_what_storage_loses():
    inputs = sequence(1)
    recorder = recorded(inputs, plan())
    dense = dense_attention(*inputs[0])[0]
    lacks = seen(dense - engine("tail", LADDER[1], inputs, routing="fine")[0]).bfloat16().float()
    for s, storage in enumerate(STORAGES):
        lost = (unpack(pack(lacks, storage)) - lacks).square().sum((0, 2, 3)).sqrt() / lacks.square().sum(
            (0, 2, 3)
        ).sqrt()
        torch.testing.assert_close(recorder.found["cond"]["coarse"][:, 0, 0, s], lost, atol=1e-3, rtol=5e-2)


def test_together_is_the_angle_between_the_errors_of_two_branches():
    inputs, other = sequence(3), sequence(3)
    g = Generation(SparseConfig("dense"), [LAYER])
    recorder = g.dense = Recorder(plan(), g, 3)
    for step in range(3):
        for branch, (q, k, v) in (("cond", inputs[step]), ("uncond", other[step])):
            mixed = [0.5 * x + 0.5 * y for x, y in zip(inputs[step], (q, k, v), strict=True)]
            g.enter(GRID, batch=1, device=CPU, timestep=0.0, step=step, total=3, branch=branch)
            sparse_attention(*mixed, LAYER, g)
    first, second = (recorder.found[branch]["together"] for branch in ("cond", "uncond"))
    known = torch.tensor([name != "reshape" and name != "anchor" for name in ERRORS])
    assert torch.allclose(first[:, :, known], torch.ones(()), atol=1e-4) and first[:, 0, ~known].isnan().all()
    both = [[0.5 * x + 0.5 * y for x, y in zip(*pair, strict=True)] for pair in zip(inputs, other, strict=True)]
    for k, rung in enumerate(LADDER):
        for method, step in (("tail", 0), ("none", 2), ("anchor", 2)):
            errors = []
            for told in (inputs, both):
                more = {"refresh_every": 3, "residual": "bf16"} if method == "anchor" else {}
                out = engine(method, rung, told, **more)[step]
                errors.append(seen(out - dense_attention(*told[step])[0])[0].flatten(1))
            cosine = torch.cosine_similarity(*errors)
            got = second[:, step, ERRORS.index(method), k]
            torch.testing.assert_close(got, cosine, atol=0.12, rtol=0)


def test_persist_is_the_angle_between_the_errors_of_two_steps():
    inputs = sequence(3)
    found = recorded(inputs, plan()).found["cond"]["persist"]
    assert found[:, 0].isnan().all() and found[:, 1, ERRORS.index("anchor")].isnan().all()
    for k, rung in enumerate(LADDER):
        for method in ("tail", "rectify", "anchor"):
            more = {"refresh_every": 3, "residual": "bf16"} if method == "anchor" else {}
            outs = engine(method, rung, inputs, **more)
            errors = [seen(outs[i] - dense_attention(*inputs[i])[0])[0].flatten(1) for i in (1, 2)]
            got = found[:, 2, ERRORS.index(method), k]
            torch.testing.assert_close(got, torch.cosine_similarity(*errors), atol=0.12, rtol=0)


def test_rows_of_a_batch_are_looked_at_each_with_its_own_memory():
    """Guidance in one batch: what is found is the mean over both branches, of what grows stale, too."""
    # The second moves on faster, so that less of what it remembers is best added.
    first, second = sequence(3), sequence(5)[::2]
    both = [[torch.cat(pair) for pair in zip(*step, strict=True)] for step in zip(first, second, strict=True)]
    alone = [recorded(inputs, plan()).found["cond"] for inputs in (first, second)]
    for name, x in recorded(both, plan()).found["cond"].items():
        if name == "stale":
            # Each row alone would have what is best for it.
            own = torch.stack([found[name][:, :, 0] for found in alone]).mean(0)
            assert (x[:, :, 0] >= 0.999 * own).logical_or(own.isnan()).all() and (x[:, :, 0] > 1.01 * own).any()
            x, alone = x[:, :, 1], [found | {name: found[name][:, :, 1]} for found in alone]
        if name not in ("together", "persist", "fade"):
            mean = torch.stack([found[name] for found in alone]).mean(0)
            torch.testing.assert_close(x, mean, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_a_sample_of_rows_tells_about_the_same():
    inputs = sequence(2)
    whole, some = (recorded(inputs, plan(rows=rows)).found["cond"] for rows in (10_000, 64))
    for name in ("error", "energy"):
        ratio = some[name].mean((0, 1)) / whole[name].mean((0, 1))
        assert (ratio > 0.6).all() and (ratio < 1.6).all() and not torch.equal(some[name], whole[name])
    torch.testing.assert_close(some["rho"].mean(-1), whole["rho"].mean(-1), atol=0.1, rtol=0)


def test_memory_is_bounded_by_the_longest_distance():
    recorder = recorded(sequence(6), plan(distances=(1, 2)))
    assert {len(kept) for kept in recorder._memory.values()} == {3}


@pytest.mark.parametrize("place", [(0, 9), (9, 0), (4, 5)])
def test_text_counts_as_kept_wherever_it_stands(place):
    g = Generation(SparseConfig("dense"), [LAYER])
    recorder = g.dense = Recorder(plan(), g, 1)
    q, k, v = torch.randn(3, 1, 2, GRID.tokens + 9, 16)
    mask = torch.tensor([[True] * 6 + [False] * 3])
    g.enter(GRID, batch=1, device=CPU, timestep=0.0, step=0, total=1, branch="cond", text=place)
    dense = sparse_attention(q, k, v, LAYER, g, text_mask=mask)
    other = Generation(SparseConfig("tail", density=0.4, block=16, dense_steps=0), [LAYER])
    other.enter(GRID, batch=1, device=CPU, timestep=0.0, step=0, total=1, branch="cond", text=place)
    error = sparse_attention(q, k, v, LAYER, other, text_mask=mask) - dense
    got = recorder.found["cond"]["error"][:, 0, METHODS.index("tail"), 2]
    torch.testing.assert_close(got, square(seen(error[:, :, place[0] : place[0] + GRID.tokens])), atol=1e-6, rtol=1e-3)


def test_rows_of_a_batch_share_what_is_best_for_both():
    lacks, had = torch.randn(2, 50, 3), torch.randn(2, 50, 3)
    lacks[0] += had[0]
    sums = [torch.stack([x.square().sum(-1).mean(), (x * y).sum(-1).mean(), y.square().sum(-1).mean()])
            for x, y in zip(lacks, had, strict=True)]  # fmt: skip
    fade, error = faded(*torch.stack(sums).mean(0))
    for share in torch.linspace(0, 1, 11):
        assert (share * had - lacks).square().sum(-1).mean() >= error * (1 - 1e-6)
    torch.testing.assert_close((fade * had - lacks).square().sum(-1).mean(), error)
    assert faded(torch.tensor(2.0), torch.tensor(-0.1), torch.tensor(1.0)) == (0.0, 2.0)
    assert faded(torch.tensor(2.0), torch.tensor(1.5), torch.tensor(1.0)) == (1.0, 0.0)
    assert faded(torch.tensor(0.0), torch.tensor(0.0), torch.tensor(0.0)) == (0.0, 0.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("text", [0, 33])
def test_recording_never_waits_for_a_gpu(text):
    """It would find nothing to do while the next layer's kernels are launched."""
    cuda, grid = torch.device("cuda"), TokenGrid(5, 24, 24)
    layer = Layer("transformer.blocks.0.attn1", 0, 1, 2, 64)
    g = Generation(SparseConfig("dense"), [layer])
    looked = plan(ladder=(Rung(0.1), Rung(0.1, 0.6), Rung(0.4)), rows=128, base=SparseConfig("tail"))
    g.dense = Recorder(looked, g, 6, {layer.name: torch.eye(64, device=cuda).repeat(2, 1, 1)})
    try:
        for step in range(6):
            q, k, v = torch.randn(3, 1, 2, grid.tokens + text, 64, device=cuda, dtype=torch.bfloat16)
            g.enter(grid, batch=1, device=cuda, timestep=0.0, step=step, total=6, branch="cond", text=(0, text))
            torch.cuda.synchronize()
            # Compilation, tables that are made once, and memories of each age are behind.
            torch.cuda.set_sync_debug_mode("error" if step == 5 else "default")
            sparse_attention(q, k, v, layer, g)
    finally:
        torch.cuda.set_sync_debug_mode("default")
