"""The accounting of KV memory, against a plain memory that carries out what it asks for."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from tests.fakes.memory import N_BYTES_PER_TOKEN, PlainMemory, compute, computed
from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.kvcache import (
    N_TOKENS_SHARED_MIN,
    CacheStrategy,
    CopyStream,
    PoolLimits,
    RestoreState,
    SaveState,
    StreamPool,
    common_prefix_length,
)

N_CTX = 96


@dataclass
class Session:
    salt: str
    tokens: list[int] = field(default_factory=list)  # of the window: what the next turn begins with
    stream: int | None = None
    has_shifted: bool = False


class RandomSessions:
    """Sessions that open, run, extend, shift, rest and close at random."""

    def __init__(self, seed: int, limits: PoolLimits, n_streams: int) -> None:
        self.random = random.Random(seed)
        self.pool = StreamPool(n_streams, N_CTX, limits)
        self.memory = PlainMemory(self.pool)
        self.sessions: dict[int, Session] = {}
        self.bases = [[self.random.randrange(50) for _ in range(60)] for _ in range(3)]
        self.n_reused = self.n_shared = 0

    def step(self) -> None:
        kind = self.random.choice(["open", "run", "run", "run", "append", "append", "rest", "rest", "shift", "close"])
        sessions = self.sessions
        running = [s for s, session in sessions.items() if session.stream is not None]
        idle = [s for s, session in sessions.items() if session.stream is None]
        if kind == "open" and len(sessions) < 12:
            sessions[len(sessions) + 1000 * self.random.randrange(10**6)] = Session(self.random.choice(["", "other"]))
        elif kind == "run" and idle:
            self.run(self.random.choice(idle))
        elif kind == "append" and running:
            self.append(self.random.choice(running))
        elif kind == "rest" and running:
            self.rest(self.random.choice(running))
        elif kind == "shift" and running:
            self.shift(self.random.choice(running))
        elif kind == "close" and idle and self.random.random() < 0.3:
            self.close(self.random.choice(idle))
        self.check()

    def run(self, session_id: int) -> None:
        session = self.sessions[session_id]
        if self.random.random() < 0.3 or not session.tokens:
            base = self.random.choice(self.bases)
            session.tokens, session.has_shifted = base[: self.random.randrange(1, 60)], False
        prompt = session.tokens + [self.random.randrange(50) for _ in range(self.random.randrange(4))]
        prompt = prompt[: N_CTX - 4]
        n_running = sum(other.stream is not None for other in self.sessions.values())
        assignment = self.pool.assign(session_id, prompt, session.salt)
        if n_running == self.pool.n_streams:
            assert assignment is None
            return
        assert assignment is not None
        self.memory.apply(assignment.operations)
        cells = self.memory.streams[assignment.stream]
        assert [token for token, _ in cells] == prompt[: assignment.n_tokens_reused]
        assert assignment.n_tokens_reused < len(prompt)
        if assignment.n_tokens_shared:
            assert cells == computed(prompt)[: assignment.n_tokens_shared], "shared cells are not what computing gives"
            session.has_shifted = False
        elif not session.has_shifted:
            assert cells == computed(prompt)[: assignment.n_tokens_reused]
        self.n_reused += assignment.n_tokens_reused
        self.n_shared += assignment.n_tokens_shared
        rest = prompt[assignment.n_tokens_reused :]
        compute(cells, rest)
        self.pool.append(assignment.stream, rest)
        session.tokens, session.stream = prompt, assignment.stream
        self.memory.apply(self.pool.enforce_limits())

    def append(self, session_id: int) -> None:
        session = self.sessions[session_id]
        assert session.stream is not None
        if len(session.tokens) < N_CTX:
            token = self.random.randrange(50)
            compute(self.memory.streams[session.stream], [token])
            self.pool.append(session.stream, [token])
            session.tokens = [*session.tokens, token]

    def shift(self, session_id: int) -> None:
        session = self.sessions[session_id]
        assert session.stream is not None
        if len(session.tokens) > 40:
            n_keep, n_discard = self.random.randrange(10), self.random.randrange(1, 20)
            self.memory.shift(session.stream, n_keep, n_discard)
            session.tokens = session.tokens[:n_keep] + session.tokens[n_keep + n_discard :]
            session.has_shifted = True

    def rest(self, session_id: int) -> None:
        session = self.sessions[session_id]
        assert session.stream is not None
        self.pool.release(session.stream)
        session.stream = None
        self.memory.apply(self.pool.enforce_limits())

    def close(self, session_id: int) -> None:
        self.memory.apply(self.pool.forget_session(session_id))
        del self.sessions[session_id]

    def check(self) -> None:
        pool, memory = self.pool, self.memory
        assert pool.n_cells_used == sum(map(len, memory.streams))
        assert all(len(cells) <= N_CTX for cells in memory.streams)
        assert pool.n_sessions_in_host == len(memory.host)
        assert pool.n_host_bytes == N_BYTES_PER_TOKEN * sum(map(len, memory.host.values()))
        assert pool.n_tokens_cached == pool.n_cells_used + sum(map(len, memory.host.values()))
        assert pool.n_tokens_cached == sum(pool.n_tokens_of(session_id) for session_id in self.sessions)
        for session_id, session in self.sessions.items():
            assert pool.runs(session_id) == (session.stream is not None)
            if session.stream is not None:
                assert [token for token, _ in memory.streams[session.stream]] == session.tokens

    def finish(self) -> None:
        for session_id, session in list(self.sessions.items()):
            if session.stream is not None:
                self.rest(session_id)
            self.close(session_id)
        self.check()
        assert self.pool.n_tokens_cached == self.pool.n_cells_used == self.pool.n_host_bytes == 0
        assert not any(self.memory.streams)
        assert not self.memory.host


LIMITS = {
    "roomy": PoolLimits(),
    "no host tier": PoolLimits(n_host_bytes_max=0),
    "little host memory": PoolLimits(n_host_bytes_max=1000, deletion_strategy="smart"),
    "few tokens": PoolLimits(n_tokens_max=200, deletion_strategy="fifo"),
    "few tokens, whole sessions": PoolLimits(n_tokens_max=200, trims_tails=False, strategy="smart"),
    "no sharing": PoolLimits(shares_prefixes=False),
}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS.keys())
def test_random_sessions_never_leak_or_mix_cells(limits: PoolLimits, seed: int) -> None:
    """10,000 steps over the seeds for each kind of limits."""
    sessions = RandomSessions(seed, limits, n_streams=1 + seed % 5)
    for _ in range(1250):
        sessions.step()
    assert sessions.n_reused > 0
    assert (sessions.n_shared > 0) or not limits.shares_prefixes or sessions.pool.n_streams == 1
    if not limits.shares_prefixes:
        assert sessions.n_shared == 0
    sessions.finish()


def pool_of(n_streams: int, **limits: object) -> tuple[StreamPool, PlainMemory]:
    pool = StreamPool(n_streams, N_CTX, PoolLimits(**limits))  # type: ignore[arg-type]
    return pool, PlainMemory(pool)


def run(pool: StreamPool, memory: PlainMemory, session_id: int, tokens: list[int], *, rest: bool = True) -> int:
    """Assign, compute and, unless told otherwise, release; returns the tokens reused."""
    assignment = pool.assign(session_id, tokens)
    assert assignment is not None
    memory.apply(assignment.operations)
    compute(memory.streams[assignment.stream], tokens[assignment.n_tokens_reused :])
    pool.append(assignment.stream, tokens[assignment.n_tokens_reused :])
    if rest:
        pool.release(assignment.stream)
    memory.apply(pool.enforce_limits())
    return assignment.n_tokens_reused


A, B, C = ([n] * 40 for n in range(3))


def test_who_leaves_a_stream_comes_back_from_host_memory() -> None:
    pool, memory = pool_of(1)
    run(pool, memory, 1, A)
    run(pool, memory, 2, B)
    assert list(memory.host) == [1]
    assert run(pool, memory, 1, [*A, 9]) == 40
    assert list(memory.host) == [2]


def test_a_prefix_is_copied_from_a_sequence_that_runs() -> None:
    pool, memory = pool_of(2)
    run(pool, memory, 1, A, rest=False)
    assignment = pool.assign(2, [*A[:30], 7, 7])
    assert assignment is not None
    assert assignment.operations == (CopyStream(0, 1, 30),)
    assert (assignment.n_tokens_reused, assignment.n_tokens_shared) == (30, 30)


def test_a_prefix_is_taken_from_a_session_that_sleeps_in_host_memory_and_stays_there() -> None:
    pool, memory = pool_of(1)
    run(pool, memory, 1, A)
    run(pool, memory, 2, B)
    assignment = pool.assign(3, [*A[:30], 7])
    assert assignment is not None
    assert any(isinstance(operation, RestoreState) for operation in assignment.operations)
    memory.apply(assignment.operations)
    assert len(memory.streams[0]) == assignment.n_tokens_shared == 30
    assert set(memory.host) == {1, 2}


def test_short_prefixes_are_not_worth_a_copy() -> None:
    pool, memory = pool_of(2)
    run(pool, memory, 1, A)
    assert run(pool, memory, 2, [*A[: N_TOKENS_SHARED_MIN - 1], 8]) == 0
    assert run(pool, memory, 3, [*A[:N_TOKENS_SHARED_MIN], 8]) == N_TOKENS_SHARED_MIN


def test_salts_keep_sessions_apart() -> None:
    pool, memory = pool_of(3)
    run(pool, memory, 1, A)
    for session_id, salt, n_expected in ((2, "secret", 0), (3, "", 39)):
        assignment = pool.assign(session_id, A, salt)
        assert assignment is not None
        assert assignment.n_tokens_reused == n_expected
        memory.apply(assignment.operations)


def test_shifted_cells_are_shared_only_up_to_the_cut() -> None:
    pool, memory = pool_of(2)
    run(pool, memory, 1, A, rest=False)
    memory.shift(0, 20, 10)
    pool.release(0)
    assert pool.reusable(2, "", A) == 20
    assert pool.reusable(1, "", [*A[:30], 5]) == 30  # its own it may go on with


def test_running_streams_stay_side_by_side() -> None:
    """Sessions whose cells lie apart are brought together when they run at the same time."""
    pool, memory = pool_of(6)
    for session_id in range(6):
        run(pool, memory, session_id, [session_id] * 40, rest=False)
    for stream in range(6):
        pool.release(stream)
    for session_id in (5, 0, 3):
        run(pool, memory, session_id, [session_id] * 41, rest=False)
    running = sorted(stream for stream in range(6) if len(memory.streams[stream]) == 41)
    assert running == list(range(running[0], running[0] + 3))


@pytest.mark.parametrize("strategy", ["lru", "fifo", "smart"])
def test_strategies_choose_their_victims(strategy: CacheStrategy) -> None:
    pool, memory = pool_of(4, n_tokens_max=130, trims_tails=False, deletion_strategy=strategy)
    shared = [9] * 38
    run(pool, memory, 1, C)
    run(pool, memory, 2, [*shared, 1])
    run(pool, memory, 3, [*shared, 2])
    run(pool, memory, 1, [*C, 5])  # the oldest, used again
    run(pool, memory, 4, B)
    gone = {session_id for session_id in range(1, 5) if pool.n_tokens_of(session_id) == 0}
    # smart gives up one of the two that hold the same: the other can be copied.
    assert gone == {"lru": {2}, "fifo": {1}, "smart": {2}}[strategy]


def test_smart_recomputes_less_than_lru_and_fifo_on_a_recorded_trace() -> None:
    """Users of three system prompts, a long document that comes back now and then, and many one-off questions."""

    def n_computed(strategy: CacheStrategy) -> int:
        chooser = random.Random(4)
        pool, memory = pool_of(2, n_tokens_max=400, trims_tails=False, strategy=strategy, deletion_strategy=strategy)
        document = [chooser.randrange(99) for _ in range(90)]
        systems = [[chooser.randrange(99) for _ in range(40)] for _ in range(3)]
        n_total = 0
        for turn in range(600):
            kind = chooser.random()
            if kind < 0.15:
                session_id, prompt = 1, [*document, turn % 99]
            elif kind < 0.6:
                user = chooser.randrange(9)
                session_id, prompt = 10 + user, [*systems[user % 3], *[user] * 20, turn % 99]
            else:
                session_id, prompt = 1000 + turn, [chooser.randrange(99) for _ in range(30)]
            n_total += len(prompt) - run(pool, memory, session_id, prompt)
        return n_total

    figures = {strategy: n_computed(strategy) for strategy in ("lru", "fifo", "smart")}
    assert figures["smart"] < 0.95 * min(figures["lru"], figures["fifo"]), figures


def test_partial_deletion_trims_a_tail() -> None:
    for trims_tails, n_left in ((True, 25), (False, 0)):
        pool, memory = pool_of(2, n_tokens_max=65, trims_tails=trims_tails)
        run(pool, memory, 1, A)
        run(pool, memory, 2, B, rest=False)
        assert pool.n_tokens_of(1) == len(memory.streams[0]) == n_left


def test_without_host_memory_the_least_recently_used_is_forgotten() -> None:
    pool, memory = pool_of(2, n_host_bytes_max=0)
    run(pool, memory, 1, A)
    run(pool, memory, 2, B)
    run(pool, memory, 1, [*A, 5])
    run(pool, memory, 3, C)
    assert [pool.n_tokens_of(session_id) for session_id in (1, 2, 3)] == [41, 0, 40]
    assert memory.n_saves == 0


def test_a_cleared_stream_holds_nothing_for_anybody() -> None:
    pool, memory = pool_of(1)
    run(pool, memory, 1, A, rest=False)
    pool.forget(0)
    memory.streams[0].clear()
    assert (pool.n_cells_used, pool.runs(1)) == (0, True)
    pool.append(0, A)
    pool.release(0)
    pool.forget(0)
    assert (pool.n_cells_used, pool.n_tokens_of(1)) == (0, 0)


def test_misuse_is_refused() -> None:
    with pytest.raises(InvalidArgument):
        StreamPool(0, 8)
    pool, memory = pool_of(1)
    with pytest.raises(InvalidArgument, match="no tokens"):
        pool.assign(1, [])
    run(pool, memory, 1, A, rest=False)
    with pytest.raises(InvalidArgument, match="runs already"):
        pool.assign(1, A)
    with pytest.raises(InvalidArgument, match="do not fit"):
        pool.append(0, [1] * N_CTX)
    assert pool.assign(2, B) is None
    assert pool.forget_session(77) == ()


def test_saving_is_asked_for_once_the_stream_is_needed_and_not_before() -> None:
    pool, memory = pool_of(2)
    run(pool, memory, 1, A)
    run(pool, memory, 2, B)
    assert memory.n_saves == 0
    assignment = pool.assign(3, C)
    assert assignment is not None
    assert [type(operation) for operation in assignment.operations][:1] == [SaveState]


@pytest.mark.parametrize(
    ("left", "right", "n_common"),
    [([], [], 0), ([1], [], 0), ([1, 2], [1, 3], 1), ([5] * 300, [5] * 200, 200), ([5] * 64 + [1], [5] * 64 + [2], 64)],
)
def test_common_prefix_length(left: list[int], right: list[int], n_common: int) -> None:
    assert common_prefix_length(left, right) == common_prefix_length(right, left) == n_common
