"""What a caller can learn about a run: output index 1."""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass
from typing import Any

from wasi_nn_backend.output.tool_calls import ToolCall

__all__ = ["FinishReason", "PositionProbabilities", "RunMetadata", "TokenProbability"]


class FinishReason(enum.Enum):
    """Why a generation ended."""

    STOP = "stop"  # the model ended it
    STOP_STRING = "stop_string"
    LENGTH = "length"
    TIME = "time_limit"  # of generating: the text is the answer
    TIMEOUT = "timeout"  # of the task: an error
    CONTEXT_FULL = "context_full"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TokenProbability:
    """``text`` has U+FFFD for a part of a character."""

    token: int
    text: str
    probability: float

    def shown(self) -> dict[str, Any]:
        """Seven digits are what the model's own arithmetic has."""
        return {"token": self.token, "text": self.text, "probability": float(f"{self.probability:.7g}")}


@dataclass(frozen=True, slots=True)
class PositionProbabilities:
    """One position of the output: the token that was chosen, and the most probable ones, which may include it."""

    chosen: TokenProbability
    top: tuple[TokenProbability, ...]

    def shown(self) -> dict[str, Any]:
        return {**self.chosen.shown(), "top": [token.shown() for token in self.top]}


@dataclass(frozen=True, slots=True)
class RunMetadata:
    """Figures of a context's last run, zero before the first."""

    n_tokens_input: int = 0
    n_tokens_output: int = 0
    build_number: int = 0
    build_commit: str = ""
    finish_reason: FinishReason | None = None
    n_tokens_reused: int = 0
    n_tokens_shared: int = 0
    n_tokens_shifted: int = 0
    n_tokens_recomputed: int = 0
    time_to_first_token_ms: float | None = None
    duration_ms: float | None = None
    probabilities: tuple[PositionProbabilities, ...] | None = None  # None: they were not asked for
    reasoning: str | None = None  # None: it was not asked for
    tool_calls: tuple[ToolCall, ...] | None = None  # None: there are no tools

    def core(self) -> dict[str, Any]:
        """The four keys that WasmEdge's modules index, in its order."""
        return {
            "input_tokens": self.n_tokens_input,
            "output_tokens": self.n_tokens_output,
            "llama_build_number": self.build_number,
            "llama_commit": self.build_commit,
        }

    def full(self) -> dict[str, Any]:
        """All of it. ``probabilities``, one entry for each output token, ``reasoning`` and ``tool_calls`` are there if
        they were asked for."""
        figures = self.core() | {
            "finish_reason": None if self.finish_reason is None else self.finish_reason.value,
            "reused_tokens": self.n_tokens_reused,
            "shared_tokens": self.n_tokens_shared,
            "shifted_tokens": self.n_tokens_shifted,
            "recomputed_tokens": self.n_tokens_recomputed,
            "time_to_first_token_ms": self.time_to_first_token_ms,
            "duration_ms": self.duration_ms,
        }
        if self.probabilities is not None:
            figures["probabilities"] = [position.shown() for position in self.probabilities]
        if self.reasoning is not None:
            figures["reasoning"] = self.reasoning
        if self.tool_calls is not None:
            figures["tool_calls"] = [{"name": call.name, "arguments": call.arguments} for call in self.tool_calls]
        return figures

    def to_json(self, *, core_only: bool = False) -> bytes:
        """JSON with a space after each comma and colon, as WasmEdge writes it: guests compare such text."""
        return json.dumps(self.core() if core_only else self.full()).encode()
