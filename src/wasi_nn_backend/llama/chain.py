"""llama.cpp's sampler chain: built from stages, and as a sampler that leaves all the work to it."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

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
    SamplerStage,
    Temperature,
    TopK,
    TopP,
    Typical,
)
from wasi_nn_backend.llama.owner import Owner, Resource

__all__ = ["ChainSampler", "build_chain", "check_largest_logit", "check_token", "native_context"]

#: Below this llama.cpp's division of the logits overflows to infinity and then to NaN; the most probable token is the
#: limit that such a temperature approaches anyway.
_MIN_TEMPERATURE = 1e-6


class ChainSampler(Owner):
    """A ``llama_sampler`` chain. Not thread-safe; different chains may sample one step's rows in parallel."""

    def __init__(self, model: Resource, n_vocab: int, stages: Sequence[SamplerStage]) -> None:
        chain = build_chain(stages, n_vocab)
        super().__init__(Resource("a sampler", chain, native.llama_sampler_free, parent=model))
        self._n_vocab = n_vocab

    def sample(self, context: Context, row: int) -> int:
        """Raises ``RuntimeFailure`` when the logits are not numbers: llama.cpp would abort on some of them."""
        with self._native() as chain, native_context(context).pointer() as pointer:
            check_largest_logit(float(context.logits(row).max()))
            return int(native.llama_sampler_sample(chain, pointer, row))

    def accept(self, token: int) -> None:
        """Raises ``InvalidArgument`` for a token outside of the vocabulary."""
        check_token(token, self._n_vocab)
        with self._native() as chain:
            native.llama_sampler_accept(chain, token)

    def reset(self) -> None:
        with self._native() as chain:
            native.llama_sampler_reset(chain)


def build_chain(stages: Sequence[SamplerStage], n_vocab: int) -> Any:
    """A ``llama_sampler *`` that the caller owns. Raises ``RuntimeFailure`` when memory is out."""
    chain: Any = native.llama_sampler_chain_init(native.llama_sampler_chain_default_params())
    if not chain:
        raise RuntimeFailure("llama.cpp could not create a sampler chain; the process is out of memory")
    for stage in stages:
        native.llama_sampler_chain_add(chain, _create(stage, n_vocab))
    return chain


def native_context(context: Context) -> NativeContext:
    if not isinstance(context, NativeContext):
        raise InvalidArgument(f"a native sampler needs a native context, not {type(context).__name__}")
    return context


def check_token(token: int, n_vocab: int) -> None:
    if not 0 <= token < n_vocab:
        raise InvalidArgument(f"token {token} is outside of the vocabulary of {n_vocab}")


def check_largest_logit(largest_logit: float) -> None:
    """Raises ``RuntimeFailure`` for an infinity or NaN. numpy's max is NaN when one of the values is."""
    if not math.isfinite(largest_logit):
        raise RuntimeFailure(
            f"the model computed {largest_logit} as its largest logit; its file is damaged or its weights do not fit "
            "the chosen cache type"
        )


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
