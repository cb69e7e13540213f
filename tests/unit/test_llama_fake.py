"""The fake llama under the suite that the native one passes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes.llama import FakeLlama
from tests.llama_conformance import LlamaConformance
from wasi_nn_backend.llama.interface import Model, ModelParams


class TestFakeLlama(LlamaConformance):
    @pytest.fixture
    def model(self, tmp_path: Path) -> Model:
        path = tmp_path / "fake.gguf"
        path.touch()
        return FakeLlama().load_model(ModelParams(path))
