"""Calls in steps: what a call does until it has to wait for an engine, and what it does after that.

Such a call is written once, as a generator that yields what it waits for. A thread that carries it out blocks there;
with an event loop nobody does, since the engine calls back. The alternative, a coroutine that the blocking calls drive,
needs a loop in every thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from typing import Protocol, TypeAlias, TypeVar

from wasi_nn_backend.engine.waiting import wait_for

__all__ = ["Bell", "Steps", "TextSteps", "WaitPoint", "iterate_steps", "run_steps"]

_T = TypeVar("_T")


class WaitPoint(Protocol):
    """What a call waits for."""

    def when_ready(self, callback: Callable[[], None]) -> None:
        """Call back once, when it is time for the next step: on the thread that made it so, or at once."""

    def cancel(self) -> None:
        """End it soon. Any thread; never blocks; without effect when it is over."""


#: A call; its result is what the generator returns.
Steps: TypeAlias = Generator[WaitPoint, None, _T]
#: A call that gives text in pieces, between its waits.
TextSteps: TypeAlias = Generator[WaitPoint | str, None, None]


def run_steps(steps: Steps[_T]) -> _T:
    """Carry out a call on this thread. What interrupts a wait (Ctrl-C) ends the call first."""
    try:
        while True:
            _block(next(steps))
    except StopIteration as end:
        result: _T = end.value
        return result
    finally:
        steps.close()


def iterate_steps(steps: TextSteps) -> Iterator[str]:
    """The same for one that gives text, which begins with the first ``next`` and ends when the iterator is closed."""
    try:
        for item in steps:
            if isinstance(item, str):
                yield item
            else:
                _block(item)
    finally:
        steps.close()


def _block(point: WaitPoint) -> None:
    ready = threading.Event()
    point.when_ready(ready.set)
    wait_for(ready)


class Bell:
    """Callbacks that are made once, on the thread that rings. Thread-safe.

    Who adds one looks for himself afterwards whether it is time already, and rings then: ringing before costs nothing.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []

    def add(self, callback: Callable[[], None]) -> None:
        with self._lock:
            self._callbacks.append(callback)

    def ring(self) -> None:
        if not self._callbacks:  # most often, and once for every token
            return
        with self._lock:
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()
