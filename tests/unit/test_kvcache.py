"""The accounting of KV memory, against a plain memory that carries out what it asks for."""

from __future__ import annotations

import random

import pytest

from tests.conftest import n_examples
from tests.fakes.memory import PlainMemory, compute
from tests.fakes.sessions import N_CTX, RandomSessions
from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.kvcache import (
    N_TOKENS_SHARED_MIN,
    CacheStrategy,
    CopyStream,
    PoolLimits,
    RemoveTail,
    RestoreState,
    SaveState,
    StreamPool,
    common_prefix_length,
)

LIMITS = {
    "roomy": PoolLimits(),
    "no host tier": PoolLimits(n_host_bytes_max=0),
    "little host memory": PoolLimits(n_host_bytes_max=1000, deletion_strategy="smart"),
    "few tokens": PoolLimits(n_tokens_max=200, deletion_strategy="fifo"),
    "few tokens, whole sessions": PoolLimits(n_tokens_max=200, trims_tails=False, strategy="smart"),
    "no sharing": PoolLimits(shares_prefixes=False),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS.keys())
def test_random_sessions_never_leak_or_mix_cells(limits: PoolLimits, seed: int) -> None:
    """10,000 steps each, or a part, in streams of their own and in a unified cache little larger than a window."""
    n_cells = N_CTX + 4 if seed % 2 else None
    sessions = RandomSessions(seed, limits, n_streams=2 + seed, n_cells=n_cells)
    for _ in range(n_examples(10_000)):
        sessions.step()
    assert sessions.n_reused > sessions.n_shared
    assert (sessions.n_shared > 0) == limits.shares_prefixes
    assert (sessions.happened["fork"] > 0) == limits.shares_prefixes
    assert (sessions.happened["shift of shared cells"] > 0) == (limits.shares_prefixes and n_cells is not None)
    assert (sessions.happened["preempt"] > 0) == (n_cells is not None)
    assert (sessions.happened["restore"] > 0) == (limits.n_host_bytes_max != 0)
    assert (sessions.happened["leave cells behind"] > 0) == (limits.shares_prefixes and n_cells is None)
    assert all(sessions.happened[event] > 0 for event in ("run", "shift", "lose_stream", "evict", "close"))
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
    run(pool, memory, 1, [*A[:20], *B[:19]])  # from before the cut: all is as computed again
    assert pool.reusable(2, "", [*A[:20], *B]) == 39


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


def test_the_next_session_goes_on_from_what_a_gone_one_left_where_it_lies() -> None:
    pool, memory = pool_of(3)
    run(pool, memory, 1, A)
    memory.apply(pool.retire_session(1))
    assert (pool.n_cells_used, pool.n_tokens_cached, pool.n_tokens_of(1)) == (0, 0, 0)
    assignment = pool.assign(2, [*A[:30], 7, 7])
    assert assignment is not None
    assert (assignment.stream, assignment.n_tokens_reused) == (0, 30)
    assert assignment.operations == (RemoveTail(0, 30),)


def test_what_gone_sessions_left_goes_first_and_not_to_host_memory() -> None:
    pool, memory = pool_of(2)
    run(pool, memory, 1, A)
    run(pool, memory, 2, B)
    memory.apply(pool.retire_session(2))
    run(pool, memory, 3, C)
    assert not memory.host
    assert run(pool, memory, 4, B) == 0
    assert list(memory.host) == [1]


def test_what_gone_sessions_left_counts_among_the_tokens_kept() -> None:
    pool, memory = pool_of(3, n_tokens_max=100, trims_tails=False)
    run(pool, memory, 1, A)
    run(pool, memory, 2, B)
    memory.apply(pool.retire_session(2))
    run(pool, memory, 3, C)
    assert [pool.n_tokens_of(session_id) for session_id in (1, 3)] == [40, 40]
    assert sum(map(len, memory.streams)) == 80


@pytest.mark.parametrize("reason", ["another salt", "no sharing", "too short", "running"])
def test_cells_that_nobody_may_use_are_not_left(reason: str) -> None:
    pool, memory = pool_of(2, shares_prefixes=reason != "no sharing")
    tokens = A[: N_TOKENS_SHARED_MIN - 1] if reason == "too short" else A
    run(pool, memory, 1, tokens, rest=reason != "running")
    memory.apply(pool.retire_session(1))
    assert any(memory.streams) == (reason == "another salt")
    assignment = pool.assign(2, A, "another" if reason == "another salt" else "")
    assert assignment is not None
    assert assignment.n_tokens_reused == 0


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
