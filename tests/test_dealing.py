"""Heads are dealt out so that no process waits long for another."""

import pytest
import torch

from dit_sparse.choices import DENSE, Choice
from dit_sparse.dealing import deal, work_of
from dit_sparse.state import Layer
from tests import profiles


def waiting(work, order, shares):
    """What the slowest share does, over all calls."""
    return work[list(order)].unflatten(0, (shares, -1)).sum(1).amax(0).sum().item()


def test_much_and_little_work_is_dealt_evenly():
    work = torch.tensor([1.0, 0.9, 0.2, 0.1]).double()[:, None]
    order = deal(work, 2)
    assert order == (0, 3, 1, 2)
    assert waiting(work, order, 2) == pytest.approx(1.1)


def test_heads_that_work_at_different_times_go_together():
    """Evenly in sum is not evenly in each call."""
    early, late = [1.0, 0.0], [0.0, 1.0]
    work = torch.tensor([early, early, late, late]).double()
    order = deal(work, 2)
    assert waiting(work, range(4), 2) == 4 and waiting(work, order, 2) == 2


@pytest.mark.parametrize("shares", [2, 3, 4])
def test_every_head_is_dealt_once_and_nobody_waits_longer(shares):
    random = torch.Generator().manual_seed(0)
    for _ in range(20):
        work = torch.rand(24, 10, generator=random).double() ** 3
        order = deal(work, shares) or range(24)
        assert sorted(order) == list(range(24))
        assert waiting(work, order, shares) <= waiting(work, range(24), shares)


def test_equal_work_stays_where_it_is():
    assert deal(torch.ones(8, 3).double(), 4) == ()


def test_work_of_a_profile():
    made, (low, top, _) = profiles.profile(), profiles.LADDER
    choices = [DENSE, Choice("tail", low), Choice("none", top), Choice("anchor", low, "bf16")]
    choices.append(Choice("anchor", low, "bf16", 0.5))
    index = torch.tensor([3, 3, 1, 0, 0, 2]).expand(4, 2, 6).clone()
    index[3, :, :2] = 4
    anchors = torch.tensor([1, 0, 0, 0, 0, 0])
    fitted = profiles.chosen(made, choices, index, anchors)
    work = work_of(fitted, "transformer.blocks.1.attn1")
    assert work.shape == (2, 12)
    expected = torch.tensor([[1, 0.1, 0.1, 1, 1, 0.2], [0.5, 0.1, 0.1, 1, 1, 0.2]]).double().repeat(1, 2)
    torch.testing.assert_close(work, expected, atol=1e-3, rtol=0)


def test_the_heads_that_a_process_holds():
    layer = Layer("blocks.0", 0, 1, 2, 32, share=1, shares=2)
    assert list(layer.held) == [2, 3]
    dealt = Layer("blocks.0", 0, 1, 2, 32, share=1, shares=2, dealt=(0, 3, 1, 2))
    assert list(dealt.held) == [1, 2]
