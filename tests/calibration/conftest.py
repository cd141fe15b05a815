import pytest


@pytest.fixture(autouse=True, scope="module")
def with_one_thread(one_thread: None) -> None:
    """All that is tested here is small."""
