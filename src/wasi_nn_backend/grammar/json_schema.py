"""From a JSON schema to a grammar (GBNF) for the JSON that the schema allows.

What comes out of the grammar fits the schema; not everything that fits comes out: members keep the order in which they
are declared, undeclared ones appear only where ``additionalProperties`` asks for them, and bounded numbers have few
digits behind the point. A keyword that cannot be kept is an error with its name: whoever writes ``uniqueItems`` counts
on it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Context, Decimal, localcontext
from typing import Any, Final, NoReturn

from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.grammar.json_rules import RuleBook, json_text, literal
from wasi_nn_backend.grammar.schema_parts import (
    BOUNDS,
    KEPT,
    Part,
    Reference,
    SchemaParts,
    complain,
    has_other_members,
    is_same,
    json_type,
    members_of,
    other_member,
    required_of,
    types_of,
    written_types,
)
from wasi_nn_backend.grammar.string_patterns import pattern_rule

__all__ = ["json_schema_to_gbnf"]

_N_LEVELS_MAX: Final = 48
_N_NAME_CHARACTERS_MAX: Final = 256
_N_REPETITIONS_MAX: Final = 1_000_000
_BOUND_MAX: Final = 10**30
_N_FRACTION_DIGITS_MAX: Final = 12
_N_DECIMAL_DIGITS: Final = 64  # more than those of the largest bound, so that nothing is rounded

#: Those that are not, but for the values here, which ask for nothing.
_REFUSED: Final[Mapping[str, Mapping[str, tuple[Any, ...]]]] = {
    "integer": {"multipleOf": ()},
    "number": {"multipleOf": ()},
    "object": {
        "patternProperties": ({},),
        "propertyNames": ({}, True),
        "dependencies": ({},),
        "dependentRequired": ({},),
        "dependentSchemas": ({},),
    },
    "array": {"contains": (), "uniqueItems": (False,)},
}
_REFUSED_ALWAYS: Final[Mapping[str, tuple[Any, ...]]] = {
    "not": (False,),
    "if": (),
    "$dynamicRef": (),
    "$recursiveRef": (),
}
_NEEDS_OTHERS: Final = frozenset({"then", "else", "minContains", "maxContains", "$dynamicAnchor", "$recursiveAnchor"})
_KNOWN: Final = frozenset({"type", "enum", "const"}).union(
    _NEEDS_OTHERS, _REFUSED_ALWAYS, *KEPT.values(), *(keywords for keywords in _REFUSED.values())
)


def json_schema_to_gbnf(text: str, remarks: list[str] | None = None) -> str:
    """Raises ``InvalidArgument`` with the place: for text that is no JSON, wrong schemas, and what cannot be kept.

    What is passed over, unknown keywords and formats, is added to ``remarks``.
    """
    try:
        document = json.loads(text, parse_float=Decimal, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise InvalidArgument(
            f"the JSON schema is no JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        ) from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits; a hundred thousand brackets
        raise InvalidArgument(f"the JSON schema cannot be read: {str(error) or type(error).__name__}") from None
    try:
        with localcontext(Context(prec=_N_DECIMAL_DIGITS)):
            return _Converter(document, [] if remarks is None else remarks).convert()
    except RecursionError:  # the limits below are for callers that are not deep in something themselves
        raise InvalidArgument("the JSON schema cannot be used: it is nested too deep") from None


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")


class _Converter:
    """One document. ``path`` is always where a schema stands, as a JSON pointer."""

    def __init__(self, document: Any, remarks: list[str]) -> None:
        self._remarks = remarks
        self._document = document
        self._parts = SchemaParts(document)
        self._book = RuleBook()
        self._rule_of: dict[str, str] = {}  # by the path that references name
        self._level = 0
        self._entered: set[str] = {"#"}  # schemas under way since the last brace or bracket

    def convert(self) -> str:
        root = self._rule_of["#"] = self._book.reserve("document")
        self._book.define(root, self._schema(self._document, "#"))
        return self._book.text(root)

    def _schema(self, schema: Any, path: str) -> str:
        """What to write for a schema in a rule of its own or in parentheses."""
        self._level += 1
        if self._level > _N_LEVELS_MAX:
            complain(path, f"schemas are nested over {_N_LEVELS_MAX} deep")
        options = [self._part(part) for part in self._parts.parts(schema, path)]
        self._level -= 1
        if not options:
            complain(path, "no value fits this schema")
        return " | ".join(dict.fromkeys(options))

    def _rule(self, schema: Any, path: str, wish: str) -> str:
        """A rule for a member or an item."""
        entered, self._entered = self._entered, set()
        rule = self._book.add(wish, self._schema(schema, path))
        self._entered = entered
        return rule

    def _part(self, part: Part | Reference) -> str:
        if isinstance(part, Reference):
            return self._reference(part)
        types = self._types(part)
        self._check_keywords(part, types)
        if "enum" in part.keywords or "const" in part.keywords:
            return self._values(part)
        if not part.keywords:
            return self._book.standard("value")
        return " | ".join(self._of_type(name, part) for name in types)

    def _reference(self, reference: Reference) -> str:
        rule = self._rule_of.get(reference.target)
        if reference.target in self._entered:
            complain(f"{reference.path}/$ref", "the schema leads back to itself before it says anything")
        if rule is None:
            self._entered.add(reference.target)
            rule = self._rule_of[reference.target] = self._book.reserve(reference.target.rpartition("/")[2])
            schema = self._parts.resolve(reference.target, reference.path)
            self._book.define(rule, self._schema(schema, reference.target))
            self._entered.discard(reference.target)
        return rule

    def _types(self, part: Part) -> list[str]:
        """The types to write, each once: an integer is a number too."""
        types = written_types(part)
        return [name for name in KEPT if name in types and not (name == "integer" and "number" in types)]

    def _check_keywords(self, part: Part, types: list[str]) -> None:
        refused = dict(_REFUSED_ALWAYS)
        for name in types:
            refused.update(_REFUSED.get(name, {}))
        if "array" in types and part.keywords.get("maxItems") in (0, 1):
            del refused["uniqueItems"]
        for keyword, value in part.keywords.items():
            if keyword in refused and value not in refused[keyword]:
                complain(
                    f"{part.path}/{keyword}", f"a grammar cannot keep {keyword}; leave it out and check the answer"
                )
            if keyword not in _KNOWN:
                self._remarks.append(f"the unknown keyword {keyword[:60]!r} at {part.path[:200]} is ignored")

    def _values(self, part: Part) -> str:
        """``const`` and ``enum``, as far as what stands beside them lets them."""
        keywords = part.keywords
        values = keywords.get("enum", [keywords.get("const")])
        if not isinstance(values, list) or not values:
            complain(f"{part.path}/enum", "this is a list of values, at least one")
        if "const" in keywords:
            values = [value for value in values if is_same(value, keywords["const"])]
        types = types_of(part)
        for keyword in (
            keywords.keys() & _KNOWN - {"const", "enum", "type", "format", "minLength", "maxLength"} - BOUNDS
        ):
            complain(f"{part.path}/{keyword}", f"{keyword} is not kept beside a list of values; leave it out")
        fitting = [v for v in values if types is None or json_type(v) in types or _is_integral(v, types)]
        fitting = [value for value in fitting if self._is_within(value, part)]
        if not fitting:
            complain(part.path, "none of the values fits what stands beside them")
        return self._book.one_of([json_text(value) for value in fitting])

    def _is_within(self, value: Any, part: Part) -> bool:
        """Whether a value of a list keeps the bounds beside it."""
        kind = json_type(value)
        if kind in ("integer", "number"):
            low, low_is_open = self._bound(part, "minimum", "exclusiveMinimum", is_low=True)
            high, high_is_open = self._bound(part, "maximum", "exclusiveMaximum", is_low=False)
            above = low is None or value > low or (value == low and not low_is_open)
            return above and (high is None or value < high or (value == high and not high_is_open))
        at_least, at_most = self._count(part, "minLength") or 0, self._count(part, "maxLength")
        return kind != "string" or (at_least <= len(value) and (at_most is None or len(value) <= at_most))

    def _of_type(self, name: str, part: Part) -> str:
        if name == "string":
            return self._string(part)
        if name in ("integer", "number"):
            return self._number(name, part)
        if name == "object":
            return self._object(part)
        return self._array(part) if name == "array" else self._book.standard(name)

    def _string(self, part: Part) -> str:
        keywords = part.keywords
        at_least = self._count(part, "minLength") or 0
        at_most = self._count(part, "maxLength")
        if at_most is not None and at_most < at_least:
            complain(part.path, "minLength is larger than maxLength")
        if "pattern" in keywords:
            return pattern_rule(self._book, keywords["pattern"], at_least, at_most, part.path)
        if "format" in keywords:
            if not at_least and at_most is None and (known := self._book.format(str(keywords["format"]))) is not None:
                return known
            self._remarks.append(f"the format at {part.path[:200]} is no rule for the output")
        if not at_least and at_most is None:
            return self._book.standard("string")
        return f'"\\"" {self._book.repeated(self._book.standard("char"), at_least, at_most)} "\\""'

    def _number(self, name: str, part: Part) -> str:
        low, low_is_open = self._bound(part, "minimum", "exclusiveMinimum", is_low=True)
        high, high_is_open = self._bound(part, "maximum", "exclusiveMaximum", is_low=False)
        n_digits = max(2, *(_n_fraction_digits(bound or Decimal(0)) for bound in (low, high)))
        if low is None and high is None:
            return self._book.standard(name)
        if n_digits > _N_FRACTION_DIGITS_MAX:
            complain(part.path, f"a bound has over {_N_FRACTION_DIGITS_MAX} digits behind the point")
        first = None if low is None else int(low.to_integral_value("ROUND_CEILING")) + (low_is_open and low % 1 == 0)
        last = None if high is None else int(high.to_integral_value("ROUND_FLOOR")) - (high_is_open and high % 1 == 0)
        written = []
        if first is None or last is None or first <= last:
            written.append(self._book.integers(first, last))
        if name == "number":
            unit = Decimal(1).scaleb(-n_digits - 1)  # one digit further than written, so that open ends have a next one
            low = low + unit if low is not None and low_is_open else low
            high = high - unit if high is not None and high_is_open else high
            if (decimals := self._book.decimals(low, high, n_digits)) != "":
                written.append(decimals)
        if not written:
            complain(part.path, "no number lies between the bounds")
        return " | ".join(written)

    def _bound(self, part: Part, keyword: str, open_keyword: str, *, is_low: bool) -> tuple[Decimal | None, bool]:
        """The narrower of two bounds, and whether it is excluded itself."""
        bounds: list[tuple[Decimal, bool]] = []
        for name in (keyword, open_keyword):
            value = part.keywords.get(name)
            if value is None:
                continue
            is_number = isinstance(value, int | Decimal) and not isinstance(value, bool)
            if not is_number or not -_BOUND_MAX <= value <= _BOUND_MAX:
                complain(f"{part.path}/{name}", "this is a number between -1e30 and 1e30")
            bounds.append((Decimal(value), name == open_keyword))
        if not bounds:
            return None, False
        narrowest = (max if is_low else min)(value for value, _ in bounds)
        return narrowest, any(is_open for value, is_open in bounds if value == narrowest)

    def _object(self, part: Part) -> str:
        members, required = members_of(part), required_of(part)
        if part.keywords.get("unevaluatedProperties", True) not in (True, False):
            complain(f"{part.path}/unevaluatedProperties", "only true and false can be kept")
        if not part.keywords.keys() & KEPT["object"]:
            return self._book.standard("object")
        others = other_member(part)
        declared = dict(members)
        for name in required:
            declared.setdefault(name, others)
            if declared[name] is False:
                complain(f"{part.path}/required", f"{name[:60]!r} is required and not allowed")
        wanted = [name for name, schema in declared.items() if schema is not False]
        path = f"{part.path}/properties"
        pairs = [(self._member(name, declared[name], f"{path}/{name}"), name in required) for name in wanted]
        rest = self._other_members(part, list(declared)) if has_other_members(part) else ""
        needs_one = self._needs_one_member(part, len(required), None if rest else len(wanted))
        return f'"{{" {self._book.standard("ws")} {self._members(pairs, rest, needs_one)} "}}"'

    def _needs_one_member(self, part: Part, n_required: int, n_possible: int | None) -> bool:
        """Whether ``minProperties`` asks for one although none is required. More, and a maximum, are not counted."""
        at_least, at_most = self._count(part, "minProperties") or 0, self._count(part, "maxProperties")
        if at_least > max(1, n_required) or (n_possible is not None and at_least > n_possible):
            complain(f"{part.path}/minProperties", "a grammar does not count members; list them under required")
        if at_most is not None and (n_possible is None or n_possible > at_most):
            complain(f"{part.path}/maxProperties", "a grammar does not count members; leave maxProperties out")
        return at_least > n_required

    def _member(self, name: str, schema: Any, path: str) -> str:
        value = self._rule(schema, path, name)
        ws = self._book.standard("ws")
        return self._book.add(f"{name} member", f'{literal(json_text(name))} {ws} ":" {ws} {value} {ws}')

    def _other_members(self, part: Part, names: list[str]) -> str:
        """The name of a rule for one member that is not declared."""
        if any(len(name) > _N_NAME_CHARACTERS_MAX for name in names):
            complain(part.path, f"a name is over {_N_NAME_CHARACTERS_MAX} characters long beside additionalProperties")
        value = self._rule(other_member(part), f"{part.path}/additionalProperties", "other value")
        ws = self._book.standard("ws")
        return self._book.add("other member", f'{self._book.other_keys(names)} {ws} ":" {ws} {value} {ws}')

    def _members(self, pairs: list[tuple[str, bool]], rest: str, needs_one: bool) -> str:
        """Members in their order, each (rule, is required), then any number of ``rest``, with commas between.

        Built from the end: what follows a member, and what there is while no member was written yet.
        """
        comma = f'"," {self._book.standard("ws")}'
        following = self._named(f"( {comma} {rest} )*") if rest else ""
        first = f"{rest} {following}" if rest else ""
        can_be_none = not needs_one
        for member, is_required in reversed(pairs):
            begun = f"{member} {following}"
            if is_required:
                first, following, can_be_none = begun, f"{comma} {begun}", False
            else:
                first = f"{begun} | {first}" if first else begun
                following = f"( {comma} {member} )? {following}"
            first, following = self._named(first), self._named(following)
        return f"( {first} )?" if first and can_be_none else first

    def _named(self, rule: str) -> str:
        return self._book.add("members", rule)

    def _array(self, part: Part) -> str:
        keywords = part.keywords
        at_least, at_most = self._count(part, "minItems") or 0, self._count(part, "maxItems")
        prefix, items = keywords.get("prefixItems", []), keywords.get("items", True)
        has_items = "items" in keywords
        if isinstance(items, list):  # as it was until 2019
            prefix, items, has_items = items, keywords.get("additionalItems", True), "additionalItems" in keywords
        if not isinstance(prefix, list):
            complain(f"{part.path}/prefixItems", "this is a list of schemas")
        unevaluated = keywords.get("unevaluatedItems", True)
        if unevaluated not in (True, False):
            complain(f"{part.path}/unevaluatedItems", "only true and false can be kept")
        if unevaluated is False and not has_items:
            items, has_items = False, True
        if prefix and not has_items:  # what is not described appears only where it is needed
            n_wanted = max(len(prefix), at_least)
            at_most = n_wanted if at_most is None else min(at_most, n_wanted)
        if items is False:
            at_most = len(prefix) if at_most is None else min(at_most, len(prefix))
        if at_most is not None and at_most < at_least:
            complain(part.path, "minItems asks for more items than there can be")
        prefix = prefix[:at_most]
        ws, comma = self._book.standard("ws"), f'"," {self._book.standard("ws")}'
        rules = [self._rule(schema, f"{part.path}/prefixItems/{at}", "item") for at, schema in enumerate(prefix)]
        inner = f" {comma} ".join(f"{rule} {ws}" for rule in rules)
        if at_most is None or at_most > len(prefix):
            item = f"{self._rule(items, f'{part.path}/items', 'item')} {ws}"
            more = self._book.add("more items", f"{comma} {item}")
            inner = self._items(
                inner, item, more, at_least - len(prefix), None if at_most is None else at_most - len(prefix)
            )
        return f'"[" {ws} {inner} "]"'

    def _items(self, inner: str, item: str, more: str, at_least: int, at_most: int | None) -> str:
        """Items after those that ``inner`` has, if any."""
        at_least = max(0, at_least)
        if inner:
            return f"{inner} {self._book.repeated(more, at_least, at_most)}"
        rest = self._book.repeated(more, max(0, at_least - 1), None if at_most is None else at_most - 1)
        return f"{item} {rest}" if at_least else f"( {item} {rest} )?"

    def _count(self, part: Part, keyword: str) -> int | None:
        value = part.keywords.get(keyword)
        if value is None:
            return None
        if isinstance(value, Decimal) and 0 <= value <= _BOUND_MAX and value == value.to_integral_value():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            complain(f"{part.path}/{keyword}", "this is a whole number, at least 0")
        if value > _N_REPETITIONS_MAX and keyword.startswith("min"):
            complain(f"{part.path}/{keyword}", "no model's window holds so much")
        return value


def _is_integral(value: Any, types: frozenset[str]) -> bool:
    return "number" in types and json_type(value) == "integer"


def _n_fraction_digits(bound: Decimal) -> int:
    exponent = bound.normalize().as_tuple().exponent
    return max(0, -exponent) if isinstance(exponent, int) else 0
