"""Texts to vectors: one thread owns one embedding context and batches the texts of all who ask.

It runs beside the engine that generates text, on a context of its own: embeddings keep nothing in the KV memory, so
that sharing a context would cost both sides their batches and save a few megabytes.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from wasi_nn_backend.engine.steps import Bell
from wasi_nn_backend.engine.waiting import wait_for
from wasi_nn_backend.errors import Cancelled, InvalidArgument, PromptTooLong, RuntimeFailure, WasiNNError
from wasi_nn_backend.home_process import HomeProcess
from wasi_nn_backend.llama.embedding_interface import EmbeddingContext

__all__ = ["Embedder", "EmbeddingJob"]

_log = logging.getLogger(__name__)


class EmbeddingJob:
    """One caller's texts as tokens, and their vectors: float32 of shape [n_texts, n_embd], each of length 1.

    Written by the embedder; ``vectors``, ``error`` and ``finished_s`` are valid once ``done``.
    """

    def __init__(self, texts: Sequence[Sequence[int]], n_embd: int, submitted_s: float) -> None:
        self.texts = texts
        self.vectors: npt.NDArray[np.float32] = np.empty((len(texts), n_embd), dtype=np.float32)
        self.error: WasiNNError | None = None
        self.submitted_s = submitted_s
        self.finished_s: float | None = None
        self.n_taken = 0  # texts that are in a batch or behind it
        self.n_embedded = 0
        self._done = threading.Event()
        self._bell = Bell()

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def finish(self, error: WasiNNError | None, now_s: float) -> None:
        """Called once, by the embedder."""
        self.error = error
        self.finished_s = now_s
        self._done.set()
        self._bell.ring()

    def wait(self) -> None:
        wait_for(self._done)

    def when_ready(self, callback: Callable[[], None]) -> None:
        """Call back once, when it is done, or at once. The embedder's thread calls, so the callback must be short."""
        self._bell.add(callback)
        if self.done:
            self._bell.ring()

    def raise_error(self) -> None:
        """Raise what ended the job, as an exception of the caller's own: others may have got the same."""
        if self.error is not None:
            raise type(self.error)(str(self.error)) from self.error


class Embedder:
    """``submit``, ``cancel`` and ``close`` may be called from any thread. ``clock`` gives seconds.

    Callers take turns, one text each, so that a caller with many texts does not delay one with a single text by more
    than a batch. ``kv_bytes`` is what the context's cells take.
    """

    def __init__(
        self,
        context: EmbeddingContext,
        clock: Callable[[], float],
        *,
        kv_bytes: int = 0,
        start_thread: Callable[[threading.Thread], None] = threading.Thread.start,
    ) -> None:
        self.kv_bytes = kv_bytes
        self._context = context
        self._clock = clock
        self._wake = threading.Condition()
        self._waiting: deque[EmbeddingJob] = deque()  # those with texts that are in no batch yet, next in turn first
        self._unfinished: set[EmbeddingJob] = set()
        self._batch: list[tuple[EmbeddingJob, int]] = []  # what is computed now: jobs and the numbers of their texts
        self._closing = False
        self._home = HomeProcess()
        self._thread = threading.Thread(target=self._run, name="wasi-nn-embedder", daemon=True)
        start_thread(self._thread)

    @property
    def n_tokens_max(self) -> int:
        """Of one text."""
        return self._context.n_tokens_max

    def submit(self, texts: Sequence[Sequence[int]]) -> EmbeddingJob:
        """Queue texts, given as tokens.

        Raises ``PromptTooLong`` and ``InvalidArgument`` (a text without tokens) before anything is computed, and
        ``RuntimeFailure`` when the embedder is closed.
        """
        self._check(texts)
        self._home.check()
        job = EmbeddingJob(texts, self._context.n_embd, self._clock())
        with self._wake:
            if self._closing:
                raise RuntimeFailure("embedding has ended: its graph was unloaded or the backend was closed")
            if not texts:
                job.finish(None, job.submitted_s)
                return job
            self._unfinished.add(job)
            self._waiting.append(job)
            self._wake.notify()
        return job

    def cancel(self, job: EmbeddingJob, error: WasiNNError | None = None) -> None:
        """End a job as cancelled, or with ``error``, at once for its caller. Without effect when it is done."""
        with self._wake:
            if job.done:
                return
            self._finish(job, error or Cancelled("the embedding was cancelled"))
            if self._batch and all(other.done for other, _ in self._batch):
                self._context.request_abort()

    def close(self) -> None:
        """Stop: unfinished jobs end as cancelled, the thread ends, the context is freed. Idempotent."""
        if self._home.is_left:
            return  # the thread stayed behind in the parent, and the context is the parent's
        with self._wake:
            already_closing, self._closing = self._closing, True
            self._wake.notify()
        if not already_closing:
            self._context.request_abort()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _check(self, texts: Sequence[Sequence[int]]) -> None:
        n_tokens_max = self.n_tokens_max
        for index, tokens in enumerate(texts):
            what = f"texts[{index}]" if len(texts) > 1 else "the text"
            if not tokens:
                raise InvalidArgument(f"{what} makes no tokens, so it has no embedding: leave it out")
            if len(tokens) > n_tokens_max:
                raise PromptTooLong(
                    f"{what} has {len(tokens)} tokens, and an embedding is computed of {n_tokens_max} at most: split "
                    f"it, or raise model.batch_size and model.n_ctx as far as the model was trained for"
                )

    # The embedder's thread.

    def _run(self) -> None:
        try:
            while batch := self._next_batch():
                self._embed(batch)
        finally:
            self._shut_down()

    def _next_batch(self) -> list[tuple[EmbeddingJob, int]]:
        """Texts of the jobs in turn, waiting for some. Empty when closing.

        It ends at the first text that no longer fits: looking for a shorter one behind it would let the long ones wait
        for ever.
        """
        with self._wake:
            self._batch = []
            while not (self._waiting or self._closing):
                self._wake.wait()
            if self._closing:
                return []
            n_tokens_free = self._context.n_batch
            while self._waiting and len(self._batch) < self._context.n_sequences:
                job = self._waiting[0]
                n_tokens_free -= len(job.texts[job.n_taken])
                if n_tokens_free < 0:
                    break
                self._batch.append((job, job.n_taken))
                job.n_taken += 1
                self._waiting.popleft()
                if job.n_taken < len(job.texts):
                    self._waiting.append(job)
            return self._batch

    def _embed(self, batch: list[tuple[EmbeddingJob, int]]) -> None:
        """A fault ends the jobs that it struck, never the thread."""
        try:
            vectors = self._context.embed([job.texts[index] for job, index in batch])
        except Exception as fault:
            if not isinstance(fault, WasiNNError):
                _log.exception("a batch of embeddings failed")
            kind = type(fault) if isinstance(fault, WasiNNError) else RuntimeFailure
            self._finish_all(batch, kind(f"the embedding failed: {fault}"))
            return
        if vectors is None:
            self._finish_all(batch, Cancelled("the embedding was stopped"))
            return
        lengths = np.sqrt(np.square(vectors, dtype=np.float64).sum(axis=1))
        for (job, index), vector, length in zip(batch, vectors, lengths, strict=True):
            self._deliver(job, index, vector, float(length))

    def _deliver(self, job: EmbeddingJob, index: int, vector: npt.NDArray[np.float32], length: float) -> None:
        with self._wake:
            if job.done:
                return
            if not 0 < length < np.inf:
                self._finish(job, RuntimeFailure(f"the model gave texts[{index}] a vector of length {length}"))
                return
            job.vectors[index] = vector / length
            job.n_embedded += 1
            if job.n_embedded == len(job.texts):
                self._finish(job, None)

    def _finish_all(self, batch: list[tuple[EmbeddingJob, int]], error: WasiNNError) -> None:
        with self._wake:
            for job, _ in batch:
                self._finish(job, error)

    def _finish(self, job: EmbeddingJob, error: WasiNNError | None) -> None:
        """Under the lock."""
        if job.done:
            return
        self._unfinished.discard(job)
        if job in self._waiting:
            self._waiting.remove(job)
        job.finish(error, self._clock())

    def _shut_down(self) -> None:
        with self._wake:
            self._closing = True
            for job in list(self._unfinished):
                self._finish(job, Cancelled("the backend was closed while the texts were embedded"))
        self._context.close()
