"""What an engine has done, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from wasi_nn_backend.scheduler import Request

__all__ = ["EngineStatistics", "SessionStatistics"]


@dataclass(slots=True)
class SessionStatistics:
    """One session's finished runs on its engine, and what of it is cached now.

    ``n_tokens_prompt`` is what prompts had, of which ``n_tokens_reused`` were cached and ``n_tokens_shared`` of those
    came from another session; ``n_tokens_recomputed`` had been computed before and were lost to others in between.
    ``n_tokens_evicted`` left their stream for host memory, or the cache. ``n_interruptions`` is how often a run had to
    wait in its middle for lack of cells. ``n_host_bytes`` is what a session takes that left its stream.
    """

    n_runs: int = 0
    n_tokens_prompt: int = 0
    n_tokens_generated: int = 0
    n_tokens_reused: int = 0
    n_tokens_shared: int = 0
    n_tokens_shifted: int = 0
    n_tokens_recomputed: int = 0
    n_tokens_evicted: int = 0
    n_interruptions: int = 0
    n_tokens_cached: int = 0
    n_host_bytes: int = 0

    @property
    def n_tokens_computed(self) -> int:
        """Tokens that went through the model: of prompts what was not cached, what was generated, what was lost."""
        return self.n_tokens_prompt - self.n_tokens_reused + self.n_tokens_generated + self.n_tokens_recomputed

    def add_request(self, request: Request) -> None:
        """Count a run that is over."""
        self.n_runs += 1
        self.n_tokens_prompt += request.n_tokens_prompt
        self.n_tokens_generated += request.n_tokens_generated
        self.n_tokens_reused += request.n_tokens_reused
        self.n_tokens_shared += request.n_tokens_shared
        self.n_tokens_shifted += request.n_tokens_shifted
        self.n_tokens_recomputed += request.n_tokens_recomputed
        self.n_interruptions += request.n_interruptions


@dataclass(slots=True)
class EngineStatistics(SessionStatistics):
    """The same over all sessions since the engine started, its steps, and what its memory holds now.

    ``n_tokens_decoded`` is what ``n_steps`` decodes had, ``n_sequence_steps`` their sequences. ``n_kv_bytes`` is what
    the context's cells take, used or not. ``n_threads`` is the number chosen for the last decode, None where it is
    fixed.
    """

    n_steps: int = 0
    n_sequence_steps: int = 0
    n_tokens_decoded: int = 0
    n_sequences: int = 0
    n_cells_used: int = 0
    n_sessions_in_host: int = 0
    n_kv_bytes: int = 0
    n_threads: int | None = None

    @property
    def n_sequences_per_step(self) -> float:
        """Mean number of sequences in a batch."""
        return self.n_sequence_steps / self.n_steps if self.n_steps else 0.0

    def add_step(self, n_sequences: int, n_tokens: int) -> None:
        self.n_steps += 1
        self.n_sequence_steps += n_sequences
        self.n_tokens_decoded += n_tokens
