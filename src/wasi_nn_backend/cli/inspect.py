"""``wasi-nn inspect``: what a file is, and whether it runs here; what a configuration amounts to."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from shutil import get_terminal_size
from typing import Annotated

import typer

from wasi_nn_backend.cli.component_file import is_component
from wasi_nn_backend.cli.config_report import ConfigQuestion, print_config
from wasi_nn_backend.cli.exit_codes import ExitCode, exits_cleanly
from wasi_nn_backend.cli.reports import Report, component_report, gguf_report, module_report
from wasi_nn_backend.errors import InvalidArgument, ModelNotFound

__all__ = ["register"]

_N_HEADER_BYTES = 8
_CONFIG = "With config"
_CONFIG_WORD = "config"
_LABEL_WIDTH = 16


def register(app: typer.Typer) -> None:
    app.command("inspect")(exits_cleanly(inspect))


def inspect(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[config] FILE",
            help="A WebAssembly module (.wasm, .wat), a component, or a GGUF model; after the word config, a"
            " configuration.",
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    nn_graph: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=MODEL[,K=V...]",
            rich_help_panel=_CONFIG,
            help="A graph whose own settings count over the file's.",
        ),
    ] = None,
    dialect: Annotated[
        str | None,
        typer.Option(
            metavar="witx|wasmedge|wamr|wamr-legacy|hyperbeam",
            rich_help_panel=_CONFIG,
            help="Guests whose defaults count under the file's settings.",
        ),
    ] = None,
) -> None:
    """Show what a module imports and whether this host has it, what a model file holds, or what a configuration
    amounts to: the value of every key, and where it comes from.

    A file's first bytes decide what it is. Nothing in it is run or loaded.

    Example: [bold]wasi-nn inspect chat.wasm[/], [bold]wasi-nn inspect --json model.gguf[/],
    [bold]wasi-nn inspect config wasi-nn.json[/]

    Exit status: 0 it can be used here, 2 a wrong command line,
    1 it cannot: unreadable, damaged, or in need of what this host lacks.
    """
    *kind, name = words
    if kind == [_CONFIG_WORD]:
        print_config(ConfigQuestion(name, nn_graph, dialect), as_json=as_json)
        return
    if not kind and name == _CONFIG_WORD and not Path(name).exists():
        raise typer.BadParameter("which configuration? Write 'inspect config FILE'", param_hint="FILE")
    if kind or nn_graph is not None or dialect is not None:
        raise typer.BadParameter(
            "write 'inspect FILE', or 'inspect config FILE' with --nn-graph and --dialect", param_hint="FILE"
        )
    report = examine(Path(name))
    if as_json:
        print(json.dumps(report.values, ensure_ascii=False, indent=2))
    else:
        print(render(report, width=get_terminal_size().columns))
    if report.lacking:
        raise typer.Exit(ExitCode.ERROR)


def examine(file: Path) -> Report:
    """Raises ``ModelNotFound`` or ``InvalidArgument`` for what cannot be read or is of no known kind."""
    header = _read_header(file)
    if header.startswith(b"GGUF"):
        return gguf_report(file)
    if header.startswith(b"\0asm") or file.suffix == ".wat":
        from wasi_nn_backend.host import read_binary

        return component_report(file) if is_component(read_binary(file)) else module_report(file)
    if not header:
        raise InvalidArgument(f"{file} is empty; build, download or copy it again")
    if file.suffix == ".json":
        raise InvalidArgument(f"{file} is no module and no model; for a configuration, write: inspect config {file}")
    raise InvalidArgument(
        f"{file} is neither WebAssembly nor GGUF: it begins with {header!r}; check that it is the file you mean"
    )


def _read_header(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(_N_HEADER_BYTES)
    except FileNotFoundError:
        raise ModelNotFound(f"there is no file {file}; check the path") from None
    except OSError as error:
        raise InvalidArgument(f"cannot read {file}: {error.strerror}; check the path and your permissions") from None


def render(report: Report, *, width: int) -> str:
    """The report as two columns, the second one wrapped at the terminal's width."""
    lines = []
    for label, values in report.rows:
        for n, value in enumerate(values or ["none"]):
            lines += textwrap.wrap(
                value,
                width=max(width, 2 * _LABEL_WIDTH),
                initial_indent=f"{label if n == 0 else '':<{_LABEL_WIDTH}}",
                subsequent_indent=" " * (_LABEL_WIDTH + 2),
                break_long_words=False,
                break_on_hyphens=False,
            )
    return "\n".join(lines)
