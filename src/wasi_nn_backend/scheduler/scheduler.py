"""Continuous batching: each step takes one token of every running generation first, then prompt chunks.

So a long prompt never stalls the others by more than one batch, and sequences join and leave between steps.

Where all streams draw from one cache, cells can run out. Idle sessions leave theirs first; then the request of the
lowest priority that came last is interrupted, and goes on where it was when there is room again. Who came first among
the highest is never interrupted, so somebody always gets to an end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from wasi_nn_backend.kvcache import Assignment, KvOperation, StreamPool, common_prefix_length
from wasi_nn_backend.scheduler.plan import Chunk, StepPlan
from wasi_nn_backend.scheduler.request import Request, RequestState

__all__ = ["Scheduler"]


class Scheduler:
    """First come, first served, over the streams of a pool. Not thread-safe: the engine's thread owns it.

    ``n_batch`` is the most tokens of a step, ``n_running_max`` the most requests that share one (None: as many as there
    are streams).
    """

    def __init__(self, pool: StreamPool, n_batch: int, n_running_max: int | None = None) -> None:
        self._pool = pool
        self._n_batch = n_batch
        self._n_running_max = n_running_max or pool.n_streams
        self._n_added = 0
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []

    @property
    def has_work(self) -> bool:
        """Whether ``plan`` would find something to decode."""
        return bool(self._running or self._waiting)

    @property
    def is_about_to_begin(self) -> bool:
        """Whether requests wait and none runs: the only moment at which waiting for more delays none who generates."""
        return bool(self._waiting) and not self._running

    def add(self, request: Request) -> None:
        self._n_added += 1
        request.arrival = self._n_added
        request.state = RequestState.WAITING
        self._waiting.append(request)

    def plan(self) -> StepPlan:
        """Admit what fits, then fill one batch."""
        operations = [*self._admit(), *self._secure_cells()]
        n_left = self._n_batch
        if (n_cells_free := self._pool.n_cells_free) is not None:
            n_left = max(1, min(n_left, n_cells_free))  # at least one: llama.cpp has the last word on its cells
        generating = [r for r in self._running if r.n_tokens_pending == 1]
        if len(generating) > n_left:  # round robin: whom this batch leaves out comes first in the next one
            generating = generating[:n_left]
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
        return StepPlan(tuple(operations), tuple(chunks))

    def commit(self, chunk: Chunk) -> None:
        """A chunk was decoded: its tokens are in the cache."""
        request = chunk.request
        end = request.n_tokens_computed + chunk.n_tokens
        self._pool.append(chunk.stream, request.tokens[request.n_tokens_computed : end])
        request.n_tokens_computed = end

    def append_sampled(self, request: Request, token: int) -> None:
        """A token was sampled; without credit left the request pauses until ``grant``, and its stream may be taken."""
        request.tokens.append(token)
        request.n_tokens_generated += 1
        if request.credit_tokens is not None:
            request.credit_tokens -= 1
            if request.credit_tokens <= 0:
                self._leave_stream(request)
                request.state = RequestState.PAUSED

    def grant(self, request: Request, n_tokens: int) -> None:
        """Let a request generate ``n_tokens`` more."""
        if request.credit_tokens is None or request.state is RequestState.FINISHED:
            return
        request.credit_tokens += n_tokens
        if request.state is RequestState.PAUSED and request.credit_tokens > 0:
            # In front: it was served before those that wait now, and most often finds its stream as it left it.
            request.state = RequestState.WAITING
            self._waiting.appendleft(request)

    def shift(self, request: Request, n_keep: int, n_discard: int) -> None:
        """Cut ``n_discard`` tokens out of a running request's window, behind its first ``n_keep``."""
        if request.stream is not None:
            self._pool.shift(request.stream, n_keep, n_discard)
        del request.tokens[n_keep : n_keep + n_discard]
        request.n_tokens_computed -= n_discard
        request.n_tokens_shifted += n_discard

    def shift_by_recomputing(self, request: Request, n_keep: int, n_discard: int) -> tuple[KvOperation, ...]:
        """``shift`` where cells cannot be moved: what lies behind the cut is forgotten and becomes pending again."""
        operations = () if request.stream is None else self._pool.cut_tail(request.stream, n_keep)
        n_lost = request.n_tokens_computed - n_keep - n_discard
        del request.tokens[n_keep : n_keep + n_discard]
        request.n_tokens_computed = n_keep
        request.n_tokens_shifted += n_discard
        request.n_tokens_recomputed += max(0, n_lost)
        return operations

    def make_room(self) -> tuple[KvOperation, ...] | None:
        """One session fewer in the cache: an idle one, or else the request that can wait best. None where only one is
        left, for which nothing more can be done."""
        if evicted := self._pool.evict_idle():
            return evicted
        return self._interrupt() if len(self._running) > 1 else None

    def finish(self, request: Request) -> None:
        """The request is over; its tokens stay cached for the session. Idempotent."""
        if request.state is RequestState.WAITING:
            self._waiting.remove(request)
        self._leave_stream(request)
        request.state = RequestState.FINISHED

    def restart(self, stream: int) -> None:
        """A stream had to be cleared: whoever runs on it computes all tokens again."""
        self._pool.forget(stream)
        for request in self._running:
            if request.stream == stream:
                request.n_tokens_computed = 0
                request.n_tokens_reused = request.n_tokens_shared = 0

    def _admit(self) -> list[KvOperation]:
        """Start waiting requests while streams can be had; returns what must be done to those first."""
        operations: list[KvOperation] = []
        for request in list(self._waiting):
            if self._pool.runs(request.session_id):
                continue  # one sequence a session: this one goes on where the other stops, and lets the next pass
            if len(self._running) >= self._n_running_max:
                break
            if self._waits_for_prefix(request):
                continue
            room = self._find_room(request)
            assignment = (
                self._pool.assign(request.session_id, request.tokens, request.salt) if room is not None else None
            )
            if room is None or assignment is None:
                break
            operations += room
            self._waiting.remove(request)
            self._start(request, assignment)
            operations += assignment.operations
        operations += self._pool.enforce_limits()
        return operations

    def _find_room(self, request: Request) -> Sequence[KvOperation] | None:
        """What gives a request the cells it needs beside those who run, or None while they need them."""
        room = self._pool.make_room_for(request.session_id, request.salt, request.tokens, len(self._running))
        if room is not None or self._running:
            return room
        operations: list[KvOperation] = []  # alone it gets all there is
        while evicted := self._pool.evict_idle():
            operations += evicted
        return operations

    def _secure_cells(self) -> list[KvOperation]:
        """See to it that this step finds cells for all who generate, and one for a prompt."""
        operations: list[KvOperation] = []
        while (n_cells_free := self._pool.n_cells_free) is not None:
            n_generating = sum(request.n_tokens_pending == 1 for request in self._running)
            if n_cells_free >= min(self._n_batch, n_generating + (n_generating < len(self._running))):
                break
            room = self.make_room()
            if room is None:
                break
            operations += room
        return operations

    def _interrupt(self) -> tuple[KvOperation, ...]:
        """Send a running request back to wait, in front, with its cells in host memory where there is room."""
        request = min(self._running, key=lambda each: (each.priority, -each.arrival))
        self._leave_stream(request)
        request.state = RequestState.WAITING
        request.n_interruptions += 1
        self._waiting.appendleft(request)
        return self._pool.evict(request.session_id)

    def _waits_for_prefix(self, request: Request) -> bool:
        """Whether somebody who runs is about to have computed more of this prompt than is cached: a system prompt is
        computed once, however many sessions start with it at the same moment."""
        if not self._pool.limits.shares_prefixes:
            return False
        for other in self._running:
            if other.salt != request.salt or other.n_tokens_shifted or other.n_tokens_pending == 1:
                continue
            n_common = min(common_prefix_length(other.tokens, request.tokens), len(request.tokens) - 1)
            if n_common > other.n_tokens_computed and self._pool.gains_from(
                request.session_id, request.salt, request.tokens, n_common
            ):
                return True
        return False

    def _start(self, request: Request, assignment: Assignment) -> None:
        request.stream = assignment.stream
        if request.n_tokens_generated == 0:
            request.n_tokens_reused = assignment.n_tokens_reused
            request.n_tokens_shared = assignment.n_tokens_shared
        else:
            request.n_tokens_recomputed += max(0, request.n_tokens_computed - assignment.n_tokens_reused)
        request.n_tokens_computed = assignment.n_tokens_reused
        request.state = RequestState.RUNNING
        self._running.append(request)

    def _leave_stream(self, request: Request) -> None:
        if request.stream is not None:
            self._running.remove(request)
            self._pool.release(request.stream)
            request.stream = None

    def _chunk(self, request: Request, n_tokens: int) -> Chunk:
        if request.stream is None:
            raise RuntimeError(f"request {request.id} runs without a stream")  # a fault of this class
        samples = n_tokens == request.n_tokens_pending
        return Chunk(request, request.stream, request.n_tokens_computed, n_tokens, samples)
