"""What a caller may configure depends on the door it came through."""

from __future__ import annotations

import logging

from wasi_nn_backend.config import ConfigSource, Layer, parse_layer
from wasi_nn_backend.errors import SecurityViolation
from wasi_nn_backend.types import Door

__all__ = ["parse_at_door"]

_log = logging.getLogger(__name__)

#: Limits that protect the host and its other guests.
_HOST_SECTIONS = ("backend", "memory")


def parse_at_door(source: ConfigSource, *, name: str, door: Door) -> Layer:
    """``parse_layer`` for a caller at a door. Raises what it raises, and ``SecurityViolation``.

    Guests do not set the host's limits: such keys are left out with a warning, so that modules which carry a whole
    configuration still run. They do not bring chat templates either: a template is a program, and Jinja's sandbox keeps
    it from Python's internals but bounds neither its time nor its memory.
    """
    layer = parse_layer(source, name=name, unknown=door.unknown_keys)
    if door.is_trusted:
        return layer
    if layer.values.get("session", {}).get("chat_template"):
        raise SecurityViolation(f"{name}: session.chat_template is the host's to set: leave it out")
    refused = [f"{section}.{key}" for section in _HOST_SECTIONS for key in layer.values.get(section, {})]
    if not refused:
        return layer
    _log.warning("%s: %s: the host's to set, ignored", name, ", ".join(refused))
    return Layer(name, {section: keys for section, keys in layer.values.items() if section not in _HOST_SECTIONS})
