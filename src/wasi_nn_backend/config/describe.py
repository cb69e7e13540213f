"""How messages show what a user wrote: JSON's own type names, never more than a line, never a control character."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from typing import Any, Final

__all__ = ["described", "shown"]

_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_.\-]{1,80}")
_N_BITS_SHOWN_MAX: Final = 256


def described(value: Any) -> str:
    """Type and value, as in ``the string 'abc'``, shortened."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        # Python refuses to print integers of thousands of digits, and nobody wants to read hundreds.
        if value.bit_length() > _N_BITS_SHOWN_MAX:
            return f"an integer of {value.bit_length()} bits"
        return f"the integer {value}"
    return f"{_type_phrase(value)} {_shortened(value)}"


def shown(name: str) -> str:
    """A key as the user wrote it; quoted where it is long or strange, so that it cannot forge log lines."""
    return name if _PLAIN_NAME.fullmatch(name) else _shortened(name)


def _type_phrase(value: Any) -> str:
    if isinstance(value, float):
        return "the number"
    if isinstance(value, str):
        return "the string"
    if isinstance(value, Mapping):
        return "the object"
    if isinstance(value, (list, tuple)):
        return "the array"
    return f"a value of type {type(value).__name__}"


def _shortened(value: Any) -> str:
    shortener = reprlib.Repr()
    shortener.maxlevel = 2
    shortener.maxstring = 60
    shortener.maxother = 60
    try:
        text = shortener.repr(value)
    except ValueError:
        # An integer too long to print, somewhere inside.
        return f"of {len(value)} elements"
    # Python escapes its own strings; other objects (arrays, say) may show themselves on several lines.
    return text if text.isprintable() else text.encode("unicode_escape").decode()
