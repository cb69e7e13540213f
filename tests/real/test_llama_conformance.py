"""llama.cpp with the tiny model under the suite that the fake passes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.llama_conformance import N_CTX, LlamaConformance
from tests.llama_unified_conformance import UNIFIED, UnifiedConformance
from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.llama import load_llama
from wasi_nn_backend.llama.interface import Model, ModelParams


class TestNativeLlama(LlamaConformance):
    @pytest.fixture
    def model(self, tiny_model_path: Path) -> Iterator[Model]:
        with load_llama().load_model(ModelParams(tiny_model_path)) as model:
            yield model


class TestNativeLlamaUnified(UnifiedConformance):
    @pytest.fixture
    def model(self, tiny_model_path: Path) -> Iterator[Model]:
        with load_llama().load_model(ModelParams(tiny_model_path)) as model:
            yield model

    @pytest.mark.parametrize(
        ("key", "wrong"),
        [
            ("n_cells", {"n_cells": N_CTX - 1}),
            ("n_cells", {"n_cells": 2**31}),
            ("n_cells", {"n_cells": 2 * N_CTX, "kv_layout": "streams"}),
            ("n_sequences", {"n_sequences": 256}),
        ],
    )
    def test_cells_that_cannot_be_are_refused(self, model: Model, key: str, wrong: dict[str, object]) -> None:
        with pytest.raises(InvalidArgument, match=key):
            model.create_context(replace(UNIFIED, **wrong))  # type: ignore[arg-type]
