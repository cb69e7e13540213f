"""Layers, and how they become settings: built-in default < backend < graph < execution context < call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeVar

from pydantic_core import to_jsonable_python

from wasi_nn_backend.config.section import Section
from wasi_nn_backend.config.settings import Settings

__all__ = ["BUILT_IN", "LIMITED_BY", "ConfigSource", "Effective", "Layer", "explain", "merge", "resolve"]

_S = TypeVar("_S", bound=Section)

#: What ``explain`` calls the layer under all others.
BUILT_IN: Final = "built-in default"

#: Section -> key -> the key of the same section that it may not exceed: a physical batch larger than the logical one
#: has no use, and a queue cannot hold more than its size. Whoever lowers only the latter means both.
LIMITED_BY: Final[Mapping[str, Mapping[str, str]]] = MappingProxyType(
    {
        "model": MappingProxyType({"ubatch_size": "batch_size"}),
        "backend": MappingProxyType({"queue_warning_threshold": "queue_size", "queue_reject_threshold": "queue_size"}),
    }
)

#: Section -> key -> the key of the same section whose value from the layers below it takes away: a grammar and a schema
#: are one setting, as they are in WasmEdge. Where one layer has both, both stay.
REPLACES: Final[Mapping[str, Mapping[str, str]]] = MappingProxyType(
    {"sampling": MappingProxyType({"grammar": "json_schema"})}
)


@dataclass(frozen=True, slots=True)
class Layer:
    """One document after checking: section -> canonical key -> value, with only the keys that were given.

    ``name`` says where it came from, for messages. ``strict`` is what the document said about unknown keys.
    ``warnings`` are what was wrong with it and could be mended.
    ``parse_layer`` makes layers; nobody checks the values again.
    """

    name: str
    values: Mapping[str, Mapping[str, Any]]
    strict: bool = False
    warnings: tuple[str, ...] = field(default=(), compare=False)

    def as_document(self) -> dict[str, dict[str, Any]]:
        """What ``parse_layer`` would make this layer from, as JSON can hold it."""
        return {section: to_jsonable_python(dict(keys)) for section, keys in self.values.items()}


#: What callers may pass as configuration: JSON text, ``@path`` or a ``Path`` of a file that holds it, the same parsed,
#: a layer, or nothing.
ConfigSource = str | bytes | Path | Mapping[str, Any] | Layer | None

_DEFAULTS: Final = Settings()


def merge(layers: Sequence[Layer], *, name: str) -> Layer:
    """One layer that says what all of them say together; the last one wins."""
    values: dict[str, dict[str, Any]] = {}
    for layer in layers:
        for section, keys in layer.values.items():
            given = values.setdefault(section, {})
            for key in _replaced(section, keys):
                given.pop(key, None)
            given.update(keys)
    frozen = MappingProxyType({section: MappingProxyType(keys) for section, keys in values.items()})
    return Layer(name, frozen, strict=any(layer.strict for layer in layers))


def _replaced(section: str, keys: Mapping[str, Any]) -> list[str]:
    return [other for key, other in REPLACES.get(section, {}).items() if key in keys]


def resolve(layers: Sequence[Layer]) -> Settings:
    """The settings in force: the built-in defaults under ``layers``, of which later ones win.

    This runs once a call, so values are copied and not checked again: ``parse_layer`` did that.
    """
    given = merge(layers, name="merged").values
    if not given:
        return _DEFAULTS
    sections = {
        name: _within_limits(getattr(_DEFAULTS, name).model_copy(update=dict(keys)), LIMITED_BY.get(name, {}))
        for name, keys in given.items()
    }
    return _DEFAULTS.model_copy(update=sections)


def _within_limits(section: _S, limited_by: Mapping[str, str]) -> _S:
    lowered = {
        key: getattr(section, limit)
        for key, limit in limited_by.items()
        if getattr(section, key) > getattr(section, limit)
    }
    return section.model_copy(update=lowered) if lowered else section


@dataclass(frozen=True, slots=True)
class Effective:
    """The value that holds for one key, and the name of the layer that decided it."""

    section: str
    key: str
    value: Any
    layer: str


def explain(layers: Sequence[Layer]) -> list[Effective]:
    """``resolve`` key by key, in the order of the sections' fields. A value that another key limits comes from the
    layer of that key."""
    settings = resolve(layers)
    deciding: dict[tuple[str, str], Layer] = {}
    for layer in layers:
        for section, keys in layer.values.items():
            for key in _replaced(section, keys):
                deciding.pop((section, key), None)
            deciding.update(dict.fromkeys(((section, key) for key in keys), layer))

    def layer_of(section: str, key: str, value: Any) -> str:
        limit = LIMITED_BY.get(section, {}).get(key)
        given = deciding.get((section, key))
        written = getattr(getattr(_DEFAULTS, section), key) if given is None else given.values[section][key]
        if limit is not None and written != value:
            given = deciding.get((section, limit), given)
        return BUILT_IN if given is None else given.name

    return [
        Effective(section, key, value, layer_of(section, key, value))
        for section, model in settings
        for key, value in model
    ]
