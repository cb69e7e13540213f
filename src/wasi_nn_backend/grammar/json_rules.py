"""The parts that grammars of JSON are made of, in GBNF: strings, numbers, repetitions, white space."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any, Final

from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.grammar.characters import Characters

__all__ = ["RuleBook", "json_text", "literal"]

#: One space, or a line and its indent. Not more: small models fill their time with white space.
_SPACE: Final = '( " " | "\\n" " "{0,20} )?'

#: Half of a surrogate pair is valid in JSON's notation, but stands for no text.
_HEX4: Final = "( [0-9a-cA-CefEF] [0-9a-fA-F]{3} | [dD] [0-7] [0-9a-fA-F]{2} )"

_STANDARD_RULES: Final[Mapping[str, str]] = {
    "ws": _SPACE,
    "char": f'[ !#-\\[\\]-~\\xA0-\\uD7FF\\uE000-\\U0010FFFF] | "\\\\" ( ["\\\\/bfnrt] | "u" {_HEX4} )',
    # No escapes: a name written with one could be a declared name in disguise.
    "key-char": "[ !#-\\[\\]-~\\xA0-\\uD7FF\\uE000-\\U0010FFFF]",
    "string": '"\\"" char* "\\""',
    "integer": '"-"? ( "0" | [1-9] [0-9]{0,15} )',
    "number": 'integer ( "." [0-9]{1,15} )? ( [eE] [-+]? [0-9]{1,2} )?',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "member": 'string ws ":" ws value',
    "object": '"{" ws ( member ws ( "," ws member ws )* )? "}"',
    "array": '"[" ws ( value ws ( "," ws value ws )* )? "]"',
    "value": "object | array | string | number | boolean | null",
}
_NAMES: Final = re.compile(r"[a-z]+(?:-[a-z]+)*")
_NOT_PLAIN: Final = re.compile(r'["\\\[\]\-^]|[^ -~]')
_QUOTED: Final = re.compile(r'"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]')

#: What a character inside of a JSON string may look like itself.
_RAW: Final = Characters.of(((0x20, 0x21), (0x23, 0x5B), (0x5D, 0x7E), (0xA0, 0xD7FF), (0xE000, 0x10FFFF)))
_SHORT_ESCAPES: Final = {0x22: '"', 0x5C: "\\", 0x08: "b", 0x0C: "f", 0x0A: "n", 0x0D: "r", 0x09: "t"}

#: What a grammar of this many rules becomes has about as many as grammars may have.
_N_RULES_MAX: Final = 12_000
#: More characters or items than this fit into no model's window.
_N_REPETITIONS_MAX: Final = 1_000_000
#: Repetitions are written out, up to 2000 rules each. Longer ones are made of blocks of this many.
_N_BLOCK: Final = 1000

_N_OPTIONS_SIDE_BY_SIDE: Final = 8
_N_LEVELS_OF_OPTIONS: Final = 50

_DAYS: Final = (
    '( ( "0" [13578] | "1" [02] ) "-" ( "0" [1-9] | [12] [0-9] | "3" [01] )'
    ' | ( "0" [469] | "11" ) "-" ( "0" [1-9] | [12] [0-9] | "30" )'
    ' | "02-" ( "0" [1-9] | "1" [0-9] | "2" [0-8] ) )'
)
_DATE: Final = f'[12] [0-9]{{3}} "-" {_DAYS}'
_TIME: Final = (
    '( [01] [0-9] | "2" [0-3] ) ":" [0-5] [0-9] ":" [0-5] [0-9] ( "." [0-9]{1,6} )? '
    '( "Z" | [-+] ( [01] [0-9] | "2" [0-3] ) ":" [0-5] [0-9] )'
)
_BYTE: Final = '( "25" [0-5] | "2" [0-4] [0-9] | "1" [0-9]{2} | [1-9]? [0-9] )'
_FORMATS: Final[Mapping[str, str]] = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f'{_DATE} "T" {_TIME}',
    "uuid": '[0-9a-f]{8} "-" [0-9a-f]{4} "-" [0-9a-f]{4} "-" [0-9a-f]{4} "-" [0-9a-f]{12}',
    "ipv4": f'{_BYTE} "." {_BYTE} "." {_BYTE} "." {_BYTE}',
}


class RuleBook:
    """The rules of one grammar under names that differ. Methods return what can stand inside of a rule."""

    def __init__(self) -> None:
        self._rules: dict[str, str] = {}
        self._names: dict[str, str] = {}  # of rules that ``add`` made, by their text
        self._n_named: dict[str, int] = {}  # how many names begin with this

    def text(self, root: str) -> str:
        """The grammar whose texts are those of ``root``."""
        return "\n".join([f"root ::= {root}", *(f"{name} ::= {rule}" for name, rule in self._rules.items())]) + "\n"

    def reserve(self, wish: str) -> str:
        """A new rule's name. It has to be defined before the grammar is finished."""
        if len(self._rules) >= _N_RULES_MAX:
            raise InvalidArgument(f"the JSON schema needs over {_N_RULES_MAX} rules; make it smaller")
        stem = re.sub(r"[^a-zA-Z]+", "-", wish[:40]).strip("-").lower() or "rule"
        n = self._n_named[stem] = self._n_named.get(stem, 0) + 1
        name = f"{stem}-{n}"  # stems have no digits, so no other stem and number give the same
        self._rules[name] = ""
        return name

    def define(self, name: str, rule: str) -> str:
        self._rules[name] = rule
        return name

    def add(self, wish: str, rule: str) -> str:
        """The name of a rule with this text, an earlier one if there is one."""
        name = self._names.get(rule)
        if name is None:
            name = self._names[rule] = self.define(self.reserve(wish), rule)
        return name

    def standard(self, name: str) -> str:
        """A rule of ``_STANDARD_RULES``, with those that it needs."""
        if name not in self._rules:
            rule = self._rules[name] = _STANDARD_RULES[name]
            for needed in _NAMES.findall(_QUOTED.sub(" ", rule)):
                self.standard(needed)
        return name

    def format(self, name: str) -> str | None:
        """A string of a format; None for the formats that are not known."""
        rule = _FORMATS.get(name)
        return None if rule is None else self.add(f"{name} string", f'"\\"" {rule} "\\""')

    def repeated(self, item: str, at_least: int, at_most: int | None) -> str:
        """``item``, the name of a rule, this many times."""
        if at_most is not None and at_most > _N_REPETITIONS_MAX:
            at_most = None
        parts = []
        n_blocks, n_rest = divmod(at_least, _N_BLOCK) if at_least > _N_BLOCK else (0, at_least)
        if n_blocks:
            parts.append(f"{self._block(item)}{{{n_blocks}}}")
        if at_most is None:
            parts.append(f"{item}{{{n_rest},}}")
        elif at_most - at_least + n_rest <= _N_BLOCK:
            parts.append(f"{item}{{{n_rest},{at_most - at_least + n_rest}}}")
        else:
            parts.append(f"{item}{{{n_rest}}}")
            parts.append(self._at_most(item, at_most - at_least))
        return " ".join(parts)

    def _block(self, item: str) -> str:
        return self.add(f"{item} block", f"{item}{{{_N_BLOCK}}}")

    def _at_most(self, item: str, n: int) -> str:
        """A block and what may follow it, or less than a block: never two readings of one text."""
        n_blocks, n_rest = divmod(n, _N_BLOCK)
        rule = f"{item}{{0,{n_rest}}}"
        block, fewer = self._block(item), self.add(f"{item} fewer", f"{item}{{0,{_N_BLOCK - 1}}}")
        for _ in range(n_blocks):
            rule = f"{block} {self.add(f'{item} rest', rule)} | {fewer}"
        return self.add(f"{item} rest", rule)

    def json_character(self, characters: Characters) -> str:
        """One of some characters inside of a JSON string. Control characters only where nothing else is left."""
        options = []
        raw = characters & _RAW
        if raw:
            options.append(_class(raw))
        short = "".join(escape for code_point, escape in _SHORT_ESCAPES.items() if code_point in characters)
        if short:
            options.append('"\\\\" ' + _class(Characters.of_text(short)))
        if not options:
            rest = characters & Characters(((0, 0x1F), (0x7F, 0x9F)))
            options += [literal(f"\\u{code:04x}") for low, high in rest.ranges for code in range(low, high + 1)]
        return options[0] if len(options) == 1 else f"( {' | '.join(options)} )"

    def one_of(self, texts: Sequence[str]) -> str:
        """Exactly one of some texts. Many are sorted by how they begin: else each would be one more stack to try."""
        return self._one_of(
            sorted(set(texts)) if len(texts) > _N_OPTIONS_SIDE_BY_SIDE else list(dict.fromkeys(texts)), 0
        )

    def _one_of(self, texts: list[str], level: int) -> str:
        if len(texts) <= _N_OPTIONS_SIDE_BY_SIDE or level > _N_LEVELS_OF_OPTIONS:
            return " | ".join(map(literal, texts))
        n_common = _n_shared(texts[0], texts[-1])  # they are sorted
        by_first: dict[str, list[str]] = {}
        for text in texts:
            by_first.setdefault(text[n_common : n_common + 1], []).append(text[n_common:])
        options = [self.add("option", self._one_of(group, level + 1)) for group in by_first.values()]
        return f"{literal(texts[0][:n_common])} ( {' | '.join(options)} )"

    def other_keys(self, names: Iterable[str]) -> str:
        """A member's name that is none of some. Its characters stand as they are, without escapes."""
        char = self.standard("key-char")
        names = [name for name in names if all(ord(character) in _RAW for character in name)]
        return f'"\\"" {self._none_of(names, char)} "\\""'

    def _none_of(self, names: Sequence[str], char: str) -> str:
        """Texts of ``char`` that are not in ``names``, character by character as in a tree of the names."""
        if not names:
            return f"{char}*"
        by_first: dict[str, list[str]] = {}
        for name in names:
            if name:
                by_first.setdefault(name[0], []).append(name[1:])
        options = ["" if "" in names else '""']
        if by_first:
            others = _RAW & Characters.of_text("".join(by_first)).complement()
            options.append(f"{_class(others)} {char}*")
        else:
            options.append(f"{char}+")
        options += [f"{literal(first)} {self._none_of(rest, char)}" for first, rest in by_first.items()]
        return self.add("other key", " | ".join(option for option in options if option))

    def integers(self, low: int | None, high: int | None) -> str:
        """Whole numbers in an inclusive range, which must not be empty."""
        return " | ".join(_numerals(*_bounded(low, high, 0), 0))

    def decimals(self, low: Decimal | None, high: Decimal | None, n_digits: int) -> str:
        """Numbers in an inclusive range with this many digits behind the point. Empty when there is none."""
        scale = Decimal(10) ** n_digits
        scaled_low = None if low is None else int((low * scale).to_integral_value("ROUND_CEILING"))
        scaled_high = None if high is None else int((high * scale).to_integral_value("ROUND_FLOOR"))
        return " | ".join(_numerals(*_bounded(scaled_low, scaled_high, n_digits), n_digits))


def literal(text: str) -> str:
    """GBNF for exactly this text."""
    return '"' + _NOT_PLAIN.sub(lambda found: _escaped(ord(found[0])), text) + '"'


def _n_shared(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def json_text(value: Any) -> str:
    """A value of a schema as JSON. ``Decimal`` is what its fractions were read as."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json_text(key)}: {json_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(json_text(item) for item in value) + "]"
    return str(value) if isinstance(value, Decimal) else json.dumps(value, ensure_ascii=False)


def _escaped(code_point: int) -> str:
    character = chr(code_point)
    if character in '"\\[]-^':
        return f"\\{character}" if character != "^" else "\\x5E"
    return character if 0x20 <= code_point < 0x7F else f"\\U{code_point:08X}"


def _class(characters: Characters) -> str:
    ranges = (_escaped(low) if low == high else f"{_escaped(low)}-{_escaped(high)}" for low, high in characters.ranges)
    return f"[{''.join(ranges)}]"


def _bounded(low: int | None, high: int | None, n_digits: int) -> tuple[int, int]:
    """Both ends of a range, an open one 15 digits and those behind the point beyond zero and the other end."""
    far = 10 ** (15 + n_digits)
    return (
        min(-far, -far if high is None else high * 10) + 1 if low is None else low,
        max(far, far if low is None else low * 10) - 1 if high is None else high,
    )


def _numerals(low: int, high: int, n_digits: int) -> list[str]:
    """Alternatives for the numbers of a range, given in units of the last digit behind the point."""
    alternatives = []
    if low < 0:
        alternatives += [f'"-" {numeral}' for numeral in _positive(max(1, -high), -low, n_digits)]
    return alternatives + (_positive(max(0, low), high, n_digits) if high >= 0 else [])


def _positive(low: int, high: int, n_digits: int) -> list[str]:
    numerals = []
    n_least = n_digits + 1  # there is always a digit before the point
    for length in range(max(len(str(low)), n_least), max(len(str(high)), n_least) + 1):
        first, last = (0 if length == n_least else 10 ** (length - 1)), 10**length - 1
        first, last = max(first, low), min(last, high)
        if first <= last:
            numerals += _same_length(str(first).zfill(length), str(last).zfill(length))
    return [_numeral(numeral, n_digits) for numeral in numerals]


def _same_length(low: str, high: str) -> list[list[tuple[str, str]]]:
    """Lists of one (first, last) a digit that together are all numbers between two of equal length."""
    if not low:
        return [[]]
    if low[0] == high[0]:
        return [[(low[0], low[0]), *rest] for rest in _same_length(low[1:], high[1:])]
    n_rest = len(low) - 1
    zeros, nines, anything = "0" * n_rest, "9" * n_rest, [("0", "9")] * n_rest
    first, last = int(low[0]), int(high[0])
    numerals = []
    if low[1:] != zeros:
        numerals += [[(low[0], low[0]), *rest] for rest in _same_length(low[1:], nines)]
        first += 1
    if high[1:] != nines:
        numerals += [[(high[0], high[0]), *rest] for rest in _same_length(zeros, high[1:])]
        last -= 1
    if first <= last:
        numerals.append([(str(first), str(last)), *anything])
    return numerals


def _numeral(digits: Sequence[tuple[str, str]], n_digits: int) -> str:
    whole = digits[: len(digits) - n_digits]
    return _digits(whole) if not n_digits else f'{_digits(whole)} "." {_digits(digits[-n_digits:])}'


def _digits(digits: Sequence[tuple[str, str]]) -> str:
    parts: list[list[Any]] = []
    for first, last in digits:
        written = f'"{first}"' if first == last else f"[{first}-{last}]"
        if parts and parts[-1][0] == written:
            parts[-1][1] += 1
        else:
            parts.append([written, 1])
    return " ".join(written if n == 1 else f"{written}{{{n}}}" for written, n in parts)
