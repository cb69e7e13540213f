"""Ctrl-C and SIGTERM for work that spends its time in native code.

Python runs a signal's handler between two byte codes of the main thread, so a main thread inside llama.cpp or wasmtime
is deaf until it comes back. Here the work runs on a second thread, and the main thread does nothing but wait for it or
for a signal. The alternative, ``KeyboardInterrupt`` raised wherever the main thread happens to be, also reaches code
that holds locks and callbacks that native code calls, where it is lost.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, NoReturn, TypeVar

from wasi_nn_backend.cli.exit_codes import ExitCode
from wasi_nn_backend.cli.termination import Terminated

__all__ = ["Cancellation", "run_interruptibly"]

_log = logging.getLogger(__name__)

T = TypeVar("T")

#: A cancel that arrives just before the work reaches the place where it can be cancelled has no effect, so it is
#: repeated until the work has ended.
_REPEAT_S = 0.05
#: How long a terminated process waits for its work. Service managers kill what takes long, and logs would stay open.
_TERMINATION_MAX_S = 2.5

_SHOW_CURSOR = b"\x1b[?25h"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Cancellation:
    """Tells the work that the person at the terminal wants it to end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requested = False
        self._hooks: list[Callable[[], None]] = []

    @property
    def requested(self) -> bool:
        return self._requested

    def request(self) -> None:
        """Call the hooks of all open ``calling`` blocks, each time."""
        with self._lock:
            self._requested = True
            hooks = list(self._hooks)
        for hook in hooks:
            hook()

    @contextmanager
    def calling(self, hook: Callable[[], None]) -> Iterator[None]:
        """While the block runs, a request calls ``hook`` (any thread); at once if the request came before."""
        with self._lock:
            self._hooks.append(hook)
            already_requested = self._requested
        try:
            if already_requested:
                hook()
            yield
        finally:
            with self._lock:
                self._hooks.remove(hook)


class _Outcome(Generic[T]):
    """What the work returned or raised."""

    def __init__(self, work: Callable[[Cancellation], T], cancellation: Cancellation) -> None:
        self._error: BaseException | None = None
        try:
            self._value = work(cancellation)
        except BaseException as error:  # carried to the thread that waits, which raises it
            self._error = error

    def value(self) -> T:
        if self._error is not None:
            raise self._error
        return self._value

    @property
    def error(self) -> BaseException | None:
        return self._error


class _Wakeup:
    """A pipe into which Python's signal handling writes the signal's number, and the work's thread a 0 when it ends.

    A main thread that waits for a lock or a queue sleeps on where the kernel hands the signal to another thread, or
    hands it over just before the wait begins: under load that lost one Ctrl-C in five. A byte in a pipe is not lost.
    """

    WORK_HAS_ENDED = 0

    def __init__(self) -> None:
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)  # as set_wakeup_fd demands: a handler must not wait for a reader
        self._previous_fd = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._previous_handlers = {number: signal.signal(number, lambda _signal, _frame: None) for number in _SIGNALS}

    def work_has_ended(self) -> None:
        os.write(self._write_end, bytes([self.WORK_HAS_ENDED]))

    def wait(self, timeout_s: float | None = None) -> int | None:
        """The next byte, or None after ``timeout_s``."""
        readable, _, _ = select.select([self._read_end], [], [], timeout_s)
        return os.read(self._read_end, 1)[0] if readable else None

    def close(self) -> set[int]:
        """Returns the signals that came too late for ``wait``: the process was told all the same.

        Only after the work has ended, or for a process that ends too: the work's thread writes to the pipe.
        """
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        os.close(self._write_end)
        unread = set(os.read(self._read_end, 4096)) if select.select([self._read_end], [], [], 0)[0] else set()
        os.close(self._read_end)
        return unread & set(_SIGNALS)


def run_interruptibly(work: Callable[[Cancellation], T]) -> T:
    """Run ``work`` to its end and return or raise what it does.

    Ctrl-C requests the cancellation, waits for the work to end and raises ``KeyboardInterrupt``; a second Ctrl-C ends
    the process without waiting. SIGTERM does the same and raises ``Terminated``, and waits no longer than 2.5 seconds.
    Only the main thread can listen for signals; on others the work simply runs.
    """
    cancellation = Cancellation()
    if threading.current_thread() is not threading.main_thread():
        return work(cancellation)
    outcomes: list[_Outcome[T]] = []
    wakeup = _Wakeup()

    def run_and_tell() -> None:
        outcomes.append(_Outcome(work, cancellation))
        wakeup.work_has_ended()

    threading.Thread(target=run_and_tell, name="wasi-nn-command", daemon=True).start()
    try:
        is_terminated = _wait(wakeup, cancellation)
    finally:
        late = wakeup.close()
    (outcome,) = outcomes
    if cancellation.requested and outcome.error is not None:
        _log.debug("the work ended after a signal", exc_info=outcome.error)
    if is_terminated or signal.SIGTERM in late:
        raise Terminated
    if cancellation.requested or late:
        raise KeyboardInterrupt
    return outcome.value()


def _wait(wakeup: _Wakeup, cancellation: Cancellation) -> bool:
    """Until the work has ended; returns whether SIGTERM came."""
    end_s: float | None = None  # from SIGTERM on
    while (event := wakeup.wait(_REPEAT_S if cancellation.requested else None)) != _Wakeup.WORK_HAS_ENDED:
        if event == signal.SIGINT and cancellation.requested:
            _leave(ExitCode.INTERRUPTED)
        if event == signal.SIGTERM and end_s is None:
            end_s = time.monotonic() + _TERMINATION_MAX_S
        if end_s is not None and time.monotonic() >= end_s:
            _log.warning("the work does not end: terminated without it")
            _leave(ExitCode.TERMINATED)
        if event in (*_SIGNALS, None):
            cancellation.request()
    return end_s is not None


def _leave(status: ExitCode) -> NoReturn:
    """Not sys.exit: it would wait for, or pull the interpreter from under, the thread that does not end."""
    logging.shutdown()
    sys.stderr.flush()
    if os.isatty(2):
        os.write(2, _SHOW_CURSOR)  # a line that was being drawn has hidden it
    os._exit(status)
