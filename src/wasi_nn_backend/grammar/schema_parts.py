"""What a JSON schema says once its references, ``allOf``, ``anyOf`` and ``oneOf`` are worked out: a list of parts.

A part is a schema without those words. A value that one of the parts allows is one that the schema allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final, NoReturn
from urllib.parse import unquote

from wasi_nn_backend.errors import InvalidArgument

__all__ = [
    "BOUNDS",
    "KEPT",
    "Part",
    "Reference",
    "SchemaParts",
    "complain",
    "has_other_members",
    "is_same",
    "json_type",
    "members_of",
    "other_member",
    "required_of",
    "types_of",
    "written_types",
]

#: Words that do not say which values are allowed.
_ANNOTATIONS: Final = frozenset(
    (
        *("$schema", "$id", "id", "$anchor", "$comment", "$vocabulary", "$defs", "definitions"),
        *("title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly"),
        *("contentMediaType", "contentEncoding", "contentSchema", "discriminator", "externalDocs", "xml", "nullable"),
    )
)
BOUNDS: Final = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
#: The keywords that are kept, by the type of value that they speak of.
KEPT: Final[Mapping[str, frozenset[str]]] = {
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "integer": BOUNDS,
    "number": BOUNDS,
    "object": frozenset(
        {"properties", "required", "additionalProperties", "unevaluatedProperties", "minProperties", "maxProperties"}
    ),
    "array": frozenset({"items", "prefixItems", "additionalItems", "minItems", "maxItems", "unevaluatedItems"}),
    "boolean": frozenset(),
    "null": frozenset(),
}
_COMBINING: Final = ("$ref", "allOf", "anyOf", "oneOf")
_N_PARTS_MAX: Final = 256
_N_LEVELS_MAX: Final = 32
_N_SCHEMAS_READ_MAX: Final = 25_000

_LARGER_WINS: Final = frozenset({"minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"})
_SMALLER_WINS: Final = frozenset({"maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"})


@dataclass(frozen=True, slots=True)
class Part:
    """``keywords`` without those that only combine or annotate. ``path`` is where they stand, as a JSON pointer."""

    keywords: Mapping[str, Any]
    path: str


@dataclass(frozen=True, slots=True)
class Reference:
    """Another schema of the document and nothing else: what it says may refer back to here."""

    target: str
    path: str


def complain(path: str, problem: str) -> NoReturn:
    """Raise ``InvalidArgument`` for a place in a schema."""
    raise InvalidArgument(f"the JSON schema cannot be used, at {path[:200]}: {problem}")


def json_type(value: Any) -> str:
    """The schema type of a value of JSON; whole numbers are integers."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, Decimal):
        return "integer" if value == value.to_integral_value() else "number"
    names = {int: "integer", str: "string", list: "array", dict: "object"}
    return "null" if value is None else names[type(value)]


def types_of(part: Part) -> frozenset[str] | None:
    """The types that ``type`` names, None without it. Raises ``InvalidArgument`` for names that are none."""
    if "type" not in part.keywords:
        return None
    named = part.keywords["type"]
    types = named if isinstance(named, list) else [named]
    known = {"string", "number", "integer", "boolean", "null", "object", "array"}
    if not types or not all(isinstance(name, str) and name in known for name in types):
        complain(f"{part.path}/type", "this is no type of JSON")
    return frozenset(types)


def written_types(part: Part) -> frozenset[str]:
    """The types of the values that are generated: without ``type``, those that the keywords speak of, if any."""
    values = _values_of(part)
    if values is not None:
        return frozenset(json_type(value) for value in values)
    named = types_of(part)
    if named is not None:
        return named
    return frozenset(name for name, kept in KEPT.items() if kept & part.keywords.keys()) or frozenset(KEPT)


class SchemaParts:
    """Reads one document, which stays as it is. Every method raises ``InvalidArgument`` with the place."""

    def __init__(self, document: Any) -> None:
        self._document = document
        self._n_read = 0

    def resolve(self, target: Any, path: str) -> Any:
        """The schema behind ``$ref``. Only pointers into the same document: nothing is fetched from anywhere."""
        if not isinstance(target, str) or (target != "#" and not target.startswith("#/")):
            complain(
                f"{path}/$ref", f"{str(target)[:80]!r} is not followed, only pointers into this document as #/$defs/x"
            )
        found = self._document
        for step in target.split("/")[1:]:
            key = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict) and key in found:
                found = found[key]
            elif isinstance(found, list) and key.isdecimal() and int(key) < len(found):
                found = found[int(key)]
            else:
                complain(f"{path}/$ref", f"there is nothing at {target[:80]!r}")
        return found

    def parts(self, schema: Any, path: str) -> list[Part | Reference]:
        """What a schema allows. Empty for one that allows nothing. Lone references are not followed."""
        return list(self._parts(schema, path, 0))

    def resolved(self, schema: Any, path: str, level: int = 0) -> list[Part]:
        """The same with all references followed."""
        found: list[Part] = []
        for part in self._parts(schema, path, level):
            if isinstance(part, Part):
                found.append(part)
            else:
                found += self.resolved(self.resolve(part.target, part.path), part.target, level + 1)
        return found

    def _parts(self, schema: Any, path: str, level: int) -> Iterator[Part | Reference]:
        self._n_read += 1
        if level > _N_LEVELS_MAX:
            complain(path, "nested too deep, or a schema that needs itself to say what it is")
        if self._n_read > _N_SCHEMAS_READ_MAX:
            complain(path, f"it takes over {_N_SCHEMAS_READ_MAX} schemas to say what this allows, references followed")
        if schema is True or schema is False:
            if schema:
                yield Part({}, path)
            return
        if not isinstance(schema, dict):
            complain(path, "a schema is an object, true or false")
        if "$id" in schema and path != "#":
            complain(f"{path}/$id", "a document inside of the document; only the whole one may have a name")
        own = {key: value for key, value in schema.items() if key not in _COMBINING and key not in _ANNOTATIONS}
        if "$ref" in schema and not own and not any(key in schema for key in _COMBINING[1:]):
            self.resolve(schema["$ref"], path)
            yield Reference(schema["$ref"], path)
            return
        groups = list(self._groups(schema, path, level))
        if not own and len(groups) == 1:  # nothing to combine: references stay
            yield from groups[0]
            return
        combined: list[Part] = [Part(own, path)]
        for group in groups:
            followed = self._followed(group, level)
            combined = [
                both for part in combined for other in followed if (both := self._both(part, other)) is not None
            ]
            if len(combined) > _N_PARTS_MAX:
                complain(path, "allOf, anyOf and oneOf combine in too many ways")
        yield from combined

    def _groups(self, schema: dict[str, Any], path: str, level: int) -> Iterator[list[Part | Reference]]:
        """All of these hold, each of them in one of its parts."""
        if "$ref" in schema:
            target = schema["$ref"]
            yield list(self._parts(self.resolve(target, path), target, level + 1))
        for keyword in _COMBINING[1:]:
            if keyword not in schema:
                continue
            members = schema[keyword]
            if not isinstance(members, list) or not members:
                complain(f"{path}/{keyword}", "this is a list of schemas, at least one")
            each = [list(self._parts(m, f"{path}/{keyword}/{at}", level + 1)) for at, m in enumerate(members)]
            if keyword == "allOf":
                yield from each
                continue
            if keyword == "oneOf":
                self._check_exclusive([self._followed(parts, level) for parts in each], f"{path}/oneOf", level + 1)
            yield [part for parts in each for part in parts]

    def _followed(self, parts: list[Part | Reference], level: int) -> list[Part]:
        found: list[Part] = []
        for part in parts:
            if isinstance(part, Part):
                found.append(part)
            else:
                found += self.resolved(self.resolve(part.target, part.path), part.target, level + 1)
        return found

    def _both(self, one: Part, other: Part) -> Part | None:
        """What both allow; None where that is nothing."""
        merged = {**one.keywords, **other.keywords}
        for keyword in one.keywords.keys() & other.keywords.keys() - {"properties", "additionalProperties"}:
            a, b = one.keywords[keyword], other.keywords[keyword]
            both = a if a == b else _both_values(keyword, a, b, other.path)
            if both is None:
                return None
            merged[keyword] = both
        if not _merge_members(merged, one, other):
            return None
        return Part(merged, one.path if one.keywords else other.path)

    def _check_exclusive(self, members: list[list[Part]], path: str, level: int) -> None:
        for at, parts in enumerate(members):
            for other_at, others in enumerate(members[:at]):
                if not all(self._exclude(one, other, level) for one in parts for other in others):
                    complain(
                        path, f"a value could fit both {other_at} and {at}, which no grammar can prevent; write anyOf"
                    )

    def _exclude(self, one: Part, other: Part, level: int) -> bool:
        """Whether no value that is generated for one of two parts fits the other one too. False for "who knows"."""
        values, other_values = _values_of(one), _values_of(other)
        if values is not None and other_values is not None:
            return not any(is_same(value, other_value) for value in values for other_value in other_values)
        written, other_written = _with_numbers(written_types(one)), _with_numbers(written_types(other))
        shared_types = (written & _allowed_types(other)) | (other_written & _allowed_types(one))
        for shared in shared_types:
            if shared in ("integer", "number"):
                apart = _ranges_apart(one, other) or _ranges_apart(other, one)
            else:
                apart = shared == "object" and self._objects_exclude(one, other, level)
            if not apart:
                return False
        return True

    def _objects_exclude(self, one: Part, other: Part, level: int) -> bool:
        return self._never_fits(one, other, level) and self._never_fits(other, one, level)

    def _never_fits(self, one: Part, other: Part, level: int) -> bool:
        """Whether objects that are generated for ``one`` lack something of ``other``, or have something else there."""
        members, other_members = members_of(one), members_of(other)
        possible = {*members, *required_of(one)}
        if not has_other_members(one) and any(name not in possible for name in required_of(other)):
            return True
        for name in required_of(one):
            if name not in other_members:
                if other.keywords.get("additionalProperties") is False:
                    return True
            elif name in members and level < _N_LEVELS_MAX:
                parts = self.resolved(members[name], f"{one.path}/properties/{name}", level + 1)
                others = self.resolved(other_members[name], f"{other.path}/properties/{name}", level + 1)
                if all(self._exclude(a, b, level + 1) for a in parts for b in others):
                    return True
        return False


def _both_values(keyword: str, a: Any, b: Any, path: str) -> Any:
    """One keyword that says what two different values of it say; None where nothing is left."""
    if keyword == "type":
        types = [types_of(Part({"type": value}, path)) or frozenset() for value in (a, b)]
        shared = types[0] & types[1]
        if any("integer" in one and "number" in other for one, other in (types, types[::-1])):
            shared |= {"integer"}
        return sorted(shared) or None
    if keyword == "const":
        return None
    if keyword == "enum" and isinstance(a, list) and isinstance(b, list):
        return [value for value in a if any(is_same(value, other) for other in b)] or None
    if keyword == "required" and isinstance(a, list) and isinstance(b, list):
        return [*a, *(name for name in b if name not in a)]
    if keyword in _LARGER_WINS or keyword in _SMALLER_WINS:
        if not all(isinstance(value, int | Decimal) and not isinstance(value, bool) for value in (a, b)):
            complain(f"{path}/{keyword}", "this is a number")
        return max(a, b) if keyword in _LARGER_WINS else min(a, b)
    complain(f"{path}/{keyword}", f"two schemas that both hold have a different {keyword}; write it once")


def _merge_members(merged: dict[str, Any], one: Part, other: Part) -> bool:
    """``properties`` and ``additionalProperties`` of both. False where a required member is not allowed."""
    members: dict[str, Any] = {}
    pairs = [(members_of(one), other), (members_of(other), one)]
    for own, opposite in pairs:
        for name, schema in own.items():
            theirs = members_of(opposite).get(name, opposite.keywords.get("additionalProperties", True))
            if theirs is not True and name not in members:
                members[name] = False if theirs is False else {"allOf": [schema, theirs]}
            else:
                members.setdefault(name, schema)
    if members:
        merged["properties"] = {name: schema for name, schema in members.items() if schema is not False}
    rests = [part.keywords["additionalProperties"] for part in (one, other) if "additionalProperties" in part.keywords]
    if len(rests) == 2:
        merged["additionalProperties"] = (
            False if False in rests else {"allOf": rests} if rests[0] != rests[1] else rests[0]
        )
    return not any(members.get(name) is False for name in required_of(Part(merged, one.path)))


def members_of(part: Part) -> dict[str, Any]:
    members = part.keywords.get("properties", {})
    if not isinstance(members, dict):
        complain(f"{part.path}/properties", "this is an object of schemas")
    return members


def has_other_members(part: Part) -> bool:
    """Whether members are generated that are not declared: where they are asked for, or nothing is declared at all."""
    if "additionalProperties" in part.keywords:
        return other_member(part) is not False
    return other_member(part) is not False and not (members_of(part) or required_of(part))


def other_member(part: Part) -> Any:
    """The schema of members that are not declared."""
    rest = part.keywords.get("unevaluatedProperties") is not False
    return part.keywords.get("additionalProperties", rest)


def required_of(part: Part) -> list[str]:
    names = part.keywords.get("required", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        complain(f"{part.path}/required", "this is a list of names")
    return list(dict.fromkeys(names))


def _values_of(part: Part) -> list[Any] | None:
    if "const" in part.keywords:
        return [part.keywords["const"]]
    values = part.keywords.get("enum")
    return values if isinstance(values, list) else None


def _allowed_types(part: Part) -> frozenset[str]:
    values = _values_of(part)
    types = types_of(part) if values is None else frozenset(json_type(value) for value in values)
    return _with_numbers(frozenset(KEPT) if types is None else types)


def _with_numbers(types: frozenset[str]) -> frozenset[str]:
    return types | {"number"} if "integer" in types else types


def _ranges_apart(one: Part, other: Part) -> bool:
    low = one.keywords.get("minimum", one.keywords.get("exclusiveMinimum"))
    high = other.keywords.get("maximum", other.keywords.get("exclusiveMaximum"))
    if not (isinstance(low, int | Decimal) and isinstance(high, int | Decimal)):
        return False
    return low > high or (low == high and ("exclusiveMinimum" in one.keywords or "exclusiveMaximum" in other.keywords))


def is_same(one: Any, other: Any) -> bool:
    """Equality of JSON, in which true is not 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    return bool(one == other)
