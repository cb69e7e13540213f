"""The library's log: where the records of the logger ``wasi_nn_backend`` go once somebody configures it.

Like every library this one says nothing by itself: the package gives its logger a ``NullHandler``, and programs with a
logging set-up of their own get the records through that. The root logger is never touched. A ``logging`` section in the
configuration opens a ``LogOutput`` beside whatever the program has; records of all backends of a process go to all
outputs.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Final, Protocol

__all__ = ["LIBRARY_LOGGER", "TRACE", "LogEvent", "LogOptions", "LogOutput", "has_outputs", "reopen_files"]

LIBRARY_LOGGER: Final = "wasi_nn_backend"

#: Below ``logging.DEBUG``: llama.cpp's own debug lines.
TRACE: Final = 5

_LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "fatal": logging.CRITICAL,
}
#: The least number of each level that lines are marked with, and its colour (ANSI).
_MARKS: Final = (
    (logging.CRITICAL, "fatal", "1;31"),
    (logging.ERROR, "error", "31"),
    (logging.WARNING, "warn", "33"),
    (logging.INFO, "info", "32"),
    (logging.DEBUG, "debug", "36"),
    (0, "trace", "2"),
)

#: What a field's text needs no quotes for.
_PLAIN_TEXT: Final = re.compile(r"[\w./:@+-]+")

#: Outputs are opened and closed by any thread; the handlers themselves have locks of their own.
_LOCK: Final = threading.Lock()


class LogEvent:
    """A message with fields, for people and programs: ``message key=value ...`` as text, members of their own in JSON.

    Texts that hold more than letters, digits and ``._/:@+-`` are quoted as in JSON, so that a name with a space or a
    line end stays one value on one line. Fields that are None are left out of the text.
    """

    __slots__ = ("fields", "message")

    def __init__(self, message: str, fields: Mapping[str, str | int | float | None]) -> None:
        self.message = message
        self.fields = fields

    def __str__(self) -> str:
        pairs = [f"{key}={_field_text(value)}" for key, value in self.fields.items() if value is not None]
        return " ".join((self.message, *pairs))


class LogOptions(Protocol):
    """What the configuration's ``LoggingSettings`` say. A protocol, since the command line needs a log before it has
    time to import those."""

    @property
    def level(self) -> str: ...

    @property
    def enable_debug(self) -> bool: ...

    @property
    def timestamps(self) -> bool: ...

    @property
    def colors(self) -> bool: ...

    @property
    def file(self) -> str: ...

    @property
    def format(self) -> str: ...


class LogOutput:
    """One user's claim on a place that records go to, from creation to ``close``.

    Users of one place (standard error, or one file) share it, so that no line appears twice there: the settings of the
    one who came last hold, or of the last who ``insists``. A file that cannot be opened is a warning on standard error,
    where the lines then go.
    """

    def __init__(self, settings: LogOptions, *, insists: bool = False) -> None:
        self.settings = settings
        self.insists = insists
        path = _place(settings.file)
        logger = logging.getLogger(LIBRARY_LOGGER)
        with _LOCK:
            handlers = list(_handlers())
            handler = next((item for item in handlers if item.path == path), None)
            if handler is None:
                level_without = handlers[0].level_without if handlers else logger.level
                handler = _Handler(path, settings, level_without)
                logger.addHandler(handler)
            self._handler = handler
            handler.add_user(self)
            _set_logger_level()

    def close(self) -> None:
        """Idempotent. The place keeps what its other users want; the last one's leaving closes it."""
        with _LOCK:
            if not self._handler.drop_user(self):
                return
            logger = logging.getLogger(LIBRARY_LOGGER)
            if not self._handler.has_users:
                logger.removeHandler(self._handler)
                logger.setLevel(self._handler.level_without)
                self._handler.close()
            _set_logger_level()


def has_outputs() -> bool:
    """Whether a configuration has asked for a log, which then gets all records."""
    return any(_handlers())


def reopen_files() -> bool:
    """Open the log files anew: whoever rotates them has renamed the old ones. False when there are none."""
    with _LOCK:
        with_files = [handler for handler in _handlers() if handler.path is not None]
        for handler in with_files:
            handler.reopen()
    return bool(with_files)


def _handlers() -> Iterator[_Handler]:
    return (item for item in logging.getLogger(LIBRARY_LOGGER).handlers if isinstance(item, _Handler))


def _set_logger_level() -> None:
    """The logger lets through what the most talkative output wants, or the program, if it has set a level itself."""
    handlers = list(_handlers())
    levels = [handler.level for handler in handlers]
    levels += [handler.level_without for handler in handlers if handler.level_without != logging.NOTSET]
    if levels:
        logging.getLogger(LIBRARY_LOGGER).setLevel(min(levels))


def _place(file: str) -> Path | None:
    """Equal for all names of one file in one directory; None is standard error."""
    if not file:
        return None
    try:
        return Path(file).expanduser().absolute()
    except RuntimeError:  # no such home folder: opening it says so
        return Path(file).absolute()


def _level(settings: LogOptions) -> int:
    return TRACE if settings.enable_debug else _LEVELS[settings.level]


def _mark(level: int) -> tuple[str, str]:
    return next((name, colour) for least, name, colour in _MARKS if level >= least)


class _Handler(logging.Handler):
    """Writes lines to a file, or to what ``sys.stderr`` is at the moment: a progress bar puts itself there.

    ``level_without`` is what the logger's level was before there were handlers.
    """

    def __init__(self, path: Path | None, settings: LogOptions, level_without: int) -> None:
        super().__init__()
        self.path = path
        self.level_without = level_without
        self._users: list[LogOutput] = []
        self._lines = _lines(settings)
        self._file: TextIOWrapper | None = None
        self.reopen()

    @property
    def has_users(self) -> bool:
        return bool(self._users)

    def add_user(self, user: LogOutput) -> None:
        self._users.append(user)
        self._obey_users()

    def drop_user(self, user: LogOutput) -> bool:
        """False when it was none."""
        if user not in self._users:
            return False
        self._users.remove(user)
        if self._users:
            self._obey_users()
        return True

    def _obey_users(self) -> None:
        settings = next((user for user in reversed(self._users) if user.insists), self._users[-1]).settings
        self.setLevel(_level(settings))
        self._lines = _lines(settings)

    def reopen(self) -> None:
        if self.path is None:
            return
        self.acquire()
        try:
            self._close_file()
            self._file = os.fdopen(_open_at_once(self.path), "a", encoding="utf-8", errors="backslashreplace")
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            self._complain("opened", error)
        finally:
            self.release()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            stream = self._file or sys.stderr
            if stream is None:  # a program without a console
                return
            in_colour = self._file is None and _takes_colours(stream)
            stream.write(self._lines.line(record, in_colour=in_colour) + "\n")
            stream.flush()
        except OSError as error:
            if self._file is None:
                return  # nobody reads standard error any more
            self._close_file()
            self._complain("written", error)
            self.emit(record)
        except Exception:  # the contract of logging: a broken log must not break the program
            self.handleError(record)

    def _complain(self, done: str, error: Exception) -> None:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        complaint = f"the log file {str(self.path)!r} cannot be {done}: {reason}; the log goes to standard error"
        record = logging.LogRecord(LIBRARY_LOGGER, logging.WARNING, __file__, 0, complaint, None, None)
        self.emit(record)

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:  # what was buffered did not reach the disk
                self._complain("written", error)

    def close(self) -> None:
        self.acquire()
        try:
            self._close_file()
        finally:
            self.release()
        super().close()


def _open_at_once(path: Path) -> int:
    """A descriptor to append with. Not ``Path.open``: for a pipe that would wait for a reader."""
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)


def _takes_colours(stream: Any) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _field_text(value: str | int | float) -> str:
    if not isinstance(value, str):
        return str(value)
    if _PLAIN_TEXT.fullmatch(value):
        return value
    return json.dumps(value, ensure_ascii=not value.isprintable())


def _lines(settings: LogOptions) -> _TextLines | _JsonLines:
    return _JsonLines(settings) if settings.format == "json" else _TextLines(settings)


class _TextLines(logging.Formatter):
    """``2025-01-31T12:00:00.000Z warn: message``. Tracebacks only at level debug: they are for those who mend the
    program."""

    def __init__(self, settings: LogOptions) -> None:
        super().__init__()
        self._settings = settings

    def line(self, record: logging.LogRecord, *, in_colour: bool) -> str:
        name, colour = _mark(record.levelno)
        mark = f"\x1b[{colour}m{name}:\x1b[0m" if in_colour and self._settings.colors else f"{name}:"
        time = f"{_time(record)} " if self._settings.timestamps else ""
        line = f"{time}{mark} {record.getMessage().rstrip()}"
        if record.exc_info and _level(self._settings) <= logging.DEBUG:
            line += "\n" + self.formatException(record.exc_info)
        return line


class _JsonLines(logging.Formatter):
    """One JSON object a line, for programs that collect logs."""

    def __init__(self, settings: LogOptions) -> None:
        super().__init__()
        self._settings = settings

    def line(self, record: logging.LogRecord, *, in_colour: bool) -> str:
        """Colours are for people."""
        line: dict[str, Any] = {"time": _time(record)} if self._settings.timestamps else {}
        event = record.msg if isinstance(record.msg, LogEvent) else None
        message = record.getMessage().rstrip() if event is None else event.message
        line |= {"level": _mark(record.levelno)[0], "logger": record.name, "message": message}
        line |= {} if event is None else event.fields
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
