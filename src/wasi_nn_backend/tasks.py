"""What became of each call's task: one line in the log and one record for whoever listens, and totals by graph.

A task is one prompt that a call brings to an engine, or the texts of one ``Graph.embed``. It is over in the thread of
its caller, not in the engine's: a log that nobody reads, or a listener that is slow, then stops no other task.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from wasi_nn_backend.config import Settings
from wasi_nn_backend.errors import ErrorCode, WasiNNError
from wasi_nn_backend.logs import LogEvent

__all__ = ["FinishedTask", "Task", "TaskBook", "TaskFigures", "TaskIdentity", "TaskKind", "TaskListener", "TaskTotals"]

_log = logging.getLogger(__name__)

TaskKind = Literal["text", "embedding"]

#: The reason of tasks that no engine took. The others are the values of ``output.FinishReason``.
REFUSED: Final = "refused"


@dataclass(frozen=True, slots=True)
class TaskIdentity:
    """``context_id`` is 0 for ``Graph.embed``, ``session_id`` and ``user_id`` are empty where none was configured."""

    request_id: int
    graph: str
    context_id: int
    session_id: str
    user_id: str
    priority: str
    kind: TaskKind


@dataclass(frozen=True, slots=True)
class TaskFigures:
    """Tokens and seconds of a task until now. Of the prompt's tokens ``n_tokens_cached`` were there already;
    ``n_tokens_computed`` went through the model, generated and lost ones included. Times count from the submission:
    ``waited_s`` until there was a place in the batch; ``duration_s`` is 0 until the end."""

    n_tokens_prompt: int = 0
    n_tokens_cached: int = 0
    n_tokens_computed: int = 0
    n_tokens_generated: int = 0
    waited_s: float | None = None
    first_token_s: float | None = None
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True)
class FinishedTask:
    """``reason`` is a ``FinishReason``'s value or ``refused``. ``error`` is the code of what a refused or failed task's
    caller got, else empty."""

    identity: TaskIdentity
    reason: str
    error: str
    figures: TaskFigures

    @property
    def was_accepted(self) -> bool:
        """Whether an engine took it, so that its times mean something."""
        return self.reason != REFUSED

    def log_fields(self) -> dict[str, str | int | float | None]:
        """In the order of the log line; times in milliseconds, None where there is none."""
        identity, figures = self.identity, self.figures
        return {
            "request": identity.request_id,
            "kind": identity.kind,
            "graph": identity.graph,
            "context": identity.context_id,
            "session": identity.session_id,
            "user": identity.user_id,
            "priority": identity.priority,
            "reason": self.reason,
            "error": self.error or None,
            "tokens_prompt": figures.n_tokens_prompt,
            "tokens_cached": figures.n_tokens_cached,
            "tokens_computed": figures.n_tokens_computed,
            "tokens_generated": figures.n_tokens_generated,
            "waited_ms": _milliseconds(figures.waited_s),
            "first_token_ms": _milliseconds(figures.first_token_s),
            "total_ms": _milliseconds(figures.duration_s),
        }


@dataclass(slots=True)
class TaskTotals:
    """All tasks of the graphs of one name since the backend began. ``n_by_reason`` counts those that are over,
    ``n_open`` the others. Of these the tokens computed and generated so far are counted in, and none of the prompt.
    """

    graph: str
    kind: TaskKind
    n_open: int = 0
    n_by_reason: dict[str, int] = field(default_factory=dict)
    n_tokens_prompt: int = 0
    n_tokens_cached: int = 0
    n_tokens_computed: int = 0
    n_tokens_generated: int = 0

    def add_finished(self, reason: str, figures: TaskFigures) -> None:
        self.n_by_reason[reason] = self.n_by_reason.get(reason, 0) + 1
        self.n_tokens_prompt += figures.n_tokens_prompt
        self.n_tokens_cached += figures.n_tokens_cached
        self.n_tokens_computed += figures.n_tokens_computed
        self.n_tokens_generated += figures.n_tokens_generated

    def add_open(self, figures: TaskFigures) -> None:
        self.n_open += 1
        self.n_tokens_computed += figures.n_tokens_computed
        self.n_tokens_generated += figures.n_tokens_generated


TaskListener = Callable[[FinishedTask], None]


class Task:
    """Made when a call comes with a prompt; then ``refuse``, or ``begin`` and ``finish``. Thread-safe."""

    def __init__(self, book: TaskBook, identity: TaskIdentity, *, logs_at_info: bool) -> None:
        self.identity = identity
        self.level = logging.INFO if logs_at_info else logging.DEBUG
        self._book = book
        self._read: Callable[[], TaskFigures] = TaskFigures

    @property
    def figures(self) -> TaskFigures:
        return self._read()

    def begin(self, read: Callable[[], TaskFigures]) -> None:
        """An engine has it. ``read`` gives its figures at any time, from any thread."""
        self._read = read
        self._book.add(self)

    def finish(self, reason: str, error: WasiNNError | None = None) -> None:
        """It is over, and its figures no longer change. Without effect the second time."""
        self._book.close(self, reason, error)

    def refuse(self, error: BaseException) -> None:
        """No engine took it."""
        self._book.close(self, REFUSED, error)


class TaskBook:
    """The tasks of one backend. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: set[Task] = set()
        self._totals: dict[tuple[str, TaskKind], TaskTotals] = {}
        self._listeners: tuple[TaskListener, ...] = ()

    def subscribe(self, listener: TaskListener) -> None:
        """Have ``listener`` called with every task that is over, in its caller's thread."""
        with self._lock:
            self._listeners = (*self._listeners, listener)

    def unsubscribe(self, listener: TaskListener) -> None:
        with self._lock:
            self._listeners = tuple(each for each in self._listeners if each != listener)

    def totals(self) -> tuple[TaskTotals, ...]:
        """By graph and kind. No count ever falls."""
        with self._lock:
            rows = {key: replace(row, n_by_reason=dict(row.n_by_reason)) for key, row in self._totals.items()}
            for task in self._open:
                rows[_key(task)].add_open(task.figures)
        return tuple(rows[key] for key in sorted(rows))

    def new(self, request_id: int, graph: str, context_id: int, settings: Settings, kind: TaskKind) -> Task:
        """For a prompt that came."""
        identity = TaskIdentity(
            request_id,
            graph,
            context_id,
            session_id=settings.session.session_id if context_id else "",
            user_id=settings.task.user_id,
            priority=settings.task.priority,
            kind="embedding" if settings.model.embedding else kind,
        )
        return Task(self, identity, logs_at_info=settings.logging.enable_log)

    # For tasks.

    def add(self, task: Task) -> None:
        with self._lock:
            self._open.add(task)
            self._row(task)

    def close(self, task: Task, reason: str, error: BaseException | None) -> None:
        figures = task.figures
        with self._lock:
            if reason != REFUSED and task not in self._open:
                return
            self._open.discard(task)
            self._row(task).add_finished(reason, figures)
            listeners = self._listeners
        logs = _log.isEnabledFor(task.level)
        if not (logs or listeners):
            return
        finished = FinishedTask(task.identity, reason, _code(reason, error), figures)
        if logs:
            _log.log(task.level, LogEvent("task finished", finished.log_fields()))
        for listener in listeners:
            try:
                listener(finished)
            except Exception:  # its fault must not cost a caller the answer
                _log.exception("a listener to finished tasks failed")

    def _row(self, task: Task) -> TaskTotals:
        key = _key(task)
        row = self._totals.get(key)
        if row is None:
            row = self._totals[key] = TaskTotals(*key)
        return row


def _key(task: Task) -> tuple[str, TaskKind]:
    return task.identity.graph, task.identity.kind


def _code(reason: str, error: BaseException | None) -> str:
    """The other reasons say it all."""
    if reason not in (REFUSED, "error"):
        return ""
    return (error.code if isinstance(error, WasiNNError) else ErrorCode.UNKNOWN).value


def _milliseconds(time_s: float | None) -> float | None:
    return None if time_s is None else round(time_s * 1000, 3)
