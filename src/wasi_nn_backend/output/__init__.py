"""From token bytes to what a caller sees: whole characters, stop strings, metadata."""

from __future__ import annotations

from wasi_nn_backend.output.embedding import embedding_json
from wasi_nn_backend.output.metadata import FinishReason, PositionProbabilities, RunMetadata, TokenProbability
from wasi_nn_backend.output.reasoning import ReasoningSplitter, opens_reasoning, split_reasoning
from wasi_nn_backend.output.text import TextAssembler
from wasi_nn_backend.output.tool_calls import ToolCall, parse_tool_calls, tool_names

__all__ = [
    "FinishReason",
    "PositionProbabilities",
    "ReasoningSplitter",
    "RunMetadata",
    "TextAssembler",
    "TokenProbability",
    "ToolCall",
    "embedding_json",
    "opens_reasoning",
    "parse_tool_calls",
    "split_reasoning",
    "tool_names",
]
