"""One prompt's answer: streamed to a writer, then its text and what is said about it afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from wasi_nn_backend.cli.interrupts import Cancellation
from wasi_nn_backend.errors import Cancelled

__all__ = ["Answer", "AnsweringContext", "stream_answer"]


class AnsweringContext(Protocol):
    """The part of ``ExecutionContext`` that answers one prompt after another."""

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    def stream(self, prompt: str | bytes) -> Iterator[str]: ...

    def cancel(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Answer:
    """``metadata`` is the context's after the answer."""

    text: str
    metadata: Mapping[str, Any]

    @property
    def n_tokens(self) -> int:
        return int(self.metadata["output_tokens"])

    @property
    def tokens_per_s(self) -> float | None:
        """The speed after the first token, which waits for the whole prompt. None where too little came to tell."""
        first_ms, all_ms = self.metadata.get("time_to_first_token_ms"), self.metadata.get("duration_ms")
        if first_ms is None or all_ms is None or self.n_tokens < 2 or all_ms <= first_ms:
            return None
        return float((self.n_tokens - 1) * 1000 / (all_ms - first_ms))

    def summary(self) -> str:
        """One line for a person."""
        parts = [f"{self.metadata['input_tokens']} prompt tokens, {self.n_tokens} answer tokens"]
        if self.tokens_per_s is not None:
            parts.append(f"{self.tokens_per_s:.1f} tokens/s")
        if (first_ms := self.metadata.get("time_to_first_token_ms")) is not None:
            parts.append(f"first token after {first_ms / 1000:.2f} s")
        if (reason := self.metadata.get("finish_reason")) is not None:
            parts.append(f"ended by {reason}")
        return ", ".join(parts)

    def as_json(self) -> dict[str, Any]:
        return {"text": self.text, "tokens_per_s": self.tokens_per_s, "metadata": dict(self.metadata)}


def stream_answer(
    context: AnsweringContext, prompt: bytes, write: Callable[[str], None], cancellation: Cancellation
) -> Answer:
    """Pass the answer's pieces to ``write`` as they come; return the whole.

    After Ctrl-C it returns what there is. Raises what ``stream`` raises otherwise, and what ``write`` raises.
    """
    pieces: list[str] = []
    with cancellation.calling(context.cancel):
        try:
            for piece in context.stream(prompt):
                pieces.append(piece)
                write(piece)
        except Cancelled:
            if not cancellation.requested:
                raise
    return Answer("".join(pieces), dict(context.metadata))
