"""One run of a session's prompt: from settings to a generation in the engine, and what its caller reads of it."""

from __future__ import annotations

from collections.abc import Callable

from wasi_nn_backend.config import Settings
from wasi_nn_backend.config.session import SessionSettings
from wasi_nn_backend.engine import N_CELLS_RESERVED, EngineLease, Generation, GenerationLimits, ShiftPolicy
from wasi_nn_backend.errors import Cancelled, PromptTooLong, UnsupportedOperation, WasiNNError
from wasi_nn_backend.llama.interface import Model, Sampler
from wasi_nn_backend.output import (
    FinishReason,
    ReasoningSplitter,
    RunMetadata,
    ToolCall,
    parse_tool_calls,
    split_reasoning,
    tool_names,
)
from wasi_nn_backend.sampling import GrammarSampler, ProbabilityRecorder, build_stages, n_tokens_seen, open_grammar
from wasi_nn_backend.scheduler import Request
from wasi_nn_backend.session.embedding import EmbeddingRun, start_embedding
from wasi_nn_backend.session.session import Prompt, Session
from wasi_nn_backend.tasks import Task, TaskFigures

__all__ = ["AnyRun", "Run", "count_prompt_tokens", "start_run"]

_PRIORITIES = ("low", "normal", "high", "urgent")

#: How many tokens a token-by-token run may be ahead of its caller, so that the callers' steps can still be batched: at
#: first and, by one more for each token that is taken, at most. What a caller never takes is computed for nothing.
_N_TOKENS_AHEAD_FIRST = 2
_N_TOKENS_AHEAD_MAX = 8
#: The engine is told when so many more may be generated, and sooner where it would run dry.
_N_TOKENS_PER_GRANT = 4


class Run:
    """A generation, the lease that keeps its engine alive, and how much of it the caller has taken.

    What callers see is the answer: without the model's reasoning, unless ``settings.reasoning`` keeps it there.
    """

    def __init__(
        self,
        generation: Generation,
        lease: EngineLease,
        task: Task,
        prompt: Prompt,
        settings: SessionSettings,
        *,
        single: bool,
    ) -> None:
        self.prompt = prompt
        self.last_piece = b""
        self.is_single = single
        self._generation = generation
        self._lease = lease
        self._task = task
        self._settings = settings
        self._splitter = None if settings.reasoning == "keep" else ReasoningSplitter(is_open=prompt.opens_reasoning)
        self._taken = bytearray()
        self._n_tokens_taken = 0
        self._n_tokens_granted = _N_TOKENS_AHEAD_FIRST
        task.begin(self._figures)

    @property
    def lease(self) -> EngineLease:
        return self._lease

    @property
    def text(self) -> bytes:
        """What was generated, or taken in a token-by-token run, which is a little ahead of its caller."""
        if self.is_single:
            return bytes(self._taken)
        text = self._generation.text
        return text if self._splitter is None else self._split(text)[0]

    @property
    def finish_reason(self) -> FinishReason | None:
        return self._generation.finish_reason

    @property
    def has_started(self) -> bool:
        """Whether it was ever given a place in the batch."""
        return self._generation.request.has_started

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until the run is over; False after ``timeout_s``."""
        return self._generation.wait(timeout_s)

    def when_ready(self, callback: Callable[[], None]) -> None:
        """Call back once, on the engine's thread or at once: where pieces are taken when ``take_piece`` need not wait,
        else when the run is over."""
        if self._lease.engine.is_foreign:
            self.cancel()  # nobody would ever call back
        self._generation.when_ready(callback)

    def cancel(self, error: Cancelled | None = None) -> None:
        """Any thread, the garbage collector's too; without effect when it is over. ``error``: what its caller gets."""
        self._lease.engine.cancel(self._generation, error)

    def end(self) -> None:
        """Stop it if it still runs, wait until it is over, and tell what it did."""
        self.cancel()
        self.wait()
        reason = self._generation.finish_reason or FinishReason.ERROR
        self._task.finish(reason.value, self._generation.error)

    def _figures(self) -> TaskFigures:
        request, generation = self._generation.request, self._generation
        start_s, end_s, first_s = generation.submitted_s, generation.finished_s, generation.first_token_s
        left_queue_s = end_s if generation.started_s is None else generation.started_s
        return TaskFigures(
            n_tokens_prompt=request.n_tokens_prompt,
            n_tokens_cached=request.n_tokens_reused,
            n_tokens_computed=request.n_tokens_decoded,
            n_tokens_generated=generation.n_tokens_output,
            waited_s=None if left_queue_s is None else left_queue_s - start_s,
            first_token_s=None if first_s is None else first_s - start_s,
            duration_s=0.0 if end_s is None else end_s - start_s,
        )

    def take_piece(self) -> bytes | None:
        """The next token's text (perhaps empty), waiting for it; None when the run is over."""
        piece = self._generation.next_piece()
        if piece is None:
            rest = b"" if self._splitter is None else self._splitter.finish()
            self.last_piece = rest
            self._taken += rest
            return rest or None
        self.last_piece = piece.text if self._splitter is None else self._splitter.feed(piece.text)
        if self.is_single:
            self._taken += self.last_piece
            self._n_tokens_taken += 1
            self._grant()
        return self.last_piece

    def _grant(self) -> None:
        """Let the engine go on, further ahead of a caller who has taken more."""
        n_taken, n_granted = self._n_tokens_taken, self._n_tokens_granted
        n_more = n_taken + min(_N_TOKENS_AHEAD_FIRST + n_taken, _N_TOKENS_AHEAD_MAX) - n_granted
        runs_dry = n_granted - n_taken <= _N_TOKENS_AHEAD_FIRST
        if n_more and (runs_dry or n_more >= _N_TOKENS_PER_GRANT) and not self._generation.done:
            self._lease.engine.grant(self._generation, n_more)
            self._n_tokens_granted += n_more

    def raise_error(self) -> None:
        """Raise what ended the run early, as an exception of the caller's own: others may have got the same."""
        error = self._generation.error
        if error is not None:
            raise type(error)(str(error)) from error

    def _split(self, text: bytes) -> tuple[bytes, bytes]:
        """(answer, reasoning)"""
        return split_reasoning(text, is_open=self.prompt.opens_reasoning)

    def _reasoning(self) -> str | None:
        if self._settings.reasoning != "separate" or self._splitter is None:
            return None
        reasoning = self._splitter.reasoning if self.is_single else self._split(self._generation.text)[1]
        return reasoning.decode(errors="replace")

    def _tool_calls(self) -> tuple[ToolCall, ...] | None:
        """Not out of the reasoning, where a model only thinks of calling. None where there are neither tools nor calls:
        a prompt in raw mode may tell of tools too."""
        answer = self.text if self._splitter is not None else self._split(self.text)[0]
        calls = parse_tool_calls(answer.decode(errors="replace"), tool_names(self._settings.tools))
        return calls if calls or self._settings.tools else None

    def metadata(self, build_number: int, build_commit: str) -> RunMetadata:
        generation = self._generation
        n_tokens_output = generation.n_tokens_output
        if self.is_single:
            n_tokens_output = min(n_tokens_output, self._n_tokens_taken)
        recorder = generation.sampler
        probabilities = recorder.positions(n_tokens_output) if isinstance(recorder, ProbabilityRecorder) else None
        start_s, first_s, end_s = generation.submitted_s, generation.first_token_s, generation.finished_s
        return RunMetadata(
            n_tokens_input=generation.request.n_tokens_prompt,
            n_tokens_output=n_tokens_output,
            build_number=build_number,
            build_commit=build_commit,
            finish_reason=generation.finish_reason,
            n_tokens_reused=generation.request.n_tokens_reused,
            n_tokens_shared=generation.request.n_tokens_shared,
            n_tokens_shifted=generation.request.n_tokens_shifted,
            n_tokens_recomputed=generation.request.n_tokens_recomputed,
            time_to_first_token_ms=None if first_s is None else round((first_s - start_s) * 1000, 3),
            duration_ms=None if end_s is None else round((end_s - start_s) * 1000, 3),
            probabilities=probabilities,
            reasoning=self._reasoning(),
            tool_calls=self._tool_calls(),
        )


#: What a session runs: text or a vector.
AnyRun = Run | EmbeddingRun


def count_prompt_tokens(session: Session, lease: EngineLease | None, settings: Settings) -> int | None:
    """Tokens of the pending prompt; None without one. What is wrong with it is for its run to say: 0 then."""
    if not session.has_input:
        return None
    if lease is None:  # the graph was unloaded
        return 0
    try:
        return len(_read_prompt(session, lease, settings).tokens)
    except WasiNNError:
        return 0


def _read_prompt(session: Session, lease: EngineLease, settings: Settings) -> Prompt:
    if settings.model.embedding:  # of one text, without a history that could be too long
        return session.prompt(lease.model, settings, n_tokens_max=0)
    return session.prompt(lease.model, settings, lease.engine.n_ctx - N_CELLS_RESERVED)


def start_run(
    session: Session, lease: EngineLease, settings: Settings, task: Task, *, streams: bool, single: bool = False
) -> AnyRun:
    """Submit a session's pending prompt to the leased engine, which the run then owns.

    Raises ``InvalidArgument`` (no prompt, a template's refusal, a grammar that cannot be used), ``PromptTooLong``,
    ``UnsupportedOperation`` (``single`` in embedding mode) and ``Busy`` (too many wait); the lease is the caller's
    then.
    """
    try:
        return _submit(session, lease, settings, task, streams=streams, single=single)
    except BaseException as error:
        task.refuse(error)
        raise


def _submit(
    session: Session, lease: EngineLease, settings: Settings, task: Task, *, streams: bool, single: bool
) -> AnyRun:
    if settings.model.embedding:
        if single:
            raise UnsupportedOperation("model.embedding is on: a vector has no tokens to take one by one: call compute")
        return start_embedding(lease, _read_prompt(session, lease, settings), task)
    engine, model = lease.engine, lease.model
    prompt = _read_prompt(session, lease, settings)
    if len(prompt.tokens) > engine.n_ctx - N_CELLS_RESERVED:
        raise PromptTooLong(
            f"the prompt has {len(prompt.tokens)} tokens and the context window {engine.n_ctx}, of which "
            f"{N_CELLS_RESERVED} stay free: shorten the prompt, start a new context or raise model.n_ctx"
        )
    sampler = _open_sampler(model, settings, engine.n_ctx, prompt)
    request = Request(
        id=task.identity.request_id,
        session_id=session.id,
        tokens=list(prompt.tokens),
        credit_tokens=_N_TOKENS_AHEAD_FIRST if single else None,
        salt=settings.session.cache_salt,
        priority=_PRIORITIES.index(settings.task.priority),
        user=settings.task.user_id or f"session {session.id}",
    )
    generation = Generation(request, sampler, _limits(settings, prompt, single=single), streams=streams or single)
    try:
        engine.submit(generation)
    except BaseException:
        sampler.close()
        raise
    return Run(generation, lease, task, prompt, settings.session, single=single)


def _open_sampler(model: Model, settings: Settings, n_ctx: int, prompt: Prompt) -> Sampler:
    """Repetition is punished from the prompt on, as llama.cpp's own programs do."""
    stages = build_stages(settings, model.vocabulary, n_ctx)
    grammar = open_grammar(settings.sampling, model.vocabulary)
    plain = model.create_sampler(stages)
    sampler: Sampler = plain if grammar is None else GrammarSampler(plain, grammar, model.vocabulary)
    for token in prompt.tokens[max(0, len(prompt.tokens) - n_tokens_seen(stages)) :]:
        sampler.accept(token)
    n_probs = settings.sampling.n_probs
    return ProbabilityRecorder(sampler, model.vocabulary, n_probs) if n_probs else sampler


def _shift_policy(settings: Settings) -> ShiftPolicy | None:
    """A run without a limit on its tokens ends when the window is full: shifting, it would never end."""
    memory = settings.memory
    if not memory.context_shifting or settings.stopping.max_tokens < 0:
        return None
    return ShiftPolicy(memory.n_keep_tokens, memory.n_discard_tokens)


def _limits(settings: Settings, prompt: Prompt, *, single: bool) -> GenerationLimits:
    """A token-by-token run takes as long as its caller takes between the tokens: it has no time-out."""
    stopping, timeout_ms = settings.stopping, settings.task.timeout_ms
    if timeout_ms is None:
        timeout_ms = settings.backend.default_task_timeout_ms
    stops = [stop.encode() for stop in (*stopping.stop, stopping.reverse_prompt) if stop]
    return GenerationLimits(
        n_tokens_max=None if stopping.max_tokens < 0 else stopping.max_tokens,
        stops=(*stops, *prompt.stops),
        duration_max_s=stopping.max_time_ms / 1000 if stopping.max_time_ms else None,
        timeout_s=timeout_ms / 1000 if timeout_ms and not single else None,
        shift=_shift_policy(settings),
        keep_control_text=settings.session.keep_control_text or settings.session.special,
        keep_end_text=settings.session.special,
    )
