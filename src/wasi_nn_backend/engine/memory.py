"""Carries out what the accounting asks for: the cells of the llama context, and states in host memory."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from wasi_nn_backend.errors import WasiNNError
from wasi_nn_backend.kvcache import (
    CopyStream,
    DropHostState,
    KvOperation,
    RemoveTail,
    RestoreState,
    SaveState,
    StreamPool,
)
from wasi_nn_backend.llama.interface import Context

__all__ = ["ExportedCells", "SequenceMemory"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExportedCells:
    """A session's cached tokens and their cells as llama.cpp writes them, for the disk. Both are empty when nothing is
    cached. ``n_tokens_exact`` of the tokens have the cells that computing them anew would give, None is all: others
    came about by a shift, and no other session may have them."""

    tokens: tuple[int, ...] = ()
    state: bytes = b""
    n_tokens_exact: int | None = None


class SequenceMemory:
    """The engine's thread owns it."""

    def __init__(self, context: Context, pool: StreamPool) -> None:
        self._context = context
        self._pool = pool
        self._states: dict[int, bytes] = {}  # session id -> its cells, in host memory

    def apply(self, operations: Iterable[KvOperation]) -> set[int]:
        """Returns the streams that are empty although the books say otherwise: their memory cannot be cut there, a
        state was not accepted, or what they were to be copied from is empty itself.

        Limits are enforced at the end, when sizes are known: in between, a later operation may count on a state. After
        a fault host memory is as the books say; what lies in the streams is not known.
        """
        operations = tuple(operations)
        cleared: set[int] = set()
        saved = [operation.session_id for operation in operations if isinstance(operation, SaveState)]
        n_done = 0
        try:
            for operation in operations:
                self._carry_out(operation, cleared)
                n_done += 1
        finally:
            self._give_up(operations[n_done:])
            self._forget_lost(saved)
        if saved:
            cleared |= self.apply(self._pool.enforce_limits())
        return cleared

    def _carry_out(self, operation: KvOperation, cleared: set[int]) -> None:
        """``cleared``: the streams that are not what later operations of the same plan count on."""
        match operation:
            case RemoveTail(stream, first_position):
                if not self._context.remove(stream, first_position):
                    self.clear(stream)
                    cleared.add(stream)
            case CopyStream(source, target, n_tokens):
                cleared.discard(target)
                if source in cleared:
                    self.clear(target)
                    cleared.add(target)
                elif not self._context.copy(source, target, 0, n_tokens):
                    cleared.add(target)
            case SaveState(stream, session_id):
                self._states.pop(session_id, None)
                if stream not in cleared:
                    self._save(stream, session_id)
            case RestoreState(session_id, stream):
                cleared.discard(stream)
                if not self._restore(session_id, stream):
                    cleared.add(stream)
            case DropHostState(session_id):
                self._states.pop(session_id, None)

    def _give_up(self, operations: Iterable[KvOperation]) -> None:
        """After a fault: a state that these would have replaced or dropped would be taken for a later one."""
        for operation in operations:
            if isinstance(operation, SaveState | DropHostState):
                self._states.pop(operation.session_id, None)

    def _forget_lost(self, session_ids: Iterable[int]) -> None:
        """Sessions whose cells should be in host memory now and are not. Not before the end: the same plan may have
        saved them a second time, or have them run, which the books must keep."""
        for session_id in session_ids:
            place = self._pool.place_of(session_id)
            if place is not None and place[0] is None and session_id not in self._states:
                self._pool.forget_session(session_id)

    def forget(self, session_id: int) -> None:
        """A session is gone. Its state too if a fault of the planning kept the books' word on it from coming here."""
        self._states.pop(session_id, None)
        self.apply(self._pool.retire_session(session_id))

    def export(self, session_id: int) -> ExportedCells:
        place = self._pool.place_of(session_id)
        if place is None:
            return ExportedCells()
        stream, tokens = place
        state = self._states.get(session_id) if stream is None else self._context.save_sequence(stream)
        if state is None:
            return ExportedCells()
        return ExportedCells(tokens, state, self._pool.n_tokens_exact_of(session_id))

    def adopt(self, session_id: int, cells: ExportedCells, salt: str) -> None:
        """Keep a state that came from disk until the session runs. Without room it is computed again."""
        if self._pool.adopt(session_id, cells.tokens, len(cells.state), salt, cells.n_tokens_exact):
            self._states[session_id] = cells.state
            self.apply(self._pool.enforce_limits())

    def clear(self, stream: int) -> None:
        self._context.remove(stream, 0)

    def shift(self, stream: int, n_keep: int, n_discard: int) -> bool:
        """Cut positions [n_keep, n_keep + n_discard) out and move the rest down. False, and nothing done, where the
        memory cannot, or where another stream holds the cells that would move."""
        if not self._context.can_shift or self._pool.shares_cells(stream, n_keep):
            return False
        if not self._context.remove(stream, n_keep, n_keep + n_discard):
            return False
        self._context.shift(stream, n_keep + n_discard, -1, -n_discard)
        return True

    def _save(self, stream: int, session_id: int) -> None:
        try:
            state = self._context.save_sequence(stream)
        except WasiNNError as error:
            _log.warning("session %d will be computed again: its cells could not be saved: %s", session_id, error)
            return
        self._states[session_id] = state
        self._pool.record_saved(session_id, len(state))

    def _restore(self, session_id: int, stream: int) -> bool:
        state = self._states.get(session_id)
        if state is not None and self._context.restore_sequence(stream, state):
            return True
        self.clear(stream)
        return False
