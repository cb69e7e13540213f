"""What a caller may configure depends on the door it came through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

from wasi_nn_backend.config import ConfigSource, Layer, log_warnings, parse_layer
from wasi_nn_backend.config.logging import OWN_LOGGING_KEY
from wasi_nn_backend.config.parse import CallerRules
from wasi_nn_backend.types import Door

__all__ = ["ConfigPlace", "parse_at_door"]

#: Where a caller's configuration enters, from the widest to the narrowest.
ConfigPlace = Literal["graph", "context", "call"]

#: What protects the host and its other guests: whole sections, and single keys.
_HOST_SECTIONS = ("backend", "performance")
_HOST_KEYS = {
    "model": frozenset({"lora", "numa"}),
    "session": frozenset({"chat_template"}),
    "task": frozenset({"priority", "user_id"}),
    "memory": frozenset(
        {
            "kv_layout",
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


def parse_at_door(
    source: ConfigSource, *, place: ConfigPlace, door: Door, strict: bool = False, logs: bool = True
) -> Layer:
    """``parse_layer`` for a caller at a door. Raises what it raises; ``logs`` as there.

    Guests do not set the host's limits, name no files of the host, and do not bring chat templates: a template is a
    program, and what it may use before it is stopped, seconds and a hundred megabytes, is the host's. Such keys are
    left out with a warning, so that modules which carry a whole configuration still run. ``strict`` is what the
    host's own configuration says about unknown keys; a guest is not its to mend, so guests' documents are read as
    their door says.
    """
    layer = parse_layer(
        source,
        name=place,
        unknown="error" if strict and door.is_trusted else door.unknown_keys,
        reads_files=door.is_trusted,
        rules=CallerRules(inherits=place == "call", defaults=door.defaults, raised_keys=door.raised_keys),
        logs=logs,
    )
    if not door.is_trusted:
        mended = _of_a_guest(layer)
    else:
        mended = layer if place == "graph" else _without_shared_logging(layer)
    if logs and mended.warnings != layer.warnings:
        log_warnings(replace(mended, warnings=mended.warnings[len(layer.warnings) :]))
    return mended


def _of_a_guest(layer: Layer) -> Layer:
    values = {section: _guest_logging(keys) if section == "logging" else keys for section, keys in layer.values.items()}
    kept, refused = _split(values, _is_hosts)
    return _without(layer, kept, refused, "the host's to set, ignored")


def _guest_logging(keys: Mapping[str, Any]) -> Mapping[str, Any]:
    """WasmEdge has two log switches. Here both are about the lines on the guest itself, and mean the same."""
    if "enable_debug" not in keys:
        return keys
    others = {key: value for key, value in keys.items() if key != "enable_debug"}
    return {**others, OWN_LOGGING_KEY: keys["enable_debug"] or keys.get(OWN_LOGGING_KEY, False)}


def _without_shared_logging(layer: Layer) -> Layer:
    """A context or a call must not change the log for everyone else."""
    kept, refused = _split(layer.values, _is_shared_logging)
    return _without(layer, kept, refused, "there is one log for all, ignored; set it for the backend or the graph")


def _without(layer: Layer, kept: Mapping[str, Mapping[str, Any]], refused: list[str], reason: str) -> Layer:
    warnings = (f"{', '.join(refused)}: {reason}",) if refused else ()
    return replace(layer, values=kept, warnings=(*layer.warnings, *warnings))


def _split(
    values: Mapping[str, Mapping[str, Any]], is_refused: Callable[[str, str], bool]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What stays, and the paths of what does not."""
    kept = {
        section: {key: value for key, value in keys.items() if not is_refused(section, key)}
        for section, keys in values.items()
    }
    return kept, [f"{section}.{key}" for section, keys in values.items() for key in keys if is_refused(section, key)]


def _is_hosts(section: str, key: str) -> bool:
    return section in _HOST_SECTIONS or key in _HOST_KEYS.get(section, ()) or _is_shared_logging(section, key)


def _is_shared_logging(section: str, key: str) -> bool:
    return section == "logging" and key != OWN_LOGGING_KEY
