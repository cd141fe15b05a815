import pytest

from dit_sparse.config import SparseConfig
from dit_sparse.phases import planned_phase


def plan(config, steps):
    return "".join(planned_phase(config, step, steps)[0] for step in range(steps))


@pytest.mark.parametrize(
    ("dense", "steps", "refreshes"),
    [(15, 50, list(range(15, 50, 5))), (10, 50, list(range(10, 50, 5))), (5, 20, [5, 10, 15])],
    ids=["CogVideoX", "HunyuanDiT", "PixArt"],
)
def test_re_ttentions_schedules(dense, steps, refreshes):
    """Section 2's table: 22 full and 28 sparse steps, 18 and 32, 8 and 12."""
    told = plan(SparseConfig("reshape", dense_steps=dense), steps)
    assert [i for i, phase in enumerate(told) if phase == "a"] == refreshes
    full = {50: {15: 22, 10: 18}, 20: {5: 8}}[steps][dense]
    assert (told.count("d") + told.count("a"), told.count("s")) == (full, steps - full)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"method": "anchor", "dense_steps": 3}, "dddasssasssass"),
        ({"method": "anchor", "dense_steps": 0, "refresh_every": 5}, "assssassssasss"),
        ({"method": "anchor", "dense_steps": 1, "refresh_every": 1}, "daaaaaaaaaaaaa"),
        ({"method": "anchor", "dense_steps": 0.15}, "dddasssasssass"),
        ({"method": "anchor", "dense_steps": "0-1,12-13"}, "ddasssasssasdd"),
        # A dense step in the middle is an anchor, whether one was due or not; the next one is where it was.
        ({"method": "anchor", "dense_steps": "0-1,6"}, "ddasssasssasss"),
        ({"method": "anchor", "dense_steps": "0-1,7"}, "ddasssaassasss"),
        ({"method": "anchor", "dense_steps": "0-1,5-8"}, "ddassdddasasss"),
        # Unless the step after it is one, or there is none.
        ({"method": "anchor", "dense_steps": "0-1,5"}, "ddassdasssasss"),
        ({"method": "anchor", "dense_steps": "0-1,13"}, "ddasssasssassd"),
        ({"method": "tail", "dense_steps": "0-1,6"}, "ddssssdsssssss"),
        ({"method": "svg", "dense_steps": "0-1,6"}, "ddasssdsssssss"),
        ({"method": "anchor", "dense_steps": "3"}, "dddasssasssass"),
        ({"method": "tail", "dense_steps": 2}, "ddssssssssssss"),
        ({"method": "tail", "dense_steps": 2, "refresh_every": 4}, "dddsssdsssdsss"),
        ({"method": "rectify", "dense_steps": 0}, "ssssssssssssss"),
        ({"method": "none", "dense_steps": 14}, "dddddddddddddd"),
        ({"method": "dense"}, "dddddddddddddd"),
    ],
)
def test_schedules(options, expected):
    assert plan(SparseConfig(**options), 14) == expected
