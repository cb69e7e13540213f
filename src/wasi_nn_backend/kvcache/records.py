"""What the pool keeps for a session, what it may keep at all, and what it hands out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from wasi_nn_backend.kvcache.operations import KvOperation

__all__ = ["Assignment", "CacheStrategy", "CachedSession", "PoolLimits", "Source"]

CacheStrategy = Literal["lru", "fifo", "smart"]


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """What may be kept for sessions that do not run. ``n_host_bytes_max`` None is no limit, 0 no host tier."""

    n_host_bytes_max: int | None = None
    n_tokens_max: int = 100_000
    strategy: CacheStrategy = "lru"  # who leaves a stream
    deletion_strategy: CacheStrategy = "lru"  # who is forgotten
    shares_prefixes: bool = True
    trims_tails: bool = True


@dataclass(frozen=True, slots=True)
class Assignment:
    """A stream for a session: after ``operations`` its first ``n_tokens_reused`` positions hold the prompt's first
    tokens, and it holds nothing else. ``n_tokens_shared`` of them came from another session."""

    stream: int
    n_tokens_reused: int
    n_tokens_shared: int
    operations: tuple[KvOperation, ...]


@dataclass(slots=True)
class CachedSession:
    """A session's cached tokens. In a stream, or with ``stream`` None in host memory, where they take ``n_host_bytes``.

    ``created`` and ``last_use`` count the pool's assignments. ``is_leftover``: the session is gone, and what it left in
    its stream is there for whoever starts with the same tokens, until the stream is needed.
    """

    session_id: int
    salt: str
    created: int
    stream: int | None = None
    tokens: list[int] = field(default_factory=list)
    n_tokens_exact: int | None = None  # after a shift only the first ones are what computing them anew would give
    n_host_bytes: int = 0
    last_use: int = 0
    runs: bool = False
    is_leftover: bool = False

    def update_exactness(self) -> None:
        """Where all that is left is exact, so is what comes behind it."""
        if self.n_tokens_exact is not None and len(self.tokens) <= self.n_tokens_exact:
            self.n_tokens_exact = None

    def sharable(self) -> Sequence[int]:
        return self.tokens if self.n_tokens_exact is None else self.tokens[: self.n_tokens_exact]


@dataclass(frozen=True, slots=True)
class Source:
    """Where the first ``n_tokens`` of a prompt lie; nowhere without ``cells``."""

    cells: CachedSession | None
    n_tokens: int
