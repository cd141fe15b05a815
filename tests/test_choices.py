import pytest
import torch

from dit_sparse.choices import DENSE, Choice, Rung, bracket, grouped, laid_out, nearest, per_block
from dit_sparse.config import SparseConfig

ANCHOR = Choice("anchor", Rung(0.1), "fp8")
TAIL = Choice("tail", Rung(0.3))
BASE = SparseConfig("tail", block=16, order="raster")


def test_a_step_takes_after_the_nearest_noise_level():
    known = {0: 1.0, 1: 0.75, 4: 0.25}
    assert nearest([1.0, 0.88, 0.87, 0.5, 0.49, 0.0], known) == [0, 0, 1, 1, 4, 4]


def test_a_level_lies_between_two_steps():
    known = {0: 1.0, 1: 0.75, 4: 0.25}
    assert bracket(0.5, known) == (1, 4, 0.5) and bracket(0.75, known) == (1, 1, 0.0)
    assert bracket(0.9375, known) == (0, 1, 0.25)
    assert bracket(1.5, known) == (0, 0, 0.0) and bracket(0.0, known) == (4, 4, 0.0)


def test_the_same_steps_are_laid_out_as_they_are():
    choices = [DENSE, ANCHOR, ANCHOR, ANCHOR, TAIL, ANCHOR, ANCHOR]
    anchors = [False, True, False, True, False, True, False]
    found = laid_out(choices, anchors, range(7))
    # The anchor at step 3 is followed by nothing that uses it.
    assert found == [(DENSE, 0), (ANCHOR, 1), (ANCHOR, 1), (DENSE, 3), (TAIL, 4), (ANCHOR, 5), (ANCHOR, 5)]


def test_more_steps_share_one_memory_and_fewer_lose_it():
    choices, anchors = [DENSE, ANCHOR, ANCHOR, TAIL], [False, True, False, False]
    twice = laid_out(choices, anchors, [0, 0, 1, 1, 2, 2, 3, 3])
    assert [since for _, since in twice] == [0, 1, 2, 2, 2, 2, 6, 7]
    assert [choice.method for choice, _ in twice] == ["dense"] * 2 + ["anchor"] * 4 + ["tail"] * 2
    assert laid_out(choices, anchors, [0, 2]) == [(DENSE, 0), (DENSE, 1)]
    assert laid_out(choices, anchors, [0, 1, 3]) == [(DENSE, 0), (DENSE, 1), (TAIL, 2)]


def test_a_memory_that_skipped_its_anchor_begins_where_it_is_first_used():
    choices, anchors = [DENSE, ANCHOR, ANCHOR, ANCHOR], [False, True, False, False]
    assert laid_out(choices, anchors, [0, 2, 3]) == [(DENSE, 0), (ANCHOR, 1), (ANCHOR, 1)]


def test_heads_go_together_from_their_anchor_to_its_last_use():
    heads = [
        [(ANCHOR, 0), (ANCHOR, 0), (ANCHOR, 0)],
        [(ANCHOR, 0), (ANCHOR, 0), (TAIL, 2)],
        [(ANCHOR, 0), (ANCHOR, 0), (ANCHOR, 0)],
        [(TAIL, 0), (DENSE, 1), (TAIL, 2)],
    ]
    steps = list(grouped("l", heads, BASE))
    assert [[group.heads for group in step] for step in steps] == [
        [(0, 2), (1,), (3,)],
        [(0, 2), (1,), (3,)],
        [(0, 2), (1, 3)],
    ]
    assert [[group.phase for group in step] for step in steps] == [
        ["anchor", "anchor", "sparse"],
        ["sparse", "sparse", "dense"],
        ["sparse", "sparse"],
    ]
    # One name for one memory, another for another.
    names = [[group.name for group in step if group.choice.learns] for step in steps]
    assert names[0] == names[1] and names[2] == names[0][:1] and len(set(names[0])) == 2
    assert steps[0][0].config == SparseConfig("anchor", density=0.1, block=16, order="raster")


@pytest.mark.parametrize("method", ["none", "rectify", "tail", "calibrated", "anchor", "reshape"])
def test_a_choice_is_a_uniform_config(method):
    base = SparseConfig("tail", second_order_limit=3.0, neighbours=True)
    config = Choice(method, Rung(0.2, 0.5)).config(base)
    assert (config.density, config.top_p, config.neighbours) == (0.2, 0.5, True)
    assert config.has_tail == (method in ("tail", "anchor", "calibrated"))
    assert config.second_order_limit == (3.0 if config.has_tail else 2.0)
    routed = {"tail": "error", "anchor": "fine", "reshape": "fine"}
    assert config.routes_by == routed.get(method, "mass")
    assert config.learns == (method in ("anchor", "reshape"))


def test_a_soft_anchor_is_a_config_with_its_density():
    assert Choice("anchor", Rung(0.1), "bf16", 0.4).config(BASE).anchor_density == 0.4
    assert ANCHOR.config(BASE).anchor_density is None


def test_choices_survive_json():
    for choice in (DENSE, ANCHOR, Choice("tail", Rung(0.1, 0.5)), Choice("anchor", Rung(0.1), "bf16", 0.4)):
        assert Choice.from_dict(choice.to_dict()) == choice


def test_rho_is_spread_over_blocks_by_relative_position():
    rho = torch.tensor([[0.2, 0.6]])
    assert torch.allclose(per_block(rho, 2), rho)
    assert torch.allclose(per_block(rho, 4), torch.tensor([[0.2, 0.3, 0.5, 0.6]]))
    assert torch.allclose(per_block(rho, 1), torch.tensor([[0.4]]))
