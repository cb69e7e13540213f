"""Schemas in the style of the JSON Schema test suite: what the converter takes, and what it refuses."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tests.conftest import missing

_NAME: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": 12}

#: Fifty that are converted. Short, so that a small model comes to an end.
ACCEPTED: dict[str, Any] = {
    # objects
    "object with one member": {"type": "object", "properties": {"name": _NAME}, "required": ["name"]},
    "required and optional members": {
        "type": "object",
        "properties": {
            "name": _NAME,
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "ok": {"type": "boolean"},
        },
        "required": ["age"],
    },
    "only optional members": {"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "boolean"}}},
    "closed object": {
        "type": "object",
        "properties": {"x": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["x"],
        "additionalProperties": False,
    },
    "open object": {
        "type": "object",
        "properties": {"id": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["id"],
        "additionalProperties": {"type": "boolean"},
    },
    "map of strings": {"type": "object", "additionalProperties": {"enum": ["red", "green"]}},
    "map with one member": {"type": "object", "additionalProperties": {"type": "boolean"}, "minProperties": 1},
    "required without properties": {"type": "object", "required": ["foo"], "additionalProperties": {"type": "boolean"}},
    "member names with escapes": {
        "type": "object",
        "properties": {'foo"bar': {"type": "boolean"}, "foo\\bar": {"type": "boolean"}, "föö\tbar": {"type": "null"}},
        "required": ['foo"bar', "foo\\bar", "föö\tbar"],
    },
    "members named like keywords": {
        "properties": {"$ref": {"type": "boolean"}, "type": {"const": "string"}, "properties": {"type": "null"}},
        "required": ["$ref", "type"],
    },
    "a member that is forbidden": {
        "type": "object",
        "properties": {"foo": {"type": "boolean"}, "bar": False},
        "required": ["foo"],
    },
    "nested objects": {
        "type": "object",
        "properties": {"a": {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]}},
        "required": ["a"],
    },
    # arrays
    "array of integers": {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": 9},
        "minItems": 2,
        "maxItems": 4,
    },
    "array of one item at most": {"type": "array", "items": {"type": "boolean"}, "maxItems": 1, "uniqueItems": True},
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "integer", "minimum": 1, "maximum": 3}, {"enum": ["a", "b"]}, {"type": "boolean"}],
        "items": False,
    },
    "tuple with a rest": {
        "type": "array",
        "prefixItems": [{"type": "null"}],
        "items": {"type": "boolean"},
        "minItems": 3,
        "maxItems": 5,
    },
    "tuple of an older draft": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "array",
        "items": [{"type": "boolean"}, {"type": "null"}],
        "additionalItems": False,
    },
    "array of arrays": {
        "type": "array",
        "items": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        "minItems": 1,
        "maxItems": 2,
    },
    "exactly three": {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 3, "maxItems": 3},
    # enums and constants
    "enum of strings": {"enum": ["red", "amber", "green"]},
    "enum of several types": {"enum": [6, "foo", [], True, {"foo": 12}, None]},
    "enum with a type": {"type": "integer", "enum": [1, "two", 3]},
    "enum of many": {"enum": [f"option {number}" for number in range(64)]},
    "enum with escapes": {"enum": ["foo\nbar", "foo\rbar", 'say "no"', "back\\slash", "ünï"]},
    "constant string": {"const": "foo"},
    "constant object": {"const": {"foo": "bar", "baz": [1, 2.5, False]}},
    "constant zero": {"const": 0},
    # numbers
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "integer range": {"type": "integer", "minimum": -13, "maximum": 245},
    "integer from": {"type": "integer", "minimum": 1000},
    "integer to": {"type": "integer", "maximum": -7},
    "integer range, open": {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 7},
    "number range": {"type": "number", "minimum": 0.25, "maximum": 1.5},
    "number range, open": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "negative numbers": {"type": "number", "maximum": -0.5},
    "year": {
        "type": "object",
        "properties": {"year": {"type": "integer", "minimum": 1900, "maximum": 2099}},
        "required": ["year"],
    },
    # strings and patterns
    "short string": {"type": "string", "minLength": 2, "maxLength": 8},
    "date": {"type": "string", "format": "date"},
    "identifier": {"type": "string", "format": "uuid"},
    "pattern": {"type": "string", "pattern": "^[a-z]{2,5}-[0-9]{1,3}$"},
    "pattern with alternatives": {"type": "string", "pattern": "^(mon|tues|fri)day$"},
    "pattern with classes": {"pattern": r"^\d{3}-\w+\s?[^\s,]{0,4}$", "type": "string"},
    "pattern with quotes": {"type": "string", "pattern": r'^["\\/]{1,3}x$'},
    # references and combinations
    "reference": {
        "$defs": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
        "type": "array",
        "items": {"$ref": "#/$defs/n"},
        "minItems": 1,
        "maxItems": 3,
    },
    "reference to itself": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"v": {"enum": [1, 2]}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
                "required": ["v", "next"],
            }
        },
        "$ref": "#/$defs/node",
    },
    "two definitions of one name": {
        "definitions": {"a": {"x": {"type": "boolean"}}, "b": {"x": {"type": "null"}}},
        "properties": {"p": {"$ref": "#/definitions/a/x"}, "q": {"$ref": "#/definitions/b/x"}},
        "required": ["p", "q"],
    },
    "any of": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "boolean"}, {"const": "none"}]},
    "one of, told apart by a constant": {
        "oneOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": "cat"}, "lives": {"enum": [7, 9]}},
                "required": ["kind", "lives"],
            },
            {
                "type": "object",
                "properties": {"kind": {"const": "dog"}, "good": {"type": "boolean"}},
                "required": ["kind"],
            },
        ]
    },
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
            {
                "properties": {"b": {"type": "integer", "minimum": 1, "maximum": 4}, "a": {"const": True}},
                "required": ["b"],
            },
        ]
    },
}

#: Schema -> a word of the complaint, which names the keyword and the place.
REFUSED: dict[str, tuple[Any, str]] = {
    "unique items": ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "#/uniqueItems"),
    "multiples": ({"type": "integer", "multipleOf": 3}, "#/multipleOf"),
    "negation": ({"not": {"type": "string"}}, "#/not"),
    "conditions": ({"if": {"required": ["a"]}, "then": {"required": ["b"]}}, "#/if"),
    "contains": ({"type": "array", "contains": {"const": 1}}, "#/contains"),
    "pattern properties": ({"type": "object", "patternProperties": {"^x": {"type": "null"}}}, "patternProperties"),
    "property names": ({"type": "object", "propertyNames": {"maxLength": 3}}, "#/propertyNames"),
    "dependencies": ({"type": "object", "dependentRequired": {"a": ["b"]}}, "#/dependentRequired"),
    "counted members": ({"type": "object", "minProperties": 2}, "#/minProperties"),
    "remote reference": ({"$ref": "https://example.com/schema.json"}, "#/$ref"),
    "file reference": ({"properties": {"a": {"$ref": "other.json#/x"}}}, "#/properties/a/$ref"),
    "missing reference": ({"items": {"$ref": "#/$defs/none"}}, "#/items/$ref"),
    "reference in a circle": ({"allOf": [{"$ref": "#"}, {"type": "object"}]}, "needs itself"),
    "exclusive choice that is none": ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "#/oneOf"),
    "nothing at all": (False, "no value fits"),
    "empty enum": ({"enum": []}, "#/enum"),
    "unknown type": ({"type": "text"}, "#/type"),
    "empty range": ({"type": "integer", "minimum": 3, "maximum": 2}, "no number"),
    "look-ahead": ({"type": "string", "pattern": "^(?=x)y$"}, "character 2"),
    "back-reference": ({"type": "string", "pattern": r"^(a)\1$"}, "character 5"),
    "anchor in the middle": ({"type": "string", "pattern": "a^b"}, "#/pattern"),
    "pattern against length": ({"type": "string", "pattern": "^a+$", "maxLength": 3}, "#/pattern"),
    "required but forbidden": ({"properties": {"a": False}, "required": ["a"]}, "#/required"),
    "no schema": ([1, 2], "a schema is"),
    "lengths that cross": ({"type": "string", "minLength": 3, "maxLength": 1}, "minLength"),
    "items that cross": ({"type": "array", "items": False, "minItems": 1}, "minItems"),
}


def is_schema(schema: Any) -> bool:
    """Whether the reference implementation takes it for one: it does not check what it is not asked about."""
    validator = _validator(schema)
    return next(validator(validator.META_SCHEMA).iter_errors(schema), None) is None


def complaint(schema: Any, value: Any, *, formats: bool = True) -> str | None:
    """What the reference implementation has against a value; None for one that fits."""
    validator = _validator(schema)
    checker = validator.FORMAT_CHECKER if formats else None
    error = next(validator(schema, format_checker=checker).iter_errors(value), None)
    return None if error is None else str(error.message)


def _validator(schema: Any) -> Any:
    try:
        jsonschema = import_module("jsonschema")
    except ImportError:
        missing("the package jsonschema is not installed; pip install -e '.[dev]'")
    return jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
