"""The accounting of KV streams against a plain memory to which its operations are applied."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.kvcache import RemoveTail, StreamPool
from wasi_nn_backend.kvcache.pool import common_prefix_length

N_CTX = 6
_sessions = st.integers(0, 5)
_tokens = st.lists(st.integers(0, 1), min_size=1, max_size=N_CTX)


@dataclass
class Memory:
    """One stream as llama.cpp would hold it."""

    session_id: int | None = None
    tokens: list[int] = field(default_factory=list)
    in_use: bool = False
    last_use: int = 0


class PoolMachine(RuleBasedStateMachine):
    @initialize(n_streams=st.integers(1, 4))
    def make(self, n_streams: int) -> None:
        self.pool = StreamPool(n_streams, N_CTX)
        self.streams = [Memory() for _ in range(n_streams)]
        self.n_uses = 0

    def stream_of(self, session_id: int) -> Memory | None:
        return next((stream for stream in self.streams if stream.session_id == session_id), None)

    def remove(self, removal: RemoveTail | None) -> None:
        if removal is not None:
            del self.streams[removal.stream].tokens[removal.first_position :]

    @rule(session_id=_sessions, tokens=_tokens)
    def assign(self, session_id: int, tokens: list[int]) -> None:
        own = self.stream_of(session_id)
        assert self.pool.is_running(session_id) == (own is not None and own.in_use)
        if own is not None and own.in_use:
            with pytest.raises(InvalidArgument, match="already runs"):
                self.pool.assign(session_id, tokens)
            return
        assignment = self.pool.assign(session_id, tokens)
        idle = [stream for stream in self.streams if not stream.in_use]
        if assignment is None:
            assert not idle
            return
        stream = self.streams[assignment.stream]
        assert not stream.in_use
        if own is not None:
            assert stream is own
        else:
            assert stream.last_use == min(other.last_use for other in idle)
        cached = stream.tokens if own is not None else []
        assert assignment.n_tokens_reused == min(common_prefix_length(cached, tokens), len(tokens) - 1)
        self.remove(assignment.removal)
        assert stream.tokens == tokens[: assignment.n_tokens_reused]
        stream.session_id, stream.in_use = session_id, True

    @rule(index=st.integers(0, 3), tokens=_tokens)
    def append(self, index: int, tokens: list[int]) -> None:
        index %= len(self.streams)
        stream = self.streams[index]
        if not stream.in_use:
            return
        if len(stream.tokens) + len(tokens) > N_CTX:
            with pytest.raises(InvalidArgument, match="do not fit"):
                self.pool.append(index, tokens)
            return
        self.pool.append(index, tokens)
        stream.tokens.extend(tokens)

    @rule(index=st.integers(0, 3))
    def release(self, index: int) -> None:
        index %= len(self.streams)
        if self.streams[index].in_use:
            self.pool.release(index)
            self.n_uses += 1
            self.streams[index].in_use, self.streams[index].last_use = False, self.n_uses

    @rule(index=st.integers(0, 3))
    def forget(self, index: int) -> None:
        index %= len(self.streams)
        self.remove(self.pool.forget(index))
        assert not self.streams[index].tokens

    @precondition(lambda self: any(stream.session_id is not None for stream in self.streams))
    @rule(session_id=_sessions)
    def forget_session(self, session_id: int) -> None:
        stream = self.stream_of(session_id)
        removal = self.pool.forget_session(session_id)
        assert (removal is None) == (stream is None)
        self.remove(removal)
        if stream is not None:
            assert not stream.tokens
            stream.session_id, stream.in_use, stream.last_use = None, False, 0

    @invariant()
    def accounts_for_what_is_there(self) -> None:
        assert self.pool.n_streams == len(self.streams)
        assert all(len(stream.tokens) <= N_CTX for stream in self.streams)
        assert self.pool.n_cells_used == sum(len(stream.tokens) for stream in self.streams)
        for session_id in range(6):
            stream = self.stream_of(session_id)
            assert self.pool.n_tokens_cached(session_id) == (0 if stream is None else len(stream.tokens))

    @invariant()
    def every_cell_has_one_owner(self) -> None:
        assert sum(self.pool.n_tokens_cached(session_id) for session_id in range(6)) == self.pool.n_cells_used

    def teardown(self) -> None:
        for session_id in range(6):
            self.remove(self.pool.forget_session(session_id))
        assert self.pool.n_cells_used == 0
        assert not any(stream.tokens for stream in self.streams)
        newcomers = range(100, 100 + self.pool.n_streams)
        taken = {assignment.stream for n in newcomers if (assignment := self.pool.assign(n, [1])) is not None}
        assert taken == set(range(self.pool.n_streams))
        assert self.pool.assign(99, [1]) is None


TestStreamPool = PoolMachine.TestCase
TestStreamPool.settings = settings(derandomize=True, deadline=None, max_examples=50, stateful_step_count=40)


def test_a_session_that_comes_back_finds_its_tokens() -> None:
    pool = StreamPool(2, 8)
    first = pool.assign(1, [7, 8, 9])
    assert first is not None
    pool.append(first.stream, [7, 8, 9])
    pool.release(first.stream)
    again = pool.assign(1, [7, 8, 4, 5])
    assert again is not None
    assert (again.stream, again.n_tokens_reused) == (first.stream, 2)
    assert again.removal == RemoveTail(first.stream, 2)


def test_streams_are_taken_unused_first_then_the_one_unused_for_longest() -> None:
    pool = StreamPool(3, 8)

    def take(session_id: int) -> int:
        assignment = pool.assign(session_id, [session_id])
        assert assignment is not None
        return assignment.stream

    first, second, third = take(1), take(2), take(3)
    assert len({first, second, third}) == 3
    for stream in (second, third, first):
        pool.release(stream)
    pool.forget_session(1)
    assert [take(session_id) for session_id in (7, 8, 9)] == [first, second, third]


def test_another_session_never_gets_foreign_tokens() -> None:
    pool = StreamPool(1, 8)
    first = pool.assign(1, [7, 8, 9])
    assert first is not None
    pool.append(0, [7, 8, 9])
    pool.release(0)
    second = pool.assign(2, [7, 8, 9])
    assert second is not None
    assert (second.n_tokens_reused, second.removal) == (0, RemoveTail(0, 0))
    assert pool.n_tokens_cached(1) == 0


def test_a_pool_and_an_assignment_need_a_size() -> None:
    for n_streams, n_ctx in ((0, 8), (1, 0)):
        with pytest.raises(InvalidArgument):
            StreamPool(n_streams, n_ctx)
    with pytest.raises(InvalidArgument, match="without a token"):
        StreamPool(1, 8).assign(1, [])
