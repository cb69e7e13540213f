"""The engine: one thread owns one llama context and steps while there is work.

``step`` reads as the system works: plan, apply KV operations, decode, sample, commit. Everything else here is the door
for other threads: they leave commands in an inbox, so that the scheduler and the KV accounting need no locks.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from wasi_nn_backend.engine.batch import fill_batch
from wasi_nn_backend.engine.generation import Generation, GenerationLimits
from wasi_nn_backend.engine.memory import SequenceMemory
from wasi_nn_backend.engine.statistics import EngineStatistics
from wasi_nn_backend.engine.threads import ThreadTuner
from wasi_nn_backend.errors import Cancelled, ContextFull, RuntimeFailure, WasiNNError
from wasi_nn_backend.kvcache import PoolLimits, StreamPool
from wasi_nn_backend.llama.interface import Context, DecodeBatch, DecodeStatus, Vocabulary
from wasi_nn_backend.output import FinishReason
from wasi_nn_backend.scheduler import Chunk, Scheduler, StepPlan

__all__ = ["Engine", "EngineOptions"]

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

_NO_PLAN = StepPlan((), ())


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """``n_ctx`` is one sequence's window in tokens, None the context's own; ``kv_bytes`` what the context's cells take.

    ``n_threads_max`` above 1 lets the engine choose the number of threads of each decode, up to it; 1 leaves it as the
    context has it.
    """

    n_ctx: int | None = None
    kv_bytes: int = 0
    limits: PoolLimits | None = None
    n_threads_max: int = 1


class Engine:
    """Runs generations over one llama context, batched. Public methods may be called from any thread.

    ``clock`` gives seconds; it is read a few times a step, for time limits, figures and the number of threads.
    """

    def __init__(
        self,
        context: Context,
        vocabulary: Vocabulary,
        clock: Callable[[], float],
        options: EngineOptions = EngineOptions(),
    ) -> None:
        # llama.cpp rounds up; users get what they asked for
        self.n_ctx = min(context.n_ctx, options.n_ctx or context.n_ctx)
        self.n_sequences = context.n_sequences
        self.kv_bytes = options.kv_bytes  # what the context's cells take, for the accounting over several engines
        self._context = context
        self._vocabulary = vocabulary
        self._clock = clock
        self._pool = StreamPool(context.n_sequences, self.n_ctx, options.limits)
        self._memory = SequenceMemory(context, self._pool)
        self._scheduler = Scheduler(self._pool, context.n_batch)
        self._generations: dict[int, Generation] = {}
        self._timed: set[Generation] = set()  # those with a time limit
        self._counts = EngineStatistics()
        self._tuner = ThreadTuner(options.n_threads_max) if options.n_threads_max > 1 else None
        self._n_threads: int | None = None  # None: as the context was created
        self._batch = DecodeBatch()
        self._pieces: dict[int, bytes] = {}
        self._pieces_special: dict[int, bytes] = {}
        self._plan = _NO_PLAN  # the step that runs now
        self._prompting: frozenset[int] = frozenset()  # requests whose prompt is in the decode that runs now
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="wasi-nn-engine", daemon=True)
        self._thread.start()

    # For other threads.

    def submit(self, generation: Generation) -> None:
        """Queue a generation. Raises ``RuntimeFailure`` when the engine is closed."""
        generation.submitted_s = self._clock()
        self._send(lambda: self._start(generation))

    def cancel(self, generation: Generation) -> None:
        """End a generation at the next step, or in the middle of its prompt. Without effect when it is done."""
        if generation.done:
            return
        try:
            self._send(lambda: self._finish(generation, FinishReason.CANCELLED, Cancelled("the run was cancelled")))
        except RuntimeFailure:
            return  # closing ends it anyway
        if generation.request.id in self._prompting:  # a prompt's batch may take seconds; one token's step may not
            self._context.request_abort()

    def grant(self, generation: Generation, n_tokens: int) -> None:
        """Let a generation with limited credit go on for ``n_tokens`` more."""
        self._send(lambda: self._scheduler.grant(generation.request, n_tokens))

    def forget_session(self, session_id: int, *, wait: bool = True) -> None:
        """Free a closed session's cells; ``wait`` until they are. Its generations must be done or cancelled."""
        try:
            forgotten = self._ask(lambda: self._memory.apply(self._pool.forget_session(session_id)))
        except RuntimeFailure:
            return  # a closed engine has no cells
        if wait and (error := forgotten.exception()) is not None:
            _log.error("session %d's cells could not be freed", session_id, exc_info=error)

    def export_session(self, session_id: int) -> tuple[tuple[int, ...], bytes]:
        """A session's cached tokens and their cells, for the disk. Its runs must be over."""
        return self._ask(lambda: self._memory.export(session_id)).result()

    def adopt_session(self, session_id: int, tokens: tuple[int, ...], state: bytes, salt: str) -> None:
        """Take over the cells of a session that was saved, so that it need not compute them again."""
        self._ask(lambda: self._memory.adopt(session_id, tokens, state, salt)).result()

    def statistics(self) -> EngineStatistics:
        """What has happened until now, read between two steps."""
        return self._ask(self._read_statistics).result()

    def close(self) -> None:
        """Stop: unfinished generations end as cancelled, the thread ends, the context is freed. Idempotent."""
        if os.getpid() != self._pid:
            return  # the thread stayed behind in the parent, and the context is the parent's
        with self._wake:
            already_closing, self._closing = self._closing, True
            self._wake.notify()
        if not already_closing:
            self._context.request_abort()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _ask(self, question: Callable[[], _T]) -> Future[_T]:
        """Have the engine's thread work something out between two steps."""
        answer: Future[_T] = Future()

        def carry_out() -> None:
            try:
                answer.set_result(question())
            except BaseException as error:  # raised again where the answer is asked for
                answer.set_exception(error)

        self._send(carry_out)
        return answer

    def _send(self, command: Callable[[], None]) -> None:
        if os.getpid() != self._pid:
            raise RuntimeFailure("the model was loaded before this process was forked: load it again in this process")
        with self._wake:
            if self._closing:
                raise RuntimeFailure("the engine is closed: its graph was unloaded or the backend was closed")
            self._inbox.append(command)
            self._wake.notify()

    # The engine's thread.

    def _run(self) -> None:
        try:
            while self._take_commands():
                if self._scheduler.has_work:
                    self._step_guarded()
        finally:
            self._shut_down()

    def _take_commands(self) -> bool:
        """Carry out the inbox, waiting for it when there is nothing else to do. False when closing."""
        with self._wake:
            while not (self._inbox or self._closing or self._scheduler.has_work):
                self._wake.wait()
            commands = list(self._inbox)
            self._inbox.clear()
            closing = self._closing
        for command in commands:
            self._carry_out(command)
        return not closing

    def _carry_out(self, command: Callable[[], None]) -> None:
        try:
            command()
        except Exception:  # a fault of this package: it must not end everybody's session
            _log.exception("a command to the engine failed")

    def _step_guarded(self) -> None:
        """A fault ends the generations that it struck, never the thread: the others' sessions live on."""
        try:
            self.step()
        except Exception as fault:
            if not isinstance(fault, WasiNNError):
                _log.exception("the engine's step failed")
            self._recover(fault)

    def _recover(self, fault: Exception) -> None:
        """End what was in the step; nobody knows what lies in its streams now. A fault of the planning ends all."""
        plan, self._plan = self._plan, _NO_PLAN
        chunks = plan.chunks
        for stream in plan.streams():
            self._scheduler.restart(stream)
            try:
                self._memory.clear(stream)
            except WasiNNError:
                _log.exception("stream %d could not be cleared", stream)
        kind = type(fault) if isinstance(fault, WasiNNError) else RuntimeFailure
        struck = [self._generations.get(chunk.request.id) for chunk in chunks] or list(self._generations.values())
        for generation in struck:
            if generation is not None:
                self._finish(generation, FinishReason.ERROR, kind(f"the run failed: {fault}"))

    def step(self) -> None:
        """One batch: plan, apply, decode, sample, commit."""
        self._expire()
        self._plan = _NO_PLAN
        self._plan = plan = self._scheduler.plan()
        if not self._apply(plan) or not plan.chunks:
            return
        rows = fill_batch(self._batch, plan)
        status = self._decode(plan)
        if status is DecodeStatus.ABORTED:
            self._undo(plan)
            return
        if status is DecodeStatus.NO_ROOM:
            raise RuntimeFailure(
                f"llama.cpp found no room for a batch of {plan.n_tokens} tokens: "
                f"lower model.n_ctx or backend.max_concurrent, or unload other graphs"
            )
        tokens = self._sample(plan, rows)
        self._commit(plan, tokens)

    def _apply(self, plan: StepPlan) -> bool:
        """False when the plan no longer holds: a stream had to be cleared, and its request starts from nothing."""
        if not plan.operations:
            return True
        cleared = self._memory.apply(plan.operations)
        for stream in cleared:
            self._scheduler.restart(stream)
        return not cleared

    def _expire(self) -> None:
        """End runs whose time is over, also those that wait or still compute their prompt."""
        if self._timed:
            now_s = self._clock()
            for generation in list(self._timed):
                if now_s - generation.submitted_s >= (generation.limits.duration_max_s or 0):
                    self._finish(generation, FinishReason.TIME)

    def _decode(self, plan: StepPlan) -> DecodeStatus:
        self._prompting = frozenset(chunk.request.id for chunk in plan.chunks if chunk.n_tokens > 1)
        try:
            return self._context.decode(self._batch) if self._tuner is None else self._decode_tuned(self._tuner, plan)
        finally:
            self._prompting = frozenset()

    def _decode_tuned(self, tuner: ThreadTuner, plan: StepPlan) -> DecodeStatus:
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

    def _undo(self, plan: StepPlan) -> None:
        """An aborted decode left an unknown part of the batch in the memory: cut back to what was committed."""
        for chunk in plan.chunks:
            if not self._context.remove(chunk.stream, chunk.first_position):
                self._memory.clear(chunk.stream)
                self._scheduler.restart(chunk.stream)

    def _sample(self, plan: StepPlan, rows: list[int]) -> list[int | None]:
        generations = self._generations
        return [
            generations[chunk.request.id].sampler.sample(self._context, row) if chunk.samples else None
            for chunk, row in zip(plan.chunks, rows, strict=True)
        ]

    def _commit(self, plan: StepPlan, tokens: list[int | None]) -> None:
        now_s = self._clock()
        self._counts.add_step(len(plan.chunks), plan.n_tokens)
        for chunk, token in zip(plan.chunks, tokens, strict=True):
            self._scheduler.commit(chunk)
            if token is not None:
                self._take_token(chunk, token, now_s)

    def _take_token(self, chunk: Chunk, token: int, now_s: float) -> None:
        """Turn a sampled token into output and decide whether the generation goes on."""
        generation = self._generations[chunk.request.id]
        limits = generation.limits
        if generation.first_token_s is None:
            generation.first_token_s = now_s
        ends = self._vocabulary.is_end_of_generation(token)
        if not ends or limits.keep_special:
            generation.publish(generation.assembler.feed(self._piece(token, special=limits.keep_special)))
        if ends:
            self._finish(generation, FinishReason.STOP)
            return
        generation.n_tokens_output += 1
        if generation.assembler.stopped:
            self._finish(generation, FinishReason.STOP_STRING)
        elif generation.n_tokens_output == limits.n_tokens_max:
            self._finish(generation, FinishReason.LENGTH)
        elif len(chunk.request.tokens) == self.n_ctx and not self._shift(chunk, limits):
            self._finish(generation, FinishReason.CONTEXT_FULL, self._context_full())
        else:
            self._scheduler.append_sampled(chunk.request, token)

    def _shift(self, chunk: Chunk, limits: GenerationLimits) -> bool:
        """Make room in a full window by cutting tokens out behind its head. False where that is off or impossible.

        Rarely and by much: the next decode rotates every cell of the cache again.
        """
        if limits.shift is None:
            return False
        n_keep = min(limits.shift.n_keep, self.n_ctx // 2)
        n_discard = min(limits.shift.n_discard or (self.n_ctx - n_keep) // 2, self.n_ctx - n_keep)
        if not self._memory.shift(chunk.stream, n_keep, n_discard):
            return False
        self._scheduler.shift(chunk.request, n_keep, n_discard)
        return True

    def _context_full(self) -> ContextFull:
        return ContextFull(
            f"the context window of {self.n_ctx} tokens is full; the text so far is kept: raise model.n_ctx, "
            f"lower stopping.max_tokens or start a new context"
        )

    def _piece(self, token: int, *, special: bool) -> bytes:
        cache = self._pieces_special if special else self._pieces
        piece = cache.get(token)
        if piece is None:
            piece = cache[token] = self._vocabulary.piece(token, special=special)
        return piece

    def _start(self, generation: Generation) -> None:
        if generation.done:
            return
        self._generations[generation.request.id] = generation
        if generation.limits.duration_max_s is not None:
            self._timed.add(generation)
        self._scheduler.add(generation.request)

    def _read_statistics(self) -> EngineStatistics:
        pool = self._pool
        return dataclasses.replace(
            self._counts,
            n_sequences=self.n_sequences,
            n_cells_used=pool.n_cells_used,
            n_tokens_cached=pool.n_tokens_cached,
            n_sessions_in_host=pool.n_sessions_in_host,
            n_kv_bytes=self.kv_bytes,
            n_host_bytes=pool.n_host_bytes,
        )

    def _finish(self, generation: Generation, reason: FinishReason, error: WasiNNError | None = None) -> None:
        if generation.done:
            return
        self._scheduler.finish(generation.request)
        self._counts.add_request(generation.request)
        self._generations.pop(generation.request.id, None)
        self._timed.discard(generation)
        generation.finish(reason, error, self._clock())

    def _shut_down(self) -> None:
        with self._wake:  # commands that came in between find the door closed or are carried out here
            self._closing = True
            commands = list(self._inbox)
            self._inbox.clear()
        for command in commands:
            self._carry_out(command)
        for generation in list(self._generations.values()):
            self._finish(generation, FinishReason.CANCELLED, Cancelled("the backend was closed during the run"))
        self._context.close()
