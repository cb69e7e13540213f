"""llama.cpp with the tiny model under the suite that the fake passes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.llama_conformance import LlamaConformance
from wasi_nn_backend.llama import load_llama
from wasi_nn_backend.llama.interface import Model, ModelParams


class TestNativeLlama(LlamaConformance):
    @pytest.fixture
    def model(self, tiny_model_path: Path) -> Iterator[Model]:
        with load_llama().load_model(ModelParams(tiny_model_path)) as model:
            yield model
