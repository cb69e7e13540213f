"""Continuous batching: each step takes one token of every running generation first, then prompt chunks.

So a long prompt never stalls the others by more than one batch, and sequences join and leave between steps.
"""

from __future__ import annotations

from collections import deque

from wasi_nn_backend.kvcache import Assignment, RemoveTail, StreamPool
from wasi_nn_backend.scheduler.plan import Chunk, StepPlan
from wasi_nn_backend.scheduler.request import Request, RequestState

__all__ = ["Scheduler"]


class Scheduler:
    """First come, first served, over the streams of a pool. Not thread-safe: the engine's thread owns it."""

    def __init__(self, pool: StreamPool, n_batch: int) -> None:
        self._pool = pool
        self._n_batch = n_batch
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._paused: list[Request] = []  # with their streams, the longest paused first

    @property
    def has_work(self) -> bool:
        """Whether ``plan`` would find something to decode."""
        return bool(self._running or self._waiting)

    def add(self, request: Request) -> None:
        request.state = RequestState.WAITING
        self._waiting.append(request)

    def plan(self) -> StepPlan:
        """Admit what fits, then fill one batch."""
        removals = self._admit()
        n_left = self._n_batch
        generating = [r for r in self._running if r.n_tokens_pending == 1]
        if len(generating) > self._n_batch:  # round robin: whom this batch leaves out comes first in the next one
            generating = generating[: self._n_batch]
            self._running = [r for r in self._running if r not in generating] + generating
        prompting = [r for r in self._running if r.n_tokens_pending > 1]
        chunks = []
        for request in (*generating, *prompting):
            if n_left == 0:
                break
            n_tokens = min(request.n_tokens_pending, n_left)
            chunks.append(self._chunk(request, n_tokens))
            n_left -= n_tokens
        # llama.cpp computes streams together only where their ids follow on each other: any other order of the batch
        # falls apart into one pass over the weights a stream.
        chunks.sort(key=lambda chunk: chunk.stream)
        return StepPlan(tuple(removals), tuple(chunks))

    def commit(self, chunk: Chunk) -> None:
        """A chunk was decoded: its tokens are in the cache."""
        request = chunk.request
        end = request.n_tokens_computed + chunk.n_tokens
        self._pool.append(chunk.stream, request.tokens[request.n_tokens_computed : end])
        request.n_tokens_computed = end

    def append_sampled(self, request: Request, token: int) -> None:
        """A token was sampled; without credit left the request pauses until ``grant``."""
        request.tokens.append(token)
        if request.credit_tokens is not None:
            request.credit_tokens -= 1
            if request.credit_tokens <= 0:
                self._running.remove(request)
                self._paused.append(request)
                request.state = RequestState.PAUSED

    def grant(self, request: Request, n_tokens: int) -> None:
        """Let a request generate ``n_tokens`` more."""
        if request.credit_tokens is None or request.state is RequestState.FINISHED:
            return
        request.credit_tokens += n_tokens
        if request.state is not RequestState.PAUSED or request.credit_tokens <= 0:
            return
        if request.stream is None:
            self.add(request)
        else:
            self._paused.remove(request)
            self._running.append(request)
            request.state = RequestState.RUNNING

    def finish(self, request: Request) -> None:
        """The request is over; its tokens stay cached for the session. Idempotent."""
        if request.state is RequestState.FINISHED:
            return
        for group in (self._running, self._paused, self._waiting):
            if request in group:
                group.remove(request)
        if request.stream is not None:
            self._pool.release(request.stream)
            request.stream = None
        request.state = RequestState.FINISHED

    def forget_session(self, session_id: int) -> RemoveTail | None:
        """The session is closed: what to remove at once. Its requests must be finished."""
        return self._pool.forget_session(session_id)

    def forget_stream(self, stream: int) -> None:
        """Nobody knows what lies in this stream after a fault: it is removed, and nothing counts on it."""
        self._pool.forget(stream)

    def restart(self, stream: int) -> None:
        """A stream had to be cleared: whoever runs on it computes all tokens again."""
        self._pool.forget(stream)
        for request in (*self._running, *self._paused):
            if request.stream == stream:
                request.n_tokens_computed = 0
                request.n_tokens_reused = 0

    def _admit(self) -> list[RemoveTail]:
        """Start waiting requests while streams can be had; returns what must be removed from those first."""
        removals: list[RemoveTail] = []
        for request in list(self._waiting):
            if self._pool.is_running(request.session_id):
                continue  # one sequence a session: this one goes on where the other stops, and lets the next pass
            assignment = self._pool.assign(request.session_id, request.tokens)
            if assignment is None and self._paused:
                self._take_stream(self._paused.pop(0))
                assignment = self._pool.assign(request.session_id, request.tokens)
            if assignment is None:
                break
            self._waiting.remove(request)
            self._start(request, assignment)
            if assignment.removal is not None:
                removals.append(assignment.removal)
        return removals

    def _start(self, request: Request, assignment: Assignment) -> None:
        request.stream = assignment.stream
        request.n_tokens_computed = assignment.n_tokens_reused
        if request.n_tokens_generated == 0:
            request.n_tokens_reused = assignment.n_tokens_reused
        request.state = RequestState.RUNNING
        self._running.append(request)

    def _take_stream(self, request: Request) -> None:
        """A paused consumer may never come back: others must not wait for it. It resumes by computing again."""
        if request.stream is not None:
            self._pool.release(request.stream)
        request.stream = None
        request.n_tokens_computed = 0

    def _chunk(self, request: Request, n_tokens: int) -> Chunk:
        if request.stream is None:
            raise RuntimeError(f"request {request.id} runs without a stream")  # a fault of this class
        samples = n_tokens == request.n_tokens_pending
        return Chunk(request, request.stream, request.n_tokens_computed, n_tokens, samples)
