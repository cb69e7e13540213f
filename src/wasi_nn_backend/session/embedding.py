"""Vectors in place of text: one run of a session in embedding mode, and the vectors of many texts at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from wasi_nn_backend.engine import Embedder, EmbeddingJob, EngineLease, Steps
from wasi_nn_backend.errors import Cancelled, InvalidArgument
from wasi_nn_backend.output import FinishReason, RunMetadata, embedding_json
from wasi_nn_backend.session.session import Prompt
from wasi_nn_backend.tasks import Task, TaskFigures

__all__ = ["EmbeddingRun", "embed_texts", "start_embedding"]


class EmbeddingRun:
    """What ``Run`` is for text: the vector of a prompt is computed, and its JSON is the output, in one piece."""

    is_single = False

    def __init__(self, job: EmbeddingJob, embedder: Embedder, lease: EngineLease, prompt: Prompt, task: Task) -> None:
        self.prompt = prompt
        self.lease = lease
        self.last_piece = b""
        self._job = job
        self._embedder = embedder
        self._task = task
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
        return _finish_reason(self._job) if self._job.done else None

    @property
    def has_started(self) -> bool:
        """Whether it is, or was, in a batch."""
        return self._job.n_taken > 0

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until the vector is there. With ``timeout_s`` it is only looked at: a vector takes a moment."""
        if timeout_s is None:
            self._job.wait()
        return self._job.done

    def when_ready(self, callback: Callable[[], None]) -> None:
        """Call back once when the run is over, on the embedder's thread or at once."""
        self._job.when_ready(callback)

    def cancel(self, error: Cancelled | None = None) -> None:
        """Any thread; without effect when the run is over. ``error``: what its caller gets."""
        if not self._job.done:  # an iterator's always is: the garbage collector must not come to the embedder's lock
            self._embedder.cancel(self._job, error)

    def end(self) -> None:
        """Stop it if it is not over, wait until it is, and tell what it did."""
        self.cancel()
        self.wait()
        self._task.finish(_finish_reason(self._job).value, self._job.error)

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


def start_embedding(lease: EngineLease, prompt: Prompt, task: Task) -> EmbeddingRun:
    """Submit a prompt to the leased embedder. Raises ``PromptTooLong``; the lease is the caller's then."""
    embedder = lease.embedder()
    return EmbeddingRun(_submit(embedder, [prompt.tokens], task), embedder, lease, prompt, task)


@dataclass(frozen=True, slots=True)
class _TextsPoint:
    """The wait for the vectors of many texts."""

    job: EmbeddingJob
    embedder: Embedder

    def when_ready(self, callback: Callable[[], None]) -> None:
        self.job.when_ready(callback)

    def cancel(self) -> None:
        self.embedder.cancel(self.job)


def embed_texts(lease: EngineLease, texts: Iterable[str], task: Task) -> Steps[npt.NDArray[np.float32]]:
    """The vectors of texts, shape [n_texts, n_embd], in their order. See ``Graph.embed`` for what it raises."""
    try:
        tokens = _tokenize(lease, texts)
        embedder = lease.embedder()
        job = _submit(embedder, tokens, task)
    except BaseException as error:
        task.refuse(error)
        raise
    try:
        yield _TextsPoint(job, embedder)
    finally:
        embedder.cancel(job)  # after Ctrl-C nobody wants the vectors any more; else without effect
        task.finish(_finish_reason(job).value, job.error)
    job.raise_error()
    return job.vectors


def _tokenize(lease: EngineLease, texts: Iterable[str]) -> list[list[int]]:
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise InvalidArgument("embed takes a list of texts: put the single text into one")
    vocabulary = lease.model.vocabulary
    return [
        vocabulary.tokenize(_checked(index, text), add_special=True, parse_special=True)
        for index, text in enumerate(texts)
    ]


def _submit(embedder: Embedder, texts: Sequence[Sequence[int]], task: Task) -> EmbeddingJob:
    job = embedder.submit(texts)
    task.begin(lambda: _figures(job))
    return job


def _figures(job: EmbeddingJob) -> TaskFigures:
    """Which of a job's texts are in a batch already is not told apart: all are computed when it is done."""
    n_tokens = sum(map(len, job.texts))
    return TaskFigures(
        n_tokens_prompt=n_tokens,
        n_tokens_computed=n_tokens if job.done and job.error is None else 0,
        duration_s=0.0 if job.finished_s is None else job.finished_s - job.submitted_s,
    )


def _finish_reason(job: EmbeddingJob) -> FinishReason:
    """Of a job that is done."""
    if job.error is None:
        return FinishReason.STOP
    return FinishReason.CANCELLED if isinstance(job.error, Cancelled) else FinishReason.ERROR


def _checked(index: int, text: object) -> bytes:
    if not isinstance(text, str):
        raise InvalidArgument(f"embed takes texts, texts[{index}] is a {type(text).__name__}: pass str")
    if not text:
        raise InvalidArgument(f"texts[{index}] is empty, so it has no embedding: leave it out")
    return text.encode(errors="replace")
