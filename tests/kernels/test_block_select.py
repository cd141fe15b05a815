import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from dit_sparse.kernels import block_select as module
from dit_sparse.kernels import reference
from dit_sparse.kernels.block_select import block_select, marked

IMPLS = ("torch", "triton")


def expected(
    scores: Tensor,
    density: float,
    top_p: float | None = None,
    k_min: int = 1,
    k_max: int | None = None,
    forced: Tensor | None = None,
) -> Tensor:
    """The specification's mask."""
    blocks = scores.shape[-1]
    plan = reference.block_select(
        scores,
        top_k=max(1, int(density * blocks)),
        # So small a share adds nothing to top_k, which is what None means.
        top_p=top_p or 1e-30,
        k_min=min(k_min, blocks),
        k_max=min(k_max or blocks, blocks),
        forced=None if forced is None else forced.expand(scores.shape),
    )
    return plan.mask()


@st.composite
def cases(draw: st.DrawFn, most: int) -> tuple[Tensor, dict]:
    batch, heads, rows, blocks = (draw(st.integers(1, n)) for n in (2, 2, 3, most))
    kind = draw(st.sampled_from(["ties", "zeros", "equal", "distinct"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (batch, heads, rows, blocks)
    # Small integers over 8: sums of them are exact in any order, so that nobody's rounding decides.
    scores = {
        "ties": torch.randint(0, 4, shape, generator=generator),
        "zeros": torch.randint(0, 9, shape, generator=generator) // 8,
        "equal": torch.full(shape, draw(st.integers(0, 3))),
        "distinct": torch.rand(shape, generator=generator).argsort(-1),
    }[kind].float() / 8
    options: dict = {
        "density": draw(st.floats(0, 1)),
        "top_p": draw(st.sampled_from([None, 0.1, 0.5, 0.9, 1.0])),
        "k_min": draw(st.integers(1, most)),
    }
    options["k_max"] = draw(st.none() | st.integers(options["k_min"], most + 2))
    if draw(st.booleans()):
        singles = [draw(st.booleans()) for _ in range(4)]
        narrow = [1 if single else size for single, size in zip(singles, shape, strict=True)]
        options["forced"] = torch.rand(narrow[draw(st.integers(0, 3)) :], generator=generator) < 0.3
    return scores, options


def check_case(case: tuple[Tensor, dict], impl: str, device: str) -> None:
    scores, options = case[0].to(device), dict(case[1])
    forced = options.get("forced")
    if forced is not None:
        options["forced"] = forced = forced.to(device)
    plan = block_select(scores, **options, impl=impl)
    plan.check()
    assert torch.equal(plan.mask(), expected(scores, **options))
    # Places past the count are defined.
    place = torch.arange(plan.indices.shape[-1], device=device)
    assert (plan.indices[place >= plan.counts[..., None]] == 0).all()
    if forced is not None:
        most = int(forced.sum(-1).max()) if forced.shape[-1] > 1 else scores.shape[-1] * int(forced.any())
        narrow = block_select(scores, **options, max_forced=most, impl=impl)
        assert torch.equal(narrow.mask(), plan.mask())
        assert narrow.indices.shape[-1] <= plan.indices.shape[-1]


@hypothesis.settings(max_examples=80, deadline=None, derandomize=True)
@hypothesis.given(case=cases(most=40))
def test_torch_is_the_reference(case: tuple[Tensor, dict]) -> None:
    check_case(case, "torch", "cpu")
    check_case((case[0].double(), case[1]), "torch", "cpu")


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(case=cases(most=14))
def test_triton_is_the_reference(case: tuple[Tensor, dict]) -> None:
    check_case(case, "triton", "cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("drop", "blocks", "kept"), [(0.8, 900, 179), (0.9, 900, 89), (0.999, 900, 1), (0.0, 9, 9)])
def test_density_is_truncated(drop: float, blocks: int, kept: int, impl: str, device: str) -> None:
    # As the published code does: (1 - 0.8) * 900 is 179.99999999999997.
    plan = block_select(torch.rand(1, 1, 2, blocks, device=device), density=1 - drop, impl=impl)
    assert plan.indices.shape[-1] == kept
    assert (plan.counts == kept).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("k_max", [None, 7])
def test_top_p_holds_its_share_with_no_block_to_spare(k_max: int | None, top_p: float, impl: str, device: str) -> None:
    # From flat rows to sharp ones.
    scores = (torch.tensor([0.2, 1, 5], device=device)[:, None] * torch.randn(2, 1, 3, 33, device=device)).softmax(-1)
    forced = torch.rand(3, 33, device=device) < 0.1
    mask = block_select(scores, density=0, top_p=top_p, k_max=k_max, impl=impl).mask()
    mass, count, last = (scores * mask).sum(-1), mask.sum(-1), torch.where(mask, scores, 1).amin(-1)
    assert ((mass >= top_p - 1e-6) | (count == k_max)).all()
    assert ((mass - last < top_p + 1e-6) | (count == 1)).all()
    assert (count <= (k_max or 33)).all()
    # The kept are the best: none left out beats one kept.
    assert (torch.where(mask, 0, scores).amax(-1) <= last).all()
    both = block_select(scores, density=0, top_p=top_p, k_max=k_max, forced=forced, impl=impl).mask()
    assert torch.equal(both, mask | forced)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_share_that_is_reached_exactly_is_enough(impl: str, device: str) -> None:
    scores = torch.full((1, 1, 1, 8), 0.125, device=device)
    assert block_select(scores, density=0, top_p=0.5, impl=impl).mask().flatten().tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize("impl", IMPLS)
def test_neighbouring_numbers_are_told_apart(impl: str, device: str) -> None:
    # Four floats next to one another, each five times; 0.1 is odd in its last bit.
    bits = torch.randperm(20, device=device).int() // 5 + torch.tensor(0.1).view(torch.int32).to(device)
    scores = bits.view(torch.float32).expand(1, 1, 2, 20)
    for density in (0.1, 0.35, 0.6, 0.8):
        mask = block_select(scores, density=density, impl=impl).mask()
        assert torch.equal(mask, expected(scores, density))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("blocks", [1, 257, 1000, 5000])
def test_long_rows(blocks: int, impl: str, device: str) -> None:
    scores = torch.rand(1, 1, 2, blocks, device=device)
    plan = block_select(scores, density=0.07, impl=impl)
    plan.check()
    assert torch.equal(plan.mask(), expected(scores, 0.07))


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_scores_and_forced(impl: str, device: str) -> None:
    # Text columns cut off, heads and rows exchanged, every other block.
    scores = torch.rand(2, 5, 3, 60, device=device).transpose(1, 2)[..., :50:2]
    forced = (torch.rand(25, 5, device=device) < 0.2).T
    plan = block_select(scores, density=0.2, top_p=0.4, forced=forced, impl=impl)
    assert torch.equal(plan.mask(), expected(scores, 0.2, 0.4, forced=forced))


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_and_negative_zero(impl: str, device: str) -> None:
    scores = torch.rand(1, 1, 4, 30, device=device)
    scores[0, 0, 0, 5], scores[0, 0, 1], scores[0, 0, 2] = float("nan"), float("nan"), -0.0
    for top_p in (None, 0.5, 1.0):
        plan = block_select(scores, density=0.1, top_p=top_p, impl=impl)
        plan.check()
        mask = plan.mask()
        assert mask[0, 0, 0, 5] and mask[0, 0, 2, :3].all()
    top_k = block_select(scores, density=0.1, impl=impl).mask()
    assert top_k[0, 0, 1].tolist() == [True] * 3 + [False] * 27
    assert top_k[0, 0, 2].tolist() == [True] * 3 + [False] * 27


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("top_p", [None, 0.5, 1.0])
def test_logarithms_stand_for_their_powers(top_p: float | None, impl: str, device: str) -> None:
    scores = torch.rand(2, 3, 5, 37, device=device)
    scores[0, 0, 0, :30], scores[0, 0, 1] = 0, 0
    # Each row may have a factor, even one whose product is no float.
    factors = torch.tensor([0, -500, 500, 3, -3], device=device)[:, None]
    plan = block_select(scores.log() + factors, density=0.2, top_p=top_p, logarithms=True, impl=impl)
    plan.check()
    mask = plan.mask()
    best = block_select(scores, density=0.2, impl="torch").mask()
    if top_p is None:
        assert torch.equal(mask, best)
    share = scores.double() / scores.double().sum(-1, keepdim=True).clamp(min=1)
    mass, last = (share * mask).sum(-1), torch.where(mask, share, 1).amin(-1)
    # The share of the sum and no block to spare, but for how it was rounded; a row of nothing keeps its first blocks.
    assert ((mass >= (top_p or 0) - 1e-4) | (share.sum(-1) == 0)).all()
    assert ((mass - last < (top_p or 0) + 1e-4) | (mask == best).all(-1)).all()
    assert (torch.where(mask, 0, share).amax(-1) <= last).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_logarithms_that_are_no_numbers(impl: str, device: str) -> None:
    scores = torch.randn(1, 1, 4, 30, device=device)
    scores[0, 0, 0, 5], scores[0, 0, 1], scores[0, 0, 2] = float("nan"), float("nan"), -float("inf")
    scores[0, 0, 3, 7] = float("inf")
    for top_p in (None, 0.5):
        plan = block_select(scores, density=0.1, top_p=top_p, logarithms=True, impl=impl)
        plan.check()
        mask = plan.mask()[0, 0]
        assert mask[0, 5] and mask[2, :3].all() and mask[3, 7]
    mask = block_select(scores, density=0.1, logarithms=True, impl=impl).mask()[0, 0]
    assert mask[1].tolist() == mask[2].tolist() == [True] * 3 + [False] * 27


def test_more_blocks_than_triton_takes_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "resolve", lambda *_: "triton")
    monkeypatch.setattr(module, "_block_select_triton", None)
    scores = torch.rand(1, 1, 1, 8193)
    assert torch.equal(block_select(scores, density=0.1).mask(), expected(scores, 0.1))


@pytest.mark.parametrize("impl", IMPLS)
def test_more_forced_than_promised_stays_a_legal_plan(impl: str, device: str) -> None:
    forced = torch.ones(12, dtype=torch.bool, device=device)
    plan = block_select(torch.rand(1, 1, 2, 12, device=device), density=0.1, forced=forced, max_forced=3, impl=impl)
    plan.check()
    assert plan.indices.shape[-1] == 4
    assert plan.indices.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "width"),
    [
        ({"density": 0.2}, 10),
        ({"density": 0.2, "k_min": 12}, 12),
        ({"density": 0.2, "k_max": 6}, 6),
        ({"density": 0.2, "k_min": 80}, 50),
        ({"density": 0.2, "top_p": 0.5}, 50),
        ({"density": 0.2, "top_p": 0.5, "k_max": 20}, 20),
        ({"density": 0.2, "forced": torch.zeros(50, dtype=torch.bool)}, 50),
        ({"density": 0.2, "forced": torch.zeros(50, dtype=torch.bool), "max_forced": 3}, 13),
        (
            {"density": 0.2, "top_p": 0.5, "k_max": 49, "forced": torch.zeros(50, dtype=torch.bool), "max_forced": 3},
            50,
        ),
    ],
)
def test_width_follows_from_the_arguments(options: dict, width: int) -> None:
    assert block_select(torch.rand(1, 1, 1, 50), **options).indices.shape[-1] == width


SCORES, FORCED = torch.rand(1, 2, 3, 8), torch.zeros(3, 8, dtype=torch.bool)


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (SCORES.half(), {}, "torch.float16"),
        (SCORES[0], {}, r"\(2, 3, 8\)"),
        (SCORES, {"density": 1.5}, "density .* not 1.5"),
        (SCORES, {"density": float("nan")}, "density .* not nan"),
        (SCORES, {"top_p": -0.1}, "top_p .* not -0.1"),
        (SCORES, {"k_min": 0}, "k_min 0"),
        (SCORES, {"k_min": 4, "k_max": 3}, "k_max 3"),
        (SCORES, {"forced": FORCED.int()}, "torch.int32"),
        (SCORES, {"forced": FORCED[:2]}, r"\(2, 8\)"),
        (SCORES, {"forced": FORCED.to("meta")}, "meta"),
        (SCORES, {"max_forced": 2}, "max_forced"),
        (SCORES, {"forced": FORCED, "max_forced": -1}, "-1"),
        (SCORES, {"impl": "cuda"}, "'cuda'"),
        (SCORES.double(), {"impl": "triton"}, "torch.float64"),
        (torch.rand(1, 1, 1, 8193), {"impl": "triton"}, "8193"),
    ],
)
def test_refusals(scores: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block_select(scores, **{"density": 0.2, **options})


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("top_p", [None, 0.5])
def test_compiles_and_is_a_sound_op(top_p: float | None, impl: str, device: str) -> None:
    scores, forced = torch.rand(1, 2, 3, 20, device=device), torch.eye(3, 20, dtype=torch.bool, device=device)

    def program(scores: Tensor) -> tuple[Tensor, Tensor]:
        plan = block_select(scores * 2, density=0.3, top_p=top_p, forced=forced, max_forced=1, impl=impl)
        return plan.counts, plan.indices

    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    got, direct = compiled(scores), program(scores)
    assert all(torch.equal(a, b) for a, b in zip(got, direct, strict=True))
    arguments = (scores, forced, 6, 20, top_p or 0.0, 7, False, impl)
    torch.library.opcheck(torch.ops.dit_sparse.block_select.default, arguments)


@pytest.mark.gpu
def test_more_rows_than_a_grid_axis_holds() -> None:
    scores = torch.rand(2, 40, 1000, 129, device="cuda")
    forced = torch.rand(1000, 129, device="cuda") < 0.05
    for top_p in (None, 0.4):
        plan = block_select(scores, density=0.1, top_p=top_p, forced=forced, impl="triton")
        other = block_select(scores, density=0.1, top_p=top_p, forced=forced, impl="torch")
        plan.check()
        # With top_p the last block of a row may be decided by the order of a sum.
        assert (plan.mask() != other.mask()).sum() <= (0 if top_p is None else 10)


@pytest.mark.parametrize("columns", [1, 7, 130])
def test_marked_blocks_are_listed_and_a_row_without_any_lists_the_first(columns, device):
    mask = torch.rand(2, 3, 5, columns, device=device) < 0.4
    mask[:, :, 2], mask[:, :, 3] = False, True
    plan = marked(mask)
    plan.check()
    wanted = mask.clone()
    wanted[..., 0] |= ~mask.any(-1)
    assert torch.equal(plan.mask(), wanted) and plan.key_blocks == columns
