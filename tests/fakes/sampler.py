"""Sampler stages in plain numpy, for the fake llama.

They follow the papers and llama.cpp's documentation, over a whole vocabulary in which minus infinity is what a stage
left out. They agree with themselves from run to run, not with llama.cpp's random generator.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.llama.interface import (
    Context,
    Distribution,
    Dry,
    DynamicTemperature,
    Greedy,
    LogitBias,
    MinP,
    Mirostat,
    Penalties,
    SamplerStage,
    Temperature,
    TopK,
    TopNSigma,
    TopP,
    Typical,
    Xtc,
)

Logits = npt.NDArray[np.float64]

CHOOSERS = (Distribution, Mirostat, Greedy)


class FakeSampler:
    """``piece`` gives a token's text, in which DRY looks for breakers."""

    def __init__(
        self, stages: Sequence[SamplerStage], piece: Callable[[int], bytes] = lambda token: b"", n_vocab: int = 260
    ) -> None:
        if [isinstance(stage, CHOOSERS) for stage in stages] != [False] * (len(stages) - 1) + [True]:
            raise InvalidArgument("a sampler chain must end in its only chooser")
        self._stages = tuple(stages)
        self._piece = piece
        self._n_vocab = n_vocab
        self._history: list[int] = []
        self.closed = False
        self.reset()

    def reset(self) -> None:
        self._random = {stage: random.Random(getattr(stage, "seed", 0)) for stage in self._stages}
        last = self._stages[-1]
        self._mu = 2 * last.tau if isinstance(last, Mirostat) else 0.0
        self._history.clear()

    def accept(self, token: int) -> None:
        self._history.append(token)

    def sample(self, context: Context, row: int) -> int:
        token = self.choose(context, row)
        self.accept(token)
        return token

    def choose(self, context: Context, row: int) -> int:
        return self._chosen(np.array(context.logits(row), dtype=np.float64))

    def choose_among(self, tokens: npt.NDArray[np.int32], logits: npt.NDArray[np.float32]) -> int:
        everything = np.full(self._n_vocab, -np.inf)
        everything[tokens] = logits
        return self._chosen(everything)

    def _chosen(self, logits: Logits) -> int:
        for stage in self._stages[:-1]:
            self._apply(stage, logits)
        return self._choose(self._stages[-1], logits)

    def close(self) -> None:
        self.closed = True

    def _apply(self, stage: SamplerStage, logits: Logits) -> None:
        match stage:
            case Penalties() | Dry() | LogitBias():
                self._change(stage, logits)
            case TopNSigma(n) if n > 0:
                logits[logits < logits.max() - n * logits[np.isfinite(logits)].std()] = -np.inf
            case TopK(k) if 0 < k < len(logits):
                logits[np.argsort(-logits, kind="stable")[k:]] = -np.inf
            case TopP(p, min_keep):
                keep_mass(logits, np.argsort(-logits, kind="stable"), p, min_keep)
            case Typical(p, min_keep):
                keep_mass(logits, by_typicality(logits), p, min_keep)
            case MinP(p, min_keep):
                order = np.argsort(-logits, kind="stable")
                n_kept = max(int((softmax(logits) >= p * softmax(logits).max()).sum()), min_keep)
                logits[order[n_kept:]] = -np.inf
            case Xtc():
                self._exclude_top_choices(stage, logits)
            case Temperature(value):
                logits /= max(value, 1e-6)
            case DynamicTemperature(value, range_, exponent):
                n = int(np.isfinite(logits).sum())
                if n > 1:
                    lowest = max(0.0, value - range_)
                    relative = entropy(softmax(logits)) / math.log(n)
                    logits /= max(lowest + (value + range_ - lowest) * relative**exponent, 1e-6)

    def _change(self, stage: Penalties | Dry | LogitBias, logits: Logits) -> None:
        match stage:
            case Penalties():
                self._penalise(stage, logits)
            case Dry():
                self._penalise_repetitions(stage, logits)
            case LogitBias(biases):
                for token, bias in biases:
                    logits[token] += bias

    def _penalise(self, stage: Penalties, logits: Logits) -> None:
        window = self._history[-stage.last_n :] if stage.last_n else []
        for token in set(window):
            logits[token] = logits[token] / stage.repeat if logits[token] > 0 else logits[token] * stage.repeat
            logits[token] -= stage.frequency * window.count(token) + stage.presence

    def _penalise_repetitions(self, stage: Dry, logits: Logits) -> None:
        """For each place in the window: how many tokens before it are the same as at the window's end."""
        window = self._history[-stage.last_n :] if stage.last_n else []
        n_max = next((n for n, token in enumerate(reversed(window)) if self._breaks(stage, token)), len(window))
        longest: dict[int, int] = {}
        for at, token in enumerate(window):
            n = 0
            while n < min(n_max, at) and window[at - 1 - n] == window[-1 - n]:
                n += 1
            longest[token] = max(longest.get(token, 0), n)
        for token, n in longest.items():
            if n >= stage.allowed_length and not self._breaks(stage, token):
                logits[token] -= stage.multiplier * stage.base ** (n - stage.allowed_length)

    def _breaks(self, stage: Dry, token: int) -> bool:
        """Breakers over several tokens are left to llama.cpp."""
        return any(breaker in self._piece(token) for breaker in stage.breakers)

    def _exclude_top_choices(self, stage: Xtc, logits: Logits) -> None:
        if self._random[stage].random() > stage.probability:
            return
        order = np.argsort(-logits, kind="stable")
        n_left = int(np.isfinite(logits).sum())
        n_above = min(int((softmax(logits) >= stage.threshold).sum()), n_left)
        if n_above > 1 and n_left - (n_above - 1) >= stage.min_keep:
            logits[order[: n_above - 1]] = -np.inf

    def _choose(self, stage: SamplerStage, logits: Logits) -> int:
        match stage:
            case Greedy():
                return int(np.argmax(logits))
            case Mirostat(_, tau, eta):
                # Of both versions the second: tokens that surprise more than mu are left out.
                surprise = -np.log2(np.maximum(softmax(logits), 1e-300))
                logits[(surprise > self._mu) & (surprise > surprise.min())] = -np.inf
                token = self._draw(stage, logits)
                self._mu -= eta * (-math.log2(softmax(logits)[token]) - tau)
                return token
            case _:
                return self._draw(stage, logits)

    def _draw(self, stage: SamplerStage, logits: Logits) -> int:
        cumulated = np.cumsum(softmax(logits))
        return int(np.searchsorted(cumulated, self._random[stage].random() * cumulated[-1], side="right"))


def softmax(logits: Logits) -> Logits:
    weights: Logits = np.exp(logits - logits.max())
    return weights / weights.sum()


def entropy(probabilities: Logits) -> float:
    possible = probabilities[probabilities > 0]
    return float(-(possible * np.log(possible)).sum())


def by_typicality(logits: Logits) -> npt.NDArray[np.intp]:
    probabilities = softmax(logits)
    surprise = -np.log(np.maximum(probabilities, 1e-300))
    return np.argsort(np.abs(surprise - entropy(probabilities)), kind="stable")


def keep_mass(logits: Logits, order: npt.NDArray[np.intp], p: float, min_keep: int) -> None:
    """Keep the first in the order whose probabilities make up ``p``."""
    mass = np.cumsum(softmax(logits)[order])
    logits[order[max(int(np.searchsorted(mass, p)) + 1, min_keep) :]] = -np.inf
