"""Vectors in place of text: one run of a session in embedding mode, and the vectors of many texts at once."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cached_property

import numpy as np
import numpy.typing as npt

from wasi_nn_backend.engine import Embedder, EmbeddingJob, EngineLease
from wasi_nn_backend.errors import Cancelled, InvalidArgument
from wasi_nn_backend.output import FinishReason, RunMetadata, embedding_json
from wasi_nn_backend.session.session import Prompt

__all__ = ["EmbeddingRun", "embed_texts", "start_embedding"]

_log = logging.getLogger(__name__)


class EmbeddingRun:
    """What ``Run`` is for text: the vector of a prompt is computed, and its JSON is the output, in one piece."""

    is_single = False

    def __init__(self, job: EmbeddingJob, embedder: Embedder, lease: EngineLease, prompt: Prompt) -> None:
        self.prompt = prompt
        self.lease = lease
        self.last_piece = b""
        self._job = job
        self._embedder = embedder
        self._is_taken = False

    @property
    def text(self) -> bytes:
        """The JSON; empty until the run is over, and when it failed."""
        return self._json if self._job.done and self._job.error is None else b""

    @cached_property
    def _json(self) -> bytes:
        return embedding_json(self._job.vectors[0].tolist())

    @property
    def finish_reason(self) -> FinishReason | None:
        if not self._job.done:
            return None
        if self._job.error is None:
            return FinishReason.STOP
        return FinishReason.CANCELLED if isinstance(self._job.error, Cancelled) else FinishReason.ERROR

    @property
    def has_started(self) -> bool:
        """Whether it is, or was, in a batch."""
        return self._job.n_taken > 0

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until the vector is there. With ``timeout_s`` it is only looked at: a vector takes a moment."""
        if timeout_s is None:
            self._job.wait()
        return self._job.done

    def cancel(self) -> None:
        """Any thread; without effect when the run is over."""
        self._embedder.cancel(self._job)

    def end(self, *, logs_at_info: bool) -> None:
        """Stop it if it is not over, wait until it is, and log what it did."""
        self.cancel()
        self.wait()
        _log.log(
            logging.INFO if logs_at_info else logging.DEBUG,
            "embedding of %d tokens, finish_reason=%s",
            len(self.prompt.tokens),
            "none" if self.finish_reason is None else self.finish_reason.value,
        )

    def take_piece(self) -> bytes | None:
        """The whole output once it is there, then None."""
        self.wait()
        self.last_piece = b"" if self._is_taken else self.text
        self._is_taken = True
        return self.last_piece or None

    def raise_error(self) -> None:
        self._job.raise_error()

    def metadata(self, build_number: int, build_commit: str) -> RunMetadata:
        job = self._job
        return RunMetadata(
            n_tokens_input=len(self.prompt.tokens),
            build_number=build_number,
            build_commit=build_commit,
            finish_reason=self.finish_reason,
            duration_ms=None if job.finished_s is None else round((job.finished_s - job.submitted_s) * 1000, 3),
        )


def start_embedding(lease: EngineLease, prompt: Prompt) -> EmbeddingRun:
    """Submit a prompt to the leased embedder. Raises ``PromptTooLong``; the lease is the caller's then."""
    embedder = lease.embedder()
    return EmbeddingRun(embedder.submit([prompt.tokens]), embedder, lease, prompt)


def embed_texts(lease: EngineLease, texts: Iterable[str]) -> npt.NDArray[np.float32]:
    """The vectors of texts, shape [n_texts, n_embd], in their order. See ``Graph.embed`` for what it raises."""
    if isinstance(texts, str | bytes):
        raise InvalidArgument("embed takes a list of texts: put the single text into one")
    vocabulary = lease.model.vocabulary
    tokens = [
        vocabulary.tokenize(_checked(index, text), add_special=True, parse_special=True)
        for index, text in enumerate(texts)
    ]
    embedder = lease.embedder()
    job = embedder.submit(tokens)
    try:
        job.wait()
    except BaseException:  # Ctrl-C: nobody wants the vectors any more
        embedder.cancel(job)
        raise
    job.raise_error()
    return job.vectors


def _checked(index: int, text: object) -> bytes:
    if not isinstance(text, str):
        raise InvalidArgument(f"embed takes texts, texts[{index}] is a {type(text).__name__}: pass str")
    if not text:
        raise InvalidArgument(f"texts[{index}] is empty, so it has no embedding: leave it out")
    return text.encode(errors="replace")
