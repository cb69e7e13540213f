"""Greedy sampling without llama.cpp's chain."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wasi_nn_backend.llama.chain import check_largest_logit, check_token, native_context
from wasi_nn_backend.llama.interface import Context
from wasi_nn_backend.llama.links import LinkMaker
from wasi_nn_backend.llama.owner import Owner, Resource

__all__ = ["GreedySampler"]


class GreedySampler(Owner):
    """The most probable token, the lowest id among equals, by an argmax over the logits where they lie.

    llama.cpp's chain copies the vocabulary into an array of structs first, which is some 15 times as much work.
    """

    def __init__(self, links: LinkMaker) -> None:
        # No native object, but a claim on the model like every sampler's, so that closing behaves the same.
        super().__init__(Resource("a greedy sampler", 0, lambda _pointer: None, parent=links.model))
        self._n_vocab = links.n_vocab

    def sample(self, context: Context, row: int) -> int:
        """Raises ``RuntimeFailure`` when the logits are not numbers."""
        return self.choose(context, row)

    def choose(self, context: Context, row: int) -> int:
        """``sample``: there is nothing to record."""
        with self._native():
            token, logit = native_context(context).best(row)
            check_largest_logit(logit)
            return token

    def choose_among(self, tokens: npt.NDArray[np.int32], logits: npt.NDArray[np.float32]) -> int:
        """The same from a part of the vocabulary, given as parallel arrays with ascending tokens."""
        with self._native():
            return int(tokens[logits.argmax()])

    def accept(self, token: int) -> None:
        """Raises ``InvalidArgument`` for a token outside of the vocabulary. There is no state to record it in."""
        check_token(token, self._n_vocab)
        with self._native():
            return

    def reset(self) -> None:
        with self._native():
            return
