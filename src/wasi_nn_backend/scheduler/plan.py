"""One step's plan: a frozen value, so that a schedule can be recorded, compared and replayed."""

from __future__ import annotations

from dataclasses import dataclass

from wasi_nn_backend.kvcache import CopyStream, KvOperation, RemoveTail, RestoreState, SaveState
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
    """``operations`` come first, in their order, then one decode of all ``chunks``, in the order of their streams.

    ``started`` are requests that left the queue for the first time.
    """

    operations: tuple[KvOperation, ...]
    chunks: tuple[Chunk, ...]
    started: tuple[Request, ...] = ()

    def streams(self) -> set[int]:
        """Every stream that the plan touches."""
        touched = {chunk.stream for chunk in self.chunks}
        for operation in self.operations:
            match operation:
                case CopyStream(source, target, _):
                    touched |= {source, target}
                case RemoveTail(stream, _) | SaveState(stream, _) | RestoreState(_, stream):
                    touched.add(stream)
        return touched

    @property
    def n_tokens(self) -> int:
        return sum(chunk.n_tokens for chunk in self.chunks)
