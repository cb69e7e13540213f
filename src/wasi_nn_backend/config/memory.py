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

    kv_layout: Annotated[
        Literal["auto", "streams", "unified"],
        Field(
            description="`streams`: each sequence has cells of its own; `unified`: all share them; `auto`: what is "
            "faster ([measured](#what-auto-chooses))"
        ),
    ] = "auto"
    max_memory_mb: Annotated[
        int,
        Field(le=INT32_MAX, description="MiB of KV memory for all graphs, 64 or more; 0: no limit"),
        zero_or_at_least(64),
        Key(outside="default"),
    ] = 8192
    memory_pressure_threshold: Annotated[
        float,
        Field(
            ge=0.5,
            le=0.95,
            description="how much of `max_memory_mb` cells and host memory may fill before sessions are forgotten",
        ),
    ] = 0.8
    max_cache_tokens: Annotated[
        int, Field(ge=0, le=INT32_MAX, description="tokens kept for sessions that do not run, over all of them")
    ] = 100_000
    cache_strategy: Annotated[
        CacheStrategy, Field(description="who leaves a stream for host memory: `lru`, `fifo`, `smart`")
    ] = "lru"
    cache_deletion_strategy: Annotated[CacheStrategy, Field(description="who is forgotten: `lru`, `fifo`, `smart`")] = (
        "lru"
    )
    enable_partial_cache_deletion: Annotated[
        bool, Field(description="cut a session's tail instead of forgetting all of it")
    ] = True
    enable_token_cache_reuse: Annotated[
        bool, Field(description="share prompts that begin alike between contexts, closed ones included")
    ] = True
    context_shifting: Annotated[
        bool,
        Field(
            description="a full window loses its oldest tokens and the run goes on, if `max_tokens` is a number; off "
            "for guests"
        ),
    ] = True
    n_keep_tokens: Annotated[
        int, Field(ge=0, le=INT32_MAX, description="tokens at the window's beginning that stay")
    ] = 128
    n_discard_tokens: Annotated[
        int, Field(ge=0, le=INT32_MAX, description="tokens behind those that go; 0: half of the rest")
    ] = 256
