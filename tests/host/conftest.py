"""Backends for the host's tests. ``model`` is the name under which their graph is registered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.llama import FakeLlama
from wasi_nn_backend.backend import Backend

MODEL = b"default"
#: No sampling and an end within a few dozen tokens.
GREEDY = {"sampling": {"temperature": 0.0, "repeat_penalty": 1.0}, "stopping": {"max_tokens": 24}}


@pytest.fixture
def fake_backend(tmp_path: Path) -> Iterator[Backend]:
    """The real backend over the fake llama, with "default" registered, and "gone", whose file is missing."""
    weights = tmp_path / "fake.gguf"
    weights.touch()
    with Backend(GREEDY, llama=FakeLlama()) as backend:
        backend.register("default", weights)
        backend.register("gone", tmp_path / "nowhere.gguf")
        yield backend


@pytest.fixture
def tiny_backend(tiny_model_path: Path) -> Iterator[Backend]:
    """The real backend over llama.cpp with the tiny random model."""
    with Backend(GREEDY) as backend:
        backend.register("default", tiny_model_path)
        yield backend
