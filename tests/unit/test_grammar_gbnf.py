"""Reading GBNF: what is refused, where, and that nothing takes long."""

from __future__ import annotations

import contextlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.grammar import Matcher, check_gbnf
from wasi_nn_backend.grammar.characters import MAX_CODE_POINT, Characters

#: Text -> (line, column, a word of the complaint).
WRONG: dict[str, tuple[str, int, int, str]] = {
    "empty": ("", 1, 1, "no rule 'root'"),
    "no root": ('start ::= "a"', 1, 1, "no rule 'root'"),
    "undefined rule": ('root ::= "a" other', 1, 14, "'other' is used but not defined"),
    "rule defined twice": ('root ::= a\na ::= "b"\na ::= "c"', 3, 1, "'a' is defined twice"),
    "no name": ('root ::= "a"\n::= "b"', 2, 1, "a rule's name"),
    "no definition": ('root = "a"', 1, 6, "::= should follow"),
    "alternative on a line of its own": ('root ::= "a"\n| "b"', 2, 1, "a rule's name"),
    "open quotes": ('root ::= "a', 1, 10, "does not end"),
    "open brackets": ("root ::= [a", 1, 10, "does not end"),
    "open parenthesis": ('root ::= ("a"', 1, 14, ") is missing"),
    "closed too often": ('root ::= "a")', 1, 13, "does not belong here"),
    "empty set": ('root ::= "a" []', 1, 14, "empty"),
    "backward range": ("root ::= [z-a]", 1, 11, "backwards"),
    "unknown escape": (r'root ::= "\q"', 1, 11, "no escape"),
    "short escape": (r'root ::= "\u12"', 1, 11, "4 hexadecimal digits"),
    "escape beyond Unicode": (r'root ::= "\U00110000"', 1, 11, "U+10FFFF"),
    "repetition of nothing": ('root ::= * "a"', 1, 10, "which is nothing"),
    "repetition of an empty text": ('root ::= "" +', 1, 13, "which is nothing"),
    "crossed repetition": ('root ::= "a"{3,2}', 1, 14, "which is never"),
    "repetition without a number": ('root ::= "a"{x}', 1, 14, "a number of repetitions"),
    "open repetition": ('root ::= "a"{2', 1, 14, "written {2}, {2,} or {2,5}"),
    "a million repetitions": ('root ::= "a"{0,1000000}', 1, 16, "over 2000"),
    "repetitions of repetitions": ('root ::= ("a"{0,50}){0,50}', 1, 21, "over 2000"),
    "too deep": ("root ::= " + "(" * 65 + '"a"' + ")" * 65, 1, 74, "over 64 deep"),
    "too many elements": ('root ::= "' + "x" * 100 + '"{2000}', 1, 118, "larger than"),
    "too many rules": ("root ::= " + " ".join(["[a]{0,2000}"] * 9), 1, 117, "larger than"),
    "NUL": ('root ::= "a\0"', 1, 12, "NUL"),
    "left recursion": ('root ::= "a" | root "b"', 1, 1, "left recursion"),
    "left recursion over two rules": ('root ::= a\na ::= b "x" | "y"\nb ::= a', 2, 1, "left recursion"),
    "left recursion behind nothing": ('root ::= a root "x"\na ::= b\nb ::= "" | "y"', 1, 1, "left recursion"),
    "repetition of what can be empty": ('root ::= ("a"*)*', 1, 17, "left recursion"),
    "no token": ("root ::= <>>", 1, 12, "does not belong"),
    "token without end": ("root ::= <think", 1, 10, "a token is written"),
    "token of two billion": ("root ::= <[4294967296]>", 1, 10, "no token"),
    "readings that multiply": ('root ::= s\ns ::= "a" s "b" | "a" s "c" | "d"', 2, 1, "too many readings"),
    "beginnings that multiply": (
        "root ::= r0\n" + "".join(f'r{n} ::= r{n + 1} | r{n + 1} "x"\n' for n in range(40)) + 'r40 ::= "a"',
        1,
        1,
        "too many ways",
    ),
}

#: Text -> what fits, what does not.
RIGHT: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "literal": ('root ::= "ab"', ("ab",), ("", "a", "abc", "b")),
    "escapes": (r'root ::= "\x41\u00e9\U0001F600\t\n\\\""', ('Aé😀\t\n\\"',), ("A",)),
    "choice": ('root ::= "a" | "b" |', ("a", "b", ""), ("ab", "c")),
    "choice over lines": ('root ::=\n  "a" |\n  "b"\n', ("a", "b"), ("",)),
    "group over lines": ('root ::= (\n "a"\n "b" # comment\n)?\n', ("ab", ""), ("a",)),
    "set": ("root ::= [a-cx-]", ("a", "b", "c", "x", "-"), ("d", "")),
    "negated set": ("root ::= [^a-c\\n]", ("d", "é", "😀"), ("a", "\n", "")),
    "any character": ("root ::= . .", ("ab", "é\n"), ("a", "abc")),
    "star": ('root ::= "ab"* "c"', ("c", "abc", "ababc"), ("ab", "ac")),
    "plus": ("root ::= [ab]+", ("a", "bab"), ("",)),
    "exactly": ('root ::= "ab"{2}', ("abab",), ("ab", "ababab")),
    "at least": ('root ::= "a"{2,}', ("aa", "aaaa"), ("a",)),
    "from to": ('root ::= "a"{1,3} "b"', ("ab", "aaab"), ("b", "aaaab")),
    "none": ('root ::= "a"{0} "b"', ("b",), ("ab",)),
    "recursion": ('root ::= "(" root ")" | ""', ("", "()", "((()))"), ("(", "())", ")(")),
    "rules in any order": ('x ::= y\ny ::= "1"\nroot ::= x y', ("11",), ("1",)),
    "comment and no line at the end": ('# first\nroot ::= "a" # last', ("a",), ("",)),
    "line ends of others": ('root ::= a\r\na ::= "x"\r\n', ("x",), ("",)),
    "nothing": ("root ::=", ("",), ("a",)),
}


@pytest.mark.parametrize("name", WRONG)
def test_says_what_is_wrong_and_where(name: str) -> None:
    text, line, column, word = WRONG[name]
    with pytest.raises(InvalidArgument) as error:
        check_gbnf(text)
    assert f"line {line}, column {column}:" in str(error.value)
    assert word in str(error.value)


@pytest.mark.parametrize("name", RIGHT)
def test_reads_the_notation(name: str) -> None:
    text, fitting, others = RIGHT[name]
    assert [accepts(text, candidate) for candidate in fitting] == [True] * len(fitting)
    assert [accepts(text, candidate) for candidate in others] == [False] * len(others)


def accepts(grammar: str, text: str) -> bool:
    matcher = Matcher(grammar)
    place = matcher.after_text(matcher.start, text.encode()) if text else matcher.start
    return bool(place) and place.can_end


def test_a_limit_on_the_text() -> None:
    with pytest.raises(InvalidArgument, match="262145 characters"):
        check_gbnf("#" * (2**18 + 1))


@pytest.mark.parametrize(
    "piece",
    ['"x" ', "(", '"a"|', "[a]{0,9}"]
    + [
        pytest.param(piece, marks=pytest.mark.slow)
        for piece in ('"', "[", "|", '""', "a ", "[a]?", "[a]*", '("a")', "\\", "<[1]>", "#", " ", "{")
    ],
)
def test_no_text_of_the_largest_size_takes_long(piece: str) -> None:
    text = ("root ::= " + piece * 2**18)[: 2**18]
    start_s = time.process_time()
    with contextlib.suppress(InvalidArgument):
        check_gbnf(text)
    assert time.process_time() - start_s < 5.0  # some 0.3 s on an idle machine


notation = st.sampled_from(
    [
        *("root", "a", " ::= ", "\n", '"', '"x"', "[", "]", "^", "-", "(", ")", "|", "*", "+", "?", "{", "}", ",", "2"),
        *("{0,3}", ".", "\\", "\\n", "\\x4", "<", ">", "!", "<[7]>", "#", " ", "é", "root ::= ", '"x" a', "a ::= "),
    ]
)


@settings(deadline=None)
@given(st.lists(notation, max_size=40).map("".join))
def test_any_text_is_read_or_refused(text: str) -> None:
    matcher, problem = None, ""
    try:
        matcher = Matcher(text)
    except InvalidArgument as error:
        problem = str(error)
    assert "line " in problem or (matcher is not None and matcher.start)


ranges = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda pair: (min(pair), max(pair))), max_size=5
)


@given(ranges, ranges)
def test_sets_of_characters(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> None:
    def listed(pairs: list[tuple[int, int]]) -> set[int]:
        return {code_point for low, high in pairs for code_point in range(low, high + 1)}

    one, other = Characters.of(some), Characters.of(others)
    universe = range(70)
    assert {c for c in universe if c in one} == listed(some)
    assert {c for c in universe if c in (one | other)} == listed(some) | listed(others)
    assert {c for c in universe if c in (one & other)} == listed(some) & listed(others)
    assert {c for c in universe if c in one.complement()} == set(universe) - listed(some)
    assert MAX_CODE_POINT in one.complement()
    assert one.complement().complement() == one
    assert all(one.meets(low, high) == bool(listed(some) & set(range(low, high + 1))) for low, high in others)
