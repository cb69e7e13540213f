"""llama.cpp's log, as records of the logger ``wasi_nn_backend.llama``.

llama.cpp says some 200 lines at its level INFO for each model that it loads: they become DEBUG, and its own DEBUG lines
go below that, so that a program at level INFO sees warnings and errors only.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import threading

from wasi_nn_backend.llama.bindings import libc, native

__all__ = ["Collector", "LogBridge"]

#: Below logging.DEBUG: llama.cpp's own debug lines, several for each layer.
TRACE = 5

# ggml_log_level in ggml.h; the binding's own table has the order of an older llama.cpp.
_LEVELS = {0: TRACE, 1: TRACE, 2: logging.DEBUG, 3: logging.WARNING, 4: logging.ERROR}
_CONTINUATION = 5  # more text for the line before


class _Line(threading.local):
    """The unfinished line of one thread and what it collects; a line may arrive in several pieces."""

    def __init__(self) -> None:
        self.level = logging.DEBUG
        self.text = ""
        self.collector: Collector | None = None


class Collector:
    """While active, this thread's error lines are kept in ``errors`` and logged at DEBUG: the caller raises them.

    ``quiet`` does the same to warnings, for calls in which llama.cpp warns of the ordinary (no room, aborted). An
    exception that a signal handler raised inside the log callback is raised at the end of the block, as ctypes would
    drop it. Reusable, not nestable.
    """

    __slots__ = ("_line", "errors", "interrupt", "quiet")

    def __init__(self, line: _Line, *, quiet: bool) -> None:
        self._line = line
        self.quiet = quiet
        self.errors: list[str] = []
        self.interrupt: BaseException | None = None

    def __enter__(self) -> Collector:
        self.errors.clear()
        self._line.collector = self
        return self

    def __exit__(self, *_error: object) -> None:
        self._line.collector = None
        if self.interrupt is not None:
            interrupt, self.interrupt = self.interrupt, None
            raise interrupt

    def reason(self) -> str:
        """What llama.cpp complained of, its function names cut off, for the end of a message."""
        parts = [error.split(": ", 1)[-1].strip() for error in self.errors]
        return "; ".join(dict.fromkeys(part for part in parts if part)) or "it gave no reason"


class LogBridge:
    """Installed once, for the life of the process: llama.cpp has a single log callback."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._line = _Line()
        self._callback = native.llama_log_callback(self._on_text)  # kept: ctypes would free it under llama.cpp's hands
        native.llama_log_set(self._callback, ctypes.c_void_p(0))
        atexit.register(self._detach)

    def collector(self, *, quiet: bool = False) -> Collector:
        return Collector(self._line, quiet=quiet)

    @staticmethod
    def _detach() -> None:
        """Give llama.cpp a callback that is no Python: it logs from static destructors and from daemon threads, too.

        ``abs`` takes an int, which the level is, and does nothing. NULL would bring back llama.cpp's own, which prints.
        """
        absolute = ctypes.cast(libc.abs, native.llama_log_callback)
        native.llama_log_set(absolute, ctypes.c_void_p(0))

    def _on_text(self, level: int, text: bytes, _user_data: object) -> None:
        line = self._line
        try:
            self._take(line, level, text.decode("utf-8", "replace"))
        except BaseException as error:  # nothing may pass through a C caller; Ctrl-C arrives here, too
            if line.collector is not None:
                line.collector.interrupt = error

    def _take(self, line: _Line, level: int, text: str) -> None:
        if level != _CONTINUATION:
            self._flush(line)
            line.level = _LEVELS.get(level, logging.DEBUG)
        *complete, rest = (line.text + text).split("\n")
        for line.text in complete:
            self._flush(line)
        line.text = rest

    def _flush(self, line: _Line) -> None:
        text, line.text = line.text.rstrip(), ""
        if not text.strip(" ."):  # empty, or the dots of llama.cpp's own progress bar
            return
        level, collector = line.level, line.collector
        if collector is not None:
            if level >= logging.ERROR:
                collector.errors.append(text)
                level = logging.DEBUG
            elif collector.quiet:
                level = min(level, logging.DEBUG)
        self._logger.log(level, "%s", text)
