"""``memory`` (also spelled ``memory_policy``): how much memory sequences may take."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from wasi_nn_backend.config.section import INT32_MAX, Key, Section, zero_or_at_least

__all__ = ["MemorySettings"]

CacheStrategy = Literal["lru", "fifo", "smart"]


class MemorySettings(Section):
    """``kv_layout`` says whose the cells are: in ``streams`` each sequence has its own, in ``unified`` all share one
    pool, so that a sequence may take what others do not need; ``auto`` measures which is faster.

    ``max_memory_mb`` is in MiB, over the cells of all graphs and the states in host memory; 0 sets no limit, less
    than 64 could not hold the smallest cache.

    ``context_shifting`` lets a run with a token limit go on when its window is full: the first ``n_keep_tokens`` stay,
    the next ``n_discard_tokens`` go (0: half of the rest). ``cache_strategy`` chooses who leaves a stream for host
    memory, ``cache_deletion_strategy`` who is forgotten when more than ``max_cache_tokens`` are kept, or the states in
    host memory and the cells fill more than ``memory_pressure_threshold`` of ``max_memory_mb``.
    """

    kv_layout: Literal["auto", "streams", "unified"] = "auto"
    context_shifting: bool = True
    n_keep_tokens: Annotated[int, Field(ge=0, le=INT32_MAX)] = 128
    n_discard_tokens: Annotated[int, Field(ge=0, le=INT32_MAX)] = 256
    max_cache_tokens: Annotated[int, Field(ge=0, le=INT32_MAX)] = 100_000
    memory_pressure_threshold: Annotated[float, Field(ge=0.5, le=0.95)] = 0.8
    cache_strategy: CacheStrategy = "lru"
    cache_deletion_strategy: CacheStrategy = "lru"
    enable_partial_cache_deletion: bool = True
    enable_token_cache_reuse: bool = True
    max_memory_mb: Annotated[int, Field(le=INT32_MAX), zero_or_at_least(64), Key(outside="default")] = 8192
