"""Every test starts from the same seed, and an output that the library forgets to write is NaN."""

import os
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

# Without a GPU the kernels run in Triton's interpreter, which must be chosen before triton is first imported.
if not torch.cuda.is_available():
    assert "triton" not in sys.modules, "something imported triton before tests/conftest.py"
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(2)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def quiet() -> Iterator[None]:
    """Without diffusers' note on each number of frames it rounds."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For small tensors: these only wait for a second thread, for minutes on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what dit_sparse allocates without a value: floats with NaN, integers with their largest number."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (Tensor, "new_empty"),
        (Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_poisoned(*args, **kwargs) -> Tensor:
        out = allocate(*args, **kwargs)
        # A frame cannot be looked up in a compiled graph.
        if torch.compiler.is_compiling():
            return out
        if sys._getframe(1).f_globals.get("__name__", "").split(".")[0] != "dit_sparse":
            return out
        with torch.no_grad():
            if out.is_floating_point() or out.is_complex():
                return out.fill_(float("nan"))
            return out.fill_(True if out.dtype == torch.bool else torch.iinfo(out.dtype).max)

    return allocate_poisoned
