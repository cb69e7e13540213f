"""From a configuration to the log that it asks for."""

from __future__ import annotations

from collections.abc import Sequence

from wasi_nn_backend.config import Layer, log_warnings
from wasi_nn_backend.config.logging import OWN_LOGGING_KEY, LoggingSettings
from wasi_nn_backend.logs import LogOutput

__all__ = ["configured_output"]


def configured_output(settings: LoggingSettings, layers: Sequence[Layer]) -> LogOutput | None:
    """An output with these settings if the layers say anything about the log: a program that does not ask for one does
    not get it. The layers' warnings, which waited for the output, are logged in either case."""
    given = {key for layer in layers for key in layer.values.get("logging", ())}
    output = LogOutput(settings) if given - {OWN_LOGGING_KEY} else None
    for layer in layers:
        log_warnings(layer)
    return output
