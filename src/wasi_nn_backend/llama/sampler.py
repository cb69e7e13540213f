"""Choosing a token from logits: llama.cpp's sampler chain, and a short cut for greedy."""

from __future__ import annotations

import ctypes
import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from wasi_nn_backend.errors import InvalidArgument, RuntimeFailure
from wasi_nn_backend.llama.bindings import native
from wasi_nn_backend.llama.context import NativeContext
from wasi_nn_backend.llama.interface import (
    Context,
    Distribution,
    Greedy,
    LogitBias,
    MinP,
    Penalties,
    Sampler,
    SamplerStage,
    Temperature,
    TopK,
    TopP,
    Typical,
)
from wasi_nn_backend.llama.owner import Owner, Resource

__all__ = ["ChainSampler", "GreedySampler", "open_sampler"]

_Logits = npt.NDArray[np.float32]

#: Below this llama.cpp's division of the logits overflows to infinity and then to NaN; the most probable token is the
#: limit that such a temperature approaches anyway.
_MIN_TEMPERATURE = 1e-6


def open_sampler(model: Resource, n_vocab: int, stages: Sequence[SamplerStage]) -> Sampler:
    """Raises ``InvalidArgument`` for a chain that does not end in its only chooser, or for values without meaning."""
    _check_order(stages)
    for stage in stages:
        _check_values(stage, n_vocab)
    kinds = [type(stage) for stage in stages]
    if kinds in ([Greedy], [LogitBias, Greedy], [Penalties, Greedy], [LogitBias, Penalties, Greedy]):
        return GreedySampler(model, n_vocab, stages)
    return ChainSampler(model, n_vocab, stages)


class GreedySampler(Owner):
    """The most probable token, the lowest id among equals, by an argmax over the logits where they lie.

    llama.cpp's chain copies the vocabulary into an array of structs first, and its penalties look every token of the
    vocabulary up in a hash table: some 15 and 60 times as much work. Here penalties and biases touch the few tokens
    that they are about, with the same formula in the same precision.
    """

    def __init__(self, model: Resource, n_vocab: int, stages: Sequence[SamplerStage]) -> None:
        # No native object, but a claim on the model like every sampler's, so that closing behaves the same.
        super().__init__(Resource("a greedy sampler", 0, lambda _pointer: None, parent=model))
        self._n_vocab = n_vocab
        biases = [pair for stage in stages if isinstance(stage, LogitBias) for pair in stage.biases]
        self._biased = np.array([token for token, _ in biases], dtype=np.intp)
        self._bias = np.array([bias for _, bias in biases], dtype=np.float32)
        penalties = [stage for stage in stages if isinstance(stage, Penalties) and stage.last_n > 0]
        self._penalties = penalties[0] if penalties else None
        self._window: deque[int] = deque()  # the last tokens, up to the penalties' last_n
        self._counts: dict[int, int] = {}  # of each token in the window
        self._adjusted = np.empty(n_vocab, dtype=np.float32) if biases or penalties else None

    def sample(self, context: Context, row: int) -> int:
        """Raises ``RuntimeFailure`` when the logits are not numbers."""
        with self._native():
            logits = _native_context(context).logits(row)
            if self._adjusted is not None:
                logits = self._adjust(logits, self._adjusted)
            token = int(logits.argmax())
            _check_finite(float(logits[token]))
            self._record(token)
            return token

    def accept(self, token: int) -> None:
        """Raises ``InvalidArgument`` for a token outside of the vocabulary."""
        _check_token(token, self._n_vocab)
        with self._native():
            self._record(token)

    def reset(self) -> None:
        with self._native():
            self._window.clear()
            self._counts.clear()

    def _adjust(self, logits: _Logits, adjusted: _Logits) -> _Logits:
        np.copyto(adjusted, logits)
        if len(self._biased):
            np.add.at(adjusted, self._biased, self._bias)
        penalties = self._penalties
        if penalties is not None and self._counts:
            tokens = np.fromiter(self._counts.keys(), dtype=np.intp, count=len(self._counts))
            counts = np.fromiter(self._counts.values(), dtype=np.float32, count=len(self._counts))
            repeat, seen = np.float32(penalties.repeat), adjusted[tokens]
            seen = np.where(seen <= 0, seen * repeat, seen / repeat)
            adjusted[tokens] = seen - (counts * np.float32(penalties.frequency) + np.float32(penalties.presence))
        return adjusted

    def _record(self, token: int) -> None:
        """Keep the penalties' window, as ``llama_sampler_penalties_accept`` does."""
        if self._penalties is None:
            return
        self._window.append(token)
        self._counts[token] = self._counts.get(token, 0) + 1
        if len(self._window) > self._penalties.last_n:
            oldest = self._window.popleft()
            self._counts[oldest] -= 1
            if not self._counts[oldest]:
                del self._counts[oldest]


class ChainSampler(Owner):
    """A ``llama_sampler`` chain. Not thread-safe; different chains may sample one step's rows in parallel."""

    def __init__(self, model: Resource, n_vocab: int, stages: Sequence[SamplerStage]) -> None:
        chain = native.llama_sampler_chain_init(native.llama_sampler_chain_default_params())
        if not chain:
            raise RuntimeFailure("llama.cpp could not create a sampler chain; the process is out of memory")
        super().__init__(Resource("a sampler", chain, native.llama_sampler_free, parent=model))
        self._n_vocab = n_vocab
        for stage in stages:
            native.llama_sampler_chain_add(chain, _create(stage, n_vocab))

    def sample(self, context: Context, row: int) -> int:
        """Raises ``RuntimeFailure`` when the logits are not numbers: llama.cpp would abort on some of them."""
        with self._native() as chain:
            native_context = _native_context(context)
            _check_finite(float(native_context.logits(row).max()))
            with native_context.pointer() as pointer:
                return int(native.llama_sampler_sample(chain, pointer, row))

    def accept(self, token: int) -> None:
        """Raises ``InvalidArgument`` for a token outside of the vocabulary."""
        _check_token(token, self._n_vocab)
        with self._native() as chain:
            native.llama_sampler_accept(chain, token)

    def reset(self) -> None:
        with self._native() as chain:
            native.llama_sampler_reset(chain)


def _native_context(context: Context) -> NativeContext:
    if not isinstance(context, NativeContext):
        raise InvalidArgument(f"a native sampler needs a native context, not {type(context).__name__}")
    return context


def _check_token(token: int, n_vocab: int) -> None:
    if not 0 <= token < n_vocab:
        raise InvalidArgument(f"token {token} is outside of the vocabulary of {n_vocab}")


def _check_finite(largest_logit: float) -> None:
    if not math.isfinite(largest_logit):
        raise RuntimeFailure(
            f"the model computed {largest_logit} as its largest logit; its file is damaged or its weights do not fit "
            "the chosen cache type"
        )


def _check_order(stages: Sequence[SamplerStage]) -> None:
    choosers = [index for index, stage in enumerate(stages) if isinstance(stage, Greedy | Distribution)]
    if choosers != [len(stages) - 1]:
        raise InvalidArgument(
            f"a sampler chain needs exactly one Distribution or Greedy, as its last stage; got {list(stages)}"
        )


def _check_values(stage: SamplerStage, n_vocab: int) -> None:
    """Refuse what would make llama.cpp compute infinities and NaN, on some of which it aborts the process."""
    match stage:
        case Penalties(last_n, repeat, frequency, presence):
            good = 0 <= last_n < 2**24 and 0 < repeat < math.inf
            good = good and math.isfinite(frequency) and math.isfinite(presence)
        case LogitBias(biases):
            good = all(0 <= token < n_vocab and bias < math.inf for token, bias in biases)
            banned = {token for token, bias in biases if bias == -math.inf}
            good = good and len(banned) < n_vocab
        case TopP(p, min_keep) | MinP(p, min_keep) | Typical(p, min_keep):
            good = 0 <= p <= 1 and min_keep >= 0
        case Temperature(value):
            good = 0 <= value < math.inf
        case TopK(k):
            good = -(2**31) <= k < 2**31
        case _:
            good = True
    if not good:
        raise InvalidArgument(f"the sampler stage {stage} has a value out of range; see its description")


def _create(stage: SamplerStage, n_vocab: int) -> Any:
    """One link of the chain, which takes ownership of it."""
    link: Any
    match stage:
        case Penalties(last_n, repeat, frequency, presence):
            link = native.llama_sampler_init_penalties(n_vocab, last_n, repeat, frequency, presence)
        case LogitBias(biases):
            array: Any = (native.llama_logit_bias * len(biases))()
            array[:] = biases
            link = native.llama_sampler_init_logit_bias(n_vocab, len(biases), array)
        case TopK(k):
            link = native.llama_sampler_init_top_k(k)
        case TopP(p, min_keep):
            link = native.llama_sampler_init_top_p(p, min_keep)
        case MinP(p, min_keep):
            link = native.llama_sampler_init_min_p(p, min_keep)
        case Typical(p, min_keep):
            link = native.llama_sampler_init_typical(p, min_keep)
        case Temperature(value):
            link = native.llama_sampler_init_temp(value if value >= _MIN_TEMPERATURE else 0.0)
        case Distribution(seed):
            link = native.llama_sampler_init_dist(ctypes.c_uint32(seed).value)
        case Greedy():
            link = native.llama_sampler_init_greedy()
    return link
