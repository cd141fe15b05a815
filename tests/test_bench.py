"""The bench command on a CPU: what it times, what it refuses to time, and the plans it draws."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dit_sparse import bench, bench_forward
from dit_sparse.bench import BenchOptions, Case, random_plan

CASE = Case(2, (2, 16, 20), head_dim=16, block=16)
CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.CASES, "small", CASE)


def rows(what, tmp_path, **options):
    told = tmp_path / "rows.json"
    code = bench.run(what, BenchOptions(device="cpu", repeats=1, output_file=told, **options))
    return code, json.loads(told.read_text())["rows"]


def test_attention_times_dense_and_even_and_uneven_plans(tmp_path, capsys):
    code, got = rows("attention", tmp_path, density=(0.1, 0.5))
    assert code == 0 and all(row["ms"] > 0 and row["error"] <= 1 for row in got)
    assert [row["what"] for row in got] == ["dense cpu", "torch", "torch", "torch, counts spread 10 times"]
    assert [row["density"] for row in got[1:]] == pytest.approx([0.1, 0.5, 0.1], abs=0.02)
    assert "counts spread 10 times" in capsys.readouterr().err


def test_attention_over_smaller_key_blocks(tmp_path):
    code, got = rows("attention", tmp_path, density=(0.2375,), key_block=8)
    # 19 of the 80 such blocks of 640 tokens; of 40 blocks 9 would be drawn.
    assert code == 0 and [row["density"] for row in got[1:]] == [0.2375, pytest.approx(0.1)]


def test_what_is_wrong_is_not_timed(tmp_path, monkeypatch, capsys):
    right = bench.block_attention
    monkeypatch.setattr(bench, "block_attention", lambda *a, **k: tuple(x + 0.5 for x in right(*a, **k)))
    code, got = rows("attention", tmp_path, density=(0.1,))
    assert code == 1 and got[0]["ms"] > 0 and all(row["ms"] is None and row["error"] > 1 for row in got[1:])
    assert "not timed: small, torch, density 0.1" in capsys.readouterr().out


def test_operator_times_every_part(tmp_path):
    code, got = rows("operator", tmp_path, density=(0.2,))
    assert code == 0 and len(got) == 14 and all(row["ms"] > 0 for row in got)


@pytest.mark.parametrize("what", ["operator", "forward"])
def test_smaller_key_blocks_are_those_of_every_part(what, tmp_path, monkeypatch):
    monkeypatch.setitem(bench.CASES, "small", replace(CASE, block=32))
    code, got = rows(what, tmp_path, density=(0.2,), key_block=16)
    assert code == 0 and all(row["ms"] > 0 and (row["error"] or 0) <= 1 for row in got)
    with pytest.raises(ValueError, match="Unknown key_block 8"):
        rows(what, tmp_path, density=(0.2,), key_block=8)


def test_forward_times_dense_sparse_and_anchor_steps(tmp_path):
    code, got = rows("forward", tmp_path, density=(0.2,))
    assert code == 0 and all(row["ms"] > 0 for row in got)
    assert [row["what"] for row in got] == [
        "dense, native", "tail, sparse step", "anchor, anchor step", "anchor, sparse step"
    ]  # fmt: skip
    assert got[0]["speedup"] == 1 and got[1]["density"] == 0.2


SMALL = dict(num_attention_heads=2, attention_head_dim=64, num_layers=1)
COGVIDEOX = SMALL | dict(text_embed_dim=32, time_embed_dim=32, patch_size=2, use_rotary_positional_embeddings=True)
FLUX = SMALL | dict(
    num_single_layers=1, joint_attention_dim=32, pooled_projection_dim=32, in_channels=16, guidance_embeds=True,
    axes_dims_rope=(8, 28, 28),
)  # fmt: skip


@pytest.mark.parametrize(
    ("class_name", "options", "size"),
    [("CogVideoXTransformer3DModel", COGVIDEOX, (9, 128, 192)), ("FluxTransformer2DModel", FLUX, (1, 384, 256))],
)
def test_forwards_of_other_families_run(class_name, options, size, tmp_path, monkeypatch):
    case = bench_forward.ForwardCase(class_name, options, size, text=8)
    monkeypatch.setitem(bench_forward.FORWARDS, "small", case)
    code, got = rows("forward", tmp_path, density=(0.5,))
    assert code == 0 and [row["what"] for row in got][1:] == [
        "tail, sparse step", "anchor, anchor step", "anchor, sparse step"
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("compile", ["blocks", "whole"])
def test_a_compiled_forward_is_one_graph_for_every_step(compile, tmp_path):
    code, got = rows("forward", tmp_path, density=(0.5,), compile=compile)
    assert code == 0 and all(", compiled" in row["what"] and row["ms"] > 0 for row in got)
    assert {row["what"].split(" step")[0] for row in got[1:]} == {"tail, sparse", "anchor, sparse", "anchor, anchor"}


def test_a_forward_with_nan_is_not_timed(tmp_path, monkeypatch, capsys):
    made = bench_forward._random

    def broken(*args):
        transformer = made(*args)
        transformer.proj_out.weight[0, 0] = float("nan")
        return transformer

    monkeypatch.setattr(bench_forward, "_random", broken)
    code, got = rows("forward", tmp_path)
    assert code == 1 and all(row["ms"] is None for row in got)
    assert "not timed: small, dense, native, density -" in capsys.readouterr().out


def test_published_shapes_are_those_of_the_other_benches():
    for name, case in bench_forward.FORWARDS.items():
        if name == "small":
            continue
        # What it reads of a config besides the shape are numbers of channels.
        channels = ("in_channels", "text_dim", "text_embed_dim", "joint_attention_dim", "pooled_projection_dim")
        config = SimpleNamespace(**dict.fromkeys(channels, 16) | dict(case.transformer))
        inputs = bench_forward.INPUTS[case.class_name](SimpleNamespace(config=config), case, META, torch.bfloat16)
        of_attention, latents = bench.CASES[name], inputs["hidden_states"].shape
        match case.class_name:
            case "WanTransformer3DModel":
                grid = tuple(n // p for n, p in zip(latents[2:], config.patch_size, strict=True))
            case "CogVideoXTransformer3DModel":
                grid = (latents[1], latents[3] // config.patch_size, latents[4] // config.patch_size)
                assert case.text == of_attention.text
            case _:
                grid = (1, *(side // 16 for side in case.size[1:]))
                assert latents[1] == grid[1] * grid[2] and case.text == of_attention.text
        assert grid == of_attention.grid
        assert case.transformer["num_attention_heads"] == of_attention.heads
        assert case.transformer["attention_head_dim"] == of_attention.head_dim


@pytest.mark.parametrize("what", ["attention", "operator", "forward"])
def test_unknown_cases_are_refused(what):
    with pytest.raises(ValueError, match="Unknown case 'wan': choose from"):
        bench.run(what, BenchOptions(case=("wan",), device="cpu"))


@pytest.mark.parametrize("key_block", [None, 32])
@pytest.mark.parametrize("spread", [1, 10])
def test_random_plans_are_legal_and_keep_the_density(spread, key_block):
    plan = random_plan(Case(3, (1, 64, 100), block=64, key_block=key_block), 0.2, CPU, spread=spread)
    plan.check()
    assert plan.counts.shape == (1, 3, 100) and plan.key_blocks == (200 if key_block else 100)
    assert plan.density() == pytest.approx(0.2, abs=0.01)
    assert int(plan.counts.max()) / int(plan.counts.min()) == pytest.approx(spread, rel=0.2)
