"""How the set-up scripts talk to a person: one-line failures, and a sign of life while something takes long."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import NoReturn, TextIO

#: A log gets a line this often: often enough for CI systems that end silent jobs, rare enough to read.
LOG_INTERVAL_S = 30.0


def say(message: str) -> None:
    """Print one line of normal output, at once even into a pipe."""
    print(f"setup: {message}", flush=True)


def fail(message: str) -> NoReturn:
    """End the program with status 1 and one line that says what to do.

    Raises:
        SystemExit: always.
    """
    raise SystemExit(f"setup: {message}")


def duration_text(seconds: float) -> str:
    """Minutes and seconds, such as ``4:07``."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Progress:
    """Shows one updating line on a terminal, and a line every 30 s in a log.

    Call ``show`` as often as convenient: it decides itself whether to write.
    """

    def __init__(self, stream: TextIO = sys.stdout, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._is_terminal = stream.isatty()
        self._start_s = clock()
        self._last_written_s = self._start_s

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._start_s

    def show(self, status: str) -> None:
        now_s = self._clock()
        line = f"setup: {status}, {duration_text(now_s - self._start_s)} so far"
        if self._is_terminal:
            self._stream.write(f"\r\x1b[K{line}")
        elif now_s - self._last_written_s >= LOG_INTERVAL_S:
            self._stream.write(f"{line}\n")
            self._last_written_s = now_s
        self._stream.flush()

    def finish(self) -> None:
        """Take the updating line away, so that the next output starts at the left edge."""
        if self._is_terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
