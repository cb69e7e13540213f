"""What a caller may configure depends on the door it came through."""

from __future__ import annotations

import logging

from wasi_nn_backend.config import ConfigSource, Layer, parse_layer
from wasi_nn_backend.types import Door

__all__ = ["parse_at_door"]

_log = logging.getLogger(__name__)

#: What protects the host and its other guests: whole sections, and single keys.
_HOST_SECTIONS = ("backend", "performance")
_HOST_KEYS = {
    "session": frozenset({"chat_template"}),
    "memory": frozenset(
        {
            "max_memory_mb",
            "memory_pressure_threshold",
            "max_cache_tokens",
            "cache_strategy",
            "cache_deletion_strategy",
            "enable_partial_cache_deletion",
            "enable_token_cache_reuse",
        }
    ),
}


def parse_at_door(source: ConfigSource, *, name: str, door: Door) -> Layer:
    """``parse_layer`` for a caller at a door. Raises what it raises.

    Guests do not set the host's limits, and do not bring chat templates: a template is a program, and Jinja's sandbox
    keeps it from Python's internals but bounds neither its time nor its memory. Such keys are left out with a warning,
    so that modules which carry a whole configuration still run.
    """
    layer = parse_layer(source, name=name, unknown=door.unknown_keys)
    if door.is_trusted:
        return layer
    refused = [f"{section}.{key}" for section, keys in layer.values.items() for key in keys if _is_hosts(section, key)]
    if not refused:
        return layer
    _log.warning("%s: %s: the host's to set, ignored", name, ", ".join(refused))
    return Layer(
        name,
        {
            section: {key: value for key, value in keys.items() if not _is_hosts(section, key)}
            for section, keys in layer.values.items()
        },
    )


def _is_hosts(section: str, key: str) -> bool:
    return section in _HOST_SECTIONS or key in _HOST_KEYS.get(section, ())
