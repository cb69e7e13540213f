"""Reads regular expressions as JSON Schema has them (ECMA-262, without what no grammar can hold) into a tree.

Python's own engine is not used on what users send: some expressions keep it busy for years, with its lock held.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, NoReturn

from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.grammar.characters import MAX_CODE_POINT, Characters

__all__ = ["Anchor", "Choice", "Group", "Node", "Repeat", "Sequence", "read_regex"]

_N_CHARACTERS_MAX: Final = 4096
_N_LEVELS_MAX: Final = 64
_N_REPETITIONS_MAX: Final = 2000

_DIGITS = Characters(((0x30, 0x39),))
_WORD = Characters.of(((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)))
_LINE_ENDS = Characters.of(((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029)))
# Without U+FEFF, which is white space in JavaScript and none elsewhere.
_SPACES = Characters.of(
    (
        *((0x09, 0x0D), (0x20, 0x20), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029)),
        *((0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000)),
    )
)
_SETS: Final = {
    "d": _DIGITS,
    "D": _DIGITS.complement(),
    "w": _WORD,
    "W": _WORD.complement(),
    "s": _SPACES,
    "S": _SPACES.complement(),
}
_ESCAPES: Final = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13}
_HEX = re.compile(r"x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|u\{([0-9a-fA-F]{1,6})\}")
_BRACES = re.compile(r"\{([0-9]{1,9})(?:(,)([0-9]{1,9})?)?\}")
_GROUP = re.compile(r"\((\?:|\?<[A-Za-z_$][A-Za-z0-9_$]*>|(?!\?))")


@dataclass(frozen=True, slots=True)
class Anchor:
    """``^`` or, with ``is_end``, ``$``."""

    is_end: bool


@dataclass(frozen=True, slots=True)
class Sequence:
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    options: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """``at_most`` None is without end."""

    item: Node
    at_least: int
    at_most: int | None


@dataclass(frozen=True, slots=True)
class Group:
    """Parentheses that capture."""

    item: Node


Node = Characters | Anchor | Sequence | Choice | Repeat | Group


def read_regex(pattern: str) -> Node:
    """Raises ``InvalidArgument`` with the place for wrong expressions, and for look-around, back-references, word
    boundaries and named character properties. Whether a quantifier is greedy makes no difference to what matches.
    """
    return _Reader(pattern).read()


class _Reader:
    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0
        self._level = 0

    def read(self) -> Node:
        if len(self._pattern) > _N_CHARACTERS_MAX:
            self._complain(f"longer than {_N_CHARACTERS_MAX} characters")
        node = self._read_choice()
        if self._at < len(self._pattern):
            self._complain("this ) closes nothing")
        return node

    def _read_choice(self) -> Node:
        options = [self._read_sequence()]
        while self._next() == "|":
            self._at += 1
            options.append(self._read_sequence())
        return options[0] if len(options) == 1 else Choice(tuple(options))

    def _read_sequence(self) -> Node:
        items: list[Node] = []
        while self._next() not in ("", "|", ")"):
            item = self._read_item()
            items.append(item if isinstance(item, Anchor) else self._read_quantifier(item))
        return items[0] if len(items) == 1 else Sequence(tuple(items))

    def _read_item(self) -> Node:
        character = self._next()
        if character in ("*", "+", "?"):
            self._complain(f"{character} repeats nothing")
        if character == "(":
            return self._read_group()
        if character == "[":
            return self._read_class()
        if character == "\\":
            return self._read_escape()
        self._at += 1
        if character in ("^", "$"):
            return Anchor(character == "$")
        return _LINE_ENDS.complement() if character == "." else Characters.of_text(character)

    def _read_quantifier(self, item: Node) -> Node:
        times: tuple[int, int | None] | None
        times = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(self._next())
        braces = _BRACES.match(self._pattern, self._at)
        if times is not None:
            self._at += 1
        elif braces is not None:
            at_least = int(braces[1])
            times = at_least, at_least if not braces[2] else int(braces[3]) if braces[3] else None
            if max(at_least, times[1] or 0) > _N_REPETITIONS_MAX:
                self._complain(f"repeated over {_N_REPETITIONS_MAX} times")
            if times[1] is not None and times[1] < at_least:
                self._complain("repeated at least more often than at most")
            self._at = braces.end()
        else:
            return item
        self._at += self._next() == "?"  # lazy
        if self._next() in ("*", "+", "?") or _BRACES.match(self._pattern, self._at):
            self._complain("a quantifier follows another one")
        return Repeat(item, *times)

    def _read_group(self) -> Node:
        found = _GROUP.match(self._pattern, self._at)
        if found is None:
            self._complain("look-around and other extensions are not supported")
        self._level += 1
        if self._level > _N_LEVELS_MAX:
            self._complain(f"parentheses are nested over {_N_LEVELS_MAX} deep")
        start, self._at = self._at, found.end()
        item = self._read_choice()
        if self._next() != ")":
            self._complain("this ( is not closed", start)
        self._at += 1
        self._level -= 1
        return item if found[1] == "?:" else Group(item)

    def _read_class(self) -> Characters:
        start = self._at
        self._at += 1
        is_negated = self._next() == "^"
        self._at += is_negated
        characters = Characters(())
        while self._next() != "]":
            if not self._next():
                self._complain("this [ is not closed", start)
            at = self._at
            low = self._read_class_member()
            if self._next() == "-" and self._pattern[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                high = self._read_class_member()
                if not (_is_one(low) and _is_one(high)) or high.ranges < low.ranges:
                    self._complain("this is no range of characters", at)
                low = Characters(((low.ranges[0][0], high.ranges[0][1]),))
            characters |= low
        self._at += 1
        characters = characters.complement() if is_negated else characters
        if not characters:
            self._complain("no character is in this set", start)
        return characters

    def _read_class_member(self) -> Characters:
        if self._next() == "\\":
            return self._read_escape(in_class=True)
        self._at += 1
        return Characters.of_text(self._pattern[self._at - 1])

    def _read_escape(self, *, in_class: bool = False) -> Characters:
        escape = self._pattern[self._at + 1 : self._at + 2]
        found = _HEX.match(self._pattern, self._at + 1)
        code_point = _ESCAPES.get(escape)
        if escape in _SETS and escape:
            self._at += 2
            return _SETS[escape]
        if found is not None:
            code_point = int(found[1] or found[2] or found[3], 16)
            if code_point > MAX_CODE_POINT:
                self._complain("there is no character above U+10FFFF")
            self._at = found.end()
            return Characters(((code_point, code_point),))
        if escape == "0" and not self._pattern[self._at + 2 : self._at + 3].isdigit():
            code_point = 0
        elif escape == "b" and in_class:
            code_point = 8
        elif code_point is None:
            if not escape or escape.isalnum():
                self._complain(f"\\{escape} is not supported")
            code_point = ord(escape)
        self._at += 2
        return Characters(((code_point, code_point),))

    def _next(self) -> str:
        return self._pattern[self._at : self._at + 1]

    def _complain(self, problem: str, position: int | None = None) -> NoReturn:
        at = (self._at if position is None else position) + 1
        raise InvalidArgument(
            f"the regular expression {_shortened(self._pattern)} is wrong at character {at}: {problem}"
        )


def _is_one(characters: Characters) -> bool:
    return len(characters.ranges) == 1 and characters.ranges[0][0] == characters.ranges[0][1]


def _shortened(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 60 else pattern[:60] + "...")
