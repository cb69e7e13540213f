"""Streams as slots: every running sequence owns one of llama.cpp's KV streams, and leaves its tokens in it afterwards.

A stream that nobody runs on is a cache: the session that comes back finds its tokens there, another session that needs
a stream takes the one that was unused for the longest time. One stream per sequence, not one unified cache, because a
step then costs what its own sequences cost, whatever lies in the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from wasi_nn_backend.errors import InvalidArgument

__all__ = ["Assignment", "RemoveTail", "StreamPool", "common_prefix_length"]


@dataclass(frozen=True, slots=True)
class RemoveTail:
    """Forget a stream's positions from ``first_position`` on (``llama_memory_seq_rm``)."""

    stream: int
    first_position: int


@dataclass(frozen=True, slots=True)
class Assignment:
    """A stream for a session: its first ``n_tokens_reused`` positions hold the prompt's first tokens once ``removal``
    is applied. A memory that cannot cut there (recurrent models) is cleared instead: ``StreamPool.forget``."""

    stream: int
    n_tokens_reused: int
    removal: RemoveTail | None


@dataclass(slots=True)
class _Stream:
    session_id: int | None = None
    tokens: list[int] = field(default_factory=list)
    in_use: bool = False
    last_use: int = 0


def common_prefix_length(left: Sequence[int], right: Sequence[int]) -> int:
    """How many leading tokens two sequences share. O(n), once a request."""
    n_shared = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        n_shared += 1
    return n_shared


class StreamPool:
    """Accounts for ``n_streams`` streams of ``n_ctx`` cells each. Not thread-safe: the engine's thread owns it."""

    def __init__(self, n_streams: int, n_ctx: int) -> None:
        if n_streams < 1 or n_ctx < 1:
            raise InvalidArgument(f"a KV pool of {n_streams} streams with {n_ctx} cells each cannot hold a sequence")
        self.n_ctx = n_ctx
        self._streams = [_Stream() for _ in range(n_streams)]
        self._stream_of_session: dict[int, int] = {}
        self._uses = itertools.count(1)

    @property
    def n_streams(self) -> int:
        return len(self._streams)

    @property
    def n_cells_used(self) -> int:
        return sum(len(stream.tokens) for stream in self._streams)

    def n_tokens_cached(self, session_id: int) -> int:
        stream = self._stream_of_session.get(session_id)
        return 0 if stream is None else len(self._streams[stream].tokens)

    def is_running(self, session_id: int) -> bool:
        """Whether a stream is in use for the session. It must be released before it can be assigned again."""
        stream = self._stream_of_session.get(session_id)
        return stream is not None and self._streams[stream].in_use

    def assign(self, session_id: int, tokens: Sequence[int]) -> Assignment | None:
        """Take a stream for a session that wants to run ``tokens``, or None while all are in use.

        At least the last token is left to compute, since its logits are wanted. Raises ``InvalidArgument`` without
        tokens, and when the session runs already: see ``is_running``.
        """
        if not tokens:
            raise InvalidArgument(f"session {session_id} asks for a stream without a token to compute")
        stream_id = self._stream_of_session.get(session_id)
        if stream_id is None:
            stream_id = self._least_recently_used()
        if stream_id is None:
            return None
        stream = self._streams[stream_id]
        if stream.in_use:
            raise InvalidArgument(f"session {session_id} already runs on stream {stream_id}")
        n_reused = 0
        if stream.session_id == session_id:
            n_reused = min(common_prefix_length(stream.tokens, tokens), len(tokens) - 1)
        removal = RemoveTail(stream_id, n_reused) if len(stream.tokens) > n_reused else None
        self._own(stream_id, session_id)
        del stream.tokens[n_reused:]
        stream.in_use = True
        return Assignment(stream_id, n_reused, removal)

    def append(self, stream_id: int, tokens: Sequence[int]) -> None:
        """Record tokens that a decode has put into a stream."""
        stream = self._streams[stream_id]
        if len(stream.tokens) + len(tokens) > self.n_ctx:
            raise InvalidArgument(
                f"stream {stream_id} has {self.n_ctx} cells: {len(stream.tokens)} + {len(tokens)} tokens do not fit"
            )
        stream.tokens.extend(tokens)

    def release(self, stream_id: int) -> None:
        """The sequence stopped running; its tokens stay for the session's next turn."""
        stream = self._streams[stream_id]
        stream.in_use = False
        stream.last_use = next(self._uses)

    def forget(self, stream_id: int) -> RemoveTail:
        """Drop a stream's contents, whoever owns it (it keeps running, if it did, from nothing)."""
        self._streams[stream_id].tokens.clear()
        return RemoveTail(stream_id, 0)

    def forget_session(self, session_id: int) -> RemoveTail | None:
        """The session is gone: its stream is free for all."""
        stream_id = self._stream_of_session.pop(session_id, None)
        if stream_id is None:
            return None
        stream = self._streams[stream_id]
        stream.session_id = None
        stream.in_use = False
        stream.last_use = 0
        return self.forget(stream_id)

    def _least_recently_used(self) -> int | None:
        idle = [i for i, stream in enumerate(self._streams) if not stream.in_use]
        return min(idle, key=lambda i: self._streams[i].last_use, default=None)

    def _own(self, stream_id: int, session_id: int) -> None:
        stream = self._streams[stream_id]
        if stream.session_id is not None:
            del self._stream_of_session[stream.session_id]
        stream.session_id = session_id
        self._stream_of_session[session_id] = stream_id
