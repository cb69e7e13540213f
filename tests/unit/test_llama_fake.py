"""The fake llama under the suite that the native one passes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes.llama import FakeLlama
from tests.llama_conformance import LlamaConformance
from tests.llama_embedding_conformance import EmbeddingConformance
from tests.llama_unified_conformance import UnifiedConformance
from wasi_nn_backend.llama.interface import Model, ModelParams


def fake_model(folder: Path) -> Model:
    path = folder / "fake.gguf"
    path.touch()
    return FakeLlama().load_model(ModelParams(path))


class TestFakeLlama(LlamaConformance):
    @pytest.fixture
    def model(self, tmp_path: Path) -> Model:
        return fake_model(tmp_path)


class TestFakeLlamaUnified(UnifiedConformance):
    @pytest.fixture
    def model(self, tmp_path: Path) -> Model:
        return fake_model(tmp_path)


class TestFakeEmbedding(EmbeddingConformance):
    @pytest.fixture
    def model(self, tmp_path: Path) -> Model:
        path = tmp_path / "fake.gguf"
        path.touch()
        return FakeLlama().load_model(ModelParams(path))
