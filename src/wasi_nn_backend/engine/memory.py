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
        """Returns the streams that had to be cleared: their memory cannot be cut there, or a state was not accepted.

        Limits are enforced at the end, when sizes are known: in between, a later operation may count on a state.
        """
        cleared: set[int] = set()
        has_saved = False
        for operation in operations:
            match operation:
                case RemoveTail(stream, first_position):
                    if not self._context.remove(stream, first_position):
                        self.clear(stream)
                        cleared.add(stream)
                case CopyStream(source, target, n_tokens):
                    if not self._context.copy(source, target, 0, n_tokens):
                        cleared.add(target)
                case SaveState(stream, session_id):
                    self._save(stream, session_id)
                    has_saved = True
                case RestoreState(session_id, stream):
                    if not self._restore(session_id, stream):
                        cleared.add(stream)
                case DropHostState(session_id):
                    self._states.pop(session_id, None)
        if has_saved:
            cleared |= self.apply(self._pool.enforce_limits())
        return cleared

    def export(self, session_id: int) -> ExportedCells:
        place = self._pool.place_of(session_id)
        if place is None:
            return ExportedCells()
        stream, tokens = place
        state = self._states[session_id] if stream is None else self._context.save_sequence(stream)
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
            self._pool.forget_session(session_id)
            return
        self._states[session_id] = state
        self._pool.record_saved(session_id, len(state))

    def _restore(self, session_id: int, stream: int) -> bool:
        state = self._states.get(session_id)
        if state is not None and self._context.restore_sequence(stream, state):
            return True
        self.clear(stream)
        return False
