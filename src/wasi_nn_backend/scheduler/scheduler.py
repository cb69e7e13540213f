"""Continuous batching: each step takes one token of every running generation first, then prompt chunks.

So a long prompt never stalls the others by more than one batch, and sequences join and leave between steps.

Where all streams draw from one cache, cells can run out. Idle sessions leave theirs first; then the request of the
lowest priority that came last is interrupted, and goes on where it was when there is room again. Who came first among
the highest is never interrupted, so somebody always gets to an end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wasi_nn_backend.kvcache import Assignment, KvOperation, StreamPool, common_prefix_length
from wasi_nn_backend.scheduler.contention import can_wait_for, last_to_be_served, prompt_rank, victim_for
from wasi_nn_backend.scheduler.fairness import FairShares
from wasi_nn_backend.scheduler.plan import Chunk, StepPlan
from wasi_nn_backend.scheduler.queue import RequestQueue
from wasi_nn_backend.scheduler.request import Request, RequestState

__all__ = ["Scheduler", "SchedulingRules"]


#: Prompts are computed best in pieces of at least so many tokens.
_N_TOKENS_STEP_MIN = 64


@dataclass(frozen=True, slots=True)
class SchedulingRules:
    """``n_batch`` is the most tokens of a step, ``n_running_max`` the most requests that share one (None: as many as
    there are streams). Without ``uses_priorities`` all are equal; without ``shares_fairly`` users are not told apart.
    """

    n_batch: int
    n_running_max: int | None = None
    uses_priorities: bool = True
    shares_fairly: bool = True


class Scheduler:
    """Gives requests streams of a pool and fills batches. Not thread-safe: the engine's thread owns it."""

    def __init__(self, pool: StreamPool, rules: SchedulingRules) -> None:
        self._pool = pool
        self._rules = rules
        self._n_batch = rules.n_batch
        self._n_running_max = min(rules.n_running_max or pool.n_streams, pool.n_streams)
        self._n_added = 0
        self._shares = FairShares() if rules.shares_fairly else None
        self._queue = RequestQueue(self._shares)
        self._running: list[Request] = []
        self._started: list[Request] = []  # for the first time, since the last plan
        self._n_tokens_tolerated = rules.n_batch // 8  # by which users may differ before anybody's place is given away
        self._left_out: list[Request] = []  # who could have generated in the last step
        self._n_tokens_to_look = 0  # until those who wait are compared with those who run again

    @property
    def has_work(self) -> bool:
        """Whether ``plan`` would find something to decode."""
        return bool(self._running or self._queue)

    @property
    def is_about_to_begin(self) -> bool:
        """Whether requests wait and none runs: the only moment at which waiting for more delays none who generates."""
        return bool(self._queue) and not self._running

    @property
    def shares(self) -> dict[str, int]:
        """Tokens served to each user who has a request here; empty where users are not told apart."""
        return {} if self._shares is None else self._shares.by_user()

    def raised_priority(self, request: Request) -> int:
        """A request's priority with what it has risen while waiting."""
        return self._queue.priority(request)

    @property
    def n_waiting(self) -> int:
        return len(self._queue)

    @property
    def n_running(self) -> int:
        return len(self._running)

    def add(self, request: Request) -> None:
        self._n_added += 1
        request.arrival = self._n_added
        if not self._rules.uses_priorities:
            request.priority = 0
        if self._shares is not None:
            self._shares.enter(request)
        self._wait(request)

    def plan(self) -> StepPlan:
        """Admit what fits, then fill one batch."""
        operations = [*self._admit(), *self._secure_cells()]
        n_left = self._n_batch
        if self._is_contended:
            n_left = min(n_left, _N_TOKENS_STEP_MIN)  # so much sooner can a place be given to somebody who comes
        if (n_cells_free := self._pool.n_cells_free) is not None:
            n_left = max(1, min(n_left, n_cells_free))  # at least one: llama.cpp has the last word on its cells
        generating = self._generating(n_left)
        if len(generating) > n_left:  # round robin: whom this batch leaves out comes first in the next one
            self._left_out = generating[n_left:]
            generating = generating[:n_left]
            self._running = [r for r in self._running if r not in generating] + generating
        chunks = [self._chunk(request, 1) for request in generating]
        chunks += self._prompt_chunks(n_left - len(generating))
        # llama.cpp computes streams together only where their ids follow on each other: any other order of the batch
        # falls apart into one pass over the weights a stream.
        chunks.sort(key=lambda chunk: chunk.stream)
        self._n_tokens_to_look -= sum(chunk.n_tokens for chunk in chunks)
        started, self._started = tuple(self._started), []
        return StepPlan(tuple(operations), tuple(chunks), started)

    def commit(self, chunk: Chunk) -> None:
        """A chunk was decoded: its tokens are in the cache."""
        request = chunk.request
        end = request.n_tokens_computed + chunk.n_tokens
        self._pool.append(chunk.stream, request.tokens[request.n_tokens_computed : end])
        if self._shares is not None:
            self._shares.serve(request, chunk.n_tokens)
        request.n_tokens_computed = end
        request.n_tokens_decoded += chunk.n_tokens

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
            self._wait(request)

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
        if len(self._running) < 2:
            return None
        request = last_to_be_served(self._running)
        self._interrupt(request)
        return self._pool.evict(request.session_id)

    def finish(self, request: Request) -> None:
        """The request is over; its tokens stay cached for the session. Idempotent."""
        if request.state is RequestState.FINISHED:
            return
        self._queue.remove(request)
        self._leave_stream(request)
        if self._shares is not None:
            self._shares.leave(request)
        request.state = RequestState.FINISHED

    def restart(self, stream: int) -> None:
        """A stream had to be cleared: whoever runs on it computes all tokens again."""
        self._pool.forget(stream)
        for request in self._running:
            if request.stream == stream:
                request.n_tokens_computed = 0
                request.n_tokens_reused = request.n_tokens_shared = 0

    @property
    def _is_contended(self) -> bool:
        """Whether users are told apart, and wait for each other's places."""
        return self._shares is not None and bool(self._queue) and len(self._running) == self._n_running_max

    def _generating(self, n_left: int) -> list[Request]:
        """Who gets its next token in a step of ``n_left`` tokens.

        Where users contend, a prompt that can end in this step does so without those who can wait better: with them it
        would end a step later. Nobody is left out of two steps in a row.
        """
        generating = [request for request in self._running if request.n_tokens_pending == 1]
        left_out, self._left_out = self._left_out, []
        generating.sort(key=lambda request: request not in left_out)
        prompting = self._prompting() if self._is_contended else []
        shares = self._shares
        if not prompting or shares is None or len(generating) > n_left:
            return generating
        first = prompting[0]
        staying = [
            request
            for request in generating
            if request in left_out or not can_wait_for(request, first, shares, self._n_tokens_tolerated)
        ]
        if first.n_tokens_pending > n_left - len(staying):
            return generating
        self._left_out = [request for request in generating if request not in staying]
        return staying

    def _prompting(self) -> list[Request]:
        """Who computes a prompt, those first whose users have been served least."""
        prompting = [request for request in self._running if request.n_tokens_pending > 1]
        if (shares := self._shares) is not None:
            prompting.sort(key=lambda request: prompt_rank(request, shares, self._n_tokens_tolerated))
        return prompting

    def _prompt_chunks(self, n_left: int) -> list[Chunk]:
        """At most ``n_left`` tokens of prompts.

        Where a prompt ends in this step, those of users who can wait better are left out: they would only make the step
        longer that gives its first token.
        """
        shares = self._shares
        chunks: list[Chunk] = []
        for request in self._prompting():
            if n_left <= 0:
                break
            if shares is not None and any(
                chunk.samples and can_wait_for(request, chunk.request, shares, self._n_tokens_tolerated)
                for chunk in chunks
            ):
                continue
            chunks.append(self._chunk(request, min(request.n_tokens_pending, n_left)))
            n_left -= chunks[-1].n_tokens
        return chunks

    def _wait(self, request: Request) -> None:
        request.state = RequestState.WAITING
        self._queue.add(request)
        self._n_tokens_to_look = 0

    def _admit(self) -> list[KvOperation]:
        """Start waiting requests while places can be had, free ones or those of others who can wait better; returns
        what must be done to the cache first."""
        operations: list[KvOperation] = []
        if self._queue and self._n_tokens_to_look <= 0:
            self._n_tokens_to_look = self._n_tokens_tolerated
            for request in self._queue.in_order():
                if self._pool.runs(request.session_id):
                    continue  # one sequence a session: this one goes on where the other stops, and lets the next pass
                if self._waits_for_prefix(request):
                    self._n_tokens_to_look = 0  # that may be over after any step
                elif not self._place_for(request, operations):
                    break
        operations += self._pool.enforce_limits()
        return operations

    def _place_for(self, request: Request, operations: list[KvOperation]) -> bool:
        """Start a request. False, with nobody interrupted, where there is no place for it now."""
        if len(self._running) >= self._n_running_max:
            victim = victim_for(request, self._running, self._shares, self._n_tokens_tolerated)
            if victim is None:
                return False
            self._interrupt(victim)
        room = self._find_room(request)
        if room is None:
            return False
        operations += room
        assignment = self._pool.assign(request.session_id, request.tokens, request.salt)
        if assignment is None:
            return False
        self._start(request, assignment)
        operations += assignment.operations
        return True

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

    def _interrupt(self, request: Request) -> None:
        """Send a running request back to wait. Its cells stay where they are until somebody needs them."""
        self._leave_stream(request)
        request.n_interruptions += 1
        self._wait(request)

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
        self._queue.start(request)
        if not request.has_started:
            self._started.append(request)
            request.has_started = True
            request.n_tokens_reused = assignment.n_tokens_reused
            request.n_tokens_shared = assignment.n_tokens_shared
        else:
            request.n_tokens_recomputed += max(0, request.n_tokens_computed - assignment.n_tokens_reused)
        request.n_tokens_computed = assignment.n_tokens_reused
        request.state = RequestState.RUNNING
        self._running.append(request)
        if self._shares is not None:
            self._shares.take_place(request)

    def _leave_stream(self, request: Request) -> None:
        if request.stream is not None:
            self._running.remove(request)
            self._pool.release(request.stream)
            request.stream = None
            if self._shares is not None:
                self._shares.leave_place(request)
            self._n_tokens_to_look = 0  # there is a place

    def _chunk(self, request: Request, n_tokens: int) -> Chunk:
        if request.stream is None:
            raise RuntimeError(f"request {request.id} runs without a stream")  # a fault of this class
        samples = n_tokens == request.n_tokens_pending
        return Chunk(request, request.stream, request.n_tokens_computed, n_tokens, samples)
