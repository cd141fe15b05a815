"""Heads of many plans in one call: the same output and the same account as with a call for each plan."""

from dataclasses import replace

import pytest
import torch

from dit_sparse import attention
from dit_sparse.choices import DENSE, Choice, Rung
from dit_sparse.followers import together
from dit_sparse.some_heads import take
from tests.test_profile_attention import enter, generation, inputs, run

pytestmark = pytest.mark.usefixtures("one_thread")
THIN, THICK = Rung(0.1), Rung(0.3)


def mixed(kind: str):
    """Eight heads: three and one of an early anchor, two of which one is soft that learn again, a tail, one dense."""
    choices = [
        Choice("anchor", THIN, kind), Choice("anchor", THICK, kind), Choice("anchor", THIN, kind, 0.5),
        Choice("tail", THIN), DENSE,
    ]  # fmt: skip
    index = torch.tensor([0, 1, 0, 4, 0, 2, 0, 3])[:, None, None]
    anchor = torch.zeros(8, 1, 5, dtype=torch.long)
    anchor[[0, 1, 2, 4, 5, 6], :, 0] = 1
    anchor[[5, 6], :, 2] = 1
    g = generation(choices, index, anchor, heads=8)
    fade = torch.rand(g.profile.tensors["fade"].shape, generator=torch.Generator().manual_seed(0))
    g.profile = replace(g.profile, tensors=g.profile.tensors | {"fade": fade})
    return g


def test_where_all_heads_follow_no_input_is_copied(monkeypatch):
    index = torch.tensor([0, 1, 0, 1])[:, None, None]
    g = generation([Choice("anchor", THIN, "fp8"), Choice("anchor", THICK, "fp8")], index, [1, 0, 0, 0, 0], heads=4)
    seen, original = [], attention.attend_part

    def watched(q, k, v, *rest):
        seen.append((q, k, v))
        return original(q, k, v, *rest)

    monkeypatch.setattr(attention, "attend_part", watched)
    for step in range(2):
        seen.clear()
        given = inputs(heads=4)
        run(g, step, *given)
    [taken] = seen
    assert all(a is b for a, b in zip(taken, given, strict=True))


@pytest.mark.parametrize("text", [0, 7])
@pytest.mark.parametrize("kind", ["bf16", "fp8", "int4"])
def test_one_call_does_what_a_call_for_each_plan_does(kind, text, monkeypatch):
    calls = []
    original = attention.attend_part

    def counted(q, k, v, part, *rest):
        calls.append((part.phase, part.layer.heads))
        assert q.shape[1] == part.layer.heads
        return original(q, k, v, part, *rest)

    monkeypatch.setattr(attention, "attend_part", counted)
    one, other = mixed(kind), mixed(kind)
    for step in range(5):
        q, k, v = inputs(heads=8, text=text)
        calls.clear()
        out = run(one, step, q, k, v)
        anchors = {0: 6, 2: 2}.get(step, 0)
        sparse = [heads for phase, heads in calls if phase == "sparse"]
        assert sorted(sparse) == ([1] if anchors == 6 else [1, 6 - anchors])
        with monkeypatch.context() as apart:
            apart.setattr(attention, "together", lambda parts, *_: tuple(parts))
            expected = run(other, step, q, k, v)
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    assert one.tally.work() == pytest.approx(other.tally.work(), rel=1e-12)
    assert one.peak_state_bytes == other.peak_state_bytes
    assert len(one.learned) == len(other.learned)
    phases = [[record.phase for record in g.tally.steps()] for g in (one, other)]
    assert phases[0] == phases[1] == ["anchor", "sparse", "sparse", "sparse", "sparse"]


def test_what_is_stored_differently_stays_apart():
    choices = [Choice("anchor", THIN, "fp8"), Choice("anchor", THICK, "int4"), Choice("reshape", THIN, "fp8")]
    index = torch.tensor([0, 1, 2, 2])[:, None, None]
    g = generation(choices, index, [1, 0, 0, 0, 0], heads=4)
    for step in range(2):
        run(g, step, *inputs(heads=4))
    enter(g, 2)
    parts = g.parts(g.layers[0])
    assert together(parts, g, 4) == tuple(sorted(parts, key=lambda part: part.config.method == "anchor"))


def test_heads_that_fade_and_heads_that_do_not_are_one_call():
    """An anchor that was skipped is made up for, and a second look at that step is at all of what it learned."""
    g = mixed("fp8")
    q, k, v = inputs(heads=8)
    for step in (1, 2):
        run(g, step, q, k, v)
    enter(g, 2)
    [merged] = [part for part in together(g.parts(g.layers[0]), g, 8) if part.learned is not None]
    assert merged.heads == [0, 1, 2, 4, 5, 6]
    known = merged.fade.tolist()
    assert known[4] == known[5] == 1 and max(known[:4]) < 1


def test_what_was_picked_first_without_gradients_has_gradients_later():
    x = torch.randn(1, 9, 2, requires_grad=True)
    with torch.inference_mode():
        assert take(x, [0, 1, 8]).shape == (1, 3, 2)
    take(x, [0, 1, 8]).sum().backward()
    assert x.grad.sum() == 6
