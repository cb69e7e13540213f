"""What a caller can learn about a run: output index 1."""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass
from typing import Any

__all__ = ["FinishReason", "RunMetadata"]


class FinishReason(enum.Enum):
    """Why a generation ended."""

    STOP = "stop"  # the model ended it
    STOP_STRING = "stop_string"
    LENGTH = "length"
    TIME = "timeout"
    CONTEXT_FULL = "context_full"
    CANCELLED = "cancelled"
    ERROR = "error"


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

    def core(self) -> dict[str, Any]:
        """The four keys that WasmEdge's modules index, in its order."""
        return {
            "input_tokens": self.n_tokens_input,
            "output_tokens": self.n_tokens_output,
            "llama_build_number": self.build_number,
            "llama_commit": self.build_commit,
        }

    def full(self) -> dict[str, Any]:
        return self.core() | {
            "finish_reason": None if self.finish_reason is None else self.finish_reason.value,
            "reused_tokens": self.n_tokens_reused,
            "shared_tokens": self.n_tokens_shared,
            "shifted_tokens": self.n_tokens_shifted,
            "recomputed_tokens": self.n_tokens_recomputed,
            "time_to_first_token_ms": self.time_to_first_token_ms,
            "duration_ms": self.duration_ms,
        }

    def to_json(self, *, core_only: bool = False) -> bytes:
        """JSON with a space after each comma and colon, as WasmEdge writes it: guests compare such text."""
        return json.dumps(self.core() if core_only else self.full()).encode()
