"""Who runs and could wait better than somebody who waits."""

from __future__ import annotations

from collections.abc import Sequence

from wasi_nn_backend.kvcache import N_TOKENS_SHARED_MIN
from wasi_nn_backend.scheduler.fairness import FairShares
from wasi_nn_backend.scheduler.request import Request

__all__ = ["can_wait_for", "last_to_be_served", "prompt_rank", "victim_for"]

#: A request may take the place of one so much lower: urgent of normal and low, high of low.
_PRIORITY_GAP = 2

#: A user with fewer places may have been served more by so many times what is tolerated between equals. Or the second
#: half of its only prompt would wait for those of a user who has all other places.
_HEAD_START = 4


def last_to_be_served(running: Sequence[Request]) -> Request:
    """Whom to interrupt where somebody must be: the lowest priority, and of those the last to come."""
    return min(running, key=lambda each: (each.priority, -each.arrival))


def victim_for(
    request: Request, running: Sequence[Request], shares: FairShares | None, n_tokens_tolerated: int
) -> Request | None:
    """Whose place a waiting request may take, or None. ``shares`` None: by priority only.

    By priority, where the gap is wide. By fairness, from the user with most places, where that one would still not have
    fewer; or from one who was served more by over ``n_tokens_tolerated``, four times that with fewer places. Without
    that tolerance two users would take turns at moving their cells.
    """
    ready = [each for each in running if _may_be_interrupted(each)]
    lower = [each for each in ready if each.priority <= request.priority - _PRIORITY_GAP]
    if lower:
        return last_to_be_served(lower)
    if shares is None:
        return None
    n_served = shares.n_tokens_of(request.user)
    by_size = sorted(
        ready, key=lambda each: (-shares.n_places_of(each.user), -shares.n_tokens_of(each.user), -each.arrival)
    )
    for each in by_size:
        if each.user == request.user or each.priority > request.priority:
            continue
        n_ahead = shares.n_tokens_of(each.user) - n_served
        n_places_more = shares.n_places_of(each.user) - shares.n_places_of(request.user)
        n_ahead_max = n_tokens_tolerated * (_HEAD_START if n_places_more < 0 else 1)
        if (n_places_more > 1 and n_ahead >= -n_tokens_tolerated) or n_ahead > n_ahead_max:
            return each
    return None


def prompt_rank(request: Request, shares: FairShares, n_tokens_tolerated: int) -> int:
    """Whose prompt goes first: that of the user who was served least, with a head start for each place less."""
    n_places = min(shares.n_places_of(request.user), 1 + _HEAD_START)
    return shares.n_tokens_of(request.user) + n_tokens_tolerated * n_places


def can_wait_for(request: Request, other: Request, shares: FairShares, n_tokens_tolerated: int) -> bool:
    """Whether one who runs can leave a step to another: its priority is no higher, and its user's prompts come so much
    later that these two are no equals."""
    if request.priority > other.priority:
        return False
    ranks = [prompt_rank(each, shares, n_tokens_tolerated) for each in (request, other)]
    return ranks[0] - ranks[1] > n_tokens_tolerated


def _may_be_interrupted(request: Request) -> bool:
    """Once always; then only with cells that are worth keeping, and not again when they were lost nevertheless: so each
    turn brings it nearer to its end."""
    is_kept = request.n_tokens_computed >= N_TOKENS_SHARED_MIN and request.n_tokens_recomputed < N_TOKENS_SHARED_MIN
    return is_kept or request.n_interruptions == 0
