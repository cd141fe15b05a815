import numpy as np
import pytest
import torch

from dit_sparse.calibration.kept import kept
from dit_sparse.calibration.probe import Look, Probe, Watched
from dit_sparse.config import SparseConfig
from dit_sparse.layout import TokenGrid
from dit_sparse.pipelines.session import Attention
from dit_sparse.state import Generation, Layer

GRID = TokenGrid(3, 8, 12)
TEXT = 7


def layer_of(method: str, text: tuple[int, int], **options) -> tuple[Attention, Generation]:
    config = SparseConfig(method, density=0.25, dense_steps=0, **({"block": 16} | options))
    generation = Generation(config, [Layer("blocks.0.attn1", 0, 1, 3, 16)])
    enter(generation, 0, text)
    return Attention(generation, 0), generation


def enter(generation: Generation, step: int, text: tuple[int, int]) -> None:
    generation.enter(
        GRID, batch=2, device=torch.device("cpu"), timestep=1.0 - step, step=step, branch="cond", total=9, text=text
    )


@pytest.mark.parametrize("text", [(0, 0), (TEXT, 0), (0, TEXT)])
@pytest.mark.parametrize("method", ["none", "none, smaller blocks of keys", "topp", "sta", "radial", "svg"])
def test_attention_over_what_is_kept_is_what_the_method_computes(method, text):
    """These put nothing in place of the rest, so their output is softmax over the kept keys and the text."""
    sizes = {"block": 64, "key_block": 16} if "smaller" in method else {}
    method = method.split(",")[0]
    attend, generation = layer_of(method, text, **sizes)
    q, k, v = torch.randn(3, 2, 3, GRID.tokens + sum(text), 16, dtype=torch.float64)
    if method == "svg":
        # It chooses at a dense step.
        attend(q, k, v)
        enter(generation, 1, text)
    out = attend(q, k, v)
    found = kept(q, k, v, None, generation, 0)
    assert found.blocks.shape == (3, 18, 18) and 0.05 < found.blocks.mean() < 0.9 and not found.dense.any()
    vision = slice(text[0], text[0] + GRID.tokens)
    for query in ((0, 0, 0), (1, 3, 7), (2, 7, 11)):
        row = text[0] + np.ravel_multi_index(query, (3, 8, 12))
        seen = torch.ones(3, q.shape[2], dtype=torch.bool)
        seen[:, vision] = torch.from_numpy(found.frames(query)).flatten(1)
        logits = (q[-1, :, row, None] @ k[-1].mT)[:, 0] / 4
        expected = logits.masked_fill(~seen, float("-inf")).softmax(-1)[:, None] @ v[-1]
        torch.testing.assert_close(out[-1, :, row], expected[:, 0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("method", ["anchor", "reshape", "ditfastattn"])
def test_an_anchor_tells_what_the_steps_after_it_go_by(method):
    attend, generation = layer_of(method, (0, 0))
    q, k, v = torch.randn(3, 2, 3, GRID.tokens, 16)
    attend(q, k, v)
    at_anchor = kept(q, k, v, None, generation, 0)
    enter(generation, 1, (0, 0))
    attend(*torch.randn(3, 2, 3, GRID.tokens, 16))
    after = kept(q, k, v, None, generation, 0)
    assert np.array_equal(at_anchor.blocks, after.blocks) and np.array_equal(at_anchor.home, after.home)
    assert after.blocks.any(-1).all() and after.blocks.mean() < 0.5


def test_a_look_is_at_the_first_call_that_is_not_dense_and_is_in_no_time():
    attend, generation = layer_of("none", (0, 0), refresh_every=2)
    probe = Probe(generation, look=Look("blocks.0.attn1", range(2, 9)))
    watched = Watched(attend, probe)
    x = torch.randn(3, 2, 3, GRID.tokens, 16)
    # Even steps are dense.
    for step in range(6):
        enter(generation, step, (0, 0))
        watched(*(x + step))
    assert probe.look.at == 3 and np.array_equal(probe.look.found.blocks, found_at(3, x).blocks)
    assert probe.own_seconds > 0 and len(probe.calls) == 6
    probe.forget()
    assert probe.own_seconds == 0 == len(probe.calls)


def found_at(step: int, x: torch.Tensor):
    attend, generation = layer_of("none", (0, 0))
    attend(*(x + step))
    return kept(*(x + step), None, generation, 0)


def test_dense_keeps_no_map_and_tokens_beside_the_grid_are_refused():
    attend, generation = layer_of("dense", (0, 0))
    q, k, v = torch.randn(3, 2, 3, GRID.tokens, 16)
    attend(q, k, v)
    assert kept(q, k, v, None, generation, 0) is None
    with pytest.raises(ValueError, match="There is no token 0 8 0: frames go to 2, rows to 7 and columns to 11."):
        found_at(0, torch.stack((q, k, v))).frames((0, 8, 0))
