"""A context that answers from a script."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from wasi_nn_backend.errors import Cancelled


class ScriptedContext:
    """Streams ``pieces`` for every prompt. A piece that is an exception is raised; ``on_piece`` runs before each."""

    def __init__(self, pieces: Iterable[str | Exception], on_piece: Callable[[], None] = lambda: None) -> None:
        self._pieces = pieces
        self._on_piece = on_piece
        self._n_pieces = 0
        self._is_cancelled = False
        self.prompts: list[bytes] = []
        self.n_resets = 0

    @property
    def metadata(self) -> dict[str, Any]:
        return {
            "input_tokens": 7,
            "output_tokens": self._n_pieces,
            "llama_build_number": 1,
            "llama_commit": "abc",
            "finish_reason": "cancelled" if self._is_cancelled else "stop",
            "time_to_first_token_ms": 500.0,
            "duration_ms": 1500.0,
        }

    def stream(self, prompt: str | bytes) -> Iterator[str]:
        self.prompts.append(prompt.encode() if isinstance(prompt, str) else prompt)
        self._n_pieces = 0
        self._is_cancelled = False
        for piece in self._pieces:
            self._on_piece()
            if self._is_cancelled:
                raise Cancelled("cancelled")
            if isinstance(piece, Exception):
                raise piece
            self._n_pieces += 1
            yield piece

    def cancel(self) -> None:
        self._is_cancelled = True

    def reset(self) -> None:
        self.n_resets += 1
