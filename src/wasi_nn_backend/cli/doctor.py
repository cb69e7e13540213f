"""``wasi-nn doctor``: what is wrong with this installation, machine and configuration, and what to do."""

from __future__ import annotations

import json
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wasi_nn_backend.cli.exit_codes import ExitCode, exits_cleanly
from wasi_nn_backend.cli.model_options import ConfigOption, file_and_config_layer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wasi_nn_backend.diagnosis import Finding

__all__ = ["register"]

_LABEL_WIDTH = 22


def register(app: typer.Typer) -> None:
    app.command("doctor")(exits_cleanly(doctor))


def doctor(
    file: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="A configuration file.", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="PATH|smollm2",
            help="The model to check.",
            show_default="smollm2, where it is installed",
        ),
    ] = None,
    config: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check compiler, Python, llama.cpp, GPU, threads, the model, its memory and the log file; say what to do.

    Example: [bold]wasi-nn doctor --model model.gguf --config threads=8[/]

    Exit status: 0 nothing is wrong, 1 something is, 2 a wrong command line.
    """
    from wasi_nn_backend.cli.capi import libraries_are_built
    from wasi_nn_backend.config import resolve
    from wasi_nn_backend.diagnosis import Machine, Status, Subject, diagnose

    settings = resolve([file_and_config_layer(file, config)])
    if sys.stderr.isatty():
        print("asking llama.cpp, a second or two...", file=sys.stderr)
    findings = diagnose(Machine.this_one(), Subject(settings, _model(model), libraries_are_built()))
    if as_json:
        print(json.dumps([_document(finding) for finding in findings], indent=2))
    else:
        print(_render(findings, width=get_terminal_size().columns))
    if any(finding.status is Status.PROBLEM for finding in findings):
        raise typer.Exit(ExitCode.ERROR)


def _model(model: str | None) -> Path | None:
    from wasi_nn_backend.errors import ModelNotFound
    from wasi_nn_backend.registry import model_path

    try:
        return model_path(model or "smollm2")
    except ModelNotFound:
        if model is not None:
            raise
        return None


def _document(finding: Finding) -> dict[str, Any]:
    return {**asdict(finding), "status": finding.status.value}


def _render(findings: Sequence[Finding], *, width: int) -> str:
    lines = []
    for finding in findings:
        label = f"{finding.status.value:<8}{finding.name}"
        for text, indent in (
            (finding.detail, f"{label:<{_LABEL_WIDTH}}"),
            (finding.advice, " " * _LABEL_WIDTH + "-> "),
        ):
            if text:
                lines += textwrap.wrap(
                    text,
                    width=max(width, 2 * _LABEL_WIDTH),
                    initial_indent=indent,
                    subsequent_indent=" " * (_LABEL_WIDTH + 3 * (text is finding.advice)),
                    break_long_words=False,
                    break_on_hyphens=False,
                )
    return "\n".join(lines)
