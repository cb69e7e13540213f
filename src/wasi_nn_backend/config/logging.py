"""``logging``: where the messages go, and which."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field

from wasi_nn_backend.config.section import Key, Section, text_of_at_most

__all__ = ["OWN_LOGGING_KEY", "LoggingSettings"]

#: One process has one log: only this key may differ from graph to graph and from context to context.
OWN_LOGGING_KEY: Final = "enable_log"

_N_PATH_BYTES_MAX: Final = 4096
_OTHER_LEVEL_NAMES: Final = {"warning": "warn", "critical": "fatal"}


def _as_level(value: Any) -> Any:
    """Python's own names, and any case."""
    return _OTHER_LEVEL_NAMES.get(value.lower(), value.lower()) if isinstance(value, str) else value


class LoggingSettings(Section):
    """One backend has one log; graphs of trusted callers may change it, guests may not (``doors.py``).

    ``enable_debug`` goes one step further than the level ``debug``: llama.cpp's own debug lines are there, too.
    ``enable_log`` raises the line about each run of one graph or context from debug to info.
    """

    level: Annotated[
        Literal["debug", "info", "warn", "error", "fatal"],
        BeforeValidator(_as_level, json_schema_input_type=str),
        Field(description="the least important messages that are shown: `debug`, `info`, `warn`, `error`, `fatal`"),
    ] = "info"
    enable_debug: Annotated[
        bool,
        Field(description="level `debug`, with llama.cpp's own debug lines"),
        Key(("enable_debug_log",)),
    ] = False
    enable_log: Annotated[
        bool,
        Field(
            description="say what each run did (tokens, time, why it ended) at level `info`, not at `debug`; for a "
            "graph or a context"
        ),
    ] = False
    timestamps: Annotated[bool, Field(description="begin each line with the time")] = True
    colors: Annotated[bool, Field(description="colour the level; never in a file or a pipe")] = True
    file: Annotated[
        str, Field(description="append to this file; empty: standard error"), text_of_at_most(_N_PATH_BYTES_MAX)
    ] = ""
    format: Annotated[Literal["text", "json"], Field(description="`text`, or one JSON object a line: `json`")] = "text"
