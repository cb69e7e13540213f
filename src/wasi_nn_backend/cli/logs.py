"""The library's log on stderr, one line a record. llama.cpp's messages arrive through it as well."""

from __future__ import annotations

import enum
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from wasi_nn_backend.logs import LogOutput, reopen_files

__all__ = ["LogLevel", "open_log", "reopening_files_on_hangup"]


class LogLevel(enum.StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARN = "warn"
    ERROR = "error"
    FATAL = "fatal"


@dataclass(frozen=True, slots=True)
class _Stderr:
    """How the command line logs while no configuration says otherwise."""

    level: str
    enable_debug: bool = False
    timestamps: bool = False
    colors: bool = True
    file: str = ""
    format: str = "text"


def open_log(level: LogLevel | None) -> LogOutput:
    """The command's own output, until it is closed. A level that was asked for holds against configurations."""
    return LogOutput(_Stderr(level or LogLevel.WARN), insists=level is not None)


@contextmanager
def reopening_files_on_hangup() -> Iterator[None]:
    """Programs that rotate logs rename the file and send SIGHUP: for the block, that opens the log files anew.

    A terminal that goes away sends it, too: then the process ends, as it would without this, and so it does when there
    is no log file. Nothing is done where somebody has decided already what SIGHUP means (``nohup``), or outside of the
    main thread.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL:
        yield
        return
    had_terminal = _has_terminal()
    signal.signal(signal.SIGHUP, lambda _signal, _frame: _reopen_or_end(had_terminal=had_terminal))
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _reopen_or_end(*, had_terminal: bool) -> None:
    has_lost_terminal = had_terminal and not _has_terminal()
    if has_lost_terminal or not reopen_files():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGHUP)


def _has_terminal() -> bool:
    """Whether the process has a controlling terminal, wherever its standard streams lead."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
