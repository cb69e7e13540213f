"""Reads llama.cpp's grammar notation (GBNF) into rules, and says what is wrong with it and where.

llama.cpp's own reader says neither what is wrong nor where, but on standard error, recurses once a parenthesis, and
takes some texts (``{3,2}``, for one) for a request for all the memory there is. What it means is kept: groups and
repetitions become rules of their own in the same way, and repetitions have the same limit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final, NoReturn

from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.grammar.characters import ANY_CHARACTER, MAX_CODE_POINT, Characters

__all__ = ["Element", "Grammar", "Rule", "TokenElement", "complain", "read_gbnf"]

#: llama.cpp's limit. It takes a larger upper bound for "no bound"; here that is an error.
_N_REPETITIONS_MAX: Final = 2000
#: Limits on the size with all repetitions written out. The largest schemas in the field need some thousand rules.
_N_RULES_MAX: Final = 16384
_N_ELEMENTS_MAX: Final = 131072
_N_LEVELS_MAX: Final = 64
_N_CHARACTERS_MAX: Final = 2**18

_SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_SPACE_AND_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_NAME = re.compile(r"[a-zA-Z0-9-]+")
_PLAIN = re.compile(r'[^"\\]+')
_DIGITS = re.compile(r"[0-9]+")
_TOKEN = re.compile(r"<(?:\[([0-9]+)\]|(?!\[)[^>]*)>")
_ESCAPES: Final = {"t": 9, "r": 13, "n": 10, **{character: ord(character) for character in '\\"[]-'}}
_HEX_DIGITS: Final = {"x": 2, "u": 4, "U": 8}


@dataclass(frozen=True, slots=True)
class TokenElement:
    """``<text>`` or ``<[id]>``: one token of the vocabulary, or with ``is_negated`` (``!<text>``) any other."""

    text: str
    token: int | None  # None: to be looked up in a vocabulary
    is_negated: bool
    position: int


#: What a rule is made of. A number refers to a rule.
Element = Characters | TokenElement | int


@dataclass(slots=True)
class Rule:
    """``position`` is where it is defined, or first referred to. ``alternatives`` is empty until it is defined."""

    name: str
    position: int
    alternatives: list[list[Element]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Grammar:
    """``rules[root]`` is where texts begin."""

    text: str
    rules: list[Rule]
    root: int


def complain(text: str, position: int, problem: str) -> NoReturn:
    """Raise ``InvalidArgument`` for a place in a grammar's text."""
    line = text.count("\n", 0, position) + 1
    column = position - (text.rfind("\n", 0, position) + 1) + 1
    raise InvalidArgument(f"the grammar is wrong at line {line}, column {column}: {problem}")


def read_gbnf(text: str, root: str = "root") -> Grammar:
    """Raises ``InvalidArgument`` with line and column. What the rules mean is not looked at (``checks``)."""
    if len(text) > _N_CHARACTERS_MAX:
        raise InvalidArgument(f"the grammar has {len(text)} characters, of which {_N_CHARACTERS_MAX} are allowed")
    if "\0" in text:
        complain(text, text.index("\0"), "a NUL character")
    return _Reader(text).read(root)


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._rules: list[Rule] = []
        self._ids: dict[str, int] = {}
        self._n_elements = 0

    def read(self, root: str) -> Grammar:
        self._skip(_SPACE_AND_LINES)
        while self._at < len(self._text):
            self._read_rule()
        for rule in self._rules:
            if not rule.alternatives:
                self._complain(f"the rule {rule.name!r} is used but not defined", rule.position)
        if root not in self._ids:
            self._complain(f"there is no rule {root!r}, where every text begins", 0)
        return Grammar(self._text, self._rules, self._ids[root])

    def _read_rule(self) -> None:
        position = self._at
        name = self._take(_NAME, "a rule's name")
        self._skip(_SPACE)
        if not self._text.startswith("::=", self._at):
            self._complain(f"::= should follow the rule's name {name!r}")
        self._at += 3
        self._skip(_SPACE_AND_LINES)
        rule = self._rules[self._named(name, position)]
        if rule.alternatives:
            self._complain(f"the rule {name!r} is defined twice", position)
        rule.position = position
        rule.alternatives = self._read_alternatives(name, 0)
        if self._at < len(self._text):
            if self._text[self._at] not in "\r\n":
                self._complain(f"{self._text[self._at]!r} does not belong here, in the rule {name!r}")
            self._skip(_SPACE_AND_LINES)

    def _read_alternatives(self, name: str, level: int) -> list[list[Element]]:
        alternatives = [self._read_sequence(name, level)]
        while self._next() == "|":
            self._at += 1
            self._skip(_SPACE_AND_LINES)
            self._count(1)
            alternatives.append(self._read_sequence(name, level))
        return alternatives

    def _read_sequence(self, name: str, level: int) -> list[Element]:
        """One alternative. A line ends it, but for those in parentheses."""
        space = _SPACE_AND_LINES if level else _SPACE
        elements: list[Element] = []
        start_of_last = 0
        n_rules_in_last = 1
        while True:
            position, character = self._at, self._next()
            if character in ("*", "+", "?", "{"):
                at_least, at_most = self._read_repetition(space)
                n_rules_in_last *= (at_most or at_least) or 1
                if start_of_last == len(elements):
                    self._complain(f"{character!r} repeats what stands before it, which is nothing", position)
                if n_rules_in_last > _N_REPETITIONS_MAX:
                    self._complain(f"repeated over {_N_REPETITIONS_MAX} times, inner repetitions counted", position)
                self._repeat(name, elements, start_of_last, (at_least, at_most))
                continue
            start_of_last, n_rules_in_last = len(elements), 1
            if character == "(":
                n_rules_before = len(self._rules)
                elements.append(self._read_group(name, level + 1))
                n_rules_in_last = len(self._rules) - n_rules_before
            elif not self._read_plain(elements, character):
                return elements
            self._skip(space)
            self._count(len(elements) - start_of_last)

    def _read_plain(self, elements: list[Element], character: str) -> bool:
        """Everything but groups and repetitions. False where the sequence ends."""
        if character == '"':
            elements.extend(self._read_literal())
        elif character == "[":
            elements.append(self._read_class())
        elif character == ".":
            self._at += 1
            elements.append(ANY_CHARACTER)
        elif character in ("<", "!"):
            elements.append(self._read_token(character))
        elif _NAME.match(character):
            position = self._at
            elements.append(self._named(self._take(_NAME, "a rule's name"), position))
        else:
            return False
        return True

    def _read_group(self, name: str, level: int) -> int:
        position = self._at
        if level > _N_LEVELS_MAX:
            self._complain(f"parentheses are nested over {_N_LEVELS_MAX} deep")
        self._at += 1
        self._skip(_SPACE_AND_LINES)
        number = self._new_rule(name, position)
        self._rules[number].alternatives = self._read_alternatives(name, level)
        if self._next() != ")":
            self._complain(f"{self._next()!r} does not belong into parentheses" if self._next() else "a ) is missing")
        self._at += 1
        return number

    def _read_repetition(self, space: re.Pattern[str]) -> tuple[int, int | None]:
        """(at least, at most); None is for ever."""
        character = self._text[self._at]
        self._at += 1
        self._skip(space)
        if character != "{":
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[character]
        position = self._at
        at_least = self._read_count()
        self._skip(space)
        at_most: int | None = at_least
        if self._next() == ",":
            self._at += 1
            self._skip(space)
            at_most = self._read_count() if _DIGITS.match(self._next()) else None
            self._skip(space)
        if self._next() != "}":
            self._complain("a repetition is written {2}, {2,} or {2,5}", position)
        self._at += 1
        self._skip(space)
        if at_most is not None and at_most < at_least:
            self._complain(f"repeated at least {at_least} and at most {at_most} times, which is never", position)
        return at_least, at_most

    def _read_count(self) -> int:
        position = self._at
        digits = self._take(_DIGITS, "a number of repetitions")
        if len(digits) > 9 or int(digits) > _N_REPETITIONS_MAX:
            self._complain(f"repeated over {_N_REPETITIONS_MAX} times", position)
        return int(digits)

    def _repeat(self, name: str, elements: list[Element], start: int, times: tuple[int, int | None]) -> None:
        """Put repetitions of what begins at ``start`` in its place, in llama.cpp's way.

        S{2,} becomes S S R with R ::= S R | (nothing), and S{1,3} S R2 with R2 ::= S R1 | and R1 ::= S |.
        """
        at_least, at_most = times
        repeated = elements[start:]
        n_optional = 1 if at_most is None else at_most - at_least
        self._count(len(repeated) * (at_least + n_optional) + n_optional)
        del elements[start:]
        elements += repeated * at_least
        tail: list[Element] = []
        for _ in range(n_optional):
            number = self._new_rule(name, self._at)
            rest = [number] if at_most is None else tail
            self._rules[number].alternatives = [[*repeated, *rest], []]
            tail = [number]
        elements += tail

    def _read_literal(self) -> list[Element]:
        position = self._at
        self._at += 1
        code_points: list[int] = []
        while self._next() != '"':
            if not self._next():
                self._complain("a text in quotes does not end", position)
            plain = _PLAIN.match(self._text, self._at)
            if plain is None:
                code_points.append(self._read_character())
            else:
                code_points.extend(map(ord, plain.group()))
                self._at = plain.end()
            if len(code_points) > _N_ELEMENTS_MAX:
                self._complain(f"a text in quotes is longer than {_N_ELEMENTS_MAX} characters", position)
        self._at += 1
        return [Characters(((code_point, code_point),)) for code_point in code_points]

    def _read_class(self) -> Characters:
        position = self._at
        self._at += 1
        is_negated = self._next() == "^"
        self._at += is_negated
        ranges: list[tuple[int, int]] = []
        while self._next() != "]":
            start = self._at
            if not self._next():
                self._complain("a set of characters in brackets does not end", position)
            low = high = self._read_character()
            if self._next() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                high = self._read_character()
            if high < low:
                self._complain("a range of characters runs backwards", start)
            ranges.append((low, high))
        self._at += 1
        if not ranges:
            self._complain("a set of characters is empty", position)
        characters = Characters.of(ranges)
        return characters.complement() if is_negated else characters

    def _read_character(self) -> int:
        character = self._text[self._at]
        if character != "\\":
            self._at += 1
            return ord(character)
        escape = self._text[self._at + 1 : self._at + 2]
        n_digits = _HEX_DIGITS.get(escape, 0)
        digits = self._text[self._at + 2 : self._at + 2 + n_digits]
        if escape in _ESCAPES:
            code_point = _ESCAPES[escape]
        elif n_digits and re.fullmatch(rf"[0-9a-fA-F]{{{n_digits}}}", digits):
            code_point = int(digits, 16)
        elif n_digits:
            self._complain(f"\\{escape} needs {n_digits} hexadecimal digits")
        else:
            self._complain(f"\\{escape} is no escape of this notation")
        if code_point > MAX_CODE_POINT:
            self._complain("there is no character above U+10FFFF")
        self._at += 2 + n_digits
        return code_point

    def _read_token(self, character: str) -> TokenElement:
        position = self._at
        self._at += character == "!"
        found = _TOKEN.match(self._text, self._at)
        if found is None:
            self._complain("a token is written <its text> or <[its number]>", position)
        self._at = found.end()
        token = found.group(1)
        if token is not None and (len(token) > 10 or int(token) >= 2**31):
            self._complain(f"{found.group()} is no token of any vocabulary", position)
        return TokenElement(found.group(), None if token is None else int(token), character == "!", position)

    def _named(self, name: str, position: int) -> int:
        if name not in self._ids:
            self._ids[name] = self._new_rule(name, position)
        return self._ids[name]

    def _new_rule(self, name: str, position: int) -> int:
        if len(self._rules) == _N_RULES_MAX:
            self._complain(f"the grammar becomes larger than {_N_RULES_MAX} rules, repetitions written out")
        self._rules.append(Rule(name, position))
        return len(self._rules) - 1

    def _count(self, n_elements: int) -> None:
        self._n_elements += n_elements
        if self._n_elements > _N_ELEMENTS_MAX:
            self._complain(f"the grammar becomes larger than {_N_ELEMENTS_MAX} elements, repetitions written out")

    def _next(self) -> str:
        """The next character; an empty string at the end."""
        return self._text[self._at : self._at + 1]

    def _take(self, pattern: re.Pattern[str], what: str) -> str:
        found = pattern.match(self._text, self._at)
        if found is None:
            self._complain(f"{what} should stand here")
        self._at = found.end()
        return found.group()

    def _skip(self, space: re.Pattern[str]) -> None:
        found = space.match(self._text, self._at)
        if found is not None:
            self._at = found.end()

    def _complain(self, problem: str, position: int | None = None) -> NoReturn:
        complain(self._text, self._at if position is None else position, problem)
