"""One decode of a step's plan, with as many threads as are fastest now."""

from __future__ import annotations

from collections.abc import Callable

from wasi_nn_backend.engine.batch import fill_batch
from wasi_nn_backend.engine.threads import ThreadTuner
from wasi_nn_backend.llama.interface import Context, DecodeBatch, DecodeStatus
from wasi_nn_backend.scheduler import StepPlan

__all__ = ["Decoder"]


class Decoder:
    """The engine's thread owns it; ``abort`` may come from any.

    ``n_threads_max`` above 1 lets it choose the number of threads of each decode, up to it; 1 leaves it as it is. A
    decode of a single token is left alone where the context has a number of its own for those.
    """

    def __init__(self, context: Context, clock: Callable[[], float], n_threads_max: int) -> None:
        self._context = context
        self._clock = clock
        self._tuner = ThreadTuner(n_threads_max) if n_threads_max > 1 else None
        self._n_threads_single = context.n_threads_single
        self._n_threads: int | None = None  # None: as the context was created
        self._is_single = False  # the last decode's number was the context's
        self._batch = DecodeBatch()
        self._prompting: frozenset[int] = frozenset()  # requests whose prompt is in the decode that runs now

    @property
    def n_threads(self) -> int | None:
        """The number for the last decode; None where all are the context's."""
        return self._n_threads_single if self._is_single else self._n_threads

    def decode(self, plan: StepPlan) -> tuple[DecodeStatus, list[int]]:
        """Returns one row of logits a chunk, too."""
        rows = fill_batch(self._batch, plan)
        self._prompting = frozenset(chunk.request.id for chunk in plan.chunks if chunk.n_tokens > 1)
        try:
            status = self._decode(plan)
        finally:
            self._prompting = frozenset()
        return status, rows

    def abort(self, request_id: int) -> None:
        """Break off a decode that computes this request's prompt: that may take seconds, one token's step may not."""
        if request_id in self._prompting:
            self._context.request_abort()

    def _decode(self, plan: StepPlan) -> DecodeStatus:
        if self._tuner is None:
            return self._context.decode(self._batch)
        self._is_single = plan.n_tokens == 1 and self._n_threads_single is not None
        return self._context.decode(self._batch) if self._is_single else self._tuned(self._tuner, plan)

    def _tuned(self, tuner: ThreadTuner, plan: StepPlan) -> DecodeStatus:
        """Decode with the number of threads that was fastest lately, or with another one to see how fast that is."""
        start_s = self._clock()
        n_threads = tuner.choose(plan.n_tokens, prompt=bool(self._prompting), now_s=start_s)
        if n_threads != self._n_threads:
            self._context.set_n_threads(n_threads)
            self._n_threads = n_threads
        status = self._context.decode(self._batch)
        if status is DecodeStatus.DONE and not plan.operations:  # those take time of their own in the decode
            tuner.observe(self._clock() - start_s)
        return status
