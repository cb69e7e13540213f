"""A model with recurrent layers, whose memory is copied whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.llama_conformance import decode
from tests.tiny_hybrid import write_tiny_hybrid
from wasi_nn_backend.llama import load_llama
from wasi_nn_backend.llama.context import NativeContext
from wasi_nn_backend.llama.interface import ContextParams, KvLayout, ModelParams

TOKENS = list(range(5, 45))


@pytest.fixture(params=["streams", "unified"])
def context(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[NativeContext]:
    path = tmp_path / "hybrid.gguf"
    write_tiny_hybrid(path)
    layout: KvLayout = request.param
    params = ContextParams(n_ctx=256, n_sequences=3, n_batch=64, n_ubatch=64, kv_layout=layout)
    with load_llama().load_model(ModelParams(path)) as model, model.create_context(params) as context:
        yield context


def test_a_part_of_a_sequence_is_not_copied(context: NativeContext) -> None:
    """The refused copy leaves an empty sequence, which computes what any other empty one does."""
    expected = decode(context, TOKENS[:10], sequence_id=1)
    decode(context, TOKENS)
    assert not context.copy(0, 1, 0, 10)
    assert context.last_position(1) == -1
    assert context.last_position(0) == len(TOKENS) - 1
    np.testing.assert_allclose(decode(context, TOKENS[:10], sequence_id=1), expected, rtol=1e-4, atol=1e-4)


def test_a_whole_sequence_is_copied(context: NativeContext) -> None:
    decode(context, TOKENS)
    assert context.copy(0, 1, 0, len(TOKENS))
    expected = decode(context, [5], len(TOKENS))
    np.testing.assert_allclose(decode(context, [5], len(TOKENS), sequence_id=1), expected, rtol=1e-4, atol=1e-4)
