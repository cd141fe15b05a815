"""Pipelines of a few thousand weights, built anew where a test needs what a fresh process would have."""

import pytest
from diffusers.models.attention_dispatch import _AttentionBackendRegistry


@pytest.fixture(autouse=True)
def own_backend(monkeypatch):
    """A model's set_attention_backend changes the default of the process too, and nothing in diffusers undoes that."""
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)


@pytest.fixture(autouse=True)
def with_quiet(quiet: None) -> None:
    """All of these generate."""


@pytest.fixture(autouse=True, scope="module")
def with_one_thread(one_thread: None) -> None:
    """All that is tested here is small."""
