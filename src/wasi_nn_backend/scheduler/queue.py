"""Requests that wait, in the order in which they should start."""

from __future__ import annotations

from collections import Counter

from wasi_nn_backend.scheduler.fairness import FairShares
from wasi_nn_backend.scheduler.request import Request

__all__ = ["N_HIGHER_STARTS_PER_RAISE", "N_STARTS_PER_RAISE", "RequestQueue"]

#: A waiting request rises one priority for so many of higher priority that start before it,
N_HIGHER_STARTS_PER_RAISE = 16

#: and one for so many of any priority: those of users who have been served less.
N_STARTS_PER_RAISE = 256


class RequestQueue:
    """Higher priority first; among equals the user who has been served least, has fewest places, came first.

    Nothing starves: while others start, a waiting request rises, until nobody who comes is above it. With four
    priorities, at most ``4 * N_STARTS_PER_RAISE`` that come after it start before it, and of those at most
    ``4 * N_HIGHER_STARTS_PER_RAISE`` for their priority alone. Counted in starts and not in seconds: an order then
    depends on nothing but the requests, and a slow machine ages nobody.
    """

    def __init__(self, shares: FairShares | None) -> None:
        self._shares = shares  # None: users are not told apart
        self._waiting: dict[Request, tuple[int, int]] = {}  # with the starts before it: of all, of higher priorities
        self._starts: Counter[int] = Counter()  # priority -> new requests that started
        self._n_starts = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, request: Request) -> None:
        """A request waits: it came, was interrupted, or its consumer wants more."""
        self._waiting[request] = (self._n_starts, self._n_starts_above(request.priority))

    def remove(self, request: Request) -> None:
        """It is cancelled or too late. Without effect when it does not wait."""
        self._waiting.pop(request, None)

    def start(self, request: Request) -> None:
        """It runs; if that is for the first time, those who wait on rise."""
        del self._waiting[request]
        if not request.has_started:
            self._n_starts += 1
            self._starts[request.priority] += 1

    def priority(self, request: Request) -> int:
        """With what it has risen while waiting."""
        n_starts, n_starts_above = self._waiting.get(request, (self._n_starts, self._n_starts_above(request.priority)))
        n_raises = (self._n_starts - n_starts) // N_STARTS_PER_RAISE
        n_raises += (self._n_starts_above(request.priority) - n_starts_above) // N_HIGHER_STARTS_PER_RAISE
        return request.priority + n_raises

    def in_order(self) -> list[Request]:
        return sorted(self._waiting, key=self._rank)

    def _rank(self, request: Request) -> tuple[int, int, int, int]:
        shares, user = self._shares, request.user
        n_tokens, n_places = (0, 0) if shares is None else (shares.n_tokens_of(user), shares.n_places_of(user))
        return -self.priority(request), n_tokens, n_places, request.arrival

    def _n_starts_above(self, priority: int) -> int:
        return sum(n for each, n in self._starts.items() if each > priority)
