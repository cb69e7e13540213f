"""Where a session that wants to run goes, whose cells it goes on from, and how they come there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from wasi_nn_backend.kvcache.eviction import N_TOKENS_SHARED_MIN, choose_victim
from wasi_nn_backend.kvcache.operations import CopyStream, KvOperation, RemoveTail, RestoreState
from wasi_nn_backend.kvcache.prefix import common_prefix_length
from wasi_nn_backend.kvcache.records import CachedSession, PoolLimits, Source

__all__ = ["best_source", "choose_stream", "fill_stream"]


def best_source(own: CachedSession | None, others: Iterable[CachedSession], salt: str, tokens: Sequence[int]) -> Source:
    """Where most of the prompt's first tokens lie, but for the last one, whose logits are wanted.

    The session's own cells win where another's of equal salt hold little more.
    """
    n_max = len(tokens) - 1
    best = Source(own, 0 if own is None else min(common_prefix_length(own.tokens, tokens), n_max))
    for other in others:
        if other is own or other.salt != salt:
            continue
        n_tokens = min(common_prefix_length(other.sharable(), tokens), n_max)
        if n_tokens >= best.n_tokens + N_TOKENS_SHARED_MIN:
            best = Source(other, n_tokens)
    return best


def choose_stream(
    streams: Sequence[CachedSession | None],
    own: CachedSession | None,
    source: CachedSession | None,
    limits: PoolLimits,
    now: int,
) -> int | None:
    """An idle stream beside the running ones: the session's own if it is one, else that of ``source`` where nobody else
    needs it, else an empty one, else the one whose owner is the strategy's victim. None while all run."""
    running = [cells is not None and cells.runs for cells in streams]
    idle = [stream for stream, runs in enumerate(running) if not runs]
    if not idle:
        return None
    near = [stream for stream in idle if any(running[max(0, stream - 1) : stream + 2])] or idle
    if limits.n_host_bytes_max == 0:
        near = idle  # whoever makes room loses all: that weighs more than a gap
    if own is not None and own.stream in near:
        return own.stream
    if source is not None and source.is_leftover and source.stream in near:
        return source.stream
    for stream in near:
        if streams[stream] is None:
            return stream
    owners = [cells for stream in near if (cells := streams[stream]) is not None]
    return choose_victim(limits.strategy, owners, now).stream


def fill_stream(stream: int, source: Source, lies_there: CachedSession | None) -> Iterator[KvOperation]:
    """Bring the source's tokens into a stream in which ``lies_there``'s still lie."""
    cells, n_tokens = source.cells, source.n_tokens
    n_lying = 0 if lies_there is None else len(lies_there.tokens)
    if cells is None or n_tokens == 0:
        n_tokens = 0
    elif cells is lies_there:
        pass
    elif cells.stream is not None:
        yield CopyStream(cells.stream, stream, n_tokens)
        return
    else:
        yield RestoreState(cells.session_id, stream)
        n_lying = len(cells.tokens)
    if n_lying > n_tokens:
        yield RemoveTail(stream, n_tokens)
