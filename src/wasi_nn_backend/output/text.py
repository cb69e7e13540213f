"""Token pieces in, releasable text out.

A piece may end inside of a UTF-8 character, and a stop string may be spread over pieces. Both are held back until it is
known what they are, so what was released never has to be taken back.

Everything stays bytes: models may produce invalid UTF-8, and guests must get the exact bytes. Decoding to ``str`` is
the Python door's business.
"""

from __future__ import annotations

from collections.abc import Sequence

from wasi_nn_backend.output.stop import StopMatcher

__all__ = ["TextAssembler", "incomplete_suffix_length"]

_MAX_CHARACTER_BYTES = 4


def incomplete_suffix_length(text: bytes | bytearray) -> int:
    """How many bytes at the end of ``text`` begin a UTF-8 character without finishing it: 0 to 3."""
    for n_back in range(1, min(_MAX_CHARACTER_BYTES, len(text) + 1)):
        byte = text[-n_back]
        if byte < 0x80:
            return 0
        if byte >= 0xC0:  # a lead byte: 110xxxxx announces 2 bytes, 1110xxxx 3, 11110xxx 4
            n_announced = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4 if byte < 0xF8 else 1
            return n_back if n_announced > n_back else 0
    return 0


class TextAssembler:
    """Collects one generation's pieces. ``stops`` are the byte strings that end it; a match is never released."""

    def __init__(self, stops: Sequence[bytes] = ()) -> None:
        self._matcher = StopMatcher(stops)
        self._held = bytearray()
        self._released = bytearray()
        self.stopped = False

    @property
    def text(self) -> bytes:
        """All that was released so far."""
        return bytes(self._released)

    @property
    def n_bytes_released(self) -> int:
        return len(self._released)

    def feed(self, piece: bytes) -> bytes:
        """Add a piece; returns what it releases, possibly nothing. After a stop string nothing more is released."""
        if self.stopped:
            return b""
        if not self._held and not self._matcher and piece.isascii():  # nearly every token of most texts
            self._released += piece
            return piece
        match = self._matcher.feed(piece)
        if match is not None:
            n_consumed, n_stop_bytes = match
            self._held += piece[:n_consumed]
            del self._held[len(self._held) - n_stop_bytes :]
            self.stopped = True
            return self.finish()
        self._held += piece
        n_releasable = len(self._held) - self._matcher.n_bytes_pending
        # What is released must also end at a character's border, or the rest of the character would come alone.
        return self._release(n_releasable - incomplete_suffix_length(self._held[:n_releasable]))

    def finish(self) -> bytes:
        """The generation is over: what was held back for a stop string or a character that never came is text."""
        return self._release(len(self._held))

    def _release(self, n_bytes: int) -> bytes:
        released = bytes(self._held[:n_bytes])
        self._released += released
        del self._held[:n_bytes]
        return released
