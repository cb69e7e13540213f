"""The engine: one thread owns one llama context and steps while there is work.

``step`` reads as the system works: plan, apply KV operations, decode, sample, commit. The methods above it are for
other threads: they leave commands in an inbox.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence

from wasi_nn_backend.engine.deadlines import Deadlines
from wasi_nn_backend.engine.decoder import Decoder
from wasi_nn_backend.engine.generation import Generation, GenerationLimits
from wasi_nn_backend.engine.inbox import Inbox
from wasi_nn_backend.engine.memory import ExportedCells, SequenceMemory
from wasi_nn_backend.engine.options import EngineOptions
from wasi_nn_backend.engine.queue_gate import QueueGate
from wasi_nn_backend.engine.statistics import EngineStatistics, SessionStatistics, StatisticsBook
from wasi_nn_backend.errors import Cancelled, ContextFull, DeadlineExceeded, RuntimeFailure, WasiNNError
from wasi_nn_backend.kvcache import KvOperation, StreamPool
from wasi_nn_backend.llama.interface import Context, DecodeStatus, Vocabulary
from wasi_nn_backend.output import FinishReason
from wasi_nn_backend.scheduler import Chunk, Scheduler, SchedulingRules, StepPlan

__all__ = ["Engine"]

_log = logging.getLogger(__name__)

_NO_PLAN = StepPlan((), ())


class Engine:
    """Runs generations over one llama context, batched. Public methods may be called from any thread.

    ``clock`` gives seconds; it is read a few times a step, for time limits, figures and the number of threads.
    """

    def __init__(
        self,
        context: Context,
        vocabulary: Vocabulary,
        clock: Callable[[], float],
        options: EngineOptions | None = None,
        *,
        start_thread: Callable[[threading.Thread], None] = threading.Thread.start,
    ) -> None:
        options = options or EngineOptions()
        self.id = options.id
        # llama.cpp rounds up; users get what they asked for
        self.n_ctx = min(context.n_ctx, options.n_ctx or context.n_ctx)
        self.n_sequences = context.n_sequences
        self.kv_layout = options.kv_layout
        self.flash_attention = options.flash_attention
        self.kv_bytes = options.kv_bytes  # what the context's cells take, for the accounting over several engines
        self._context = context
        self._vocabulary = vocabulary
        self._clock = clock
        self._pool = StreamPool(context.n_sequences, self.n_ctx, options.limits, options.n_cells)
        self._memory = SequenceMemory(context, self._pool)
        self.n_tokens_step_max = min(options.n_tokens_step_max or context.n_batch, context.n_batch)
        self._scheduler = Scheduler(
            self._pool,
            SchedulingRules(
                self.n_tokens_step_max,
                options.n_running_max,
                uses_priorities=options.uses_priorities,
                shares_fairly=options.shares_fairly,
            ),
        )
        self._gate = QueueGate(options.n_waiting_max, options.n_waiting_warning)
        self._drops_late_waiting = options.drops_late_waiting
        self._decoder = Decoder(context, clock, options.n_threads_max)
        self._generations: dict[int, Generation] = {}
        self._deadlines = Deadlines()
        self._late: list[Generation] = []  # those that wait although their time-out is over
        n_cells = options.n_cells or context.n_sequences * self.n_ctx
        self._book = StatisticsBook(self._pool, EngineStatistics(id=options.id, model=options.model, n_cells=n_cells))
        self._pieces: dict[int, bytes] = {}
        self._pieces_special: dict[int, bytes] = {}
        self._plan = _NO_PLAN  # the step that runs now
        self._inbox = Inbox(clock, options.company_wait_s)
        self._thread = threading.Thread(target=self._run, name="wasi-nn-engine", daemon=True)
        start_thread(self._thread)

    # For other threads.

    def submit(self, generation: Generation) -> None:
        """Queue a generation. Raises ``Busy`` (too many wait) and ``RuntimeFailure`` when the engine is closed."""
        self._gate.enter()
        generation.submitted_s, generation.waits_in_queue = self._clock(), True
        try:
            self._inbox.send(lambda: self._start(generation), generation.request.session_id)
        except BaseException:
            self._gate.leave()
            raise

    def expect(self, session_id: int) -> None:
        """A session has its next prompt and will submit it soon: a batch that begins just before may wait for it."""
        self._inbox.expect(session_id)

    def dismiss(self, session_id: int) -> None:
        """Expect a session no longer."""
        self._inbox.dismiss(session_id)

    @property
    def is_foreign(self) -> bool:
        """Whether this is a forked child, where nothing is computed any more."""
        return self._inbox.is_foreign

    @property
    def n_waiting(self) -> int:
        """Runs that have not started yet."""
        return self._gate.n_waiting

    def cancel(self, generation: Generation, error: WasiNNError | None = None) -> None:
        """End a generation at the next step, or in the middle of its prompt, with ``error`` or as cancelled by its
        caller. Without effect when it is done. Takes no lock: the garbage collector may call it, on any thread."""
        if generation.done:
            return
        if self.is_foreign:
            generation.give_up(RuntimeFailure("the run stayed behind in the process that this one was forked from"))
            return
        why = error or Cancelled("the run was cancelled")
        self._inbox.post(lambda: self._finish(generation, FinishReason.CANCELLED, why))
        self._decoder.abort(generation.request.id)

    def grant(self, generation: Generation, n_tokens: int) -> None:
        """Let a generation with limited credit go on for ``n_tokens`` more."""
        self._inbox.send(lambda: self._scheduler.grant(generation.request, n_tokens))

    def forget_session(self, session_id: int, *, wait: bool = True) -> None:
        """Free a closed session's cells; ``wait`` until they are. Its generations must be done or cancelled."""
        try:
            forgotten = self._inbox.ask(lambda: self._forget_session(session_id))
        except RuntimeFailure:
            return  # a closed engine has no cells
        if not wait or threading.current_thread() is self._thread:  # which carries out a last step while Python ends
            return
        if (error := forgotten.exception()) is not None:
            _log.error("session %d's cells could not be freed", session_id, exc_info=error)

    def export_session(self, session_id: int) -> ExportedCells:
        """A session's cached tokens and their cells, for the disk. Its runs must be over."""
        return self._inbox.ask(lambda: self._memory.export(session_id)).result()

    def adopt_session(self, session_id: int, cells: ExportedCells, salt: str) -> None:
        """Take over the cells of a session that was saved, so that it need not compute them again."""
        self._inbox.ask(lambda: self._memory.adopt(session_id, cells, salt)).result()

    def session_statistics(self, session_id: int) -> SessionStatistics:
        """One session's figures, read between two steps. Raises ``RuntimeFailure`` when the engine is closed."""
        return self._inbox.ask(lambda: self._book.of_session(session_id)).result()

    def n_tokens_cached(self, session_ids: Sequence[int]) -> dict[int, int]:
        """What is cached of each of these sessions: one question, however many they are."""
        return self._inbox.ask(lambda: {each: self._pool.n_tokens_of(each) for each in session_ids}).result()

    def statistics(self) -> EngineStatistics:
        """What has happened until now, read between two steps."""
        return self._inbox.ask(self._read_statistics).result()

    def close(self) -> None:
        """Stop: unfinished generations end as cancelled, the thread ends, the context is freed. Idempotent."""
        if self.is_foreign:
            return  # the thread stayed behind in the parent, and the context is the parent's
        if self._inbox.close():
            self._context.request_abort()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # The engine's thread.

    def _run(self) -> None:
        try:
            while self._inbox.take(lambda: self._scheduler.has_work):
                if self._scheduler.is_about_to_begin:
                    self._inbox.wait_for_company()
                if self._scheduler.has_work:
                    self._step_guarded()
        finally:
            self._shut_down()

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
        started_s = self._clock() if plan.started else None
        for request in plan.started:
            self._generations[request.id].started_s = started_s
            self._leave_queue(self._generations[request.id])
        if not self._move_cells(plan.operations) or not plan.chunks:
            return
        status, rows = self._decoder.decode(plan)
        if status is not DecodeStatus.DONE:
            self._undo(plan)
            if status is DecodeStatus.NO_ROOM:
                self._make_room(plan)
            return
        tokens = self._sample(plan, rows)
        self._commit(plan, tokens)

    def _move_cells(self, operations: Iterable[KvOperation]) -> bool:
        """False when the plan no longer holds: a stream had to be cleared, and its request starts from nothing."""
        cleared = self._memory.apply(operations)
        for stream in cleared:
            self._scheduler.restart(stream)
        return not cleared

    def _make_room(self, plan: StepPlan) -> None:
        """llama.cpp found fewer cells than the books say: the next step tries with one session fewer in the cache."""
        operations = self._scheduler.make_room()
        if operations is None:
            raise RuntimeFailure(
                f"llama.cpp found no room for a batch of {plan.n_tokens} tokens, with nothing else in the cache: "
                f"lower model.n_ctx or model.batch_size"
            )
        self._move_cells(operations)

    def _expire(self) -> None:
        """End runs whose time is over, also those that wait or still compute their prompt."""
        if self._deadlines:
            for generation, is_timeout in self._deadlines.due(self._clock()):
                if not is_timeout:
                    self._finish(generation, FinishReason.TIME)
                elif self._drops_late_waiting or not generation.waits_in_queue:
                    self._time_out(generation)
                else:
                    self._late.append(generation)
        for generation in [late for late in self._late if not late.waits_in_queue]:
            self._late.remove(generation)
            self._time_out(generation)

    def _time_out(self, generation: Generation) -> None:
        timeout_s = generation.limits.timeout_s
        if generation.waits_in_queue:
            message = f"the task was still waiting when its time-out of {timeout_s:g} s was over: try again later, or"
        else:
            message = f"the run was not over within its time-out of {timeout_s:g} s; the text so far is kept:"
        advice = "raise task.timeout_ms or backend.default_task_timeout_ms"
        self._finish(generation, FinishReason.TIMEOUT, DeadlineExceeded(f"{message} {advice}"))

    def _leave_queue(self, generation: Generation) -> None:
        if generation.waits_in_queue:
            generation.waits_in_queue = False
            self._gate.leave()

    def _undo(self, plan: StepPlan) -> None:
        """A decode that was broken off left an unknown part of the batch in the memory: cut back to what was there."""
        for chunk in plan.chunks:
            if not self._context.remove(chunk.stream, chunk.first_position):
                self._memory.clear(chunk.stream)
                self._scheduler.restart(chunk.stream)

    def _sample(self, plan: StepPlan, rows: list[int]) -> list[int | WasiNNError | None]:
        return [
            self._sampled(chunk, row) if chunk.samples else None for chunk, row in zip(plan.chunks, rows, strict=True)
        ]

    def _sampled(self, chunk: Chunk, row: int) -> int | WasiNNError:
        """What a run's settings and grammar make of its logits is its own affair: failing there ends only this run."""
        try:
            return self._generations[chunk.request.id].sampler.sample(self._context, row)
        except WasiNNError as error:
            return error

    def _commit(self, plan: StepPlan, tokens: list[int | WasiNNError | None]) -> None:
        now_s = self._clock()
        self._book.add_step(len(plan.chunks), plan.n_tokens)
        for chunk, token in zip(plan.chunks, tokens, strict=True):
            self._scheduler.commit(chunk)
            if isinstance(token, WasiNNError):
                self._finish(self._generations[chunk.request.id], FinishReason.ERROR, token)
            elif token is not None:
                self._take_token(chunk, token, now_s)

    def _take_token(self, chunk: Chunk, token: int, now_s: float) -> None:
        """Turn a sampled token into output and decide whether the generation goes on."""
        generation = self._generations[chunk.request.id]
        limits = generation.limits
        if generation.first_token_s is None:
            generation.first_token_s = now_s
        ends = self._vocabulary.is_end_of_generation(token)
        if not ends:
            generation.n_tokens_output += 1  # before its text: who reads that may ask for the count at once
        if not ends or limits.keep_end_text:
            generation.publish(generation.assembler.feed(self._piece(token, special=limits.keep_control_text)))
        if ends:
            self._finish(generation, FinishReason.STOP)
            return
        if generation.assembler.stopped:
            self._finish(generation, FinishReason.STOP_STRING)
        elif generation.n_tokens_output == limits.n_tokens_max:
            self._finish(generation, FinishReason.LENGTH)
        elif len(chunk.request.tokens) == self.n_ctx and not self._shift(chunk, limits):
            self._finish(generation, FinishReason.CONTEXT_FULL, self._context_full())
        else:
            self._scheduler.append_sampled(chunk.request, token)

    def _shift(self, chunk: Chunk, limits: GenerationLimits) -> bool:
        """Make room in a full window by cutting tokens out behind its head. False where that is off.

        Rarely and by much: the next decode rotates every cell of the cache again, or computes the rest of the window
        where cells cannot be moved.
        """
        if limits.shift is None:
            return False
        request, stream = chunk.request, chunk.stream
        n_keep = min(limits.shift.n_keep, self.n_ctx // 2)
        n_discard = min(limits.shift.n_discard or (self.n_ctx - n_keep) // 2, self.n_ctx - n_keep)
        if self._memory.shift(stream, n_keep, n_discard):
            self._scheduler.shift(request, n_keep, n_discard)
        else:
            self._move_cells(self._scheduler.shift_by_recomputing(request, n_keep, n_discard))
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
        self._deadlines.add(generation)
        self._scheduler.add(generation.request)

    def _forget_session(self, session_id: int) -> None:
        self._book.forget(session_id)
        self._memory.forget(session_id)

    def _read_statistics(self) -> EngineStatistics:
        return self._book.of_engine(
            n_kv_bytes=self.kv_bytes,
            n_waiting=self._scheduler.n_waiting,
            n_running=self._scheduler.n_running,
            n_threads=self._decoder.n_threads,
        )

    def _finish(self, generation: Generation, reason: FinishReason, error: WasiNNError | None = None) -> None:
        if generation.done:
            return
        self._scheduler.finish(generation.request)
        self._book.add_run(generation)
        self._generations.pop(generation.request.id, None)
        self._deadlines.forget(generation)
        self._leave_queue(generation)
        generation.finish(reason, error, self._clock())

    def _shut_down(self) -> None:
        self._inbox.close()
        self._inbox.carry_out()  # what came in between; from now on the door is closed
        for generation in list(self._generations.values()):
            self._finish(generation, FinishReason.CANCELLED, Cancelled("the backend was closed during the run"))
        self._context.close()
