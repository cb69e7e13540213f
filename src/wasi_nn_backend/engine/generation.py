"""One run of a model for one session: what the engine's thread fills and its consumer reads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from wasi_nn_backend.engine.steps import Bell
from wasi_nn_backend.engine.waiting import wait_for
from wasi_nn_backend.errors import WasiNNError
from wasi_nn_backend.llama.interface import Sampler
from wasi_nn_backend.output import FinishReason, TextAssembler
from wasi_nn_backend.scheduler import Request

__all__ = ["Generation", "GenerationLimits", "Piece", "ShiftPolicy"]


@dataclass(frozen=True, slots=True)
class ShiftPolicy:
    """How a full window makes room: the first ``n_keep`` tokens stay, the next ``n_discard`` go (0: half of them)."""

    n_keep: int
    n_discard: int


@dataclass(frozen=True, slots=True)
class GenerationLimits:
    """When to stop besides the model's own wish. ``n_tokens_max`` None: until the context is full.

    Times count from the submission. After ``duration_max_s`` the text so far is the answer; ``timeout_s`` is an error.
    """

    n_tokens_max: int | None = None
    stops: tuple[bytes, ...] = ()
    duration_max_s: float | None = None
    timeout_s: float | None = None
    shift: ShiftPolicy | None = None  # None: a full window ends the run
    keep_control_text: bool = False  # the text of control tokens is output
    keep_end_text: bool = False  # and that of the end-of-generation token


@dataclass(frozen=True, slots=True)
class Piece:
    """One token's contribution to the text; empty while a character or a stop string may be incomplete."""

    text: bytes


class Generation:
    """Written by the engine's thread only; ``finish_reason``, ``error`` and the figures are valid once ``done``.

    ``streams`` decides whether pieces are queued for a consumer: a caller that only waits for the end is not woken for
    every token.
    """

    def __init__(self, request: Request, sampler: Sampler, limits: GenerationLimits, *, streams: bool) -> None:
        self.request = request
        self.sampler = sampler
        self.limits = limits
        self.assembler = TextAssembler(limits.stops)
        self.finish_reason: FinishReason | None = None
        self.error: WasiNNError | None = None
        self.n_tokens_output = 0
        self.submitted_s = 0.0
        self.waits_in_queue = False  # until it starts for the first time
        self.started_s: float | None = None  # when it first got a place in the batch
        self.first_token_s: float | None = None
        self.finished_s: float | None = None
        self._pieces: SimpleQueue[Piece | None] | None = SimpleQueue() if streams else None
        self._done = threading.Event()
        self._bell = Bell()

    @property
    def done(self) -> bool:
        return self._done.is_set()

    @property
    def text(self) -> bytes:
        return self.assembler.text

    # The engine's side.

    def publish(self, text: bytes) -> None:
        if self._pieces is not None:
            self._pieces.put(Piece(text))
            self._bell.ring()

    def finish(self, reason: FinishReason, error: WasiNNError | None, now_s: float) -> None:
        """Called once. Text that was held back is released first."""
        rest = self.assembler.finish()
        if rest:
            self.publish(rest)
        self.finish_reason = reason
        self.error = error
        self.finished_s = now_s
        try:
            self.sampler.close()
        finally:  # whoever waits must learn of the end, whatever happens
            self._done.set()
            if self._pieces is not None:
                self._pieces.put(None)
            self._bell.ring()

    def give_up(self, error: WasiNNError) -> None:
        """Finish it in a forked child, where the engine's thread is gone: locks may have been inherited locked, so what
        others could have waited with is made anew."""
        self.finish_reason, self.error = FinishReason.ERROR, error
        self._bell = Bell()
        if self._pieces is not None:
            self._pieces = SimpleQueue()
            self._pieces.put(None)
        done = threading.Event()
        done.set()
        self._done = done

    # The consumer's side.

    def when_ready(self, callback: Callable[[], None]) -> None:
        """Call back once, at the next piece where pieces are taken, else at the end; at once if that is there. It is
        the engine's thread that calls, so the callback must be short."""
        self._bell.add(callback)
        if self.done or (self._pieces is not None and not self._pieces.empty()):
            self._bell.ring()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until the generation is over; False after ``timeout_s``. Signals interrupt it on the main thread."""
        if timeout_s is not None:
            return self._done.wait(timeout_s)
        wait_for(self._done)
        return True

    def next_piece(self) -> Piece | None:
        """The next token's piece, waiting for it; None when the generation is over (and again after that)."""
        if self._pieces is None:
            raise RuntimeError("this generation was not asked to stream")  # a fault of the layer above
        if self.done:
            try:
                return self._pieces.get_nowait()
            except Empty:
                return None
        return self._pieces.get()
