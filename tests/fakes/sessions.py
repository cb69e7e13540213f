"""Sessions that do at random what sessions do, and the books of their cells checked after each step."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tests.fakes.memory import N_BYTES_PER_TOKEN, PlainMemory, compute, computed
from wasi_nn_backend.kvcache import (
    N_TOKENS_SHARED_MIN,
    Assignment,
    KvOperation,
    PoolLimits,
    StreamPool,
    common_prefix_length,
)
from wasi_nn_backend.kvcache.records import CachedSession

N_CTX = 96
N_SESSIONS_MAX = 12
#: Steps between two looks at every cell; what can be counted is looked at after each step.
N_STEPS_PER_FULL_CHECK = 16

#: What happens, by how often: to nobody yet, to a session that rests, to one that runs.
EVENTS = {"open": 4, "fork": 4}
EVENTS_RESTING = {"run": 24, "evict": 4, "save_and_restore": 2, "close": 3}
EVENTS_RUNNING = {"generate": 16, "shift": 4, "lose_stream": 1, "idle": 11}
_EVENTS = (
    [*EVENTS, *EVENTS_RESTING, *EVENTS_RUNNING],
    [*EVENTS.values(), *EVENTS_RESTING.values(), *EVENTS_RUNNING.values()],
)


@dataclass
class Session:
    """``tokens`` are those of the window, which the next turn begins with, cached or not. ``n_exact`` of the cached
    ones are what computing them anew would give: a shift leaves others, None is all."""

    salt: str
    tokens: list[int] = field(default_factory=list)
    stream: int | None = None
    n_exact: int | None = None
    is_fork: bool = False  # that has not run yet


class RandomSessions:
    """Drives a pool as the scheduler and the engine do, with a plain memory that carries out what the pool asks for."""

    def __init__(self, seed: int, limits: PoolLimits, n_streams: int, n_cells: int | None = None) -> None:
        self.random = random.Random(seed)
        self.pool = StreamPool(n_streams, N_CTX, limits, n_cells)
        self.n_cells = n_cells
        self.memory = PlainMemory(self.pool)
        self.sessions: dict[int, Session] = {}
        self.prompts = [[self.random.randrange(50) for _ in range(60)] for _ in range(3)]
        self.n_opened = self.n_steps = 0
        self.n_reused = self.n_shared = 0
        self.happened: Counter[str] = Counter()

    def step(self) -> None:
        [event] = self.random.choices(*_EVENTS)
        is_for_running = event in EVENTS_RUNNING
        candidates = [n for n, each in self.sessions.items() if (each.stream is not None) == is_for_running]
        if event in EVENTS:
            getattr(self, event)()
        elif candidates:
            getattr(self, event)(self.random.choice(candidates))
        self.n_steps += 1
        self.check()

    # Events.

    def open(self) -> None:
        self.add(Session(self.random.choice(["", "", "other"])))

    def fork(self) -> None:
        """The pool hears of a fork when it first runs: it goes on from another session's tokens."""
        if self.sessions:
            origin = self.random.choice(list(self.sessions.values()))
            self.add(Session(origin.salt, list(origin.tokens), is_fork=True))

    def add(self, session: Session) -> None:
        if len(self.sessions) < N_SESSIONS_MAX:
            self.n_opened += 1
            self.sessions[self.n_opened] = session

    def run(self, session_id: int) -> None:
        """A turn: the window so far and some tokens, or a new prompt that begins as others' do."""
        session = self.sessions[session_id]
        if not session.tokens or self.random.random() < 0.2:
            session.tokens = self.random.choice(self.prompts)[: self.random.randrange(1, 60)]
        n_new = self.random.randrange(5)
        prompt = (session.tokens + [self.random.randrange(50) for _ in range(n_new)])[: N_CTX - 4]
        room = self.find_room(session_id, session.salt, prompt)
        if room is None:
            return
        best = self.best_reuse(session_id, session.salt, prompt)
        assignment = self.pool.assign(session_id, prompt, session.salt)
        if sum(other.stream is not None for other in self.sessions.values()) == self.pool.n_streams:
            assert (room, assignment) == ((), None)
            return
        assert assignment is not None
        self.memory.apply([*room, *assignment.operations])
        n_reused, n_shared = assignment.n_tokens_reused, assignment.n_tokens_shared
        if n_shared or session.n_exact is None or n_reused <= session.n_exact:
            session.n_exact = None
        self.check_reuse(assignment, session, prompt, best)
        session.stream, session.tokens = assignment.stream, prompt[:n_reused]
        self.happened["run"] += 1
        self.happened["fork"] += session.is_fork and n_shared > 0
        session.is_fork = False
        self.n_reused += n_reused
        self.n_shared += n_shared
        self.decode(session, prompt[n_reused:])
        self.memory.apply(self.pool.enforce_limits())

    def check_reuse(self, assignment: Assignment, session: Session, prompt: list[int], best: tuple[int, int]) -> None:
        """As much as there is, or little less, of the own session or of others; and the cells are the right ones."""
        n_own, n_of_others = best
        n_reused, n_shared = assignment.n_tokens_reused, assignment.n_tokens_shared
        assert n_of_others < n_reused + N_TOKENS_SHARED_MIN or not self.pool.limits.shares_prefixes
        if n_shared:
            assert n_own < n_reused == n_shared <= n_of_others
        else:
            assert n_reused == n_own
        cells = self.memory.streams[assignment.stream]
        assert [token for token, _ in cells] == prompt[:n_reused]
        n_exact = n_reused if session.n_exact is None else min(session.n_exact, n_reused)
        assert cells[:n_exact] == computed(prompt[:n_exact]), "not what computing the tokens would give"

    def generate(self, session_id: int) -> None:
        """Some tokens, for which a unified cache may have to evict who rests or, as a last resort, preempt who runs."""
        session = self.sessions[session_id]
        n_tokens = min(self.random.randrange(1, 12), N_CTX - len(session.tokens))
        if n_tokens and self.pool.n_cells_free == 0:
            self.preempt_unless(self.pool.evict_idle())
        if session.stream is not None and (n_free := self.pool.n_cells_free) != 0:  # not preempted itself
            n_tokens = n_tokens if n_free is None else min(n_tokens, n_free)
            self.decode(session, [self.random.randrange(50) for _ in range(n_tokens)])

    def preempt_unless(self, evicted: tuple[KvOperation, ...]) -> None:
        if not evicted:
            youngest = [n for n, each in self.sessions.items() if each.stream is not None][-1]
            self.idle(youngest)
            evicted = self.pool.evict(youngest)
            self.happened["preempt"] += 1
        self.memory.apply(evicted)

    def shift(self, session_id: int) -> None:
        """Cut tokens out behind the head; computed again where the cells are another stream's too."""
        session = self.sessions[session_id]
        assert session.stream is not None
        n_keep = self.random.randrange(30)
        n_discard = self.random.randrange(1, 20)
        tail = session.tokens[n_keep + n_discard :]
        if not tail:
            return
        is_shared = self.pool.shares_cells(session.stream, n_keep)
        assert is_shared == (self.n_cells is not None and self.memory.shares_cells(session.stream, n_keep))
        if is_shared:
            self.memory.apply(self.pool.cut_tail(session.stream, n_keep))
            session.tokens = session.tokens[:n_keep]
            if session.n_exact is not None and n_keep <= session.n_exact:
                session.n_exact = None
            if self.pool.n_cells_free is None or self.pool.n_cells_free >= len(tail):
                self.decode(session, tail)
            self.happened["shift of shared cells"] += 1
        else:
            self.memory.shift(session.stream, n_keep, n_discard)
            session.tokens = session.tokens[:n_keep] + tail
            session.n_exact = n_keep if session.n_exact is None else min(n_keep, session.n_exact)
            self.happened["shift"] += 1

    def lose_stream(self, session_id: int) -> None:
        """A decode failed: nobody knows what lies in the stream, so it is cleared."""
        session = self.sessions[session_id]
        assert session.stream is not None
        self.memory.streams[session.stream].clear()
        self.pool.forget(session.stream)
        session.tokens, session.n_exact = [], None
        self.happened["lose_stream"] += 1

    def idle(self, session_id: int) -> None:
        session = self.sessions[session_id]
        assert session.stream is not None
        self.pool.release(session.stream)
        session.stream = None
        self.memory.apply(self.pool.enforce_limits())

    def evict(self, session_id: int) -> None:
        operations = self.pool.evict(session_id)
        self.happened["evict"] += bool(operations)
        self.memory.apply(operations)
        place = self.pool.place_of(session_id)
        assert place is None or place[0] is None

    def save_and_restore(self, session_id: int) -> None:
        """Saved, closed, and restored as another session."""
        session, place = self.sessions[session_id], self.pool.place_of(session_id)
        if place is None:
            return
        stream, tokens = place
        cells = list(self.memory.host[session_id] if stream is None else self.memory.streams[stream])
        n_tokens_exact = self.pool.n_tokens_exact_of(session_id)
        self.close(session_id)
        self.n_opened += 1
        self.sessions[self.n_opened] = replace(session, tokens=list(tokens))
        n_bytes = N_BYTES_PER_TOKEN * len(tokens)
        if self.pool.adopt(self.n_opened, tokens, n_bytes, session.salt, n_tokens_exact):
            self.memory.host[self.n_opened] = cells
            self.memory.apply(self.pool.enforce_limits())
            self.happened["restore"] += 1

    def close(self, session_id: int) -> None:
        """As an engine does, or so that nothing stays."""
        retires = self.random.random() < 0.7
        close = self.pool.retire_session if retires else self.pool.forget_session
        self.memory.apply(close(session_id))
        del self.sessions[session_id]
        self.happened["close"] += 1
        self.happened["leave cells behind"] += len(self.leftovers()) > 0

    # What events are made of.

    def find_room(self, session_id: int, salt: str, prompt: list[int]) -> Sequence[KvOperation] | None:
        """As the scheduler does before it assigns a stream. Who runs alone gets all cells."""
        n_running = sum(each.stream is not None for each in self.sessions.values())
        room = self.pool.make_room_for(session_id, salt, prompt, n_running)
        if room is not None or n_running:
            return room
        operations: list[KvOperation] = []
        while evicted := self.pool.evict_idle():
            operations += evicted
        return operations

    def decode(self, session: Session, tokens: list[int]) -> None:
        assert session.stream is not None
        compute(self.memory.streams[session.stream], tokens)
        self.pool.append(session.stream, tokens)
        session.tokens = session.tokens + tokens

    def best_reuse(self, session_id: int, salt: str, prompt: list[int]) -> tuple[int, int]:
        """The longest beginnings of a prompt that lie somewhere, but for its last token: of its own session, and of
        others of its salt, whose cells must be exact."""
        n_own = n_shared = 0
        for other_id, other in self.sessions.items():
            place = self.pool.place_of(other_id)
            if place is None:
                continue
            n_common = min(common_prefix_length(list(place[1]), prompt), len(prompt) - 1)
            if other_id == session_id:
                n_own = n_common
            elif other.salt == salt:
                n_shared = max(n_shared, n_common if other.n_exact is None else min(n_common, other.n_exact))
        for cells in self.leftovers().values():
            if cells.salt == salt:
                n_shared = max(n_shared, min(common_prefix_length(cells.sharable(), prompt), len(prompt) - 1))
        return n_own, n_shared

    def leftovers(self) -> dict[int, CachedSession]:
        """What gone sessions have left, by stream."""
        streams = enumerate(self.pool._streams)
        return {stream: cells for stream, cells in streams if cells is not None and cells.is_leftover}

    # Checks.

    def check(self) -> None:
        """What can be counted; every few steps also each cell."""
        pool, memory = self.pool, self.memory
        left_in = self.leftovers()
        n_in_streams = sum(len(cells) for stream, cells in enumerate(memory.streams) if stream not in left_in)
        n_in_host = sum(map(len, memory.host.values()))
        assert pool.n_tokens_cached == n_in_streams + n_in_host
        assert pool.n_sessions_in_host == len(memory.host)
        assert pool.n_host_bytes == N_BYTES_PER_TOKEN * n_in_host
        if self.n_cells is None:
            assert pool.n_cells_used == n_in_streams
        else:
            assert pool.n_cells_free == self.n_cells - pool.n_cells_used >= 0
        if self.n_steps % N_STEPS_PER_FULL_CHECK == 0:
            self.check_every_cell()

    def check_every_cell(self) -> None:
        """Each stream and state belongs to one session and holds what the books say; shared cells count once."""
        pool, memory = self.pool, self.memory
        owned: set[int] = set()
        for session_id, session in self.sessions.items():
            assert pool.runs(session_id) == (session.stream is not None)
            place = pool.place_of(session_id)
            if place is None:
                assert session_id not in memory.host
                continue
            stream, tokens = place
            if stream is None:
                cells = memory.host[session_id]
            else:
                assert stream not in owned, "two sessions own one stream"
                owned.add(stream)
                cells = memory.streams[stream]
            assert len(cells) <= N_CTX
            assert tuple(token for token, _ in cells) == tokens
        for stream, left in self.leftovers().items():
            assert stream not in owned, "what is left lies in somebody's stream"
            owned.add(stream)
            assert [token for token, _ in memory.streams[stream]] == left.tokens
        assert all(not cells for stream, cells in enumerate(memory.streams) if stream not in owned)
        assert memory.host.keys() <= self.sessions.keys()
        if self.n_cells is not None:
            assert pool.n_cells_used == memory.n_distinct_cells()

    def finish(self) -> None:
        """Everybody leaves; nothing may be left."""
        for session_id, session in list(self.sessions.items()):
            if session.stream is not None:
                self.idle(session_id)
            self.close(session_id)
        self.check_every_cell()
        assert self.pool.n_tokens_cached == self.pool.n_cells_used == self.pool.n_host_bytes == 0
        while evicted := self.pool.evict_idle():
            self.memory.apply(evicted)
        assert not any(self.memory.streams)
        assert not self.memory.host
