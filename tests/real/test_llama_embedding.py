"""llama.cpp's embeddings under the suite that the fake passes: every kind of pooling, with small random models."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.llama_embedding_conformance import PARAMS, TEXTS, EmbeddingConformance, unit
from tests.tiny_encoder import N_CTX_TRAIN, write_tiny_encoder
from wasi_nn_backend.errors import InvalidArgument, UnsupportedOperation
from wasi_nn_backend.llama import load_llama
from wasi_nn_backend.llama.gguf_file import GgufSummary
from wasi_nn_backend.llama.interface import ContextParams, Model, ModelParams
from wasi_nn_backend.llama.model import NativeModel
from wasi_nn_backend.llama.tiny_model import TINY_SHAPE, write_tiny_model

POOLINGS = {
    "last token": {},
    "pooled last": {"pooling_type": gguf.PoolingType.LAST},
    "pooled mean": {"pooling_type": gguf.PoolingType.MEAN},
    "pooled first, looking ahead": {"pooling_type": gguf.PoolingType.CLS, "is_causal": False},
    "last token, looking ahead": {"is_causal": False},
}


def open_model(path: Path) -> NativeModel:
    return load_llama().load_model(ModelParams(path))


def open_tiny(directory: Path, **shape: object) -> NativeModel:
    path = directory / "tiny.gguf"
    write_tiny_model(path, shape=replace(TINY_SHAPE, **shape))
    return open_model(path)


def vectors_of(model: Model) -> np.ndarray:
    texts = [model.vocabulary.tokenize(text, add_special=True, parse_special=False) for text in TEXTS]
    context = model.create_embedding_context(PARAMS)
    vectors = unit(context.embed(texts))
    context.close()
    return vectors


class TestDecoder(EmbeddingConformance):
    @pytest.fixture(params=POOLINGS.values(), ids=POOLINGS.keys())
    def model(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Model]:
        with open_tiny(tmp_path, **request.param) as model:
            yield model


class TestEncoder(EmbeddingConformance):
    @pytest.fixture(params=[gguf.PoolingType.MEAN, gguf.PoolingType.CLS, gguf.PoolingType.NONE])
    def model(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Model]:
        write_tiny_encoder(tmp_path / "encoder.gguf", request.param)
        with open_model(tmp_path / "encoder.gguf") as model:
            yield model

    def test_texts_end_where_the_table_of_positions_ends(self, model: Model) -> None:
        """llama.cpp would end the process."""
        wide = replace(PARAMS, n_ctx=4 * N_CTX_TRAIN, n_cells=4 * N_CTX_TRAIN, n_batch=4 * N_CTX_TRAIN)
        context = model.create_embedding_context(wide)
        assert context.n_tokens_max == N_CTX_TRAIN
        assert context.embed([[5] * N_CTX_TRAIN, [5] * N_CTX_TRAIN]) is not None
        with pytest.raises(InvalidArgument, match=f"1 to {N_CTX_TRAIN}"):
            context.embed([[5] * (N_CTX_TRAIN + 1)])
        context.close()

    def test_it_generates_nothing_and_has_no_cells(self, model: Model) -> None:
        assert not model.can_generate
        assert model.kv_bytes_per_token("f16", "f16") == 0
        with pytest.raises(UnsupportedOperation, match="encoder"):
            model.create_context(ContextParams(n_ctx=256))


def test_the_vector_of_the_last_token_is_what_pooling_the_last_gives(tmp_path: Path) -> None:
    with open_tiny(tmp_path) as model:
        plain = vectors_of(model)
    with open_tiny(tmp_path, pooling_type=gguf.PoolingType.LAST) as model:
        np.testing.assert_allclose(vectors_of(model), plain, atol=1e-5)
    with open_tiny(tmp_path, pooling_type=gguf.PoolingType.MEAN) as model:
        assert abs(vectors_of(model) - plain).max() > 0.1


@pytest.mark.parametrize("pooling_type", [None, gguf.PoolingType.LAST])
def test_last_tokens_computed_apart_are_what_computing_all_at_once_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pooling_type: gguf.PoolingType | None
) -> None:
    """A file that does not say that attention looks back only has its texts computed in one piece."""
    with open_tiny(tmp_path, pooling_type=pooling_type) as model:
        apart = vectors_of(model)
        monkeypatch.setattr(GgufSummary, "is_causal", property(lambda _summary: False))
        np.testing.assert_allclose(vectors_of(model), apart, atol=1e-3)


def test_ranking_models_have_no_embeddings(tmp_path: Path) -> None:
    with open_tiny(tmp_path, pooling_type=gguf.PoolingType.RANK) as model:
        with pytest.raises(UnsupportedOperation, match="ranks texts"):
            model.create_embedding_context(PARAMS)
        model.create_context(ContextParams(n_ctx=256)).close()


def test_an_unknown_pooling_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp would end the process."""
    monkeypatch.setattr(
        gguf.GGUFWriter, "add_pooling_type", lambda writer, _t: writer.add_uint32("llama.pooling_type", 77)
    )
    with (
        open_tiny(tmp_path, pooling_type=gguf.PoolingType.LAST) as model,
        pytest.raises(UnsupportedOperation, match="77"),
    ):
        model.create_embedding_context(PARAMS)


def test_an_abort_ends_a_long_batch_early(tmp_path: Path) -> None:
    shape = {"n_embd": 256, "n_ff": 1024, "n_layers": 8}
    with open_tiny(tmp_path, **shape) as model:
        wide = replace(PARAMS, n_ctx=2048, n_cells=2048, n_batch=2048, n_ubatch=512)
        context = model.create_embedding_context(wide)
        results: list[np.ndarray | None] = []
        thread = threading.Thread(target=lambda: results.append(context.embed([[5] * 2048])))
        thread.start()
        while thread.is_alive():  # the flag is lowered when the call begins
            context.request_abort()
        assert results == [None]
        assert context.embed([[5] * 10]) is not None
        context.close()
