"""What a person sees besides the answer: loading progress, what it waits for, and statistics, all on stderr."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from wasi_nn_backend.cli.interrupts import Cancellation

if TYPE_CHECKING:
    from rich.progress import Progress

    from wasi_nn_backend.host.runner import StartTimer

__all__ = ["format_bytes", "format_count", "load_progress", "waiting_line", "write_answer"]

#: Lines that come and go at once would only flicker.
_WAITING_SHOWN_AFTER_S = 0.5


def write_answer(text: str) -> None:
    """Write a piece of a model's answer to stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def load_progress(label: str, cancellation: Cancellation) -> Iterator[Callable[[float], bool]]:
    """A progress callback for ``load_by_name``: draws a bar where stderr is a terminal that can show one, and cancels
    after Ctrl-C."""
    if not _stderr_can_draw():
        yield lambda _fraction: not cancellation.requested
        return
    # Imported here: rich takes longer to import than most commands take to print their help.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=1.0)

        def report(fraction: float) -> bool:
            progress.update(task, completed=fraction)
            return not cancellation.requested

        yield report


@contextmanager
def waiting_line(label: str, *, start_timer: StartTimer | None = None) -> Iterator[Callable[[], None]]:
    """After half a second a line with the time that went by, where stderr is a terminal that can show one. It goes when
    the block ends or what is yielded is called, which must come before anything is written to the same terminal."""
    if not _stderr_can_draw():
        yield lambda: None
        return
    line = _WaitingLine(label)
    timer = (start_timer or _start_thread_timer)(_WAITING_SHOWN_AFTER_S, line.show)
    try:
        yield line.end
    finally:
        timer.cancel()
        line.end()


class _WaitingLine:
    """Shown by a timer's thread, ended by the one that waits; once ended, it is never shown."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._lock = threading.Lock()
        self._progress: Progress | None = None
        self._has_ended = False

    def show(self) -> None:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        with self._lock:
            if self._has_ended:
                return
            console = Console(stderr=True)
            self._progress = Progress(
                *columns, console=console, transient=True, redirect_stdout=False, refresh_per_second=4
            )
            self._progress.add_task(self._label, total=None)
            self._progress.start()

    def end(self) -> None:
        with self._lock:
            self._has_ended = True
            progress, self._progress = self._progress, None
            if progress is not None:
                progress.stop()


def _stderr_can_draw() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _start_thread_timer(delay_s: float, action: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(delay_s, action)
    timer.daemon = True
    timer.start()
    return timer


def format_bytes(n_bytes: int) -> str:
    """``1536`` as ``1.5 KiB``."""
    size = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{_short(size)} {unit}"
        size /= 1024
    return f"{_short(size)} TiB"


def _short(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")


def format_count(count: int) -> str:
    """``134515008`` as ``134.5 million``."""
    for threshold, unit in ((10**9, "billion"), (10**6, "million")):
        if count >= threshold:
            return f"{_short(count / threshold)} {unit}"
    return f"{count:,}"
