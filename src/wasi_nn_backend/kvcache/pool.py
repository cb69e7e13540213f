"""Who holds which cells: the streams of a llama context, and the states that left them for host memory.

Every running sequence owns one of llama.cpp's KV streams and leaves its tokens there afterwards. A session that comes
back finds them; one that starts with the same tokens as another copies them; one that has to make room for another goes
to host memory. Streams instead of one unified cache, because a step then costs what its own sequences cost, whatever
lies in the others.

A unified cache is possible too: its streams draw from fewer cells than they could fill, and whoever needs cells gets
those of idle sessions, then of sessions that the scheduler interrupts.

What a session leaves behind when it is gone stays in its stream until somebody needs that: services that open a
session for each request begin with the same prompt every time.

Streams that run are kept side by side: llama.cpp computes those together whose ids follow on each other, so a gap
between running streams costs a pass over the weights in every step, and moving a session costs less than two of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.kvcache.cells import SharedCells
from wasi_nn_backend.kvcache.choosing import best_source, choose_stream, fill_stream
from wasi_nn_backend.kvcache.eviction import N_TOKENS_SHARED_MIN, choose_victim
from wasi_nn_backend.kvcache.operations import DropHostState, KvOperation, RemoveTail, SaveState
from wasi_nn_backend.kvcache.prefix import common_prefix_length
from wasi_nn_backend.kvcache.records import Assignment, CachedSession, PoolLimits, Source

__all__ = ["StreamPool"]

#: Cells of a unified cache that each running session should find free when another one joins: with fewer the newcomer
#: would have to leave again at once. Small caches spare a quarter of each stream's share.
_N_CELLS_SPARE_MAX = 32


class StreamPool:
    """Accounts for ``n_streams`` streams of up to ``n_ctx`` tokens each. Not thread-safe: the engine's thread owns it.

    ``n_cells`` None: each stream has ``n_ctx`` cells of its own. Otherwise all share so many (a unified cache).
    """

    def __init__(
        self, n_streams: int, n_ctx: int, limits: PoolLimits | None = None, n_cells: int | None = None
    ) -> None:
        if n_streams < 1 or n_ctx < 1 or (n_cells is not None and n_cells < n_ctx):
            raise InvalidArgument(
                f"a pool of {n_streams} streams of {n_ctx} tokens and {n_cells or n_ctx} cells cannot hold a sequence"
            )
        self.n_ctx = n_ctx
        self.limits = limits or PoolLimits()
        self._streams: list[CachedSession | None] = [None] * n_streams
        self._cells: dict[int, CachedSession] = {}
        self._shared = None if n_cells is None else SharedCells(n_cells, n_streams)
        self._n_tokens_cached = 0
        self._n_host_bytes = 0
        self.n_tokens_evicted = 0  # of sessions that left their stream or were forgotten, since the beginning
        self._evicted: dict[int, int] = {}  # the same by session, until it is gone
        self._leftover_ids = itertools.count(-1, -1)  # sessions have positive ones
        self._uses = itertools.count(1)
        self._now = 0

    @property
    def n_streams(self) -> int:
        return len(self._streams)

    @property
    def n_cells_used(self) -> int:
        """Cells that hold a session's token, those that several streams hold counted once."""
        if self._shared is not None:
            return self._shared.n_used
        return sum(len(cells.tokens) for cells in self._streams if cells is not None and not cells.is_leftover)

    @property
    def n_cells_free(self) -> int | None:
        """Cells that any stream may take; None where each has its own."""
        return None if self._shared is None else self._shared.n_free

    @property
    def n_tokens_cached(self) -> int:
        """Over all sessions and both tiers."""
        return sum(len(cells.tokens) for cells in self._cells.values() if not cells.is_leftover)

    @property
    def n_host_bytes(self) -> int:
        return self._n_host_bytes

    @property
    def n_sessions_in_host(self) -> int:
        return sum(cells.stream is None for cells in self._cells.values())

    def n_tokens_of(self, session_id: int) -> int:
        cells = self._cells.get(session_id)
        return 0 if cells is None else len(cells.tokens)

    def n_host_bytes_of(self, session_id: int) -> int:
        cells = self._cells.get(session_id)
        return 0 if cells is None else cells.n_host_bytes

    def n_tokens_evicted_of(self, session_id: int) -> int:
        return self._evicted.get(session_id, 0)

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
        source = self._best_source(session_id, salt, tokens)
        target = choose_stream(self._streams, own, source.cells, self.limits, self._now)
        if target is None:
            return None
        lies_there = self._streams[target]
        makes_room = () if lies_there is None or lies_there is own else self._vacate(lies_there, target)
        operations = [*makes_room, *fill_stream(target, source, lies_there), *self._forget_old_place(own, target)]
        self._account(operations)
        cells = own or CachedSession(session_id, salt, created=self._tick())
        cells.salt = salt
        cells.stream, cells.runs = target, True
        self._n_tokens_cached += source.n_tokens - len(cells.tokens)
        cells.tokens = list(tokens[: source.n_tokens])
        if source.cells is not own:
            cells.n_tokens_exact = None
        cells.update_exactness()
        cells.last_use = self._tick()
        self._cells[session_id] = self._streams[target] = cells
        n_shared = source.n_tokens if source.cells is not own else 0
        return Assignment(target, source.n_tokens, n_shared, tuple(operations))

    def adopt(
        self, session_id: int, tokens: Sequence[int], n_bytes: int, salt: str = "", n_tokens_exact: int | None = None
    ) -> bool:
        """Take a state that came from outside into the host tier. False where it does not fit, or is not wanted."""
        maximum = self.limits.n_host_bytes_max
        if session_id in self._cells or not tokens or len(tokens) > self.n_ctx:
            return False
        if maximum is not None and self.n_host_bytes + n_bytes > maximum:
            return False
        cells = CachedSession(session_id, salt, created=self._tick(), tokens=list(tokens), n_host_bytes=n_bytes)
        cells.n_tokens_exact = n_tokens_exact
        cells.last_use = self._now
        self._cells[session_id] = cells
        self._n_tokens_cached += len(cells.tokens)
        self._n_host_bytes += n_bytes
        return True

    def place_of(self, session_id: int) -> tuple[int | None, tuple[int, ...]] | None:
        """The stream (None: host memory) and the tokens of a session's cells, or None without any."""
        cells = self._cells.get(session_id)
        return None if cells is None or not cells.tokens else (cells.stream, tuple(cells.tokens))

    def n_tokens_exact_of(self, session_id: int) -> int | None:
        """As in ``CachedSession``."""
        cells = self._cells.get(session_id)
        return None if cells is None else cells.n_tokens_exact

    def append(self, stream: int, tokens: Sequence[int]) -> None:
        """Record tokens that a decode has put into a stream."""
        cells = self._in(stream)
        if len(cells.tokens) + len(tokens) > self.n_ctx:
            raise InvalidArgument(
                f"stream {stream} has {self.n_ctx} cells: {len(cells.tokens)} + {len(tokens)} tokens do not fit"
            )
        if self._shared is not None:
            self._shared.append(stream, len(tokens))
        cells.tokens.extend(tokens)
        self._n_tokens_cached += len(tokens)

    def shares_cells(self, stream: int, first_position: int) -> bool:
        """Whether cells from a position on are another stream's too: those must not move."""
        return self._shared is not None and self._shared.is_shared(stream, first_position)

    def cut_tail(self, stream: int, first_position: int) -> tuple[KvOperation, ...]:
        """Forget a running stream's tokens from a position on."""
        cells = self._in(stream)
        self._n_tokens_cached -= max(0, len(cells.tokens) - first_position)
        del cells.tokens[first_position:]
        cells.update_exactness()
        operations = (RemoveTail(stream, first_position),)
        self._account(operations)
        return operations

    def shift(self, stream: int, n_keep: int, n_discard: int) -> None:
        """Record that positions ``n_keep`` to ``n_keep + n_discard`` were cut out and the rest moved down."""
        cells = self._in(stream)
        if self._shared is not None:
            self._shared.cut(stream, n_keep, n_keep + n_discard)
        self._n_tokens_cached -= len(cells.tokens[n_keep : n_keep + n_discard])
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
            self._n_host_bytes += n_bytes - cells.n_host_bytes
            cells.n_host_bytes = n_bytes

    def forget(self, stream: int) -> None:
        """Nobody knows what lies in this stream, or it was cleared: whoever owns it has nothing cached."""
        if self._shared is not None:
            self._shared.cut(stream, 0)
        cells = self._streams[stream]
        if cells is not None:
            self._n_tokens_cached -= len(cells.tokens)
            cells.tokens.clear()
            cells.n_tokens_exact = None
            if not cells.runs:
                self._streams[stream] = None
                self._drop(cells)

    def forget_session(self, session_id: int) -> tuple[KvOperation, ...]:
        """Nothing of the session is left, in whatever tier."""
        self._evicted.pop(session_id, None)
        return self._forget(session_id)

    def retire_session(self, session_id: int) -> tuple[KvOperation, ...]:
        """The session is gone. What it leaves in a stream others may go on from, as long as nobody needs the stream.

        Not in a unified cache, where steps look at every cell that is used, and others would have to wait for these.
        """
        cells = self._cells.get(session_id)
        if cells is None or cells.stream is None or cells.runs or self._shared is not None:
            return self.forget_session(session_id)
        if not self.limits.shares_prefixes or len(cells.sharable()) < N_TOKENS_SHARED_MIN:
            return self.forget_session(session_id)
        self._evicted.pop(session_id, None)
        del self._cells[session_id]
        cells.session_id, cells.is_leftover = next(self._leftover_ids), True
        self._cells[cells.session_id] = cells
        return ()

    def _forget(self, session_id: int) -> tuple[KvOperation, ...]:
        cells = self._cells.get(session_id)
        if cells is None:
            return ()
        self._drop(cells)
        if cells.stream is None:
            return (DropHostState(session_id),)
        self._streams[cells.stream] = None
        operations = (RemoveTail(cells.stream, 0),)
        self._account(operations)
        return operations

    def evict(self, session_id: int) -> tuple[KvOperation, ...]:
        """An idle session leaves its stream, for host memory where there is one."""
        cells = self._cells.get(session_id)
        if cells is None or cells.stream is None or cells.runs:
            return ()
        stream = cells.stream
        operations = (*self._vacate(cells, stream), RemoveTail(stream, 0))
        self._account(operations)
        return operations

    def evict_idle(self, protected: int | None = None) -> tuple[KvOperation, ...]:
        """The strategy's victim among idle sessions leaves its stream; nothing where none is idle but ``protected``."""
        idle = [owner for stream in self._idle(protected) if (owner := self._streams[stream]) is not None]
        return self.evict(choose_victim(self.limits.strategy, idle, self._now).session_id) if idle else ()

    def make_room_for(
        self, session_id: int, salt: str, tokens: Sequence[int], n_running: int
    ) -> tuple[KvOperation, ...] | None:
        """Have idle sessions leave a unified cache until a prompt fits beside those that run and grow; None, and
        nothing done, where that cannot be. Whose cells the prompt would go on from stays."""
        if self._shared is None:
            return ()
        n_spare = n_running * min(_N_CELLS_SPARE_MAX, self._shared.n_cells // (4 * self.n_streams))
        if self._shared.n_free <= n_spare and not self._idle(None):
            return None  # the common case, asked in every step while somebody waits
        source = self._best_source(session_id, salt, tokens)
        n_needed, protected = len(tokens) - source.n_tokens + n_spare, None
        if source.cells is not None and source.n_tokens:
            protected = source.cells.session_id
            if source.cells.stream is None:
                n_needed += len(source.cells.tokens)  # the state is read back whole and then cut
        if self._shared.n_free + self._shared.n_freed_by(self._idle(protected)) < n_needed:
            return None
        operations: list[KvOperation] = []
        while self._shared.n_free < n_needed:
            operations += self.evict_idle(protected)
        return tuple(operations)

    def enforce_limits(self) -> tuple[KvOperation, ...]:
        """Forget sessions, in the strategy's order, until what is kept is within the limits. Running ones stay."""
        operations: list[KvOperation] = []
        while (n_excess := self._n_tokens_cached - self.limits.n_tokens_max) > 0:
            idle = [cells for cells in self._cells.values() if not cells.runs]
            if not idle:
                break
            victim = choose_victim(self.limits.deletion_strategy, idle, self._now)
            self._count_evicted(victim, n_excess)
            operations += self._trim_or_forget(victim, n_excess)
        maximum = self.limits.n_host_bytes_max
        while maximum is not None and self.n_host_bytes > maximum:
            asleep = [cells for cells in self._cells.values() if cells.stream is None]
            if not asleep:
                break
            victim = choose_victim(self.limits.deletion_strategy, asleep, self._now)
            self._count_evicted(victim)
            operations += self._forget(victim.session_id)
        return tuple(operations)

    # Choosing.

    def _idle(self, protected: int | None) -> list[int]:
        """Streams in which a session rests, but for one session's."""
        owners = enumerate(self._streams)
        return [stream for stream, c in owners if c is not None and not c.runs and c.session_id != protected]

    def _best_source(self, session_id: int, salt: str, tokens: Sequence[int]) -> Source:
        others = self._cells.values() if self.limits.shares_prefixes else ()
        return best_source(self._cells.get(session_id), others, salt, tokens)

    # Moving. Each of these changes the books and says what the engine has to do.

    def _vacate(self, owner: CachedSession, stream: int) -> tuple[KvOperation, ...]:
        """Who lies in a stream goes to host memory, or is forgotten where that is not worth it. The cells stay as they
        are until something else is done to the stream."""
        self._streams[stream] = None
        self._count_evicted(owner)
        if owner.is_leftover or self.limits.n_host_bytes_max == 0 or len(owner.tokens) < N_TOKENS_SHARED_MIN:
            self._drop(owner)
            return ()
        owner.stream = None
        return (SaveState(stream, owner.session_id),)

    def _forget_old_place(self, own: CachedSession | None, stream: int) -> Iterator[KvOperation]:
        """The session's cells are in ``stream`` now: where they were before is free."""
        if own is None or own.stream == stream:
            return
        if own.stream is None:
            self._n_host_bytes -= own.n_host_bytes
            own.n_host_bytes = 0
            yield DropHostState(own.session_id)
        else:
            self._streams[own.stream] = None
            yield RemoveTail(own.stream, 0)

    def _trim_or_forget(self, cells: CachedSession, n_excess: int) -> tuple[KvOperation, ...]:
        n_left = len(cells.tokens) - n_excess
        if not self.limits.trims_tails or cells.stream is None or n_left < N_TOKENS_SHARED_MIN:
            return self._forget(cells.session_id)
        return self.cut_tail(cells.stream, n_left)

    def _drop(self, cells: CachedSession) -> None:
        del self._cells[cells.session_id]
        self._n_tokens_cached -= len(cells.tokens)
        self._n_host_bytes -= cells.n_host_bytes

    def _count_evicted(self, cells: CachedSession, n_tokens_max: int | None = None) -> None:
        if cells.is_leftover:
            return
        n_tokens = len(cells.tokens[:n_tokens_max])
        self.n_tokens_evicted += n_tokens
        self._evicted[cells.session_id] = self._evicted.get(cells.session_id, 0) + n_tokens

    def _account(self, operations: Iterable[KvOperation]) -> None:
        """Keep the books of a unified cache's cells. Called before those of the sessions change."""
        if self._shared is not None:
            for operation in operations:
                self._shared.apply(operation, self.n_tokens_of)

    def _in(self, stream: int) -> CachedSession:
        cells = self._streams[stream]
        if cells is None:
            raise InvalidArgument(f"stream {stream} belongs to no session")
        return cells

    def _tick(self) -> int:
        self._now = next(self._uses)
        return self._now
