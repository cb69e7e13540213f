"""``wasi-nn schema``: the JSON schema of the configuration, for editors."""

from __future__ import annotations

import json

import typer

from wasi_nn_backend.cli.exit_codes import exits_cleanly

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    app.command("schema")(exits_cleanly(schema))


def schema() -> None:
    """Print a JSON schema of configuration files: editors complete keys with it and mark what is wrong.

    Example: [bold]wasi-nn schema > wasi-nn.schema.json[/]

    Exit status: 0 printed, 2 a wrong command line.
    """
    from wasi_nn_backend.config.reference import json_schema

    print(json.dumps(json_schema(), ensure_ascii=False, indent=2))
