"""Whom to forget when the cache is full."""

from __future__ import annotations

from collections.abc import Sequence

from wasi_nn_backend.kvcache.prefix import common_prefix_length
from wasi_nn_backend.kvcache.records import CachedSession, CacheStrategy

__all__ = ["N_TOKENS_SHARED_MIN", "choose_victim"]

#: Prefixes shorter than this are shared by accident: every chat begins with the same few template tokens.
N_TOKENS_SHARED_MIN = 16

#: Attention makes a token dearer the further back it looks: at this length it costs twice what the first one does.
_N_TOKENS_COST_DOUBLES = 4096


def choose_victim(strategy: CacheStrategy, candidates: Sequence[CachedSession], now: int) -> CachedSession:
    """The session to forget first. ``candidates`` must not be empty.

    lru: unused for longest. fifo: oldest. smart: the lowest value, where

        value = c(tokens that no other candidate holds) * (1 + number of others that share its prefix) / (1 + age)

    with ``age`` in assignments since the last use and ``c(n) = n * (1 + n / 8192)`` the cost of computing n tokens:
    what others hold can be copied from them and costs nothing to lose; a prefix that many share is likely to be asked
    for again. Ties go to the least recently used. What gone sessions left behind goes before all others.
    """
    candidates = [each for each in candidates if each.is_leftover] or candidates
    if strategy == "fifo":
        return min(candidates, key=lambda each: each.created)
    if strategy == "lru":
        return min(candidates, key=lambda each: each.last_use)
    return min(candidates, key=lambda each: (_value(each, candidates, now), each.last_use))


def _value(candidate: CachedSession, candidates: Sequence[CachedSession], now: int) -> float:
    n_shared = [common_prefix_length(candidate.tokens, other.tokens) for other in candidates if other is not candidate]
    sharers = [n for n in n_shared if n >= N_TOKENS_SHARED_MIN]
    n_unique = len(candidate.tokens) - max(sharers, default=0)
    cost = n_unique * (1 + n_unique / (2 * _N_TOKENS_COST_DOUBLES))
    return cost * (1 + len(sharers)) / (1 + now - candidate.last_use)
