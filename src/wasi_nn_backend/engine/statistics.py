"""What an engine has done, in numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from wasi_nn_backend.engine.generation import Generation
from wasi_nn_backend.kvcache import StreamPool

__all__ = ["EngineStatistics", "SessionStatistics", "StatisticsBook"]


@dataclass(slots=True)
class SessionStatistics:
    """One session's finished runs on its engine, and what of it is cached now.

    ``n_tokens_prompt`` is what prompts had, of which ``n_tokens_reused`` were cached and ``n_tokens_shared`` of those
    came from another session; ``n_tokens_recomputed`` had been computed before and were lost to others in between.
    ``n_tokens_computed`` went through the model: what was not cached of prompts, what was generated but for each run's
    last token, what was lost.
    ``n_tokens_evicted`` left their stream for host memory, or the cache. ``n_interruptions`` is how often a run had to
    wait in its middle for lack of cells. ``n_host_bytes`` is what a session takes that left its stream.
    """

    n_runs: int = 0
    n_tokens_prompt: int = 0
    n_tokens_computed: int = 0
    n_tokens_generated: int = 0
    n_tokens_reused: int = 0
    n_tokens_shared: int = 0
    n_tokens_shifted: int = 0
    n_tokens_recomputed: int = 0
    n_tokens_evicted: int = 0
    n_interruptions: int = 0
    n_tokens_cached: int = 0
    n_host_bytes: int = 0

    def add_run(self, generation: Generation) -> None:
        """Count a run that is over."""
        request = generation.request
        self.n_runs += 1
        self.n_tokens_prompt += request.n_tokens_prompt
        self.n_tokens_computed += request.n_tokens_decoded
        self.n_tokens_generated += generation.n_tokens_output
        self.n_tokens_reused += request.n_tokens_reused
        self.n_tokens_shared += request.n_tokens_shared
        self.n_tokens_shifted += request.n_tokens_shifted
        self.n_tokens_recomputed += request.n_tokens_recomputed
        self.n_interruptions += request.n_interruptions


@dataclass(slots=True)
class EngineStatistics(SessionStatistics):
    """The same over all sessions since the engine started, its steps, and what its memory holds now.

    ``n_tokens_decoded`` is what ``n_steps`` decodes had, ``n_sequence_steps`` their sequences. ``n_kv_bytes`` is what
    the context's ``n_cells`` take, used or not. ``n_waiting`` and ``n_running`` are runs, of which ``n_sequences`` fit
    into a step. ``n_threads`` is the number for the last decode, None where it is configured. ``id`` and ``model``, a
    path, say which engine this is.
    """

    n_steps: int = 0
    n_sequence_steps: int = 0
    n_tokens_decoded: int = 0
    n_sequences: int = 0
    n_cells_used: int = 0
    n_sessions_in_host: int = 0
    n_kv_bytes: int = 0
    n_waiting: int = 0
    n_running: int = 0
    n_threads: int | None = None
    n_cells: int = 0
    id: int = 0
    model: str = ""

    @property
    def n_sequences_per_step(self) -> float:
        """Mean number of sequences in a batch."""
        return self.n_sequence_steps / self.n_steps if self.n_steps else 0.0

    def add_step(self, n_sequences: int, n_tokens: int) -> None:
        self.n_steps += 1
        self.n_sequence_steps += n_sequences
        self.n_tokens_decoded += n_tokens


class StatisticsBook:
    """Counts for an engine and each of its sessions. The engine's thread owns it. ``engine`` is what is known of the
    engine from the beginning; it is counted in."""

    def __init__(self, pool: StreamPool, engine: EngineStatistics) -> None:
        self._pool = pool
        self._engine = engine
        self._sessions: dict[int, SessionStatistics] = {}

    def add_step(self, n_sequences: int, n_tokens: int) -> None:
        self._engine.add_step(n_sequences, n_tokens)

    def add_run(self, generation: Generation) -> None:
        """Count a run that is over."""
        self._engine.add_run(generation)
        self._sessions.setdefault(generation.request.session_id, SessionStatistics()).add_run(generation)

    def forget(self, session_id: int) -> None:
        self._sessions.pop(session_id, None)

    def of_session(self, session_id: int) -> SessionStatistics:
        return replace(
            self._sessions.get(session_id, SessionStatistics()),
            n_tokens_cached=self._pool.n_tokens_of(session_id),
            n_tokens_evicted=self._pool.n_tokens_evicted_of(session_id),
            n_host_bytes=self._pool.n_host_bytes_of(session_id),
        )

    def of_engine(self, **now: int | None) -> EngineStatistics:
        """``now`` are fields that the engine knows."""
        pool = self._pool
        return replace(
            self._engine,
            n_sequences=pool.n_streams,
            n_cells_used=pool.n_cells_used,
            n_tokens_cached=pool.n_tokens_cached,
            n_sessions_in_host=pool.n_sessions_in_host,
            n_host_bytes=pool.n_host_bytes,
            n_tokens_evicted=pool.n_tokens_evicted,
            **now,  # type: ignore[arg-type]  # names of fields
        )
