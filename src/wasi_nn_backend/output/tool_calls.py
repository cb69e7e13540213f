"""Calls of tools in an answer, as the common chat templates teach models to write them.

What cannot be read is text and no call: a model may write about calls, or be cut off in one. The formats:

- ``<tool_call>{"name": ..., "arguments": ...}</tool_call>``: Hermes, Qwen and many after them;
- ``<function=name>{...}</function>``: functionary, Llama 3.1;
- ``[TOOL_CALLS]`` and ``[{"name": ..., "arguments": ...}]`` or ``name[ARGS]{...}``: Mistral, older and newer;
- ``<|python_tag|>{"name": ..., "parameters": ...}``, more of them after semicolons: Llama 3;
- the same without the marker, which is a control token whose text is usually left out. Then the whole answer must be
  calls, and of tools that the model was told of.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["ToolCall", "parse_tool_calls", "tool_names"]

_N_CALLS_MAX: Final = 128

_HERMES: Final = re.compile(r"<tool_call>\s*(?=\{)")
_FUNCTIONARY: Final = re.compile(r"<function=([\w.\-]{1,128})>\s*(?=\{)")
_WHOLE_ANSWER: Final = re.compile(r"\s*(?:\[TOOL_CALLS\]|<\|python_tag\|>)?\s*")
_NAMED: Final = re.compile(r"(?:\[TOOL_CALLS\])?\s*([\w.\-]{1,128})(?:\[ARGS\])?\s*(?=\{)")
_SPACE: Final = re.compile(r"\s*")
_SEPARATOR: Final = re.compile(r"\s*[;,]?\s*")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """``arguments`` are a JSON object's members."""

    name: str
    arguments: Mapping[str, Any]


def tool_names(tools: Collection[Mapping[str, Any]]) -> frozenset[str]:
    """The names in tool definitions, which stand in an object ``function`` or at the top."""
    functions = (tool.get("function", tool) for tool in tools)
    names = (function.get("name") for function in functions if isinstance(function, Mapping))
    return frozenset(name for name in names if isinstance(name, str))


def parse_tool_calls(text: str, known_names: Collection[str]) -> tuple[ToolCall, ...]:
    """The calls in a whole answer, in their order. ``known_names`` are the tools that the model was told of."""
    marked = tuple(_marked(text))
    if marked:
        return marked
    start = _WHOLE_ANSWER.match(text)
    is_marked = start is not None and bool(start[0].strip())
    calls = _bare(text, 0 if start is None else start.end()) or _named(text)
    return calls if is_marked or all(call.name in known_names for call in calls) else ()


def _marked(text: str) -> Iterator[ToolCall]:
    """Calls between tags, anywhere in the text."""
    matches = [*_HERMES.finditer(text), *_FUNCTIONARY.finditer(text)]
    for match in sorted(matches, key=re.Match.start)[:_N_CALLS_MAX]:
        value, _ = _json_at(text, match.end())
        call = _call(match[1], value) if match.re is _FUNCTIONARY else _call_of(value)
        if call is not None:
            yield call


def _bare(text: str, at: int) -> tuple[ToolCall, ...]:
    """The rest of the text as an array of calls, or as calls one after the other; nothing, if there is more in it."""
    calls: list[ToolCall] = []
    while at < len(text):
        value, at = _json_at(text, at)
        found = [_call_of(element) for element in (value if isinstance(value, list) else [value])]
        if not found or None in found or len(calls) >= _N_CALLS_MAX:
            return ()
        calls += [call for call in found if call is not None]
        at = _end_of(_SEPARATOR, text, at)
    return tuple(calls)


def _named(text: str) -> tuple[ToolCall, ...]:
    """The whole text as names, each before its arguments."""
    calls: list[ToolCall] = []
    at = _end_of(_SPACE, text, 0)
    while at < len(text):
        match = _NAMED.match(text, at)
        if match is None or len(calls) >= _N_CALLS_MAX:
            return ()
        value, at = _json_at(text, match.end())
        call = _call(match[1], value)
        if call is None:
            return ()
        calls.append(call)
        at = _end_of(_SEPARATOR, text, at)
    return tuple(calls)


def _end_of(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return at if match is None else match.end()


def _call_of(value: Any) -> ToolCall | None:
    if not isinstance(value, dict):
        return None
    value = value.get("function", value) if isinstance(value.get("function"), dict) else value
    return _call(value.get("name"), value.get("arguments", value.get("parameters", {})))


def _call(name: Any, arguments: Any) -> ToolCall | None:
    if isinstance(arguments, str):  # some models write the arguments as JSON in a string
        arguments, _ = _json_at(arguments, 0)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    return ToolCall(name, arguments)


def _json_at(text: str, at: int) -> tuple[Any, int]:
    """(the JSON value that begins there, where it ends), or None and the text's end."""
    try:
        value, end = _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, nesting of thousands of levels
        return None, len(text)
    return value, end


def _refuse_constant(literal: str) -> None:
    raise ValueError(f"{literal} is no JSON")


def _finite(literal: str) -> float:
    number = float(literal)
    if math.isinf(number):
        raise ValueError(f"{literal} is beyond all numbers")
    return number


_DECODER: Final = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)
