"""Who holds which cells: the streams of a llama context, and the states that left them for host memory.

Every running sequence owns one of llama.cpp's KV streams and leaves its tokens there afterwards. A session that comes
back finds them; one that starts with the same tokens as another copies them; one that has to make room for another goes
to host memory. Streams instead of one unified cache, because a step then costs what its own sequences cost, whatever
lies in the others.

Streams that run are kept side by side: llama.cpp computes those together whose ids follow on each other, so a gap
between running streams costs a pass over the weights in every step, and moving a session costs less than two of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.kvcache.eviction import N_TOKENS_SHARED_MIN, CacheStrategy, Candidate, choose_victim
from wasi_nn_backend.kvcache.operations import (
    CopyStream,
    DropHostState,
    KvOperation,
    RemoveTail,
    RestoreState,
    SaveState,
)
from wasi_nn_backend.kvcache.prefix import common_prefix_length

__all__ = ["Assignment", "PoolLimits", "StreamPool"]


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """What may be kept for sessions that do not run. ``n_host_bytes_max`` None is no limit, 0 no host tier."""

    n_host_bytes_max: int | None = None
    n_tokens_max: int = 100_000
    strategy: CacheStrategy = "lru"  # who leaves a stream
    deletion_strategy: CacheStrategy = "lru"  # who is forgotten
    shares_prefixes: bool = True
    trims_tails: bool = True


@dataclass(frozen=True, slots=True)
class Assignment:
    """A stream for a session: after ``operations`` its first ``n_tokens_reused`` positions hold the prompt's first
    tokens, and it holds nothing else. ``n_tokens_shared`` of them came from another session."""

    stream: int
    n_tokens_reused: int
    n_tokens_shared: int
    operations: tuple[KvOperation, ...]


@dataclass(slots=True)
class _Cells:
    """A session's cached tokens. In a stream, or with ``stream`` None in host memory, where they take ``n_bytes``."""

    session_id: int
    salt: str
    created: int
    stream: int | None = None
    tokens: list[int] = field(default_factory=list)
    n_tokens_exact: int | None = None  # after a shift only the first ones are what computing them anew would give
    n_host_bytes: int = 0
    last_use: int = 0
    runs: bool = False

    def sharable(self) -> Sequence[int]:
        return self.tokens if self.n_tokens_exact is None else self.tokens[: self.n_tokens_exact]


@dataclass(frozen=True, slots=True)
class _Source:
    cells: _Cells | None
    n_tokens: int


class StreamPool:
    """Accounts for ``n_streams`` streams of ``n_ctx`` cells each. Not thread-safe: the engine's thread owns it."""

    def __init__(self, n_streams: int, n_ctx: int, limits: PoolLimits | None = None) -> None:
        if n_streams < 1 or n_ctx < 1:
            raise InvalidArgument(f"a KV pool of {n_streams} streams with {n_ctx} cells each cannot hold a sequence")
        self.n_ctx = n_ctx
        self.limits = limits or PoolLimits()
        self._streams: list[_Cells | None] = [None] * n_streams
        self._cells: dict[int, _Cells] = {}
        self._uses = itertools.count(1)
        self._now = 0

    @property
    def n_streams(self) -> int:
        return len(self._streams)

    @property
    def n_cells_used(self) -> int:
        """Cells of streams that hold a token."""
        return sum(len(cells.tokens) for cells in self._streams if cells is not None)

    @property
    def n_tokens_cached(self) -> int:
        """Over all sessions and both tiers."""
        return sum(len(cells.tokens) for cells in self._cells.values())

    @property
    def n_host_bytes(self) -> int:
        return sum(cells.n_host_bytes for cells in self._cells.values())

    @property
    def n_sessions_in_host(self) -> int:
        return sum(cells.stream is None for cells in self._cells.values())

    def n_tokens_of(self, session_id: int) -> int:
        cells = self._cells.get(session_id)
        return 0 if cells is None else len(cells.tokens)

    def runs(self, session_id: int) -> bool:
        """Whether a stream is assigned to this session and not released."""
        cells = self._cells.get(session_id)
        return cells is not None and cells.runs

    def reusable(self, session_id: int, salt: str, tokens: Sequence[int]) -> int:
        """How many of the prompt's first tokens ``assign`` would find cached now."""
        return self._best_source(session_id, salt, tokens).n_tokens

    def gains_from(self, session_id: int, salt: str, tokens: Sequence[int], n_common: int) -> bool:
        """Whether ``assign`` would rather use ``n_common`` tokens that another session is about to have."""
        own = self._cells.get(session_id)
        n_own = 0 if own is None else common_prefix_length(own.tokens, tokens)
        return n_common >= n_own + N_TOKENS_SHARED_MIN and n_common > self.reusable(session_id, salt, tokens)

    def assign(self, session_id: int, tokens: Sequence[int], salt: str = "") -> Assignment | None:
        """Take a stream for a session that wants to run ``tokens``, or None while all streams run.

        At least the last token is left to compute, since its logits are wanted. Raises ``InvalidArgument`` for no
        tokens and for a session that runs already.
        """
        if not tokens:
            raise InvalidArgument(f"session {session_id} has no tokens to run")
        if self.runs(session_id):
            raise InvalidArgument(f"session {session_id} runs already")
        own = self._cells.get(session_id)
        target = self._choose_stream(own)
        if target is None:
            return None
        source, lies_there = self._best_source(session_id, salt, tokens), self._streams[target]
        operations = [
            *self._make_room(target, session_id),
            *self._fill(target, source, lies_there),
            *self._forget_old_place(own, target),
        ]
        cells = own or _Cells(session_id, salt, created=self._tick())
        cells.salt = salt
        cells.stream, cells.runs = target, True
        cells.tokens = list(tokens[: source.n_tokens])
        cells.n_tokens_exact = None if source.cells is not own or own is None else own.n_tokens_exact
        cells.last_use = self._tick()
        self._cells[session_id] = self._streams[target] = cells
        n_shared = source.n_tokens if source.cells is not own else 0
        return Assignment(target, source.n_tokens, n_shared, tuple(operations))

    def adopt(self, session_id: int, tokens: Sequence[int], n_bytes: int, salt: str = "") -> bool:
        """Take a state that came from outside into the host tier. False where it does not fit, or is not wanted."""
        maximum = self.limits.n_host_bytes_max
        if session_id in self._cells or not tokens or len(tokens) > self.n_ctx:
            return False
        if maximum is not None and self.n_host_bytes + n_bytes > maximum:
            return False
        cells = _Cells(session_id, salt, created=self._tick(), tokens=list(tokens), n_host_bytes=n_bytes)
        cells.last_use = self._now
        self._cells[session_id] = cells
        return True

    def place_of(self, session_id: int) -> tuple[int | None, tuple[int, ...]] | None:
        """The stream (None: host memory) and the tokens of a session's cells, or None without any."""
        cells = self._cells.get(session_id)
        return None if cells is None or not cells.tokens else (cells.stream, tuple(cells.tokens))

    def append(self, stream: int, tokens: Sequence[int]) -> None:
        """Record tokens that a decode has put into a stream."""
        cells = self._in(stream)
        if len(cells.tokens) + len(tokens) > self.n_ctx:
            raise InvalidArgument(
                f"stream {stream} has {self.n_ctx} cells: {len(cells.tokens)} + {len(tokens)} tokens do not fit"
            )
        cells.tokens.extend(tokens)

    def shift(self, stream: int, n_keep: int, n_discard: int) -> None:
        """Record that positions ``n_keep`` to ``n_keep + n_discard`` were cut out and the rest moved down."""
        cells = self._in(stream)
        del cells.tokens[n_keep : n_keep + n_discard]
        cells.n_tokens_exact = min(n_keep, cells.n_tokens_exact if cells.n_tokens_exact is not None else n_keep)

    def release(self, stream: int) -> None:
        """The sequence stopped running; its tokens stay for the session's next turn."""
        cells = self._in(stream)
        cells.runs = False
        cells.last_use = self._tick()

    def record_saved(self, session_id: int, n_bytes: int) -> None:
        """A ``SaveState`` was carried out and took so many bytes."""
        cells = self._cells.get(session_id)
        if cells is not None and cells.stream is None:
            cells.n_host_bytes = n_bytes

    def forget(self, stream: int) -> None:
        """Nobody knows what lies in this stream, or it was cleared: whoever owns it has nothing cached."""
        cells = self._streams[stream]
        if cells is not None:
            cells.tokens.clear()
            cells.n_tokens_exact = None
            if not cells.runs:
                self._streams[stream] = None
                del self._cells[cells.session_id]

    def forget_session(self, session_id: int) -> tuple[KvOperation, ...]:
        """The session is gone, from whatever tier."""
        cells = self._cells.pop(session_id, None)
        if cells is None:
            return ()
        if cells.stream is None:
            return (DropHostState(session_id),)
        self._streams[cells.stream] = None
        return (RemoveTail(cells.stream, 0),)

    def enforce_limits(self) -> tuple[KvOperation, ...]:
        """Forget sessions, in the strategy's order, until what is kept is within the limits. Running ones stay."""
        operations: list[KvOperation] = []
        while (n_excess := self.n_tokens_cached - self.limits.n_tokens_max) > 0:
            victim = self._victim(cells for cells in self._cells.values() if not cells.runs)
            if victim is None:
                break
            operations += self._trim_or_forget(victim, n_excess)
        maximum = self.limits.n_host_bytes_max
        while maximum is not None and self.n_host_bytes > maximum:
            victim = self._victim(cells for cells in self._cells.values() if cells.stream is None)
            if victim is None:
                break
            operations += self.forget_session(victim.session_id)
        return tuple(operations)

    # Choosing.

    def _choose_stream(self, own: _Cells | None) -> int | None:
        """An idle stream beside the running ones: the session's own if it is one, else an empty one, else the one whose
        owner is the strategy's victim."""
        running = [cells is not None and cells.runs for cells in self._streams]
        idle = [stream for stream, runs in enumerate(running) if not runs]
        if not idle:
            return None
        near = [stream for stream in idle if any(running[max(0, stream - 1) : stream + 2])] or idle
        if self.limits.n_host_bytes_max == 0:
            near = idle  # whoever makes room loses all: that weighs more than a gap
        if own is not None and own.stream in near:
            return own.stream
        for stream in near:
            if self._streams[stream] is None:
                return stream
        owners = [cells for stream in near if (cells := self._streams[stream]) is not None]
        return self._choose(owners, self.limits.strategy).stream

    def _best_source(self, session_id: int, salt: str, tokens: Sequence[int]) -> _Source:
        """Where most of the prompt's first tokens lie. The session's own cells win where another's hold little more."""
        n_max = len(tokens) - 1
        own = self._cells.get(session_id)
        best = _Source(own, 0 if own is None else min(common_prefix_length(own.tokens, tokens), n_max))
        if not self.limits.shares_prefixes:
            return best
        for other in self._cells.values():
            if other is own or other.salt != salt:
                continue
            n_tokens = min(common_prefix_length(other.sharable(), tokens), n_max)
            if n_tokens >= best.n_tokens + N_TOKENS_SHARED_MIN:
                best = _Source(other, n_tokens)
        return best

    def _victim(self, candidates: Iterator[_Cells]) -> _Cells | None:
        found = list(candidates)
        return self._choose(found, self.limits.deletion_strategy) if found else None

    def _choose(self, owners: Sequence[_Cells], strategy: CacheStrategy) -> _Cells:
        candidates = [Candidate(each.session_id, each.tokens, each.created, each.last_use) for each in owners]
        return self._cells[choose_victim(strategy, candidates, self._now).session_id]

    # Moving. Each of these changes the books and says what the engine has to do.

    def _make_room(self, stream: int, session_id: int) -> Iterator[KvOperation]:
        """Whoever else lies in a stream goes to host memory, or is forgotten where that is not worth it."""
        owner = self._streams[stream]
        if owner is None or owner.session_id == session_id:
            return
        self._streams[stream] = None
        if self.limits.n_host_bytes_max == 0 or len(owner.tokens) < N_TOKENS_SHARED_MIN:
            del self._cells[owner.session_id]
            return
        owner.stream = None
        yield SaveState(stream, owner.session_id)

    def _fill(self, stream: int, source: _Source, lies_there: _Cells | None) -> Iterator[KvOperation]:
        """Bring the source's tokens into a stream in which ``lies_there``'s still lie."""
        cells, n_tokens = source.cells, source.n_tokens
        n_lying = 0 if lies_there is None else len(lies_there.tokens)
        if cells is None or n_tokens == 0:
            n_tokens = 0
        elif cells is lies_there:
            pass
        elif cells.stream is not None:
            yield CopyStream(cells.stream, stream, n_tokens)
            return
        else:
            yield RestoreState(cells.session_id, stream)
            n_lying = len(cells.tokens)
        if n_lying > n_tokens:
            yield RemoveTail(stream, n_tokens)

    def _forget_old_place(self, own: _Cells | None, stream: int) -> Iterator[KvOperation]:
        """The session's cells are in ``stream`` now: where they were before is free."""
        if own is None or own.stream == stream:
            return
        if own.stream is None:
            own.n_host_bytes = 0
            yield DropHostState(own.session_id)
        else:
            self._streams[own.stream] = None
            yield RemoveTail(own.stream, 0)

    def _trim_or_forget(self, cells: _Cells, n_excess: int) -> tuple[KvOperation, ...]:
        n_left = len(cells.tokens) - n_excess
        if not self.limits.trims_tails or cells.stream is None or n_left < N_TOKENS_SHARED_MIN:
            return self.forget_session(cells.session_id)
        del cells.tokens[n_left:]
        return (RemoveTail(cells.stream, n_left),)

    def _in(self, stream: int) -> _Cells:
        cells = self._streams[stream]
        if cells is None:
            raise InvalidArgument(f"stream {stream} belongs to no session")
        return cells

    def _tick(self) -> int:
        self._now = next(self._uses)
        return self._now
