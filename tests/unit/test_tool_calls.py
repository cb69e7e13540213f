"""Calls of tools, read out of answers in the formats of the common templates."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import n_examples
from wasi_nn_backend.output import ToolCall, parse_tool_calls, tool_names

A = ToolCall("get_weather", {"city": "Oslo"})
B = ToolCall("time", {})
NAMES = ("get_weather", "time")
JSON_A = '{"name": "get_weather", "arguments": {"city": "Oslo"}}'
LLAMA_A = '{"name": "get_weather", "parameters": {"city": "Oslo"}}'
JSON_B = '{"name": "time"}'


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (f"<tool_call>\n{JSON_A}\n</tool_call>", [A]),
        (f"Let me see.\n<tool_call>{JSON_A}</tool_call>\n<tool_call>{JSON_B}</tool_call>", [A, B]),
        (f"<tool_call>{JSON_A}", [A]),  # ended by a control token instead of the tag
        (f'<tool_call>{{"name": "get_w</tool_call><tool_call>{JSON_B}</tool_call>', [B]),
        ('<function=get_weather>{"city": "Oslo"}</function>', [A]),
        (f"[TOOL_CALLS][{JSON_A}, {JSON_B}]", [A, B]),
        (f"[TOOL_CALLS] [{JSON_A}]", [A]),
        ('[TOOL_CALLS]get_weather[ARGS]{"city": "Oslo"}[TOOL_CALLS]time[ARGS]{}', [A, B]),
        (f"<|python_tag|>{LLAMA_A}", [A]),
        (f"<|python_tag|>{LLAMA_A}; {JSON_B}", [A, B]),
        (LLAMA_A, [A]),
        (f" {LLAMA_A}\n", [A]),
        (f"[{JSON_A}, {JSON_B}]", [A, B]),
        ('get_weather{"city": "Oslo"}', [A]),
        ('{"name": "get_weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}', [A]),
        (f'{{"type": "function", "function": {JSON_A}}}', [A]),
    ],
)
def test_calls_are_read(text: str, calls: list[ToolCall]) -> None:
    assert list(parse_tool_calls(text, NAMES)) == calls


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hello.",
        '{"name": "nobody", "arguments": {}}',
        '{"city": "Oslo"}',
        f"I would write {JSON_A}",
        f"{JSON_A} and more",
        f"[{JSON_A}, 7]",
        "[]",
        "[TOOL_CALLS]",
        "[TOOL_CALLS][",
        "<tool_call>",
        "<tool_call>{</tool_call>",
        '<tool_call>{"name": 7}</tool_call>',
        '<tool_call>{"name": "time", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "time", "arguments": {"x": NaN}}</tool_call>',
        "<tool_call>" + '{"a":' * 50_000,
        '<tool_call>{"name": "time", "arguments": {"x": ' + "9" * 5000 + "}}",
        '<tool_call>{"name": "time", "arguments": {"x": 1e999}}</tool_call>',
        "<function=time>[]</function>",
        "42",
        'time"{}"',
    ],
    ids=lambda text: text[:30],
)
def test_what_is_no_call_is_text(text: str) -> None:
    assert parse_tool_calls(text, NAMES) == ()


def test_a_marked_call_needs_no_definition_and_a_bare_one_does() -> None:
    assert parse_tool_calls(f"<tool_call>{JSON_A}</tool_call>", ()) == (A,)
    assert parse_tool_calls(f"[TOOL_CALLS][{JSON_A}]", ()) == (A,)
    assert parse_tool_calls(JSON_A, ()) == ()


@settings(derandomize=True, deadline=None, max_examples=n_examples(200))
@given(
    st.lists(st.sampled_from([*'<>[]{}":,;', "tool_call", "/", "[TOOL_CALLS]", JSON_A, "name", " ", "time"])).map(
        "".join
    )
)
def test_any_text_is_read_without_an_error(text: str) -> None:
    for call in parse_tool_calls(text, NAMES):
        json.dumps(call.arguments, allow_nan=False)


def test_names_in_either_shape_of_a_definition() -> None:
    tools = [{"type": "function", "function": {"name": "a"}}, {"name": "b"}, {"function": 7}, {"name": 7}, {}]
    assert tool_names(tools) == {"a", "b"}
