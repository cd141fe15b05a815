import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small take longer on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
