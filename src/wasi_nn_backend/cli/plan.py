"""``wasi-nn plan``: how much memory a model and a configuration need, and what fits."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wasi_nn_backend.cli.exit_codes import ExitCode, exits_cleanly
from wasi_nn_backend.cli.inspect import render
from wasi_nn_backend.cli.model_options import ConfigOption, ModelOption, file_and_config_layer
from wasi_nn_backend.cli.reports import Report
from wasi_nn_backend.cli.terminal import format_bytes
from wasi_nn_backend.errors import UnsupportedOperation

if TYPE_CHECKING:
    from wasi_nn_backend.planning import Plan

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    app.command("plan")(exits_cleanly(plan))


def plan(
    file: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="A configuration file.", show_default=False)
    ] = None,
    model: ModelOption = "smollm2",
    config: ConfigOption = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Plan for so much memory, such as 8GiB.", show_default="what is free"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """How many sessions of what length fit into the memory, what each costs, and which settings to begin with.

    The model is not loaded: the numbers are those of its file's header.

    Example: [bold]wasi-nn plan --model model.gguf --config n_ctx=4096 --memory 8GiB[/]

    Exit status: 0 it fits, 1 it does not or the model cannot be read, 2 a wrong command line.
    """
    from wasi_nn_backend.config import resolve
    from wasi_nn_backend.planning import make_plan
    from wasi_nn_backend.registry import model_path

    settings = resolve([file_and_config_layer(file, config)])
    made = make_plan(model_path(model), settings, _bytes(memory))
    if as_json:
        print(json.dumps(_document(made), indent=2))
    else:
        print(render(_report(made), width=get_terminal_size().columns))
    if not made.fits:
        raise typer.Exit(ExitCode.ERROR)


def _bytes(memory: str | None) -> int:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    from wasi_nn_backend.llama.host_memory import available_bytes

    if memory is None:
        n_bytes = available_bytes()
        if n_bytes is None:
            raise UnsupportedOperation("this system does not say how much memory is free; give it with --memory")
        return n_bytes
    try:
        n_bytes = int(TypeAdapter(ByteSize).validate_python(memory))
    except ValidationError:
        n_bytes = 0
    if n_bytes <= 0:
        raise typer.BadParameter(f"{memory!r} is no size; write 8GiB or 500MB", param_hint="--memory")
    return n_bytes


def _document(plan: Plan) -> dict[str, Any]:
    return {
        "model": str(plan.summary.path),
        "fits": plan.fits,
        "n_bytes_available": plan.n_bytes_available,
        "n_bytes_needed": {**asdict(plan.need), "total": plan.need.total},
        "n_ctx": plan.n_ctx,
        "n_sessions_at_once": plan.n_sessions_at_once,
        "n_kv_bytes_per_token": plan.n_kv_bytes_per_token,
        "sessions": [asdict(count) for count in plan.sessions],
        "suggestion": asdict(plan.suggestion) if plan.suggestion is not None else None,
    }


def _report(plan: Plan) -> Report:
    need, summary = plan.need, plan.summary
    parts = {
        "weights": need.weights,
        "KV cells": need.cells,
        "computing": need.computing,
        "vocabulary": need.vocabulary,
        "program": need.program,
    }
    verdict = "fits" if plan.fits else "does NOT fit"
    rows = [
        ("Model", [f"{summary.name}, trained on {summary.n_ctx_train:,} tokens ({summary.path})"]),
        ("Sessions", [f"{plan.n_sessions_at_once} at once, each in a window of {plan.n_ctx:,} tokens"]),
        (
            "Memory",
            [
                f"{format_bytes(need.total)} of {format_bytes(plan.n_bytes_available)}: {verdict}",
                ", ".join(f"{name} {format_bytes(n_bytes)}" for name, n_bytes in parts.items()),
            ],
        ),
        ("A token", [f"{format_bytes(plan.n_kv_bytes_per_token)} of KV memory"]),
        (
            "Kept in all",
            [
                f"{count.n_sessions:,} sessions of {count.n_tokens:,} tokens "
                f"({format_bytes(count.n_tokens * plan.n_kv_bytes_per_token)} each)"
                for count in plan.sessions
            ],
        ),
        ("Suggested", _suggestion_lines(plan)),
    ]
    return Report(values={}, rows=rows)


def _suggestion_lines(plan: Plan) -> list[str]:
    better = plan.suggestion
    if better is None:
        return ["nothing: not even one short window fits; take a smaller model or a smaller cache_type_k"]
    return [
        f"n_ctx={better.n_ctx} max_concurrent={better.max_concurrent} batch_size={better.batch_size}",
        f"max_memory_mb={better.max_memory_mb} max_cache_tokens={better.max_cache_tokens}",
        f"threads=auto (up to {better.threads})",
    ]
