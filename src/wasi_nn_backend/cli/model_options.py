"""The options that ``generate`` and ``chat`` share, and the configuration layers that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wasi_nn_backend.errors import WasiNNError

if TYPE_CHECKING:
    from wasi_nn_backend.config import Layer

__all__ = [
    "ONE_AT_A_TIME",
    "ConfigOption",
    "MaxTokensOption",
    "MinPOption",
    "ModelOption",
    "SamplingOptions",
    "SeedOption",
    "StatsOption",
    "StopOption",
    "SystemOption",
    "TemperatureOption",
    "TopKOption",
    "TopPOption",
    "file_and_config_layer",
    "option_layer",
    "parse_config_options",
]

_SAMPLING = "Sampling"

#: ``generate`` and ``chat`` run one sequence: without this a backend reserves KV memory for ten, and forgets whom it
#: talks with while they think. The person who waits can stop it: no time-out. ``--config`` can say otherwise.
ONE_AT_A_TIME: Mapping[str, Any] = MappingProxyType(
    {"max_concurrent": 1, "auto_cleanup": False, "default_task_timeout_ms": 0}
)

ModelOption = Annotated[
    str, typer.Option("--model", "-m", metavar="PATH|smollm2", help="A GGUF file, or the name of the built-in model.")
]
TemperatureOption = Annotated[
    float | None,
    typer.Option(
        metavar="T",
        min=0.0,
        max=2.0,
        show_default="0.7",
        rich_help_panel=_SAMPLING,
        help="0 always takes the most probable token.",
    ),
]
TopKOption = Annotated[
    int | None,
    typer.Option(
        metavar="K",
        min=-1,
        show_default="40",
        rich_help_panel=_SAMPLING,
        help="Choose among the K most probable; -1 is off.",
    ),
]
TopPOption = Annotated[
    float | None,
    typer.Option(
        metavar="P",
        min=0.0,
        max=1.0,
        show_default="0.9",
        rich_help_panel=_SAMPLING,
        help="Choose among those that together reach P.",
    ),
]
MinPOption = Annotated[
    float | None,
    typer.Option(
        metavar="P",
        min=0.0,
        max=1.0,
        show_default="0.05",
        rich_help_panel=_SAMPLING,
        help="Drop what is less likely than P times the best.",
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=-1,
        rich_help_panel=_SAMPLING,
        help="Repeat an answer; -1 is a new one each time.",
    ),
]
MaxTokensOption = Annotated[
    int | None,
    typer.Option(help="End after N tokens; -1 goes on until the context is full.", metavar="N", show_default="512"),
]
StopOption = Annotated[list[str] | None, typer.Option(help="End before this text. May be repeated.", metavar="TEXT")]
SystemOption = Annotated[str | None, typer.Option(help="The system message that begins the chat.", metavar="TEXT")]
ConfigOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Any key of docs/configuration.md, such as n_ctx=4096, or a file of them. May be repeated.",
        metavar="KEY=VALUE|@FILE",
    ),
]
StatsOption = Annotated[bool, typer.Option("--stats", help="Print tokens, speed and time to first token on stderr.")]


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """The sampling options as given; None leaves the configuration's own value."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None

    def section(self) -> Mapping[str, Any]:
        """The ``sampling`` section of a configuration layer, None where an option was not given."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def parse_config_options(texts: Sequence[str], *, option: str) -> Layer:
    """``key=value`` and ``@file`` texts as a configuration layer, in which assignments win; a mistake is a usage error
    that names the option."""
    from wasi_nn_backend.config import parse_assignments, parse_layer
    from wasi_nn_backend.config.layers import merge

    for text in texts:
        if text == "@":
            raise typer.BadParameter(f"{option}: '@' is followed by no file name; write @FILE")
        if "=" not in text and not text.startswith("@"):
            raise typer.BadParameter(f"{option}: {text!r} is no assignment; write key=value or @FILE")
    try:
        files = [parse_layer(text, name=option, unknown="error") for text in texts if text.startswith("@")]
        assignments = [text for text in texts if not text.startswith("@")]
        return merge([*files, parse_assignments(assignments, name=option)], name=option)
    except WasiNNError as error:
        raise typer.BadParameter(str(error)) from None  # the message begins with the option


def file_and_config_layer(file: Path | None, texts: Sequence[str] | None) -> Layer:
    """A configuration file named as an argument, and ``--config`` options over it."""
    from wasi_nn_backend.config.layers import merge

    layers = [parse_config_options([f"@{file}"], option="CONFIG")] if file is not None else []
    return merge([*layers, parse_config_options(texts or [], option="--config")], name="--config")


def option_layer(**sections: Mapping[str, Any]) -> Layer:
    """The command's own options as a configuration layer; a value of None is an option that was not given."""
    from wasi_nn_backend.config import parse_layer

    given = {
        section: {key: value for key, value in values.items() if value is not None}
        for section, values in sections.items()
    }
    try:
        return parse_layer(given, name="the command line")
    except WasiNNError as error:
        raise typer.BadParameter(str(error)) from None
