"""The exit statuses of every command, and the one place that turns failures into them."""

from __future__ import annotations

import enum
import functools
import logging
import sys
from collections.abc import Callable
from typing import ParamSpec

import typer

from wasi_nn_backend.cli.streams import close_stdout
from wasi_nn_backend.cli.termination import Terminated
from wasi_nn_backend.errors import WasiNNError

__all__ = ["ExitCode", "describe", "exits_cleanly", "print_error", "report_os_error"]

_log = logging.getLogger(__name__)

P = ParamSpec("P")


class ExitCode(enum.IntEnum):
    """Above 100 the numbers are those of the shell's own tools: ``timeout``, and 128 plus the signal's number."""

    OK = 0
    ERROR = 1
    USAGE = 2
    TIMEOUT = 124
    INTERRUPTED = 130
    TRAP = 134
    CLOSED_OUTPUT = 141
    TERMINATED = 143


def print_error(message: str) -> None:
    """One line on stderr, whatever ``message`` contains."""
    print("error: " + " ".join(message.split()), file=sys.stderr)


def describe(error: WasiNNError) -> str:
    return f"{error} (code {error.code.value})"


def report_os_error(error: OSError) -> None:
    """One line about what the system refused. An error that names no file is nearly always stdout's: a full disk."""
    # What is still buffered for stdout must not fail a second time at exit.
    close_stdout()
    reason = error.strerror or str(error)
    if error.filename is None:
        print_error(f"cannot read or write: {reason}; check where stdin and stdout lead")
    else:
        print_error(f"cannot use {str(error.filename)!r}: {reason}; check the path and your permissions")


def exits_cleanly(command: Callable[P, None]) -> Callable[P, None]:
    """Decorator of commands: every failure becomes one line and an exit status.

    Tracebacks go to the log at level debug: they help the people who work on the program, nobody else.
    """

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except (typer.Exit, typer.TyperException):
            raise
        except KeyboardInterrupt:
            raise typer.Exit(ExitCode.INTERRUPTED) from None
        except Terminated:
            raise typer.Exit(ExitCode.TERMINATED) from None
        except BrokenPipeError:
            close_stdout()
            raise typer.Exit(ExitCode.CLOSED_OUTPUT) from None
        except WasiNNError as error:
            _log.debug("the command failed", exc_info=True)
            print_error(describe(error))
            raise typer.Exit(ExitCode.ERROR) from None
        except OSError as error:
            _log.debug("the command failed", exc_info=True)
            report_os_error(error)
            raise typer.Exit(ExitCode.ERROR) from None
        except Exception as error:
            _log.debug("the command failed", exc_info=True)
            hint = "a defect in wasi-nn; 'wasi-nn --log-level debug ...' shows where"
            print_error(f"{type(error).__name__}: {error} ({hint})")
            raise typer.Exit(ExitCode.ERROR) from None

    return wrapper
