"""Finding stop strings in text that arrives in pieces.

One Knuth-Morris-Pratt automaton a stop string: the work for a byte does not grow with the length of the stop strings,
so a guest that sends long ones slows nobody down. Searching the held text again at each piece would.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopMatcher"]


class _Pattern:
    """One stop string and how many of its leading bytes the text ends with now."""

    def __init__(self, stop: bytes) -> None:
        self.stop = stop
        self.n_matched = 0
        self._fallback = self._build_fallback(stop)

    @staticmethod
    def _build_fallback(stop: bytes) -> list[int]:
        """For each prefix length, the length of its longest proper suffix that is a prefix too."""
        fallback = [0] * (len(stop) + 1)
        n_matched = 0
        for i in range(1, len(stop)):
            while n_matched and stop[i] != stop[n_matched]:
                n_matched = fallback[n_matched]
            if stop[i] == stop[n_matched]:
                n_matched += 1
            fallback[i + 1] = n_matched
        return fallback

    def advance(self, byte: int) -> bool:
        n_matched = self.n_matched
        while n_matched and byte != self.stop[n_matched]:
            n_matched = self._fallback[n_matched]
        if byte == self.stop[n_matched]:
            n_matched += 1
        self.n_matched = n_matched
        return n_matched == len(self.stop)


class StopMatcher:
    """Watches for the first of several stop strings to be complete."""

    def __init__(self, stops: Sequence[bytes]) -> None:
        self._patterns = [_Pattern(stop) for stop in stops if stop]

    def __bool__(self) -> bool:
        return bool(self._patterns)

    def feed(self, piece: bytes) -> tuple[int, int] | None:
        """Advance over ``piece``. At the first complete stop string: (bytes of the piece consumed, its length)."""
        for n_consumed, byte in enumerate(piece, start=1):
            complete = [len(pattern.stop) for pattern in self._patterns if pattern.advance(byte)]
            if complete:
                return n_consumed, max(complete)
        return None

    @property
    def n_bytes_pending(self) -> int:
        """How many bytes at the text's end may yet turn out to be the beginning of a stop string."""
        return max((pattern.n_matched for pattern in self._patterns), default=0)
