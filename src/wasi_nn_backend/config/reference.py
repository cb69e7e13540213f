"""The keys for people and for editors: tables in Markdown and a JSON schema, both made from the sections' fields.

What is written down by hand goes out of date; here a key that is added is documented, or the tests fail.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from pydantic import TypeAdapter
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from wasi_nn_backend.config.keys import INHERITING_SECTIONS, RUNTIME, SECTIONS, STRICT
from wasi_nn_backend.config.section import key_of

__all__ = ["json_schema", "markdown_table"]

_SCHEMA_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
#: Names that pydantic makes up, and its own words for bounds on what a validator makes of the written value.
_NOISE: Final = frozenset({"title", "ge", "le"})

_NO_BOUND: Final = 1_000_000_000
_OUTSIDE_PHRASES: Final = {"clamp": "", "default": "Else: default", "error": "Else: error"}


def markdown_table(section: str) -> str:
    """One section's keys, with their other spellings, defaults, ranges and meanings."""
    rows = ["| key | also spelled | default | values |", "| --- | --- | --- | --- |"]
    for name, field in SECTIONS[section].model_fields.items():
        key = key_of(field)
        spellings = [f"`{spelling}`" for spelling in key.spellings]
        spellings += [f"`{negation}` (the opposite)" for negation in key.negations]
        default = json.dumps(to_jsonable_python(field.default), ensure_ascii=False)
        written = f"{section}.{name}" if key.nested_only else name
        rows.append(f"| `{written}` | {', '.join(spellings)} | `{default}` | {_values(field)} |".replace("|  |", "| |"))
    return "\n".join(rows) + "\n"


def _values(field: FieldInfo) -> str:
    """The range, where the description does not say it, and what happens outside of it."""
    description = (field.description or "").replace("|", "\\|")
    bounds = _bounds(field)
    text = f"{bounds}: {description}" if bounds else description
    outside = _OUTSIDE_PHRASES[key_of(field).outside]
    return f"{text}. {outside}" if outside else text


def _bounds(field: FieldInfo) -> str:
    """``1 to 256``; nothing where only one end is bounded, or the other end is the largest number there is."""
    least = next((item.ge for item in field.metadata if hasattr(item, "ge")), None)
    most = next((item.le for item in field.metadata if hasattr(item, "le")), None)
    if least is None or most is None or most >= _NO_BOUND:
        return ""
    return f"{_number(least)} to {_number(most)}"


def _number(value: Any) -> str:
    return f"{value:g}" if abs(value) < 10_000 else f"{value:,}"


def json_schema() -> dict[str, Any]:
    """JSON Schema of what ``parse_layer`` takes without a warning, in both shapes and all spellings."""
    sections = {section: dict(_properties(section)) for section in SECTIONS}
    for section, model in SECTIONS.items():
        for name, field in model.model_fields.items():
            for other in key_of(field).also_in:
                sections[other][name] = sections[section][name]
    flat: dict[str, Any] = {}
    for section, model in SECTIONS.items():
        for name, field in model.model_fields.items():
            if not key_of(field).nested_only:
                flat |= {spelling: sections[section][spelling] for spelling in _written_names(name, field)}
    sections["memory_policy"] = sections["memory"]
    runtime = {
        name: {"anyOf": [{"const": -1}, schema]}
        for section in INHERITING_SECTIONS
        for name, schema in sections[section].items()
    }
    return {
        "$schema": _SCHEMA_DIALECT,
        "title": "Configuration of wasi-nn-backend",
        "type": "object",
        "properties": {
            STRICT: {"type": "boolean", "description": "unknown keys of this document are an error"},
            **{section: _object(properties) for section, properties in sections.items()},
            "memory-policy": _object(sections["memory"]),
            RUNTIME: _object(runtime),
            **flat,
        },
        "additionalProperties": False,
    }


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _properties(section: str) -> Iterator[tuple[str, Any]]:
    for name, field in SECTIONS[section].model_fields.items():
        schema = _field_schema(field)
        for written in _written_names(name, field):
            yield written, schema


def _written_names(name: str, field: FieldInfo) -> list[str]:
    key = key_of(field)
    names = [name, *key.spellings, *key.negations]
    return list(dict.fromkeys(written for plain in names for written in (plain, plain.replace("_", "-"))))


def _field_schema(field: FieldInfo) -> dict[str, Any]:
    schema = TypeAdapter(field.rebuild_annotation()).json_schema(mode="validation")
    definitions = schema.pop("$defs", {})
    schema = _inlined(schema, definitions)
    return {**schema, "description": field.description, "default": to_jsonable_python(field.default)}


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    """Without references, since each key's schema stands in many places, and without what says nothing."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
        return {name: _inlined(value, definitions) for name, value in schema.items() if name not in _NOISE}
    return [_inlined(item, definitions) for item in schema] if isinstance(schema, list) else schema
