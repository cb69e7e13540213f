"""Who has had how much: users share the batch by tokens served, not by requests."""

from __future__ import annotations

from collections import Counter

from wasi_nn_backend.scheduler.request import Request

__all__ = ["FairShares"]


class FairShares:
    """Tokens served to each user who has a request in the system.

    Who comes anew begins with as much as the one who has had least: neither owed for the time away nor behind. So a
    user is forgotten with the last of its requests, and the books hold nobody who is gone.
    """

    def __init__(self) -> None:
        self._n_tokens: dict[str, int] = {}
        self._n_requests: dict[str, int] = {}
        self._n_places: Counter[str] = Counter()

    def enter(self, request: Request) -> None:
        user = request.user
        if user not in self._n_requests:
            self._n_tokens[user] = min(self._n_tokens.values(), default=0)
            self._n_requests[user] = 0
        self._n_requests[user] += 1

    def leave(self, request: Request) -> None:
        user = request.user
        self._n_requests[user] -= 1
        if self._n_requests[user] == 0:
            del self._n_requests[user], self._n_tokens[user], self._n_places[user]

    def serve(self, request: Request, n_tokens: int) -> None:
        self._n_tokens[request.user] += n_tokens

    def take_place(self, request: Request) -> None:
        self._n_places[request.user] += 1

    def leave_place(self, request: Request) -> None:
        self._n_places[request.user] -= 1

    def n_places_of(self, user: str) -> int:
        """Requests of this user that run."""
        return self._n_places[user]

    def by_user(self) -> dict[str, int]:
        return dict(self._n_tokens)

    def n_tokens_of(self, user: str) -> int:
        return self._n_tokens.get(user, 0)
