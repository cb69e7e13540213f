"""From a document to a layer: names become keys, values are checked, and every complaint says where.

Both shapes go through one reader, so a document means the same whether its keys stand in sections or at the top.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from wasi_nn_backend.config import jsontext
from wasi_nn_backend.config.describe import described, shown
from wasi_nn_backend.config.files import named_file, read_file
from wasi_nn_backend.config.keys import (
    INHERITING_SECTIONS,
    MEMBERS,
    RUNTIME,
    SECTIONS,
    STRICT,
    TOP_LEVEL,
    UNSUPPORTED,
    Target,
    normalised,
)
from wasi_nn_backend.config.layers import LIMITED_BY, ConfigSource, Layer
from wasi_nn_backend.config.section import OUT_OF_RANGE
from wasi_nn_backend.errors import InvalidArgument, InvalidEncoding, NotFound, UnsupportedOperation

__all__ = ["CallerRules", "UnknownPolicy", "log_warnings", "parse_assignments", "parse_layer"]

UnknownPolicy = Literal["warn", "ignore", "error"]

_log = logging.getLogger("wasi_nn_backend.config")

_RANGE_ERRORS: Final = frozenset({"greater_than_equal", "less_than_equal", OUT_OF_RANGE})

_VALID: Final = {bool: "a valid boolean", str: "a valid string", int: "a valid integer"}

#: What pydantic's own words would not say to people who know JSON.
_EXPECTATIONS: Final = {"model_type": "should be an object"}
_MEMBER_ERRORS: Final = {
    "missing": "is missing; add it",
    "extra_forbidden": "is no known key; correct it or leave it out",
}

#: A hostile document could hold a hundred thousand unknown or repeated keys, and comparing one unknown name with the
#: known ones takes about a millisecond. What is left out is counted.
_N_WARNINGS_MAX: Final = 64
_N_NAME_CHARS_COMPARED_MAX: Final = 64


@dataclass(frozen=True, slots=True)
class CallerRules:
    """How a caller's document is read, beyond what holds for all.

    ``inherits``: -1 leaves a key as it was, for all keys of ``sampling`` and ``stopping`` for which it means nothing
    else. ``defaults`` (nested) come before the built-in ones where a value out of range becomes the default; of
    ``raised_keys``, (section, key) pairs, one that is too small becomes the smallest there is.
    """

    inherits: bool = False
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    raised_keys: frozenset[tuple[str, str]] = frozenset()


_NO_RULES: Final = CallerRules()


def parse_layer(
    source: ConfigSource,
    *,
    name: str,
    unknown: UnknownPolicy = "warn",
    reads_files: bool = True,
    rules: CallerRules = _NO_RULES,
    logs: bool = True,
) -> Layer:
    """Check a configuration document in either shape. ``name`` stands in messages; a ``Layer`` comes back as it is.

    ``reads_files`` lets ``@path`` stand for a file's content; a guest's text must not. In the section ``runtime`` -1
    leaves a key as it was; ``rules`` may extend that, and say more about values out of range. Warnings are in the
    layer; ``logs`` False leaves it to the caller to log them (``log_warnings``).

    Raises ``InvalidEncoding`` for text that is not JSON or UTF-8, ``InvalidArgument`` for wrong types, values that
    cannot be mended, files that cannot be read and, under ``unknown="error"`` or ``"strict": true``, unknown keys,
    ``NotFound`` where there is no such file, ``UnsupportedOperation`` for keys that ask for what this version cannot
    do. Values out of range that can be mended are mended with a warning.
    """
    if isinstance(source, Layer):
        return source
    path = named_file(source) if reads_files else None
    if path is not None:
        name, source = f"{name} {shown(str(path))}", _read_file(path, name)
    reader = _Reader(name, unknown, rules=rules, logs=logs)
    if isinstance(source, (str, bytes)):
        source = _parse_text(source, reader)
    if source is not None:
        reader.read(source)
    return reader.layer()


def _read_file(path: Path, name: str) -> bytes:
    try:
        return read_file(path)
    except (InvalidArgument, NotFound) as error:
        raise type(error)(f"{name}: {error}") from None


def parse_assignments(pairs: Sequence[str], *, name: str) -> Layer:
    """Check ``key=value`` strings as they stand on a command line. The key is flat, dotted, or any other spelling.

    A value that is JSON counts as such, any other as a string. Raises as ``parse_layer`` does; an unknown key is an
    error, since who types a key is there to mend it.
    """
    reader = _Reader(name, "error")
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip()
        section, dot, member = key.partition(".")
        if not equals or not section or (dot and not member):
            raise InvalidArgument(f"{name}: {described(pair)} is no assignment; write key=value, as in temperature=0.5")
        value = _parse_value(text, reader)
        if dot:
            reader.read_member(section, member, value)
        else:
            reader.read_top(key, value)
    return reader.layer()


def log_warnings(layer: Layer) -> None:
    """For layers that were parsed with ``logs=False``, once there is a log."""
    for warning in layer.warnings:
        _log.warning("%s: %s", layer.name, warning)


def _parse_text(source: str | bytes, reader: _Reader) -> Mapping[str, Any] | None:
    try:
        text = jsontext.without_comments(jsontext.read_text(source))
        if not text.strip():
            return None
        document = jsontext.decode(text, on_repeated_key=reader.warn_of_repetition)
    except (InvalidArgument, InvalidEncoding) as error:
        raise type(error)(f"{reader.name}: {error}") from None
    if not isinstance(document, dict):
        raise InvalidArgument(
            f'{reader.name}: the configuration is {described(document)}; write a JSON object, as in {{"top_k": 20}}'
        )
    return document


def _parse_value(text: str, reader: _Reader) -> Any:
    try:
        return jsontext.decode(text, on_repeated_key=reader.warn_of_repetition)
    except (InvalidArgument, InvalidEncoding):
        return text


class _Reader:
    """Collects the values of one document. ``path`` is always the key as the user wrote it."""

    def __init__(self, name: str, unknown: UnknownPolicy, *, rules: CallerRules = _NO_RULES, logs: bool = True) -> None:
        self.name = name
        self._unknown = unknown
        self._rules = rules
        self._strict = False
        self._logs = logs
        self._n_warnings = 0
        self._warnings: list[str] = []
        self._values: dict[str, dict[str, Any]] = {}
        self._paths: dict[tuple[str, str], str] = {}

    def layer(self) -> Layer:
        self._lower_to_limits()
        if self._n_warnings > _N_WARNINGS_MAX:
            n_more = self._n_warnings - _N_WARNINGS_MAX
            self._keep_warning(f"{n_more} more warnings about this configuration are left out")
        frozen = MappingProxyType({section: MappingProxyType(keys) for section, keys in self._values.items()})
        return Layer(self.name, frozen, strict=self._strict, warnings=tuple(self._warnings))

    def read(self, document: object) -> None:
        if not isinstance(document, Mapping):
            raise InvalidArgument(
                f"{self.name}: the configuration is {described(document)}; "
                "pass JSON text, a mapping, a Path, a Layer or None"
            )
        for key, value in document.items():
            if key == STRICT:  # wherever it stands, it holds for the whole document
                self._read_strict(value)
        for key, value in document.items():
            self.read_top(self._checked_name(key), value)

    def _read_strict(self, value: Any) -> None:
        if not isinstance(value, bool):
            raise InvalidArgument(f"{self.name}: {STRICT} is {described(value)}, but it should be true or false")
        self._strict = value

    def read_top(self, key: str, value: Any) -> None:
        """A key at the top level: a section, or any key of the flat shape."""
        if key == STRICT:
            self._read_strict(value)
        elif normalised(key) not in MEMBERS:
            self._read_key(key, normalised(key), TOP_LEVEL, value)
        elif isinstance(value, Mapping):
            for member, member_value in value.items():
                self.read_member(key, self._checked_name(member), member_value)
        else:
            raise InvalidArgument(
                f"{self.name}: {shown(key)} is {described(value)}; it is a section and takes an object of keys"
            )

    def read_member(self, section: str, key: str, value: Any) -> None:
        place = normalised(section)
        targets = MEMBERS.get(place, {})
        if place == RUNTIME and _is_minus_one(value) and (normalised(key) in targets or normalised(key) in UNSUPPORTED):
            return
        self._read_key(f"{section}.{key}", normalised(key), targets, value)

    def _checked_name(self, key: Any) -> str:
        if isinstance(key, str):
            return key
        raise InvalidArgument(f"{self.name}: a key is {described(key)}; keys are strings")

    def _read_key(self, path: str, key: str, targets: Mapping[str, Target], value: Any) -> None:
        target = targets.get(key)
        if target is not None:
            if not (self._rules.inherits and _is_minus_one(value) and _means_nothing(target, value)):
                self._store(target, path, value)
        elif key in UNSUPPORTED:
            self._refuse_unsupported(path, key, value)
        else:
            self._report_unknown(path, key)

    def _store(self, target: Target, path: str, value: Any) -> None:
        if target.negated and isinstance(value, bool):
            value = not value
        checked = self._checked(target, path, value)
        earlier_path = self._paths.get((target.section, target.key))
        keys = self._values.setdefault(target.section, {})
        if earlier_path is not None and keys[target.key] != checked:
            self._warn(
                f"{shown(earlier_path)} and {shown(path)} are the same key with different values; the last one counts"
            )
        keys[target.key] = checked
        self._paths[target.section, target.key] = path

    def _checked(self, target: Target, path: str, value: Any) -> Any:
        """The value as the section's model has it. One value a time, so that messages follow the document's order."""
        remarks: list[str] = []
        model = SECTIONS[target.section]
        try:
            section = model.model_validate({target.key: value}, context=remarks)
        except ValidationError as error:
            return self._mended(target, path, value, error.errors(include_url=False)[0])
        for remark in remarks:
            self._warn(f"{shown(path)}: {remark}")
        return getattr(section, target.key)

    def _mended(self, target: Target, path: str, value: Any, problem: ErrorDetails) -> Any:
        """What counts instead of a value out of range. Raises ``InvalidArgument`` where the value is past mending."""
        inside = problem["loc"][1:]
        what = shown(path) + "".join(f"[{part}]" if isinstance(part, int) else f".{shown(part)}" for part in inside)
        if problem["type"] in _MEMBER_ERRORS:
            raise InvalidArgument(f"{self.name}: {what} {_MEMBER_ERRORS[problem['type']]}")
        got = described(problem["input"] if inside else value)
        expected = _EXPECTATIONS.get(problem["type"], problem["msg"].removeprefix("Input "))
        complaint = f"{what} is {got}, but it {expected}"
        if problem["type"] not in _RANGE_ERRORS or target.outside == "error":
            raise InvalidArgument(f"{self.name}: {complaint}; change the value or leave the key out")
        bounds = problem.get("ctx", {})
        is_raised = "ge" in bounds and (target.section, target.key) in self._rules.raised_keys
        if target.outside == "clamp" or is_raised:
            substitute = bounds["ge"] if "ge" in bounds else bounds["le"]
            self._warn(f"{complaint}; {described(substitute)} is used instead")
        else:
            built_in = SECTIONS[target.section].model_fields[target.key].default
            substitute = self._rules.defaults.get(target.section, {}).get(target.key, built_in)
            default = "the automatic choice" if substitute is None else f"the default, {described(substitute)},"
            self._warn(f"{complaint}; {default} is used instead")
        return substitute

    def _refuse_unsupported(self, path: str, key: str, value: Any) -> None:
        unsupported = UNSUPPORTED[key]
        if value is not None and type(value) is not unsupported.value_type:
            expected = _VALID[unsupported.value_type]
            raise InvalidArgument(
                f"{self.name}: {shown(path)} is {described(value)}, but it should be {expected}; "
                "change the value or leave the key out"
            )
        if unsupported.is_asked_for(value):
            raise UnsupportedOperation(
                f"{self.name}: {shown(path)} asks for {unsupported.request}, which this version cannot do; "
                f"leave the key out or {'switch it off' if unsupported.automatic is None else 'set it to -1'}"
            )

    def _report_unknown(self, path: str, key: str) -> None:
        if self._unknown == "ignore" and not self._strict:
            _log.debug("%s: the unknown key %s is ignored", self.name, shown(path))
            return
        if self._unknown == "error" or self._strict:
            raise InvalidArgument(f"{self.name}: {self._unknown_complaint(path, key)}; correct it or leave it out")
        if self._n_warnings < _N_WARNINGS_MAX:
            self._warn(f"{self._unknown_complaint(path, key)}; it is ignored")
        else:
            self._n_warnings += 1

    def _unknown_complaint(self, path: str, key: str) -> str:
        return f"{shown(path)} is no known key{_suggestion(key)}"

    def _lower_to_limits(self) -> None:
        """Keys that another key of the same document limits; limits of other layers are ``resolve``'s to apply."""
        for section, limited_by in LIMITED_BY.items():
            keys = self._values.get(section, {})
            for key, limit in limited_by.items():
                if key in keys and limit in keys and keys[key] > keys[limit]:
                    written = shown(self._paths[section, key])
                    self._warn(
                        f"{written} is {described(keys[key])}, but it should be at most {limit}; "
                        f"{described(keys[limit])} is used instead"
                    )
                    keys[key] = keys[limit]

    def warn_of_repetition(self, key: str) -> None:
        self._warn(f"{shown(key)} stands twice in one object with different values; the last one counts")

    def _warn(self, message: str) -> None:
        self._n_warnings += 1
        if self._n_warnings <= _N_WARNINGS_MAX:
            self._keep_warning(message)

    def _keep_warning(self, message: str) -> None:
        self._warnings.append(message)
        if self._logs:
            _log.warning("%s: %s", self.name, message)


def _is_minus_one(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == -1


def _means_nothing(target: Target, value: Any) -> bool:
    """Whether a value is out of range for a key that a call may inherit."""
    if target.section not in INHERITING_SECTIONS:
        return False
    try:
        SECTIONS[target.section].model_validate({target.key: value})
    except ValidationError:
        return True
    return False


def _suggestion(key: str) -> str:
    if len(key) > _N_NAME_CHARS_COMPARED_MAX:
        return ""
    section, _, member = key.partition(".")
    if member in MEMBERS.get(section, {}):  # as assignments spell it
        return f'; write {{"{section}": {{"{member}": ...}}}}'
    nearest = difflib.get_close_matches(key, [*TOP_LEVEL, *MEMBERS, STRICT], n=1)
    if not nearest:
        return ""
    if nearest[0] == STRICT:
        return f"; the nearest is {STRICT}, at the top level"
    if nearest[0] in MEMBERS:
        return f"; the nearest is the section {nearest[0]}"
    return f"; the nearest is {TOP_LEVEL[nearest[0]].section}.{nearest[0]}"
