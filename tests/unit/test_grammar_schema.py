"""JSON schemas as grammars: what comes out fits the schema, and what cannot be kept is refused by its name."""

from __future__ import annotations

import copy
import json
import random
import re
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.conftest import n_examples
from tests.json_schemas import ACCEPTED, REFUSED, complaint, is_schema
from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.grammar import Matcher, TokenTable, json_schema_to_gbnf

ALPHABET = [*map(chr, range(0x20, 0x7F)), "\n", "\t", *"éöüï€\u2028"]
TABLE = TokenTable(character.encode() for character in ALPHABET)


def converted(schema: Any) -> Matcher:
    return Matcher(json_schema_to_gbnf(json.dumps(schema)))


def spoken(matcher: Matcher, chance: random.Random, n_characters: int = 300) -> str | None:
    """A text of the grammar, character by character at random; None if it does not come to an end."""
    place, text = matcher.start, ""
    for _ in range(n_characters):
        fitting = matcher.fitting(place, TABLE).tolist()
        assert fitting or place.can_end, f"{text!r} leads nowhere"
        if place.can_end and (not fitting or chance.random() < 0.4):
            return text
        character = ALPHABET[chance.choice(fitting)]
        place, text = matcher.after_text(place, character.encode()), text + character
        assert place
    return None


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_spoken_at_random_fits_the_schema(name: str) -> None:
    matcher, chance = converted(ACCEPTED[name]), random.Random(name)
    texts = [text for _ in range(8) if (text := spoken(matcher, chance)) is not None]
    assert texts
    for text in texts:
        assert complaint(ACCEPTED[name], json.loads(text)) is None, text


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_kept_is_refused_by_its_name(name: str) -> None:
    schema, words = REFUSED[name]
    with pytest.raises(InvalidArgument) as error:
        converted(schema)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1, column 1"),
        ('{"type": "object",}', "line 1, column 19"),
        ('{\n"a": NaN}', "NaN is no number of JSON"),
        ('{"maximum": ' + "9" * 5000 + "}", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('{"minLength": 1e999999999}', "#/minLength"),
        ('{"type": "number", "maximum": 1e999999999}', "#/maximum"),
        ('{"$id": "a", "items": {"$id": "b"}}', "#/items/$id"),
        ('{"type": "object", "properties": []}', "#/properties"),
        ('{"enum": "a"}', "#/enum"),
        ('{"required": [1]}', "#/required"),
        ('{"anyOf": []}', "#/anyOf"),
        ('{"type": "string", "pattern": 5}', "#/pattern"),
        ('{"type": "string", "pattern": "^(a*)*$"}', "without end"),
        ('{"$ref": "#"}', "leads back to itself"),
        ('{"anyOf": [{"type": "null"}, {"$ref": "#"}]}', "leads back to itself"),
        ('{"const": 1, "enum": [2]}', "none of the values"),
        ('{"items": {"type": "string"}, "prefixItems": {}}', "#/prefixItems"),
    ],
)
def test_says_where_a_document_is_wrong(text: str, words: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        json_schema_to_gbnf(text)
    assert words in str(error.value)


def test_what_is_passed_over_is_remarked() -> None:
    remarks: list[str] = []
    schema = {"type": "object", "properties": {"a": {"type": "string", "format": "email", "minimun": 3}}, "title": "x"}
    json_schema_to_gbnf(json.dumps(schema), remarks)
    assert remarks == [
        "the unknown keyword 'minimun' at #/properties/a is ignored",
        "the format at #/properties/a is no rule for the output",
    ]


def nested(n: int) -> dict[str, Any]:
    return {"type": "array", "items": nested(n - 1)} if n else {"type": "null"}


@pytest.mark.parametrize(
    "schema",
    [
        nested(60),
        {"type": "object", "properties": {f"p{n}": {"type": "integer"} for n in range(5000)}},
        {"const": "x" * 300_000},
        {"$defs": {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(40)}, "$ref": "#/$defs/a0"},
        {"oneOf": [{"required": ["k"], "properties": {"k": {"const": n}}} for n in range(500)]},
        {"type": "string", "pattern": "a" * 5000},
    ],
    ids=["deep", "wide", "long", "branching", "exclusive", "pattern"],
)
def test_schemas_that_are_too_large(schema: Any) -> None:
    with pytest.raises(InvalidArgument):
        converted(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {f"member {n}": {"type": "integer"} for n in range(300)}},
        {"type": "object", "properties": {f"p{n}": {} for n in range(100)}, "additionalProperties": {"type": "string"}},
        {"enum": [f"value {n}" for n in range(5000)]},
        {"type": "string", "minLength": 5000, "maxLength": 90_000},
        {"type": "array", "items": {"type": "integer"}, "minItems": 1500, "maxItems": 4000},
        {"type": "string", "maxLength": 2**31 - 1},
        {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
        {"oneOf": [{"required": ["k"], "properties": {"k": {"const": n}}} for n in range(40)]},
        nested(40),
    ],
)
def test_schemas_of_a_large_size(schema: Any) -> None:
    assert converted(schema).start


def test_lengths_beyond_a_block_are_counted() -> None:
    matcher = converted({"type": "string", "minLength": 1500, "maxLength": 3200})
    for length, fits in [(1499, False), (1500, True), (2000, True), (3000, True), (3200, True), (3201, False)]:
        place = matcher.after_text(matcher.start, b'"' + b"x" * length + b'"')
        assert bool(place and place.can_end) is fits, length


bounds = st.integers(-(10**6), 10**6) | st.sampled_from([-1, 0, 1, 9, 10, 99, 100, 999, 1000, -10, -99])


@settings(deadline=None)
@given(bounds | st.none(), bounds | st.none(), st.lists(st.integers(-(2 * 10**6), 2 * 10**6) | bounds, max_size=10))
def test_exactly_the_integers_in_a_range(low: int | None, high: int | None, numbers: list[int]) -> None:
    assume(low is None or high is None or low <= high)
    bounds = {"minimum": low, "maximum": high}
    matcher = converted({"type": "integer"} | {key: value for key, value in bounds.items() if value is not None})
    near = [bound + offset for bound in (low, high) if bound is not None for offset in (-1, 0, 1)]
    for number in (*numbers, *near):
        within = (low is None or number >= low) and (high is None or number <= high)
        assert is_text(matcher, str(number)) is within, number
    assert not is_text(matcher, "00")
    assert not is_text(matcher, "1.5")


decimals = st.decimals(-1000, 1000, places=3) | st.decimals(-2, 2, places=1)


@settings(deadline=None)
@given(decimals, decimals, st.booleans(), st.booleans(), st.lists(decimals, max_size=10))
def test_exactly_the_numbers_in_a_range_with_so_many_digits(
    one: Decimal, other: Decimal, low_open: bool, high_open: bool, numbers: list[Decimal]
) -> None:
    low, high = min(one, other), max(one, other)
    assume(low < high - 1)
    keys = "exclusiveMinimum" if low_open else "minimum", "exclusiveMaximum" if high_open else "maximum"
    text = f'{{"type": "number", "{keys[0]}": {low:f}, "{keys[1]}": {high:f}}}'
    matcher = Matcher(json_schema_to_gbnf(text))
    n_digits = max(2, *(max(0, -int(bound.normalize().as_tuple().exponent)) for bound in (low, high)))
    step = Decimal(1).scaleb(-n_digits)
    for number in (*numbers, low, low - step, low + step, high, high - step, high + step):
        within = (low < number < high) or (number == low and not low_open) or (number == high and not high_open)
        written = f"{number.quantize(step):f}"
        if number == number.quantize(step) and not (number == 0 and written.startswith("-")):
            assert is_text(matcher, written) is within, written


def is_text(matcher: Matcher, text: str) -> bool:
    place = matcher.after_text(matcher.start, text.encode())
    return bool(place) and place.can_end


patterns = st.recursive(
    st.sampled_from(
        ["a", "b", "[ab]", "[^a]", "c", r"\d", r"\w", r"\s", ".", r"\.", '"', r"\\", r"\n", "[^,]", r"\x41", "-"]
    ),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}"])).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
    ),
    max_leaves=6,
)


def converted_or_none(schema: Any) -> Matcher | None:
    try:
        return converted(schema)
    except InvalidArgument:
        return None


@settings(deadline=None)
@given(patterns, st.sampled_from(["", "^", "$", "^$"]), st.integers(0, 2**32))
def test_strings_of_a_pattern_match_it(pattern: str, anchors: str, seed: int) -> None:
    anchored = ("^" if "^" in anchors else "") + f"({pattern})" + ("$" if "$" in anchors else "")
    if (matcher := converted_or_none({"type": "string", "pattern": anchored})) is None:
        return  # it repeats without end what can be empty
    text = spoken(matcher, random.Random(seed), 60)
    assume(text is not None)
    assert re.search(anchored, json.loads(text or "")), text


names = st.text('ab\u00e9"', max_size=3)


@settings(deadline=None)
@given(st.lists(names, max_size=5, unique=True), names)
def test_a_member_that_is_not_declared_is_called_otherwise(declared: list[str], name: str) -> None:
    schema = {
        "type": "object",
        "properties": {d: {"type": "null"} for d in declared},
        "additionalProperties": {"const": 1},
    }
    matcher = converted(schema)
    fits = is_text(matcher, json.dumps({name: 1}, ensure_ascii=False))
    assert fits is (name not in declared and '"' not in name)  # names with escapes are not made up
    assert is_text(matcher, json.dumps(dict.fromkeys(declared), ensure_ascii=False))


@settings(deadline=None)
@given(
    st.lists(st.sampled_from("abcdef"), unique=True),
    st.sets(st.sampled_from("abcdef")),
    st.sets(st.sampled_from("abcdef")),
)
def test_members_come_in_their_order_or_not_at_all(declared: list[str], required: set[str], given_: set[str]) -> None:
    schema = {"type": "object", "properties": {d: {"type": "null"} for d in declared}, "required": sorted(required)}
    schema["additionalProperties"] = False
    if not required <= set(declared):
        with pytest.raises(InvalidArgument, match="required and not allowed"):
            converted(schema)
        return
    matcher = converted(schema)
    text = json.dumps({name: None for name in declared if name in given_})
    assert is_text(matcher, text) is (required <= given_)
    backwards = json.dumps(dict.fromkeys(reversed(declared)))
    assert is_text(matcher, backwards) is (len(declared) < 2)


@settings(deadline=None)
@given(st.integers(0, 4), st.integers(0, 4) | st.none(), st.integers(0, 3), st.booleans(), st.integers(0, 7))
def test_arrays_have_as_many_items_as_they_should(
    at_least: int, at_most: int | None, n_prefix: int, has_items: bool, n: int
) -> None:
    schema: dict[str, Any] = {"type": "array", "minItems": at_least, "prefixItems": [{"const": 1}] * n_prefix}
    schema |= {"items": {"const": 1}} if has_items else {}
    schema |= {} if at_most is None else {"maxItems": at_most}
    if at_most is not None and at_least > at_most:
        with pytest.raises(InvalidArgument, match="minItems"):
            converted(schema)
        return
    fits = is_text(converted(schema), json.dumps([1] * n))
    allowed = complaint(schema, [1] * n) is None
    assert allowed or not fits
    if has_items and n >= n_prefix:  # a tuple is written in full
        assert fits is allowed


VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2.5, 1e300, "", "a", "^a$", "#", "#/$defs/n", "string", "object", [], {}, ["a"]),
    *({"type": "string"}, {"enum": [1, "a"]}, [{"type": "null"}, {"type": "boolean"}], {"$ref": "#"}),
]
KEYWORDS = [
    *(
        "type",
        "properties",
        "required",
        "items",
        "prefixItems",
        "enum",
        "const",
        "minimum",
        "exclusiveMaximum",
        "anyOf",
    ),
    *("oneOf", "allOf", "$ref", "additionalProperties", "minItems", "maxItems", "minLength", "maxLength", "pattern"),
    *("unevaluatedProperties", "unevaluatedItems", "minProperties", "additionalItems", "if", "not", "$defs"),
]


def mutate(schema: Any, chance: random.Random) -> None:
    """Change something somewhere in a schema."""
    places = [schema]
    for place in places:  # grows while it is gone through
        inner = place.values() if isinstance(place, dict) else place
        places += [value for value in inner if isinstance(value, dict | list)]
    place = chance.choice(places)
    value = copy.deepcopy(chance.choice(VALUES))
    if isinstance(place, list):
        place.append(value)
    elif place and chance.random() < 0.4:
        key = chance.choice([key for key in place if key != "$schema"] or ["type"])
        if chance.random() < 0.5:
            place.pop(key, None)
        else:
            place[key] = value
    else:
        place[chance.choice(KEYWORDS)] = value


@settings(deadline=None, max_examples=n_examples(200))
@given(st.sampled_from(sorted(ACCEPTED)), st.integers(0, 2**32))
def test_mutated_schemas_are_kept_or_refused(name: str, seed: int) -> None:
    schema, chance = copy.deepcopy(ACCEPTED[name]), random.Random(seed)
    for _ in range(chance.randint(1, 3)):
        mutate(schema, chance)
    if (matcher := converted_or_none(schema)) is None or not is_schema(schema):
        return
    text = spoken(matcher, chance, 200)
    assert text is None or complaint(schema, json.loads(text), formats=False) is None, (schema, text)
