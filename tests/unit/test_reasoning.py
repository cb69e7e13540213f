"""Reasoning told from the answer, however the text is cut into pieces."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import n_examples
from wasi_nn_backend.output import ReasoningSplitter, opens_reasoning, split_reasoning

#: Tags, parts of tags, white space and characters of several bytes.
_parts = st.sampled_from(["<think>", "</think>", "<", "think>", "</", "<thin", " ", "\n", "a", "€", "yes"])
_texts = st.lists(_parts, max_size=12).map("".join)


def expected(text: str, *, is_open: bool) -> tuple[str, str]:
    """By looking at the whole text: blocks at its beginning, the last perhaps open, and closed ones anywhere."""
    blocks, rest = [], f"<think>{text}" if is_open else text
    while (match := re.match(r"\s*<think>(.*?)(?:</think>|\Z)", rest, re.DOTALL)) is not None:
        blocks.append(match[1])
        rest = rest[match.end() :]
    if blocks:
        rest = rest.lstrip()
    blocks += re.findall(r"<think>(.*?)</think>", rest, re.DOTALL)
    answer = re.sub(r"<think>.*?</think>", "", rest, flags=re.DOTALL)
    return answer, "\n".join(block.strip() for block in blocks if block.strip())


@settings(derandomize=True, deadline=None, max_examples=n_examples(400))
@given(_texts, st.booleans(), st.data())
def test_any_cut_gives_what_the_whole_text_gives(text: str, is_open: bool, data: st.DataObject) -> None:
    whole = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8) | st.just(list(range(len(whole))))))
    splitter = ReasoningSplitter(is_open=is_open)
    released = [splitter.feed(whole[at:end]) for at, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    released.append(splitter.finish())
    assert (b"".join(released), splitter.reasoning) == split_reasoning(whole, is_open=is_open)
    assert (splitter.feed(b""), splitter.finish()) == (b"", b"")
    assert (b"".join(released).decode(), splitter.reasoning.decode()) == expected(text, is_open=is_open)


@pytest.mark.parametrize(
    ("text", "is_open", "answer", "reasoning"),
    [
        ("<think>a</think>b", False, "b", "a"),
        ("\n <think>\na\n</think>\n\nb", False, "b", "a"),
        ("a</think>b", True, "b", "a"),
        ("a", True, "", "a"),
        ("<think>a</thi", False, "", "a</thi"),
        ("<think></think>b", False, "b", ""),
        ("b<think>a</think>c", False, "bc", "a"),
        ("write <think> and so on", False, "write <think> and so on", ""),  # only written about
        ("  b", False, "  b", ""),
        ("<think>a</think><think>b</think>c", False, "c", "a\nb"),
        ("<thinking>b", False, "<thinking>b", ""),
    ],
)
def test_where_reasoning_begins_and_ends(text: str, is_open: bool, answer: str, reasoning: str) -> None:
    assert split_reasoning(text.encode(), is_open=is_open) == (answer.encode(), reasoning.encode())


def test_an_answer_is_not_held_back() -> None:
    splitter = ReasoningSplitter(is_open=False)
    assert [splitter.feed(piece) for piece in (b" ", b"Yes", b" <", b"b>", b" <think>x", b"</think>", b"!")] == [
        b"", b" Yes", b" ", b"<b>", b" ", b"", b"!",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "is_open"),
    [
        (b"x<think>", True),
        (b"x<think>\n\n ", True),
        (b"<think>\n</think>\n", False),
        (b"<think> a", False),
        (b"", False),
    ],
)
def test_a_prompt_may_open_the_block(prompt: bytes, is_open: bool) -> None:
    assert opens_reasoning(prompt) == is_open
