"""One step's plan: a frozen value, so that a schedule can be recorded, compared and replayed."""

from __future__ import annotations

from dataclasses import dataclass

from wasi_nn_backend.kvcache import RemoveTail
from wasi_nn_backend.scheduler.request import Request

__all__ = ["Chunk", "StepPlan"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next ``n_tokens`` pending tokens of one request. ``samples`` when they reach its end."""

    request: Request
    stream: int
    first_position: int
    n_tokens: int
    samples: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """``removals`` come first, then one decode of all ``chunks``, which are in the order of their streams."""

    removals: tuple[RemoveTail, ...]
    chunks: tuple[Chunk, ...]

    @property
    def n_tokens(self) -> int:
        return sum(chunk.n_tokens for chunk in self.chunks)
