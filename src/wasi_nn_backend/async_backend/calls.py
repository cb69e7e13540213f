"""Carries out blocking calls for event loops: what takes a moment on a few threads, what waits for an engine on none.

A call goes on whether or not a loop still runs: its next step is handed to the threads by the engine, and the loop only
hears of its end. A loop that was given up can so never keep a context from being closed.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, ParamSpec, TypeVar

from wasi_nn_backend.engine import Steps, TextSteps, WaitPoint
from wasi_nn_backend.errors import Cancelled
from wasi_nn_backend.llama.interface import ProgressCallback

__all__ = ["CallRunner", "LoadProgress"]

_log = logging.getLogger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")

#: Threads of each kind, made when they are needed. Tokenising and rendering prompts hold the interpreter's lock most of
#: the time, so that more of them would not be faster.
N_THREADS = 4


class CallRunner:
    """``steps`` and ``run`` are for what takes a moment of computing. ``wait`` is for what may wait: for the disk, a
    model, or other calls. Those must have threads of their own, since the calls that they wait for need one to end.
    """

    def __init__(self) -> None:
        self._working = ThreadPoolExecutor(N_THREADS, "wasi-nn-asyncio")
        self._waiting = ThreadPoolExecutor(N_THREADS, "wasi-nn-asyncio-wait")
        self._is_closing = False

    @property
    def is_closing(self) -> bool:
        return self._is_closing

    async def steps(self, steps: Steps[_T]) -> _T:
        """The result of a call in steps."""
        call: _Call[_T] = _Call(steps, self._working)
        return await _result(call.outcome, call.cancel)

    async def next_text(self, steps: TextSteps) -> str | None:
        """The next text of a call in steps; None when there is no more."""
        call: _Call[str | None] = _Call(steps, self._working)
        return await _result(call.outcome, call.cancel)

    async def run(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """The result of a function that takes a moment. It is carried out, whether the task is cancelled or not."""
        return await _result(_submit(self._working, partial(function, *args, **kwargs)), _leave_alone)

    async def wait(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """The result of a function that may have to wait. It is carried out, whether the task is cancelled or not."""
        return await _result(_submit(self._waiting, partial(function, *args, **kwargs)), _leave_alone)

    async def make(self, make: Callable[[], _T], discard: Callable[[_T], object], cancel: Callable[[], object]) -> _T:
        """``wait`` for something that has to be closed: when the task is cancelled, ``cancel`` shall end the making,
        and what was made nevertheless goes to ``discard``."""
        outcome = _submit(self._waiting, make)

        def end() -> None:
            cancel()
            outcome.cancel()

        try:
            return await _result(outcome, end)
        except asyncio.CancelledError:
            if outcome.done() and not outcome.cancelled() and outcome.exception() is None:
                await self.wait(discard, outcome.result())
            raise

    async def close(self, last: Callable[[], None]) -> None:
        """Carry out ``last``, which ends all calls, then end the threads. May be called again, and while it runs."""
        self._is_closing = True
        outcome: Future[None] = Future()

        def end() -> None:
            try:
                last()
            finally:
                self._working.shutdown()
                self._waiting.shutdown()

        # A thread of its own: one of those that end here could not wait for itself.
        thread = threading.Thread(target=_fulfil, args=(outcome, end), name="wasi-nn-asyncio-close")
        thread.start()
        try:
            await _result(outcome, _leave_alone)
        finally:
            thread.join()  # it has nothing more to do


class LoadProgress:
    """What a load tells of its progress: it also hears there that it shall end."""

    def __init__(self, runner: CallRunner, progress: ProgressCallback | None) -> None:
        self._runner = runner
        self._progress = progress
        self._is_cancelled = False

    def cancel(self) -> None:
        self._is_cancelled = True

    def __call__(self, fraction: float) -> bool | None:
        if self._is_cancelled or self._runner.is_closing:
            return False
        return None if self._progress is None else self._progress(fraction)


class _Call(Generic[_T]):
    """One call in steps, or one text of it. Between two steps it is the engine's to call back, and holds no thread."""

    def __init__(self, steps: Generator[WaitPoint | str, None, Any], executor: Executor) -> None:
        self.outcome: Future[_T] = Future()
        self._steps = steps
        self._executor = executor
        self._lock = threading.Lock()
        self._point: WaitPoint | None = None
        self._is_cancelled = False
        self._submit()

    def cancel(self) -> None:
        """Have it end soon. What waits is cancelled now, what computes at its next wait."""
        with self._lock:
            self._is_cancelled = True
            point = self._point
        if point is not None:
            point.cancel()

    def _go_on(self) -> None:
        """The next step, on one of the executor's threads."""
        try:
            if self._is_cancelled and self._point is None:
                self._steps.close()
                raise Cancelled("the call was cancelled before it began")
            found = next(self._steps)
        except StopIteration as end:
            self.outcome.set_result(end.value)
            return
        except BaseException as error:  # for whoever awaits the call
            self.outcome.set_exception(error)
            return
        if isinstance(found, str):
            self.outcome.set_result(found)  # type: ignore[arg-type]  # such steps make a _Call[str | None]
            return
        with self._lock:
            self._point = found
            is_cancelled = self._is_cancelled
        if is_cancelled:
            found.cancel()
        found.when_ready(self._submit)

    def _submit(self) -> None:
        _submit(self._executor, self._go_on)


def _submit(executor: Executor, function: Callable[[], _T]) -> Future[_T]:
    """After the threads have ended the backend is closed, or the interpreter ends: nothing takes long then, and what is
    under way has to come to its end all the same."""
    try:
        return executor.submit(function)
    except RuntimeError:
        outcome: Future[_T] = Future()
        _fulfil(outcome, function)
        return outcome


def _fulfil(outcome: Future[_T], function: Callable[[], _T]) -> None:
    try:
        result = function()
    except BaseException as error:  # for whoever awaits it
        outcome.set_exception(error)
    else:
        outcome.set_result(result)


def _leave_alone() -> None:
    """What cannot be cancelled is waited for."""


async def _result(outcome: Future[_T], cancel: Callable[[], object]) -> _T:
    """Wait for a call. When the task is cancelled, the call is, and the task goes on only when that has ended."""
    loop = asyncio.get_running_loop()
    over = loop.create_future()
    outcome.add_done_callback(lambda _: _tell(loop, over))
    cancelled: asyncio.CancelledError | None = None
    while not over.done():
        try:
            await asyncio.wait([over])
        except asyncio.CancelledError as error:
            cancelled = cancelled or error
            cancel()
    if cancelled is not None:
        raise cancelled
    return outcome.result()


def _tell(loop: asyncio.AbstractEventLoop, over: asyncio.Future[None]) -> None:
    try:
        loop.call_soon_threadsafe(over.set_result, None)
    except RuntimeError:
        _log.debug("a call has ended whose event loop was closed before")
