"""What the accounting asks of the engine, in order. Values, so that plans can be recorded and compared."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CopyStream", "DropHostState", "KvOperation", "RemoveTail", "RestoreState", "SaveState"]


@dataclass(frozen=True, slots=True)
class RemoveTail:
    """Forget a stream's positions from ``first_position`` on (``llama_memory_seq_rm``)."""

    stream: int
    first_position: int


@dataclass(frozen=True, slots=True)
class CopyStream:
    """Make ``target`` hold the first ``n_tokens`` of ``source``, and nothing else (``llama_memory_seq_cp``)."""

    source: int
    target: int
    n_tokens: int


@dataclass(frozen=True, slots=True)
class SaveState:
    """Write a stream's cells to host memory, as the state of a session (``llama_state_seq_get_data``)."""

    stream: int
    session_id: int


@dataclass(frozen=True, slots=True)
class RestoreState:
    """Read a session's state back into a stream, which it replaces (``llama_state_seq_set_data``)."""

    session_id: int
    stream: int


@dataclass(frozen=True, slots=True)
class DropHostState:
    """Free a session's state in host memory."""

    session_id: int


KvOperation = RemoveTail | CopyStream | SaveState | RestoreState | DropHostState
