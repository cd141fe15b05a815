import pytest
import torch
from torch import Tensor

from dit_sparse.kernels import reference
from dit_sparse.kernels.block_scores import ALIGNED, block_scores
from dit_sparse.kernels.block_select import block_select
from tests.close import assert_no_worse

IMPLS = ("torch", "triton")
# Batch, heads, query blocks, key blocks, channels. Of a single number, who errs less is chance.
SHAPES = [(4, 8, 1, 1, 8), (2, 3, 65, 63, 40), (1, 2, 5, 130, 72), (2, 1, 64, 64, 64), (1, 1, 70, 9, 128)]


def statistics(shape: tuple[int, ...], device: str) -> dict[str, Tensor]:
    """What block_scores takes but for the text; some lengths and statistics like those of a model's keys."""
    batch, heads, rows, blocks, dim = shape
    random = lambda n: torch.randn(batch, heads, n, dim, device=device)  # noqa: E731
    return {
        "q": random(rows) * 2,
        "k": random(blocks) + 3 * torch.randn(dim, device=device),
        "lengths": torch.randint(1, 129, (blocks,), device=device),
        "variances": random(blocks).square(),
        "deviations": random(blocks).square().sum(-1),
    }


def without(given: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: x for name, x in given.items() if name not in names}


def double(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x if name == "lengths" else x.double() for name, x in given.items()}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("by_error", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_reference(shape: tuple[int, ...], by_error: bool, text: bool, impl: str, device: str) -> None:
    given = statistics(shape, device)
    if not by_error:
        given = without(given, "variances", "deviations")
    if text:
        given["text"] = torch.randn(shape[:3], device=device) * 5
    scale = shape[-1] ** -0.5
    got = block_scores(**given, scale=scale, impl=impl)
    assert got.shape == (*shape[:3], shape[3] + text) and got.stride(2) % ALIGNED == 0
    eager, exact = (reference.block_scores(**x, scale=scale) for x in (given, double(given)))
    assert_no_worse(got, eager, exact)
    if impl == "torch":
        torch.testing.assert_close(block_scores(**double(given), scale=scale), exact)


def test_softmax_is_the_pooled_mass_of_a_sequence_of_repeated_keys(device: str) -> None:
    given = without(statistics((1, 2, 3, 4, 8), device), "variances", "deviations")
    keys = given["k"].repeat_interleave(given["lengths"], dim=2)
    whole = (given["q"] @ keys.mT * 0.3).softmax(-1).split(given["lengths"].tolist(), dim=-1)
    expected = torch.stack([part.sum(-1) for part in whole], -1)
    for impl in IMPLS:
        torch.testing.assert_close(block_scores(**given, scale=0.3, impl=impl).softmax(-1), expected)


@pytest.mark.parametrize("top_p", [None, 0.6])
@pytest.mark.parametrize("by_error", [False, True])
def test_blocks_chosen_are_those_of_float64_but_for_ties(by_error: bool, top_p: float | None, device: str) -> None:
    given = statistics((2, 1, 33, 150, 128), device)
    if not by_error:
        given = without(given, "variances", "deviations")
    options = {"density": 0.1, "top_p": top_p, "logarithms": True}
    plan = block_select(block_scores(**given, scale=0.3, impl="triton"), **options, impl="triton")
    exact = reference.block_scores(**double(given), scale=0.3)
    other = block_select(exact, **options, impl="torch")
    # A block may be chosen for another only if both weigh the same within rounding.
    kept, chosen = plan.mask(), other.mask()
    last = exact.masked_fill(~chosen, torch.inf).amin(-1, keepdim=True)
    assert ((exact - last).abs()[kept != chosen] < 2e-5).all()
    assert (kept != chosen).sum() <= 4
    assert ((plan.counts - other.counts).abs() <= (top_p is not None)).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_numbers_that_are_none_and_blocks_without_spread(impl: str, device: str) -> None:
    given = statistics((1, 1, 4, 20, 16), device)
    given["q"][0, 0, 0, 3], given["variances"][0, 0, 5], given["deviations"][0, 0, 6] = float("nan"), 0, 0
    scores = block_scores(**given, scale=0.25, impl=impl)
    assert scores[0, 0, 0].isnan().all() and not scores[0, 0, 1:].isnan().any()
    assert (scores[0, 0, 1:, 5:7] == -torch.inf).all()
    block_select(scores, density=0.3, logarithms=True, impl=impl).check()


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_statistics(impl: str, device: str) -> None:
    given = statistics((2, 2, 9, 12, 16), device)
    expected = block_scores(**given, scale=0.25, impl="torch")
    for name in ("q", "k", "variances"):
        given[name] = given[name].transpose(1, 2).contiguous().transpose(1, 2)
    given["deviations"] = given["deviations"].mT.contiguous().mT
    torch.testing.assert_close(block_scores(**given, scale=0.25, impl=impl), expected)


GIVEN = statistics((1, 2, 3, 4, 8), "cpu")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": GIVEN["q"][0]}, r"\(2, 3, 8\)"),
        ({"k": GIVEN["k"][..., :7]}, r"\(1, 2, 4, 7\)"),
        ({"k": GIVEN["k"].double()}, "torch.float64"),
        ({"q": GIVEN["q"].half()}, "torch.float16"),
        ({"lengths": GIVEN["lengths"][:3]}, r"lengths must be \(4,\)"),
        ({"lengths": GIVEN["lengths"].to("meta")}, "meta"),
        ({"variances": None}, "go together"),
        ({"variances": GIVEN["q"]}, r"variances must be \(1, 2, 4, 8\)"),
        ({"deviations": GIVEN["variances"]}, r"deviations must be \(1, 2, 4\)"),
        ({"deviations": GIVEN["deviations"].double()}, "deviations must be torch.float32"),
        ({"text": GIVEN["deviations"]}, r"text must be \(1, 2, 3\)"),
        ({"impl": "cuda"}, "'cuda'"),
    ],
)
def test_refusals(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block_scores(**{**GIVEN, "scale": 1.0, **changed})


def test_triton_takes_no_float64() -> None:
    with pytest.raises(ValueError, match=r"torch.float64"):
        block_scores(**double(GIVEN), scale=1.0, impl="triton")


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_and_is_a_sound_op(impl: str, device: str) -> None:
    given = statistics((1, 2, 3, 4, 8), device)

    def program(q: Tensor) -> Tensor:
        return block_scores(q * 2, **without(given, "q"), scale=0.5, impl=impl) + 1

    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(given["q"]), program(given["q"]))
    arguments = (*without(given, "variances", "deviations").values(), 0.5)
    torch.library.opcheck(torch.ops.dit_sparse.block_scores.default, (*arguments, None, None, None, impl))
    more = (given["variances"], given["deviations"], torch.randn(1, 2, 3, device=device))
    torch.library.opcheck(torch.ops.dit_sparse.block_scores.default, (*arguments, *more, impl))
