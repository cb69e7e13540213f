"""Following tokens through a grammar: bytes in the middle of characters, named tokens, the whole vocabulary."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import n_examples
from wasi_nn_backend.errors import InvalidArgument, RuntimeFailure
from wasi_nn_backend.grammar import GrammarFollower, Matcher, Place, TokenTable, TokenText

JSON = r"""
root   ::= object
value  ::= object | array | string | number | "true" | "false" | "null"
object ::= "{" ws (string ":" ws value ("," ws string ":" ws value)*)? "}"
array  ::= "[" ws (value ("," ws value)*)? "]"
string ::= "\"" ([^"\\\x00-\x1f] | "\\" ["\\/bfnrt])* "\""
number ::= "-"? [0-9]+ ("." [0-9]+)?
ws     ::= " "?
"""

#: Token -> text: bytes, parts of characters, words, things that show nothing.
TEXTS = [
    *(bytes([byte]) for byte in range(256)),
    *(b"ab", b"abc", b"abd", b'{"', b'":', b"null", b"nul", "é".encode(), "€".encode()[:2], "€".encode()[1:]),
    *("😀".encode()[:3], "😀".encode()[2:], b" {", b"}}", b'",', b"", b"\0x", b"12", b"", "x€".encode()[:3]),
]
TABLE = TokenTable(TEXTS)


def place_after(matcher: Matcher, text: bytes) -> Place:
    return matcher.after_text(matcher.start, text)


def test_characters_may_come_in_pieces() -> None:
    matcher = Matcher('root ::= "€" [à-ü] "😀"')
    text = "€é😀".encode()
    place = matcher.start
    for at in range(len(text)):
        assert place
        assert not place.can_end
        place = matcher.after_text(place, text[at : at + 1])
    assert place.can_end
    assert place == place_after(matcher, text)


@pytest.mark.parametrize(
    "text",
    [
        *(b"\x80", b"\xed\xa0", b"\xf4\x90", b"\xe0\x80", b"\xc0\x80", b"\xc1\xa1", b"\xe0\x82\xa1", b"\xed\xa0\x80"),
        *(b"\xf0\x82\x82\xac", b"\xf4\x90\x80\x80", b"\xff", b"\xe2a", b"\xe2\x82\xe2", b"a\x80", b"\0", b"a\0"),
    ],
)
def test_what_is_no_utf8_never_fits(text: bytes) -> None:
    assert not place_after(Matcher("root ::= .*"), text)


@pytest.mark.parametrize(
    ("begin", "fits"),
    [(b"\xc3", True), (b"\xc4", False), (b"\xe2", True), (b"\xe2\x82", True), (b"\xe2\x83", False), (b"\xf0", False)],
)
def test_the_begin_of_a_character_fits_if_one_can_follow(begin: bytes, fits: bool) -> None:
    assert bool(place_after(Matcher("root ::= [é€]"), begin)) is fits


def test_tokens_can_be_named() -> None:
    numbers = {"<think>": 300}
    matcher = Matcher('root ::= <think> [a-z]* !<[97]> "." | <[7]> "x"', token_of=numbers.get)
    begun = matcher.after(matcher.start, 300, b"")
    assert begun
    assert not matcher.after(matcher.start, 301, b"")
    assert not matcher.after(matcher.start, 97, b"a")
    assert matcher.after(matcher.start, 7, b"\x07")
    other = matcher.after(begun, 98, b"b")  # a letter, or any token but 97
    assert matcher.after(other, 46, b".").can_end
    letter = matcher.after(begun, 97, b"a")
    assert letter
    assert not matcher.after(letter, 46, b".").can_end  # it was no token but 97


def test_a_token_that_is_named_has_to_begin_where_it_is_named() -> None:
    matcher = Matcher('root ::= "a" !<[5]> "c"')
    assert not matcher.after(matcher.start, 400, b"ab")  # llama.cpp takes it, and then ends the process
    assert matcher.after(matcher.after(matcher.start, 97, b"a"), 400, b"ab")


def test_tokens_of_no_vocabulary_fit_nowhere() -> None:
    matcher = Matcher('root ::= "a" | <think>')
    assert matcher.after(matcher.start, 97, b"a")
    assert not matcher.after(matcher.start, 300, b"")


GRAMMARS = {
    "json": JSON,
    "words": 'root ::= ("ab" | "abc" | "é" | "€" | "😀" | "x€")+ | "1"{2,4} | [^a-z{]',
    "tokens": 'root ::= ("a" !<[98]> <[271]>)* [0-9é]*',
    "any": "root ::= .*",
    "ambiguous": "root ::= " + "[a-c]? " * 12 + '"d"',
}


@pytest.mark.parametrize("name", GRAMMARS)
@settings(deadline=None, max_examples=n_examples(25))
@given(data=st.data())
def test_the_whole_vocabulary_at_once_is_each_token_alone(name: str, data: st.DataObject) -> None:
    matcher = Matcher(GRAMMARS[name])
    place = matcher.start
    for _ in range(8):
        alone = {token for token, text in enumerate(TEXTS) if matcher.after(place, token, text)}
        assert matcher.fitting(place, TABLE).tolist() == sorted(alone)
        assert alone or place.can_end
        if not alone:
            break
        token = data.draw(st.sampled_from(sorted(alone)))
        place = matcher.after(place, token, TEXTS[token])


@given(
    st.lists(st.sampled_from([b"{", b'"a', b'"', b":", b" ", b"1", b"}", b"[", b"]", b",", b"true", b"\xc3", b"\xa9"]))
)
def test_a_token_leads_where_its_bytes_lead(tokens: list[bytes]) -> None:
    matcher = Matcher(JSON)
    place = matcher.start
    for token in tokens:
        place = matcher.after(place, 0, token)
        if not place:
            break
    assert bool(place) == bool(place_after(matcher, b"".join(tokens)))


expressions = st.recursive(
    st.sampled_from(['"x"', '"é"', '"ab"', '""', "[a-c]", "[^a]", ".", "<[98]>", "!<[97]>", "a", "b", '"["']),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(" ".join),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]} | {pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{0,3}"])).map(lambda pair: f"({pair[0]}){pair[1]}"),
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=n_examples(150))
@given(expressions, expressions, st.data())
def test_whatever_was_read_can_be_followed(root: str, rule: str, data: st.DataObject) -> None:
    try:
        matcher = Matcher(f"root ::= {root}\na ::= {rule}\nb ::= [a-z] b | ")
    except InvalidArgument:
        return
    place = matcher.start
    for _ in range(6):
        fitting = matcher.fitting(place, TABLE).tolist()
        assert fitting or place.can_end
        if not fitting:
            break
        token = data.draw(st.sampled_from(fitting))
        place = matcher.after(place, token, TEXTS[token])
        assert place


def test_old_states_are_forgotten_and_nothing_changes() -> None:
    """Each depth is a state of its own, and there are more of them than are kept."""
    matcher = Matcher('root ::= "[" root "]" | "x"')
    n_deep = 10_000
    place = matcher.start
    for _ in range(n_deep):
        place = matcher.after_text(place, b"[")
    place = matcher.after_text(place, b"x")
    for _ in range(n_deep):
        assert not place.can_end
        place = matcher.after_text(place, b"]")
    assert place.can_end
    assert not matcher.after_text(place, b"]")


def test_too_many_readings_are_an_error_when_they_come_up() -> None:
    matcher = Matcher('root ::= y{1,60}\ny ::= x{1,60}\nx ::= "a"{1,60}')  # in which "aaa" can be divided at will
    assert matcher.after_text(matcher.start, b"aaa")
    with pytest.raises(RuntimeFailure, match="too many readings"):
        matcher.after_text(matcher.start, b"a" * 100)


def test_the_vocabulary_does_not_multiply_readings() -> None:
    """Each token alone goes through this in thousands of ways."""
    table = TokenTable([b"a" * n for n in range(1, 60)] + [b"a" * n + b"!" for n in range(60)])
    matcher = Matcher("root ::= " + "[a-z]? " * 100)
    assert matcher.fitting(matcher.start, table).tolist() == list(range(59))


def test_a_vocabulary_that_takes_too_much_work_is_an_error() -> None:
    matcher = Matcher('root ::= y{1,60}\ny ::= x{1,60}\nx ::= "a"{1,60}')
    table = TokenTable([b"a" * n for n in range(1, 100)])
    with pytest.raises(RuntimeFailure, match="too many readings"):
        matcher.fitting(matcher.start, table)


FOLLOWED = 'root ::= "<tool>" [a-z]+ "</tool>"'


def follow(follower: GrammarFollower, *texts: bytes, token: int = 1) -> list[bool]:
    """Whether each of the texts fits, which are taken where they do."""
    fits = []
    for text in texts:
        step = follower.after(TokenText(token, text, text, is_end=False))
        if step is not None:
            follower.take(step)
        fits.append(step is not None)
    return fits


def test_a_lazy_grammar_holds_from_its_trigger_on() -> None:
    follower = GrammarFollower(FOLLOWED, triggers=["<tool>"])
    assert follow(follower, b"Let us see. 1 < 2", b" <to", b"ol>ab", b"1", b"c", b"</tool>", b"x") == (
        [True, True, True, False, True, True, False]
    )


def test_a_token_must_not_go_on_behind_the_trigger_with_what_the_grammar_forbids() -> None:
    follower = GrammarFollower(FOLLOWED, triggers=["<tool>"])
    assert follow(follower, b"<tool", b">1", b">a") == [True, False, True]


def test_a_trigger_can_be_an_expression_and_its_capture_the_begin() -> None:
    follower = GrammarFollower(FOLLOWED, triggers=["/[.!] (<tool>)/"])
    assert follow(follower, b"<tool> no.", b" <tool", b">", b"1", b"a</tool>") == [True, True, True, False, True]


def test_the_grammar_may_begin_inside_of_a_character_s_token() -> None:
    follower = GrammarFollower(FOLLOWED, triggers=["<tool>"])
    assert follow(follower, "€".encode()[:2], "€".encode()[2:] + b"<tool>a", b"1", b"\xff") == [
        True,
        True,
        False,
        False,
    ]


def test_the_end_fits_while_a_trigger_is_waited_for_and_at_the_end() -> None:
    follower = GrammarFollower(FOLLOWED, triggers=["<tool>"])
    end = TokenText(0, b"", b"<end>", is_end=True)
    assert follower.after(end) is not None
    follow(follower, b"<tool>a")
    assert follower.after(end) is None
    follow(follower, b"</tool>")
    assert follower.after(end) is not None
    follower.reset()
    assert follow(follower, b"anything") == [True]


def test_a_control_token_can_be_the_trigger() -> None:
    follower = GrammarFollower("root ::= <call> [a-z]+", triggers=["<call>"], token_of={"<call>": 9}.get)
    call = TokenText(9, b"", b"<call>", is_end=False)
    follower.take(follower.after(call) or pytest.fail("it does not fit"))
    assert follow(follower, b"1", b"a") == [False, True]


def test_a_trigger_that_the_grammar_does_not_begin_with() -> None:
    with pytest.raises(InvalidArgument, match="'<call>' is not how the grammar's texts begin"):
        GrammarFollower(FOLLOWED, triggers=["<call>"])
