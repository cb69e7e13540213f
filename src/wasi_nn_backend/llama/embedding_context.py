"""A llama context for embeddings: whole texts in, one vector a text out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from wasi_nn_backend.errors import InvalidArgument, RuntimeFailure, UnsupportedOperation
from wasi_nn_backend.llama.bindings import native
from wasi_nn_backend.llama.context_params import ModelFacts, to_native
from wasi_nn_backend.llama.context_parts import AbortFlag, BatchArrays, open_context
from wasi_nn_backend.llama.gguf_file import GgufSummary
from wasi_nn_backend.llama.interface import ContextParams, DecodeBatch
from wasi_nn_backend.llama.log_bridge import LogBridge
from wasi_nn_backend.llama.owner import Hold, Owner, Resource

__all__ = ["NativeEmbeddingContext"]

_ABORTED = 2  # llama_decode's and llama_encode's code


def _poolings() -> tuple[int, ...]:
    return (
        native.LLAMA_POOLING_TYPE_NONE,
        native.LLAMA_POOLING_TYPE_MEAN,
        native.LLAMA_POOLING_TYPE_CLS,
        native.LLAMA_POOLING_TYPE_LAST,
    )


class NativeEmbeddingContext(Owner):
    """``EmbeddingContext`` over llama.cpp. Only ``request_abort`` and ``close`` may be called by other threads than the
    owner's.

    For embeddings llama.cpp makes every token of the batch an output, and computes and keeps the logits of each:
    200 MiB for 512 tokens of SmolLM2, and a tenth of the time; half a GiB for 240 tokens of Gemma 3, and more than half
    of the time. Where only the last token's vector is asked for (no pooling, or pooling of the last), all tokens but
    the last are therefore computed without outputs first, as a prompt's are, and then the last token of every text in
    one further batch. Other pooling and attention that looks ahead need the whole text in one piece (n_ubatch =
    n_batch, or llama.cpp aborts).
    """

    def __init__(
        self, model: Resource, facts: ModelFacts, summary: GgufSummary, params: ContextParams, log: LogBridge
    ) -> None:
        pooling = summary.pooling_type
        self._is_last_only = (
            not summary.is_encoder
            and summary.is_causal
            and pooling in (native.LLAMA_POOLING_TYPE_NONE, native.LLAMA_POOLING_TYPE_LAST)
        )
        self._is_pooled = pooling != native.LLAMA_POOLING_TYPE_NONE
        if pooling not in _poolings():  # llama.cpp aborts for numbers that it does not know
            raise UnsupportedOperation(
                f"{facts.name} has no embeddings: it pools in the way {pooling}, which ranks texts or is unknown; "
                "load an embedding model or one without pooling"
            )
        params = self._fitting(params, facts)
        native_params = to_native(params, facts)
        native_params.embeddings = True
        if self._is_last_only:
            native_params.n_outputs_max = params.n_sequences
        self._abort = AbortFlag(native_params)
        pointer = open_context(model, facts.name, params, native_params, log)
        super().__init__(Resource(f"an embedding context of {facts.name}", pointer, native.llama_free, parent=model))
        self._memory = native.llama_get_memory(pointer)
        if (int(native.llama_pooling_type(pointer)), not self._memory) != (pooling, summary.is_encoder):
            self.close()
            raise UnsupportedOperation(f"{facts.name} does not work as its file says: its embeddings would be wrong")
        with Hold(model) as model_pointer:
            self._n_embd = int(native.llama_model_n_embd_out(model_pointer))
        self._n_vocab = facts.n_vocab
        self._n_batch = int(native.llama_n_batch(pointer))
        self._n_sequences = params.n_sequences
        # An encoder's table of positions ends at its training length, and llama.cpp aborts beyond it.
        n_positions = summary.n_ctx_train if summary.is_encoder else params.n_ctx
        self._n_tokens_max = min(params.n_ctx, self._n_batch, n_positions)
        self._arrays = BatchArrays(self._n_batch)
        self._batch = DecodeBatch()
        self._call_log = log.collector(quiet=True)

    def _fitting(self, params: ContextParams, facts: ModelFacts) -> ContextParams:
        if facts.is_recurrent:  # a sequence costs a whole state there, whatever its length
            params = replace(params, n_sequences=1)
        if self._is_last_only:
            return params
        # llama.cpp reserves its graph for a multiple of the sequences, and aborts where pooling the mean then finds
        # more tokens than outputs.
        n_batch = -(-params.n_batch // params.n_sequences) * params.n_sequences
        return replace(params, n_batch=n_batch, n_ubatch=n_batch, n_cells=max(params.n_cells_total, n_batch))

    @property
    def n_embd(self) -> int:
        return self._n_embd

    @property
    def n_tokens_max(self) -> int:
        return self._n_tokens_max

    @property
    def n_batch(self) -> int:
        return self._n_batch

    @property
    def n_sequences(self) -> int:
        return self._n_sequences

    def embed(self, texts: Sequence[Sequence[int]]) -> npt.NDArray[np.float32] | None:
        """See ``EmbeddingContext.embed``. Raises ``RuntimeFailure`` when llama.cpp fails."""
        self._check(texts)
        with self._native() as pointer, self._call_log as log:
            self._abort.lower()
            if self._memory:
                native.llama_memory_clear(self._memory, False)
            result = self._compute_last(pointer, texts) if self._is_last_only else self._compute_whole(pointer, texts)
            if result == 0:
                return self._vectors(pointer, texts)
        if result == _ABORTED:
            return None
        raise RuntimeFailure(f"llama.cpp failed to embed {len(texts)} texts (code {result}): {log.reason()}")

    def _compute_last(self, pointer: int, texts: Sequence[Sequence[int]]) -> int:
        batch = self._batch
        batch.clear()
        for sequence_id, tokens in enumerate(texts):
            batch.add(tokens[:-1], 0, sequence_id, logits_for_last=False)
        if len(batch):
            native.llama_set_embeddings(pointer, False)
            result = int(native.llama_decode(pointer, self._arrays.fill(batch)))
            if result != 0:
                return result
        batch.clear()
        for sequence_id, tokens in enumerate(texts):
            batch.add(tokens[-1:], len(tokens) - 1, sequence_id, logits_for_last=True)
        native.llama_set_embeddings(pointer, True)
        return int(native.llama_decode(pointer, self._arrays.fill(batch)))

    def _compute_whole(self, pointer: int, texts: Sequence[Sequence[int]]) -> int:
        batch = self._batch
        batch.clear()
        for sequence_id, tokens in enumerate(texts):
            batch.add(tokens, 0, sequence_id, logits_for_last=True)
        batch.wants_logits[:] = [1] * len(batch)  # llama.cpp would do it with a warning
        compute = native.llama_decode if self._memory else native.llama_encode
        return int(compute(pointer, self._arrays.fill(batch)))

    def _vectors(self, pointer: int, texts: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
        vectors = np.empty((len(texts), self._n_embd), dtype=np.float32)
        row = -1
        for sequence_id, tokens in enumerate(texts):
            row += 1 if self._is_last_only else len(tokens)
            vector = self._pooled(pointer, sequence_id) if self._is_pooled else self._token_vector(pointer, row)
            if not vector:
                raise RuntimeFailure(f"llama.cpp computed {len(texts)} texts and gave no vector for one of them")
            vectors[sequence_id] = np.ctypeslib.as_array(vector, (self._n_embd,))
        return vectors

    @staticmethod
    def _pooled(pointer: int, sequence_id: int) -> Any:
        return native.llama_get_embeddings_seq(pointer, sequence_id)

    @staticmethod
    def _token_vector(pointer: int, row: int) -> Any:
        return native.llama_get_embeddings_ith(pointer, row)

    def _check(self, texts: Sequence[Sequence[int]]) -> None:
        """Everything that llama.cpp would abort on, or read out of bounds for."""
        if not 0 < len(texts) <= self._n_sequences:
            raise InvalidArgument(f"{len(texts)} texts at once; it must be 1 to {self._n_sequences}")
        lengths = [len(tokens) for tokens in texts]
        if min(lengths) < 1 or max(lengths) > self._n_tokens_max or sum(lengths) > self._n_batch:
            raise InvalidArgument(
                f"texts of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} together; each must have 1 to "
                f"{self._n_tokens_max}, all {self._n_batch} at most (batch_size)"
            )
        if min(map(min, texts)) < 0 or max(map(max, texts)) >= self._n_vocab:
            raise InvalidArgument(f"a text has a token outside of the vocabulary of {self._n_vocab}")

    def request_abort(self) -> None:
        self._abort.raise_it()
