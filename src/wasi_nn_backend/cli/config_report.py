"""``wasi-nn inspect config``: what a configuration amounts to, key by key, and which layer decided each."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from wasi_nn_backend.cli.graph_options import parse_graph_option
from wasi_nn_backend.cli.model_options import parse_config_options

if TYPE_CHECKING:
    from wasi_nn_backend.config.layers import Effective, Layer

__all__ = ["ConfigQuestion", "print_config"]

#: Text longer than this is cut on a screen; ``--json`` has all of it.
_N_VALUE_CHARS_MAX = 60


@dataclass(frozen=True, slots=True)
class ConfigQuestion:
    """A configuration file, and what else takes part: the graph's own settings, a family of guests."""

    file: str
    graph: str | None
    dialect: str | None


def print_config(question: ConfigQuestion, *, as_json: bool) -> None:
    """Raises what ``parse_layer`` raises for a file that is wrong; warnings go to the log."""
    from wasi_nn_backend.config.layers import explain

    entries = explain(_layers(question))
    if as_json:
        print(json.dumps(_as_document(question, entries), ensure_ascii=False, indent=2))
    elif _shows_tables():
        _print_table(entries)
    else:
        for entry in entries:
            print(f"{entry.section}.{entry.key}\t{_shown(entry.value)}\t{entry.layer}")


def _shows_tables() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def _layers(question: ConfigQuestion) -> list[Layer]:
    """The order in which a backend puts them over each other."""
    from wasi_nn_backend.config import parse_layer
    from wasi_nn_backend.config.files import read_file

    layers = []
    if question.dialect is not None:
        door = _dialect_door(question.dialect)
        layers.append(parse_layer(door.defaults, name=f"{door.name} guests"))
    # A shell's <(...) is a pipe, and whoever writes it can press Ctrl-C.
    layers.append(parse_layer(read_file(Path(question.file), may_wait=True), name=question.file))
    if question.graph is not None:
        option = parse_graph_option(question.graph)
        name = f"--nn-graph {option.name}"
        layers.append(parse_config_options(option.assignments, option=name))
    return layers


def _dialect_door(name: str) -> Any:
    from wasi_nn_backend.dialects import CORE_DIALECTS

    known = {dialect.name: dialect.door for dialect in CORE_DIALECTS}
    if name.lower() not in known:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}", param_hint="--dialect")
    return known[name.lower()]


def _as_document(question: ConfigQuestion, entries: Sequence[Effective]) -> dict[str, Any]:
    from pydantic_core import to_jsonable_python

    values = {
        f"{entry.section}.{entry.key}": {"value": to_jsonable_python(entry.value), "layer": entry.layer}
        for entry in entries
    }
    return {"file": question.file, "kind": "config", "values": values}


def _shown(value: Any) -> str:
    from pydantic_core import to_jsonable_python

    return json.dumps(to_jsonable_python(value), ensure_ascii=False)


def _print_table(entries: Sequence[Effective]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    from wasi_nn_backend.config.layers import BUILT_IN

    table = Table(Column("key", no_wrap=True), "value", "from", box=None, pad_edge=False, header_style="bold")
    previous = None
    for entry in entries:
        if previous not in (None, entry.section):
            table.add_section()
        previous = entry.section
        text = _shown(entry.value)
        shown = text if len(text) <= _N_VALUE_CHARS_MAX else text[: _N_VALUE_CHARS_MAX - 3] + "..."
        table.add_row(
            f"{entry.section}.{entry.key}", shown, entry.layer, style="dim" if entry.layer == BUILT_IN else None
        )
    Console(markup=False, emoji=False, highlight=False).print(table)
