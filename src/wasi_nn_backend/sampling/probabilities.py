"""What the model thought of each token that was chosen, and of the most probable others: ``sampling.n_probs``."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from wasi_nn_backend.llama.candidates import search
from wasi_nn_backend.llama.interface import Context, Sampler, Vocabulary
from wasi_nn_backend.output import PositionProbabilities, TokenProbability

__all__ = ["ProbabilityRecorder"]


class _Position(NamedTuple):
    """``top_tokens`` and ``top_probabilities`` are parallel, descending. Objects would take ten times the memory."""

    token: int
    probability: float
    top_tokens: npt.NDArray[np.int32]
    top_probabilities: npt.NDArray[np.float32]


class ProbabilityRecorder:
    """A ``Sampler`` that passes everything on to another and keeps, for each token sampled, the probabilities there.

    They are the model's own, as llama-server reports them: the softmax of the logits before biases, penalties,
    temperature and all other stages. What a stage makes of them depends on which others run and in which order; these
    can be compared between runs. Each token costs some passes over the vocabulary, about 0.4 ms at 49,000 tokens.
    """

    def __init__(self, sampler: Sampler, vocabulary: Vocabulary, n_top: int) -> None:
        self._sampler = sampler
        self._vocabulary = vocabulary
        self._n_top = min(n_top, vocabulary.n_tokens)
        self._positions: list[_Position] = []
        self._texts: dict[int, str] = {}  # looked up while sampling: afterwards the model may be closed

    def sample(self, context: Context, row: int) -> int:
        token = self._sampler.sample(context, row)
        logits = context.logits(row)
        weights = np.exp(logits - logits.max())
        total = float(weights.sum(dtype=np.float64))
        (found,) = search(logits[np.newaxis], self._n_top)
        top = found.tokens[np.lexsort((found.tokens, -found.logits))[: self._n_top]].astype(np.int32)
        self._positions.append(_Position(token, float(weights[token]) / total, top, weights[top] / np.float32(total)))
        for shown in (token, *top.tolist()):
            if shown not in self._texts:
                self._texts[shown] = self._vocabulary.piece(shown, special=True).decode(errors="replace")
        return token

    def accept(self, token: int) -> None:
        self._sampler.accept(token)

    def reset(self) -> None:
        self._sampler.reset()
        self._positions.clear()

    def close(self) -> None:
        """What was recorded stays readable."""
        self._sampler.close()

    def positions(self, n_positions: int) -> tuple[PositionProbabilities, ...]:
        """Of the first so many tokens. Any thread may ask, also while others are sampled."""
        return tuple(
            PositionProbabilities(
                self._described(position.token, position.probability),
                tuple(map(self._described, position.top_tokens.tolist(), position.top_probabilities.tolist())),
            )
            for position in self._positions[:n_positions]
        )

    def _described(self, token: int, probability: float) -> TokenProbability:
        return TokenProbability(token, self._texts[token], probability)
