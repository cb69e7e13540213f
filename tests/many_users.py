"""Many users at once: seeded calls from many threads on the sessions of one graph, and how each of them ended.

Nothing here sleeps: calls are cancelled and contexts are closed when a call has read so many pieces of its text, and
who was refused comes back when others were served.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from wasi_nn_backend import Busy, Cancelled, DeadlineExceeded, ExecutionContext, Graph, InvalidArgument
from wasi_nn_backend.llama import load_llama

Outcome = Literal["text", "timeout", "cancelled", "refused"]
#: What happens when a call has read some pieces: it is cancelled, or the one that came last (which most often still
#: waits) is, or its context is closed. ``whole``: nothing, and nobody reads it in pieces.
Act = Literal["whole", "stream", "cancel", "cancel newest", "close"]

PRIORITIES = ("low", "normal", "high", "urgent")
#: Of all calls. A tenth is cancelled, a twentieth loses its context.
_SHARES: dict[Act, float] = {"cancel": 0.05, "cancel newest": 0.05, "close": 0.05, "stream": 0.2}
_SHARE_TIMED = 0.15
_SHARE_COLLIDING = 0.04  # go to the session of the call before

#: Who was refused comes back when so many others have been served.
_N_SERVED_BETWEEN = 24

#: Of the backend that the calls are made on, beside what is the model's affair.
CONFIG: dict[str, Any] = {
    "temperature": 0,
    "repeat_penalty": 1.0,
    "ignore_eos": True,
    "prompt_mode": "raw",
    "default_task_timeout_ms": 0,
}


@dataclass(frozen=True)
class Call:
    session: int
    prompt: str
    n_tokens: int
    priority: str
    user: str
    timeout_ms: int  # 0: none
    act: Act
    n_pieces: int  # that are read before ``act``

    def config(self) -> dict[str, Any]:
        names = {"priority": self.priority, "user_id": self.user, "timeout_ms": self.timeout_ms}
        return {"max_tokens": self.n_tokens, **names}


@dataclass(frozen=True)
class Ending:
    call: Call
    outcome: Outcome
    text: str


@dataclass(frozen=True)
class Plan:
    """``lengths`` are the numbers of tokens to generate that are drawn from."""

    n_calls: int
    n_sessions: int
    prompts: Sequence[str]
    lengths: Sequence[int]
    timeout_max_ms: int

    def calls(self, seed: int) -> list[Call]:
        chooser = random.Random(seed)
        acts: list[Act] = [act for act, share in _SHARES.items() for _ in range(round(share * self.n_calls))]
        acts += ["whole"] * (self.n_calls - len(acts))
        chooser.shuffle(acts)
        calls: list[Call] = []
        for number, act in enumerate(acts):
            collides = number > 0 and chooser.random() < _SHARE_COLLIDING
            is_timed = chooser.random() < _SHARE_TIMED
            calls.append(
                Call(
                    session=calls[-1].session if collides else number % self.n_sessions,
                    prompt=chooser.choice(self.prompts),
                    n_tokens=chooser.choice(self.lengths),
                    priority=chooser.choice(PRIORITIES),
                    user=f"user {chooser.randrange(8)}",
                    timeout_ms=chooser.randint(1, self.timeout_max_ms) if is_timed else 0,
                    act=act,
                    n_pieces=chooser.randint(1, 4),
                )
            )
        return calls


class Crowd:
    """The sessions of a graph and the threads that call them. Use once."""

    def __init__(self, graph: Graph, n_sessions: int) -> None:
        self._graph = graph
        self._contexts = [self._open(n) for n in range(n_sessions)]
        self._changed = threading.Condition()
        self._n_served = 0  # calls that ended and were not refused
        self._active: dict[int, ExecutionContext] = {}  # by the order in which the calls came
        self._closing: set[int] = set()  # sessions
        self._n_came = 0
        self._acting: list[Future[None]] = []
        self._actors = ThreadPoolExecutor(4)

    def run(self, calls: Sequence[Call], n_threads: int) -> list[Ending]:
        """Make all calls, and close the sessions. Raises what no call may end in."""
        with self._actors, ThreadPoolExecutor(n_threads) as threads:
            endings = list(threads.map(self._make, calls))
        for future in self._acting:
            future.result()
        for context in self._contexts:
            context.close()
        check_nothing_is_left(self._graph)
        return endings

    def _open(self, number: int) -> ExecutionContext:
        return self._graph.init_execution_context({"session_id": f"session {number}"})

    def _make(self, call: Call) -> Ending:
        with self._changed:
            n_served, number = self._n_served, self._n_came
            self._n_came += 1
            context = self._active[number] = self._contexts[call.session]
        try:
            ending = self._ending(context, call)
        except BaseException:
            self._leave(number, was_served=True)
            raise
        self._leave(number, was_served=ending.outcome != "refused")
        if ending.outcome == "refused":  # this thread comes back later, or it would use up all calls
            with self._changed:
                self._changed.wait_for(lambda: self._n_served >= n_served + _N_SERVED_BETWEEN or not self._active)
        return ending

    def _leave(self, number: int, *, was_served: bool) -> None:
        with self._changed:
            del self._active[number]
            self._n_served += was_served
            self._changed.notify_all()

    def _ending(self, context: ExecutionContext, call: Call) -> Ending:
        try:
            return Ending(call, "text", self._text(context, call))
        except DeadlineExceeded:
            return Ending(call, "timeout", "")
        except Cancelled:
            return Ending(call, "cancelled", "")
        except Busy:
            return Ending(call, "refused", "")
        except InvalidArgument as error:
            if "is closed" not in str(error):
                raise
            return Ending(call, "refused", "")  # it came after another call's context was closed

    def _text(self, context: ExecutionContext, call: Call) -> str:
        if call.act == "whole":
            return context.run_inference(call.prompt, call.config())
        pieces = []
        for piece in context.stream(call.prompt, call.config()):
            pieces.append(piece)
            if len(pieces) == call.n_pieces:
                self._act(context, call)
        return "".join(pieces)

    def _act(self, context: ExecutionContext, call: Call) -> None:
        """On another thread: whoever cancels or closes is rarely the one who reads."""
        act: Callable[[], None] | None = {
            "cancel": context.cancel,
            "cancel newest": self._cancel_newest,
            "close": lambda: self._close(context, call.session),
        }.get(call.act)
        if act is not None:
            self._acting.append(self._actors.submit(act))

    def _cancel_newest(self) -> None:
        with self._changed:
            newest = max(self._active, default=None)
            context = None if newest is None else self._active[newest]
        if context is not None:
            context.cancel()

    def _close(self, context: ExecutionContext, number: int) -> None:
        """And open the session anew."""
        with self._changed:
            if self._contexts[number] is not context or number in self._closing:
                return  # a call that collided with this one does it
            self._closing.add(number)
        context.close()
        self._contexts[number] = self._open(number)
        self._closing.discard(number)


def count_outcomes(endings: Sequence[Ending]) -> Counter[Outcome]:
    return Counter(ending.outcome for ending in endings)


def texts_alone(graph: Graph, plan: Plan) -> dict[tuple[str, int], str]:
    """What each prompt gives for each length where nobody else computes."""
    with graph.init_execution_context({"enable_token_cache_reuse": False}) as context:
        return {
            (prompt, n_tokens): context.run_inference(prompt, {"max_tokens": n_tokens})
            for prompt in plan.prompts
            for n_tokens in plan.lengths
        }


def check_nothing_is_left(graph: Graph) -> None:
    """After all contexts were closed: no run, no cell, no session."""
    figures = graph.statistics()
    assert (figures.n_waiting, figures.n_running) == (0, 0)
    assert (figures.n_cells_used, figures.n_tokens_cached, figures.n_host_bytes) == (0, 0, 0)
    assert graph.contexts() == []


@contextmanager
def leaves_nothing() -> Iterator[None]:
    """The block ends with the threads and open files that it began with."""
    load_llama()  # has files of its own open from the first time on
    n_threads, files = threading.active_count(), Path("/proc/self/fd")
    n_files = len(list(files.iterdir())) if files.is_dir() else None
    yield
    assert threading.active_count() == n_threads
    assert n_files is None or len(list(files.iterdir())) == n_files
