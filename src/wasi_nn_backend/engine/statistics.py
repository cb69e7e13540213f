"""What an engine has done, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from wasi_nn_backend.scheduler import Request

__all__ = ["EngineStatistics"]


@dataclass(slots=True)
class EngineStatistics:
    """Counts since the engine started, of finished runs where they are a run's, and what its memory holds now.

    ``n_tokens_prompt`` is what prompts had, of which ``n_tokens_reused`` were cached and ``n_tokens_shared`` of those
    came from another session; ``n_tokens_recomputed`` had been computed before and were lost to others in between.
    ``n_sequence_steps / n_steps`` is the mean number of sequences in a batch.
    """

    n_steps: int = 0
    n_sequence_steps: int = 0
    n_tokens_decoded: int = 0
    n_runs: int = 0
    n_tokens_prompt: int = 0
    n_tokens_generated: int = 0
    n_tokens_reused: int = 0
    n_tokens_shared: int = 0
    n_tokens_shifted: int = 0
    n_tokens_recomputed: int = 0
    n_sequences: int = 0
    n_cells_used: int = 0
    n_tokens_cached: int = 0
    n_sessions_in_host: int = 0
    n_kv_bytes: int = 0
    n_host_bytes: int = 0

    def add_step(self, n_sequences: int, n_tokens: int) -> None:
        self.n_steps += 1
        self.n_sequence_steps += n_sequences
        self.n_tokens_decoded += n_tokens

    def add_request(self, request: Request) -> None:
        """Count a run that is over."""
        self.n_runs += 1
        self.n_tokens_prompt += request.n_tokens_prompt
        self.n_tokens_generated += request.n_tokens_generated
        self.n_tokens_reused += request.n_tokens_reused
        self.n_tokens_shared += request.n_tokens_shared
        self.n_tokens_shifted += request.n_tokens_shifted
        self.n_tokens_recomputed += request.n_tokens_recomputed
