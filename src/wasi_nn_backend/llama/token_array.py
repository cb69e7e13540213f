"""A ``llama_token_data_array`` in memory of numpy's: what llama.cpp's sampler chain is given and chooses from."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from wasi_nn_backend.errors import RuntimeFailure
from wasi_nn_backend.llama.bindings import native

__all__ = ["TokenArray", "no_token_left"]


class TokenArray:
    """Reused from token to token, and grows when it has to. 12 bytes a token."""

    def __init__(self, n_tokens: int) -> None:
        self._native: Any = native.llama_token_data_array()
        self._reference = ctypes.byref(self._native)
        self._n = 0
        self._reserve(n_tokens)

    def fill(self, tokens: npt.NDArray[np.integer[Any]], logits: npt.NDArray[np.float32]) -> None:
        """Take parallel arrays, replacing what was there."""
        self._resize(len(tokens))
        self._ids[: self._n] = tokens
        self._logits[: self._n] = logits
        self._p[: self._n] = 0.0

    def copy(self, words: npt.NDArray[np.int32]) -> None:
        """The same from whole ``llama_token_data``, shape [n, 3] (``Candidates.words``), in a third of the time."""
        self._resize(len(words))
        self._words[: self._n] = words

    def _resize(self, n_tokens: int) -> None:
        self._n = n_tokens
        if n_tokens > len(self._words):
            self._reserve(2 * n_tokens)
        self._native.data = self._pointer  # a chain may have moved it: XTC drops tokens at the beginning
        self._native.size = n_tokens
        self._native.selected = -1
        self._native.sorted = False

    def _reserve(self, n_tokens: int) -> None:
        self._words = np.empty((n_tokens, 3), dtype=np.int32)  # ``llama_token_data``: int32 id, float32 logit and p
        self._ids = self._words[:, 0]
        numbers = self._words.view(np.float32)
        self._logits, self._p = numbers[:, 1], numbers[:, 2]
        self._pointer = ctypes.cast(self._words.ctypes.data, type(self._native.data))

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        """A view, in the order of the tokens until a link of the chain sorts them."""
        return self._logits[: self._n]

    def apply(self, sampler: Any) -> None:
        native.llama_sampler_apply(sampler, self._reference)

    def chosen_by(self, sampler: Any) -> int:
        """Apply a chain with a chooser. Raises ``RuntimeFailure`` when nothing is left that it could have chosen.

        llama.cpp does not notice that: among logits that are all minus infinity it takes the last token.
        """
        self.apply(sampler)
        selected = self._native.selected
        if 0 <= selected < self._native.size:
            chosen = self._native.data[selected]
            if math.isfinite(chosen.logit):
                return int(chosen.id)
        raise no_token_left()


def no_token_left() -> RuntimeFailure:
    """The error for settings that exclude every token, to be raised."""
    return RuntimeFailure(
        "no token is left to choose: the biases, bans and other sampling settings exclude all that the model can say "
        "here; relax them"
    )
