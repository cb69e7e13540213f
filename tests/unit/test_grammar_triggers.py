"""Triggers of lazy grammars: words, and expressions that are searched for without Python's engine."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.grammar.regex import read_regex
from wasi_nn_backend.grammar.triggers import TriggerSearch, check_triggers

WRONG = {
    "a{3,2}": (2, "more often than at most"),
    "(?=a)b": (1, "look-around"),
    "(?<!a)b": (1, "look-around"),
    r"(a)\1": (4, "\\1"),
    r"\bword": (1, "\\b"),
    r"\p{L}": (1, "\\p"),
    "[z-a]": (2, "no range"),
    r"[a-\d]": (2, "no range"),
    "[]": (1, "no character"),
    "[a": (1, "not closed"),
    "(a": (1, "not closed"),
    "a)": (2, "closes nothing"),
    "*a": (1, "repeats nothing"),
    "a**": (3, "follows another"),
    "x{5000}": (2, "over 2000"),
    "\\": (1, "not supported"),
    r"\u{110000}": (1, "U+10FFFF"),
    "(" * 65 + "a" + ")" * 65: (65, "over 64 deep"),
}


@pytest.mark.parametrize("pattern", WRONG, ids=[pattern[:10] for pattern in WRONG])
def test_says_what_is_wrong_with_an_expression_and_where(pattern: str) -> None:
    at, word = WRONG[pattern]
    with pytest.raises(InvalidArgument) as error:
        read_regex(pattern)
    assert f"at character {at}:" in str(error.value)
    assert word in str(error.value)


@pytest.mark.parametrize("trigger", ["", "/a*/", "/(a|)/", "/^/", "/$/", "/(x{2000}){2000}/", "/(a/"])
def test_triggers_that_make_no_sense(trigger: str) -> None:
    with pytest.raises(InvalidArgument):
        check_triggers([trigger])


def test_slashes_alone_are_words() -> None:
    assert found(["/"], "a/b") == 1
    assert found(["//"], "a//b") == 1


def found(triggers: list[str], *texts: str) -> int | None:
    search = TriggerSearch(triggers)
    state = search.start
    for text in texts:
        state, offset = search.feed(state, text)
        if offset is not None:
            return offset
    return None


@pytest.mark.parametrize(
    ("triggers", "texts", "offset"),
    [
        (["<tool>"], ["some <to", "ol> text"], 5),
        (["<tool>"], ["<to", "<tool>"], 3),
        (["/<(a|b)>/"], ["x <b>"], 3),
        (["/x(?:<(a)>|<(b)>)/"], ["x<b>"], 2),
        (["/x(?:<a>)/"], ["ax<a>"], 1),
        (["/^ab/"], ["xab"], None),
        (["/^ab/"], ["ab"], 0),
        (["/ab$/"], ["ab", "c"], 0),
        (["/ab$/"], ["abc"], None),
        (["/ab$/"], ["abc", "ab"], 3),
        (["/a.c/"], ["a\nc abc"], 4),
        (["aa", "/a+b/"], ["xaaab"], 1),
    ],
)
def test_finds_where_the_grammar_begins(triggers: list[str], texts: list[str], offset: int | None) -> None:
    assert found(triggers, *texts) == offset


expressions = st.recursive(
    st.sampled_from(["a", "b", "[ab]", "[^a]", "c", r"\w", "ab", "."]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{1,}", "*?"])).map(
            lambda p: f"(?:{p[0]}){p[1]}"
        ),
    ),
    max_leaves=6,
)


@settings(deadline=None)
@given(st.lists(expressions, min_size=1, max_size=2), st.lists(st.text("abcd", max_size=4), max_size=4))
def test_finds_what_python_s_engine_finds(patterns: list[str], texts: list[str]) -> None:
    triggers = [f"/{pattern}/" for pattern in patterns]
    try:
        check_triggers(triggers)
    except InvalidArgument:
        assert any(re.fullmatch(pattern, "") for pattern in patterns)
        return
    assert found(triggers, *texts) == first_to_end(patterns, "".join(texts))


def first_to_end(patterns: list[str], text: str) -> int | None:
    """The begin of the match that ends first; of several the one that begins first."""
    for end in range(1, len(text) + 1):
        begins = [b for b in range(end) for pattern in patterns if re.compile(pattern).fullmatch(text, b, end)]
        if begins:
            return min(begins)
    return None


def test_an_expression_that_keeps_other_engines_busy_for_years() -> None:
    search = TriggerSearch(["/(?:(?:a+)+)+b/"])
    state = search.start
    start_s = time.process_time()
    for _ in range(1000):
        state, offset = search.feed(state, "aaaaaaaa")
        assert offset is None
    assert time.process_time() - start_s < 10.0  # 0.3 s on an idle machine
    assert search.feed(state, "b")[1] == 0
