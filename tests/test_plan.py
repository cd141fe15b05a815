from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.plan import BlockPlan


@st.composite
def masks(draw) -> torch.Tensor:
    """[B, H, Nq, Nk] bool, at least one True a row."""
    shape = draw(st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 6), st.integers(1, 9)))
    rows = shape[0] * shape[1] * shape[2]
    drawn = draw(st.lists(st.integers(1, 2 ** shape[3] - 1), min_size=rows, max_size=rows))
    return (torch.tensor(drawn)[:, None] >> torch.arange(shape[3]) & 1).bool().view(shape)


@settings(deadline=None)
@given(masks())
def test_a_mask_survives_the_round_trip(mask):
    plan = BlockPlan.from_mask(mask)
    plan.check()
    assert plan.counts.dtype == plan.indices.dtype == torch.int32
    assert plan.indices.is_contiguous()
    assert torch.equal(plan.mask(), mask)
    assert plan.density() == pytest.approx(mask.double().mean().item())


@settings(deadline=None)
@given(masks())
def test_a_row_lists_its_blocks_in_ascending_order(mask):
    plan = BlockPlan.from_mask(mask)
    for row, count, indices in zip(mask.flatten(0, 2), plan.counts.flatten(), plan.indices.flatten(0, 2), strict=True):
        assert indices[:count].tolist() == row.nonzero().flatten().tolist()


def test_long_rows_are_listed_in_ascending_order_too():
    mask = torch.rand(1, 1, 3, 5000) < 0.5
    BlockPlan.from_mask(mask).check()
    assert torch.equal(BlockPlan.from_mask(mask).mask(), mask)


@settings(deadline=None)
@given(masks())
def test_a_width_cuts_what_no_row_uses(mask):
    width = int(mask.sum(-1).max())
    plan = BlockPlan.from_mask(mask, width)
    plan.check()
    assert plan.indices.shape[-1] == width
    assert plan.indices.is_contiguous()
    assert torch.equal(plan.mask(), mask)
    assert plan.density() == pytest.approx(mask.double().mean().item())


@settings(deadline=None)
@given(masks(), st.sampled_from((-7, 1000, 2**31 - 1)))
def test_what_stands_past_the_count_does_not_matter(mask, junk):
    plan = BlockPlan.from_mask(mask)
    past = torch.arange(plan.indices.shape[-1]) >= plan.counts[..., None]
    dirty = replace(plan, indices=plan.indices.masked_fill(past, junk))
    dirty.check()
    assert torch.equal(dirty.mask(), mask)


def test_a_full_plan_visits_everything():
    plan = BlockPlan.full(2, 3, 4, 5, "cpu")
    plan.check()
    assert plan.mask().shape == (2, 3, 4, 5)
    assert plan.density() == 1


def test_a_list_that_all_rows_share_is_in_memory_once():
    plan = BlockPlan.full(2, 3, 4, 5, "cpu")
    indices, step = plan.lists()
    assert step == 0 and indices.untyped_storage().nbytes() == 4 * 5
    # Whatever strides: each list begins `step` after the one before.
    some = BlockPlan.from_mask(torch.rand(2, 3, 4, 5) < 2)
    for each in (
        some,
        replace(some, indices=some.indices.mT.contiguous().mT),
        replace(some, indices=some.indices[:1]),
    ):
        indices, step = each.lists()
        assert step == 5 and indices.is_contiguous() and torch.equal(indices, each.indices)
    one = BlockPlan(plan.counts[:1, :1, :1], some.indices[:1, :1, :1], 5)
    assert one.lists()[1] == 0
    for shared_by_heads in (some.indices[:, :1].expand(2, 3, 4, 5), some.indices[..., :1].expand(2, 3, 4, 5)):
        indices, step = replace(some, indices=shared_by_heads).lists()
        assert step == 5 and indices.is_contiguous() and torch.equal(indices, shared_by_heads)


def change(name: str, at: tuple[int, ...], value: int):
    def changed(plan: BlockPlan) -> BlockPlan:
        tensor = getattr(plan, name).clone()
        tensor[at] = value
        return replace(plan, **{name: tensor})

    return changed


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda plan: replace(plan, counts=plan.counts.long()), "int32"),
        (lambda plan: replace(plan, indices=plan.indices.long()), "int32"),
        (lambda plan: replace(plan, counts=plan.counts[..., :1]), "do not fit"),
        (change("counts", (0, 0, 0), 0), "1..4, but they span 0..3"),
        (change("counts", (0, 1, 2), 5), "1..4, but they span 3..5"),
        (change("indices", (0, 0, 1, 2), 4), "Key block 4 is out of range: there are 4"),
        (change("indices", (0, 0, 1, 0), -1), "Key block -1 is out of range"),
        (change("indices", (0, 1, 1, 1), 0), "ascend without repeats"),
        (change("indices", (0, 1, 1, 0), 2), "ascend without repeats"),
    ],
)
def test_an_illegal_plan_is_refused(spoil, message):
    plan = BlockPlan.from_mask(torch.tensor([True, True, True, False]).expand(1, 2, 3, 4))
    plan.check()
    with pytest.raises(ValueError, match=message):
        spoil(plan).check()


def test_a_width_too_small_for_a_row_is_caught_by_the_check():
    with pytest.raises(ValueError, match="1..2, but they span 3..3"):
        BlockPlan.from_mask(torch.ones(1, 1, 1, 3, dtype=torch.bool), width=2).check()
