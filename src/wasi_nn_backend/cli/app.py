"""The command tree, its global options, and the way from a command line to an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from shutil import get_terminal_size
from typing import Annotated

import typer

from wasi_nn_backend.cli import bench, capi, chat, doctor, generate, inspect, map_lines, plan, port, run, schema, top
from wasi_nn_backend.cli.exit_codes import ExitCode, print_error, report_os_error
from wasi_nn_backend.cli.logs import LogLevel, open_log, reopening_files_on_hangup
from wasi_nn_backend.cli.streams import close_stdout

__all__ = ["app", "run_command_line"]

_DISTRIBUTION = "wasi-nn-backend"
_HELP_COLUMNS_MIN = 80
_GLOBAL_OPTIONS = ("--log-level", "--version")

app = typer.Typer(
    name="wasi-nn",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
run.register(app)
map_lines.register(app)
generate.register(app)
chat.register(app)
top.register(app)
inspect.register(app)
plan.register(app)
doctor.register(app)
bench.register(app)
capi.register(app)
port.register(app)
schema.register(app)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version  # as slow as the rest of this module's imports

    try:
        print(f"wasi-nn {version(_DISTRIBUTION)}")
    except PackageNotFoundError:
        print("wasi-nn (version unknown: the package is not installed, see 'make setup')")
    raise typer.Exit


@app.callback(invoke_without_command=True)
def global_options(
    context: typer.Context,
    log_level: Annotated[
        LogLevel | None,
        typer.Option(
            help="How much the library and llama.cpp say on stderr.", case_sensitive=False, show_default="warn"
        ),
    ] = None,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Large language models for WebAssembly modules, through WASI-NN and llama.cpp.

    Example: [bold]wasi-nn generate --model smollm2 "Name the capital city of France."[/]

    Exit status, for all commands:

      0  done
      1  an error; stderr has one line about it
      2  a wrong command line
    130  Ctrl-C
    141  the reader of stdout went away
    143  SIGTERM
    """
    context.call_on_close(open_log(log_level).close)
    context.with_resource(reopening_files_on_hangup())
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(ExitCode.USAGE)


def run_command_line(argv: Sequence[str] | None) -> int:
    """Run ``argv`` (default: the process's arguments) and return the exit status."""
    _widen_help()
    try:
        status: object = app(args=argv, prog_name="wasi-nn", standalone_mode=False)
        sys.stdout.flush()
    except typer.TyperException as error:
        _print_usage_error(error)
        return error.exit_code
    except BrokenPipeError:
        close_stdout()
        return ExitCode.CLOSED_OUTPUT
    except OSError as error:
        report_os_error(error)
        return ExitCode.ERROR
    except SystemExit:
        # typer's own answer to a stdout that closed while it printed a help text.
        close_stdout()
        return ExitCode.CLOSED_OUTPUT
    return status if isinstance(status, int) else ExitCode.OK


def _widen_help() -> None:
    """On a narrow terminal let the terminal break the help's lines: typer would cut off the names of options."""
    if os.environ.get("COLUMNS") == "0":  # what some terminals say while they start; rich would draw nothing at all
        del os.environ["COLUMNS"]
    if get_terminal_size().columns < _HELP_COLUMNS_MIN:
        os.environ.setdefault("TERMINAL_WIDTH", str(_HELP_COLUMNS_MIN))


def _print_usage_error(error: typer.TyperException) -> None:
    print_error(error.format_message())
    context = getattr(error, "ctx", None)
    if getattr(error, "option_name", None) in _GLOBAL_OPTIONS:
        print("Global options come before the command: wasi-nn --log-level debug run ...", file=sys.stderr)
    elif context is not None:
        print(f"Try '{context.command_path} --help'.", file=sys.stderr)
