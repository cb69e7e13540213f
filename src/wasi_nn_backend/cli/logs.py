"""The library's log on stderr, one line a record. llama.cpp's messages arrive through it as well."""

from __future__ import annotations

import copy
import enum
import logging
import sys

__all__ = ["LogLevel", "configure_logging"]

_LIBRARY_LOGGER = "wasi_nn_backend"


class LogLevel(enum.StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARN = "warn"
    ERROR = "error"


class _StderrHandler(logging.Handler):
    """Looks ``sys.stderr`` up for each record, so that lines go above a progress bar that is drawn there."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr)
        except Exception:  # the contract of logging: a broken log must not break the program
            self.handleError(record)


class _Formatter(logging.Formatter):
    """``level: message``; tracebacks only where they are asked for."""

    def __init__(self, *, shows_tracebacks: bool) -> None:
        super().__init__()
        self._shows_tracebacks = shows_tracebacks

    def format(self, record: logging.LogRecord) -> str:
        if not self._shows_tracebacks:
            record = copy.copy(record)  # other handlers may want the traceback
            record.exc_info = record.exc_text = None
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:
        level = {"WARNING": "warn", "CRITICAL": "error"}.get(record.levelname, record.levelname.lower())
        return f"{level}: {record.message.rstrip()}"


def configure_logging(level: LogLevel) -> None:
    """Replace what an earlier call set up; other libraries' loggers stay as they are."""
    logger = logging.getLogger(_LIBRARY_LOGGER)
    for handler in [handler for handler in logger.handlers if isinstance(handler, _StderrHandler)]:
        logger.removeHandler(handler)
    handler = _StderrHandler()
    handler.setFormatter(_Formatter(shows_tracebacks=level is LogLevel.DEBUG))
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if level is LogLevel.WARN else level.value.upper())
