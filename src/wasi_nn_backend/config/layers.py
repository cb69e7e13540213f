"""Layers, and how they become settings: built-in default < backend < graph < execution context < call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from wasi_nn_backend.config.model import ModelSettings
from wasi_nn_backend.config.settings import Settings

__all__ = ["ConfigSource", "Layer", "merge", "resolve"]


@dataclass(frozen=True, slots=True)
class Layer:
    """One document after checking: section -> canonical key -> value, with only the keys that were given.

    ``name`` says where it came from, for messages. ``parse_layer`` makes layers; nobody checks the values again.
    """

    name: str
    values: Mapping[str, Mapping[str, Any]]


#: What callers may pass as configuration: JSON text, the same parsed, a layer, or nothing.
ConfigSource = str | bytes | Mapping[str, Any] | Layer | None

_DEFAULTS: Final = Settings()


def merge(layers: Sequence[Layer], *, name: str) -> Layer:
    """One layer that says what all of them say together; the last one wins."""
    values: dict[str, dict[str, Any]] = {}
    for layer in layers:
        for section, keys in layer.values.items():
            values.setdefault(section, {}).update(keys)
    return Layer(name, MappingProxyType({section: MappingProxyType(keys) for section, keys in values.items()}))


def resolve(layers: Sequence[Layer]) -> Settings:
    """The settings in force: the built-in defaults under ``layers``, of which later ones win.

    This runs once a call, so values are copied and not checked again: ``parse_layer`` did that.
    """
    given = merge(layers, name="merged").values
    if not given:
        return _DEFAULTS
    sections = {name: getattr(_DEFAULTS, name).model_copy(update=dict(keys)) for name, keys in given.items()}
    if "model" in sections:
        sections["model"] = _with_fitting_ubatch(sections["model"])
    return _DEFAULTS.model_copy(update=sections)


def _with_fitting_ubatch(model: ModelSettings) -> ModelSettings:
    """A physical batch larger than the logical one has no use, and whoever lowers only the latter means both."""
    if model.ubatch_size <= model.batch_size:
        return model
    return model.model_copy(update={"ubatch_size": model.batch_size})
