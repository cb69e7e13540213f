"""What every embedding context must do. Runs on the fake and on llama.cpp, so that the fake stays true.

A subclass gives the ``model`` fixture and is named ``Test...``. Vectors are compared up to rounding: llama.cpp computes
a text in other pieces, over other cells, when others are in its batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.llama.embedding_interface import EmbeddingContext
from wasi_nn_backend.llama.interface import ContextParams, Model

N_BATCH = 64
N_TOKENS_MAX = 40
N_SEQUENCES = 5
TEXTS = (b"the cat sat on the mat", b"a", b"no", b"the cat sat on the hat", b"zz")
PARAMS = ContextParams(
    n_ctx=N_TOKENS_MAX,
    n_sequences=N_SEQUENCES,
    n_cells=N_BATCH,
    n_batch=N_BATCH,
    n_ubatch=16,
    kv_layout="unified",
)


def unit(vectors: npt.NDArray[np.float32] | None) -> npt.NDArray[np.float32]:
    assert vectors is not None
    assert vectors.dtype == np.float32
    unit_vectors: npt.NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit_vectors


class EmbeddingConformance:
    @pytest.fixture
    def model(self) -> Iterator[Model]:
        raise NotImplementedError

    @pytest.fixture
    def context(self, model: Model) -> Iterator[EmbeddingContext]:
        context = model.create_embedding_context(PARAMS)
        yield context
        context.close()

    def texts(self, model: Model) -> list[list[int]]:
        return [model.vocabulary.tokenize(text, add_special=True, parse_special=False) for text in TEXTS]

    def test_limits_are_those_asked_for(self, context: EmbeddingContext) -> None:
        assert context.n_batch >= N_BATCH
        assert context.n_sequences == N_SEQUENCES
        assert context.n_tokens_max == N_TOKENS_MAX
        assert context.n_embd > 0

    def test_batched_is_alone_and_order_is_kept(self, model: Model, context: EmbeddingContext) -> None:
        texts = self.texts(model)
        alone = np.concatenate([unit(context.embed([tokens])) for tokens in texts])
        assert alone.shape == (len(texts), context.n_embd)
        np.testing.assert_allclose(unit(context.embed(texts)), alone, atol=1e-3)
        np.testing.assert_allclose(unit(context.embed(texts[::-1])), alone[::-1], atol=1e-3)

    def test_different_texts_have_different_vectors(self, model: Model, context: EmbeddingContext) -> None:
        vectors = unit(context.embed(self.texts(model)))
        similar = vectors @ vectors.T - np.eye(len(vectors), dtype=np.float32)
        assert similar.max() < 0.999

    def test_every_token_counts(self, model: Model, context: EmbeddingContext) -> None:
        tokens = self.texts(model)[0]
        whole = unit(context.embed([tokens]))[0]
        for at in range(1, len(tokens) - 1):
            changed = [*tokens[:at], *tokens[at + 1 :]]
            assert whole @ unit(context.embed([changed]))[0] < 0.9999

    def test_nothing_is_kept_from_one_call_to_the_next(self, model: Model, context: EmbeddingContext) -> None:
        texts = self.texts(model)
        before = context.embed(texts[:1])
        context.embed(texts)
        for _ in range(3 * N_BATCH // len(texts[0])):  # more tokens than there are cells
            np.testing.assert_array_equal(context.embed(texts[:1]), before)

    def test_texts_of_all_lengths_up_to_the_limit(self, model: Model, context: EmbeddingContext) -> None:
        tokens = (self.texts(model)[0] * N_TOKENS_MAX)[:N_TOKENS_MAX]
        for n_tokens in (1, 2, 15, 16, 17, N_TOKENS_MAX):
            assert np.isfinite(unit(context.embed([tokens[:n_tokens]]))).all()
        longest = [tokens, tokens[: N_BATCH - N_TOKENS_MAX]]
        np.testing.assert_allclose(unit(context.embed(longest))[:1], unit(context.embed(longest[:1])), atol=1e-3)

    @pytest.mark.parametrize(
        "lengths", [[], [0], [3, 0], [N_TOKENS_MAX + 1], [30, 36], [1] * (N_SEQUENCES + 1)], ids=str
    )
    def test_what_does_not_fit_is_refused(self, model: Model, context: EmbeddingContext, lengths: list[int]) -> None:
        with pytest.raises(InvalidArgument):
            context.embed([[1] * n_tokens for n_tokens in lengths])
        assert context.embed(self.texts(model)) is not None

    @pytest.mark.parametrize("token", [-1, 2**31 - 1])
    def test_foreign_tokens_are_refused(self, context: EmbeddingContext, token: int) -> None:
        with pytest.raises(InvalidArgument, match="vocabulary"):
            context.embed([[1, token]])

    def test_an_abort_when_nothing_runs_has_no_effect(self, model: Model, context: EmbeddingContext) -> None:
        context.request_abort()
        assert context.embed(self.texts(model)) is not None
