"""Text comes out whole: characters and stop strings that are spread over pieces, and what a run tells about itself."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import n_examples
from wasi_nn_backend.output import FinishReason, RunMetadata, TextAssembler
from wasi_nn_backend.output.stop import StopMatcher
from wasi_nn_backend.output.text import incomplete_suffix_length

deterministic = settings(derandomize=True, deadline=None, max_examples=n_examples(200))

#: Few different bytes, so that stop strings overlap, repeat and nearly match; some of them parts of characters.
_raw_texts = st.lists(st.sampled_from([0x61, 0x62, 0xE2, 0x82, 0xAC, 0xF0, 0xC3, 0xFF]), max_size=24).map(bytes)
_raw_stops = st.just([]) | st.lists(
    st.lists(st.sampled_from([0x61, 0x62]), max_size=8).map(bytes)
    | st.lists(st.sampled_from([0x61, 0xE2, 0x82]), max_size=4).map(bytes),
    max_size=4,
)
_characters = st.text("ab€é🙂", max_size=16)
_words = st.lists(st.text("ab€é🙂", min_size=1, max_size=4), max_size=4)


@st.composite
def pieces_of(draw: st.DrawFn, texts: st.SearchStrategy[bytes]) -> list[bytes]:
    """A text, cut anywhere: also into empty pieces and inside of characters, or at every byte."""
    text = draw(texts)
    cuts = sorted(draw(st.just(range(len(text))) | st.lists(st.integers(0, len(text)), max_size=10)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def first_stop(text: bytes, stops: Sequence[bytes]) -> tuple[int, int] | None:
    """By trying every end: (where the stop string ends that is complete first, the length of the longest of them)."""
    for end in range(len(text) + 1):
        if complete := [len(stop) for stop in stops if stop and text[:end].endswith(stop)]:
            return end, max(complete)
    return None


def n_bytes_undecided(text: bytes, stops: Sequence[bytes]) -> int:
    """By trying every length: the longest end of the text that begins a stop string."""
    lengths = range(max((len(stop) for stop in stops), default=0))
    return max((n for n in lengths if any(len(stop) > n and text.endswith(stop[:n]) for stop in stops)), default=0)


@deterministic
@given(pieces_of(_raw_texts), _raw_stops)
def test_what_is_released_is_the_text_before_the_first_stop_string(pieces: list[bytes], stops: list[bytes]) -> None:
    text = b"".join(pieces)
    assembler = TextAssembler(stops)
    released = b"".join(assembler.feed(piece) for piece in pieces) + assembler.finish()
    match = first_stop(text, stops)
    assert released == (text if match is None else text[: match[0] - match[1]])
    assert assembler.stopped == (match is not None)
    assert assembler.text == released
    assert assembler.n_bytes_released == len(released)
    assert (assembler.feed(b"more"), assembler.stopped) == ((b"", True) if match else (b"more", False))


@deterministic
@given(pieces_of(_characters.map(str.encode)), _words)
def test_valid_text_is_released_in_whole_characters(pieces: list[bytes], stops: list[str]) -> None:
    assembler = TextAssembler([stop.encode() for stop in stops])
    for piece in [*(assembler.feed(piece) for piece in pieces), assembler.text]:
        piece.decode()
    if assembler.stopped:
        assembler.finish().decode()


@deterministic
@given(pieces_of(_raw_texts), _raw_stops)
def test_nothing_is_held_back_without_need(pieces: list[bytes], stops: list[bytes]) -> None:
    assembler = TextAssembler(stops)
    text = b""
    for piece in pieces:
        text += piece
        assembler.feed(piece)
        if assembler.stopped:
            return
        decided = text[: len(text) - n_bytes_undecided(text, stops)]
        assert assembler.text == decided[: len(decided) - incomplete_suffix_length(decided)]


@deterministic
@given(pieces_of(_raw_texts), _raw_stops)
def test_the_matcher_agrees_with_a_naive_search(pieces: list[bytes], stops: list[bytes]) -> None:
    matcher = StopMatcher(stops)
    assert bool(matcher) == any(stops)
    text = b""
    for piece in pieces:
        match = matcher.feed(piece)
        expected = first_stop(text + piece, stops)
        if expected is not None:
            assert match == (expected[0] - len(text), expected[1])
            return
        text += piece
        assert match is None
        assert matcher.n_bytes_pending == n_bytes_undecided(text, stops)


@deterministic
@given(_characters, st.integers(0, 64))
def test_an_incomplete_suffix_is_what_a_character_lacks(text: str, n_bytes: int) -> None:
    cut = text.encode()[:n_bytes]
    whole = cut.decode(errors="ignore").encode()
    assert incomplete_suffix_length(cut) == len(cut) - len(whole)


@pytest.mark.parametrize("text", [b"\x80\x80\x80\x80", b"a\xff", b"\xf8\x80", b"\xe2\x82\xac\x80", b""])
def test_bytes_that_no_character_can_take_up_are_not_waited_for(text: bytes) -> None:
    assert incomplete_suffix_length(text) == 0
    assert TextAssembler().feed(text) == text


@pytest.mark.parametrize(
    ("stops", "pieces", "text"),
    [
        (["abab"], ["ab", "aab", "ab", "x"], "aba"),  # begins inside of a failed match
        (["bc", "abcd"], ["ab", "cd"], "a"),  # the shorter one is complete first
        (["c", "abc"], ["a", "b", "c"], ""),  # complete at the same byte: the one that began first
        (["€"], ["1\N{EURO SIGN}2"], "1"),
        (["aabaaac"], ["aabaaa", "baaac"], "aaba"),  # goes on from a beginning inside of a beginning
        (["ab"], ["a", "a", "a"], "aaa"),  # never complete: all of it is text in the end
        ([""], ["x"], "x"),
    ],
)
def test_stop_strings_that_overlap(stops: list[str], pieces: list[str], text: str) -> None:
    assembler = TextAssembler([stop.encode() for stop in stops])
    released = b"".join([assembler.feed(piece.encode()) for piece in pieces])
    assert (released + assembler.finish()).decode() == text


def test_a_character_that_is_never_finished_keeps_its_place() -> None:
    assembler = TextAssembler()
    assert [assembler.feed(piece) for piece in (b"\xe2\x82", b"a", b"\xc3", b"\xc3", b"\xa9")] == [
        b"",
        b"\xe2\x82a",
        b"",
        b"\xc3",
        b"\xc3\xa9",
    ]


def test_finishing_twice_releases_once() -> None:
    assembler = TextAssembler([b"stop"])
    assert assembler.feed(b"st") == b""
    assert assembler.finish() == b"st"
    assert assembler.finish() == b""
    assert assembler.text == b"st"


def test_metadata_begins_with_the_four_keys_of_wasmedge() -> None:
    metadata = RunMetadata(16, 8, 4321, "abc", FinishReason.LENGTH, 3, 1.5, 2.5)
    core = '{"input_tokens": 16, "output_tokens": 8, "llama_build_number": 4321, "llama_commit": "abc"}'
    assert metadata.to_json(core_only=True).decode() == core
    assert metadata.to_json().decode().startswith(core[:-1] + ", ")
    assert json.loads(metadata.to_json()) == metadata.full()
    assert metadata.full()["finish_reason"] == "length"
    assert RunMetadata().full()["finish_reason"] is None
