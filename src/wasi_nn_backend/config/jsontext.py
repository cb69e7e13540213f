"""JSON text from strangers: ``//`` comments allowed, depth and size bounded, errors with line and column."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Final

from wasi_nn_backend.errors import InvalidArgument, InvalidEncoding

__all__ = ["decode", "read_text", "without_comments"]

N_BYTES_MAX: Final = 2**20
DEPTH_MAX: Final = 32

#: A string (also one that is never closed, so that scanning stays linear), a comment, or a bracket. Comments in strings
#: and quotes in comments come out right because whatever begins first is taken whole.
_LEXEME: Final = re.compile(r'"(?:[^"\\]++|\\.)*+"?|//[^\r\n]*|[\[{]|[\]}]', re.DOTALL)


def read_text(source: str | bytes) -> str:
    """The text without a byte order mark. Raises ``InvalidEncoding`` if not UTF-8, ``InvalidArgument`` if too long."""
    n_bytes = len(source) if isinstance(source, bytes) else len(source.encode(errors="surrogatepass"))
    if n_bytes > N_BYTES_MAX:
        raise InvalidArgument(f"the text is {n_bytes} bytes long; at most {N_BYTES_MAX} bytes of JSON are read")
    if isinstance(source, str):
        return source.removeprefix("\ufeff")
    try:
        return source.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        before = source[: error.start].decode(errors="replace")
        raise InvalidEncoding(
            f"the text is not UTF-8 at {_place(before, len(before))}: {error.reason}; send JSON in UTF-8"
        ) from None


def without_comments(text: str) -> str:
    """The text with spaces in place of ``//`` comments, so that line and column of everything else stay the same."""
    return _LEXEME.sub(lambda match: " " * len(match[0]) if match[0].startswith("//") else match[0], text)


def decode(text: str, *, on_repeated_key: Callable[[str], None]) -> Any:
    """Parse strict JSON. ``on_repeated_key`` is told of names that one object gives two different values.

    Raises ``InvalidEncoding`` with line and column where it is not JSON, and ``InvalidArgument`` for what is JSON in
    the eyes of Python's parser only (NaN) or too much of it (depth, digits).
    """
    _check_depth(text)

    def as_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members: dict[str, Any] = {}
        for name, value in pairs:
            if name in members and members[name] != value:
                on_repeated_key(name)
            members[name] = value
        return members

    try:
        return json.loads(text, object_pairs_hook=as_object, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise InvalidEncoding(
            f"the text is not JSON at line {error.lineno} column {error.colno}: {error.msg}; correct it there"
        ) from None
    except ValueError:
        # Python refuses to convert integers of thousands of digits; no key wants one.
        raise InvalidArgument("a number in the JSON text has too many digits; write a shorter one") from None


def _check_depth(text: str) -> None:
    """Before parsing, because the parser recurses: a few kilobytes of brackets would exhaust the stack."""
    depth = 0
    for match in _LEXEME.finditer(text):
        if match[0] in ("[", "{"):
            depth += 1
        elif match[0] in ("]", "}"):
            depth -= 1
        if depth > DEPTH_MAX:
            place = _place(text, match.start())
            raise InvalidArgument(f"the JSON text is nested deeper than {DEPTH_MAX} levels at {place}; flatten it")


def _refuse_constant(literal: str) -> None:
    raise InvalidArgument(f"{literal} is not a number that JSON knows; write a finite number")


def _place(text: str, offset: int) -> str:
    line = text.count("\n", 0, offset) + 1
    column = offset - text.rfind("\n", 0, offset)
    return f"line {line} column {column}"
