"""The values of an invoked component function, from and to the words of a command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from wasmtime.component import (
    F32,
    F64,
    S8,
    S16,
    S32,
    S64,
    U8,
    U16,
    U32,
    U64,
    Bool,
    Char,
    EnumType,
    ListType,
    OptionType,
    Record,
    String,
    ValType,
    Variant,
)

from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.host.component_imports import type_text

__all__ = ["argument_value", "result_text"]

_INTEGERS: dict[type[ValType], tuple[int, int]] = {
    **{kind: (0, (1 << n_bits) - 1) for kind, n_bits in ((U8, 8), (U16, 16), (U32, 32), (U64, 64))},
    **{
        kind: (-(1 << n_bits >> 1), (1 << n_bits >> 1) - 1)
        for kind, n_bits in ((S8, 8), (S16, 16), (S32, 32), (S64, 64))
    },
}
_BOOLEANS = {"true": True, "false": False}


def argument_value(kind: ValType, text: str) -> Any:
    """One argument from its text. Raises ``InvalidArgument``.

    A string is taken as it is, ``list<u8>`` is its UTF-8 bytes, a list of strings is JSON; numbers, ``true`` and
    ``false``, the names of an enum, and an option of any of these.
    """
    match kind:
        case String():
            return text
        case OptionType():
            return argument_value(kind.payload, text)
        case EnumType():
            return _checked(kind, text, text in kind.names)
        case Char():
            return _checked(kind, text, len(text) == 1)
        case Bool():
            return _BOOLEANS[_checked(kind, text, text in _BOOLEANS)]
        case ListType():
            return _list(kind, text)
        case F32() | F64():
            return _number(kind, text, float)
    if type(kind) not in _INTEGERS:
        raise InvalidArgument(f"a function with a parameter of type {type_text(kind)} cannot be invoked from outside")
    number = _number(kind, text, lambda digits: int(digits, 0))
    least, most = _INTEGERS[type(kind)]
    _checked(kind, text, least <= number <= most)
    return number


def result_text(value: Any) -> int | float | str:
    """A result ready to be printed: numbers and texts as they are, the rest as JSON."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return json.dumps(value, ensure_ascii=False, default=_json_value)
    return value


def _json_value(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, Record):
        return vars(value)
    if isinstance(value, Variant):
        return {value.tag: value.payload}
    return sorted(value) if isinstance(value, set) else str(value)


def _list(kind: ListType, text: str) -> Any:
    if isinstance(kind.element, U8):
        return text.encode(errors="surrogateescape")
    if not isinstance(kind.element, String):
        raise InvalidArgument(f"a function with a parameter of type {type_text(kind)} cannot be invoked from outside")
    try:
        items = json.loads(text)
    except ValueError:
        items = None
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise InvalidArgument(f'{text[:80]!r} is no {type_text(kind)}: pass JSON like ["a", "b"]')
    return items


def _number(kind: ValType, text: str, convert: Callable[[str], Any]) -> Any:
    try:
        return convert(text)
    except ValueError:
        return _checked(kind, text, False)


def _checked(kind: ValType, text: str, is_right: bool) -> str:
    if not is_right:
        raise InvalidArgument(f"{text[:80]!r} is no {type_text(kind)}")
    return text
