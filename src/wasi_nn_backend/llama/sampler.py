"""Opening a sampler: which implementation a chain of stages gets, and what is refused.

All of them choose what llama.cpp's own chain chooses; they differ in how much of the vocabulary they hand to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.llama.chain import ChainSampler
from wasi_nn_backend.llama.greedy import GreedySampler
from wasi_nn_backend.llama.interface import (
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
from wasi_nn_backend.llama.owner import Resource
from wasi_nn_backend.llama.reduced import ReducedSampler

__all__ = ["open_sampler"]


def open_sampler(model: Resource, n_vocab: int, stages: Sequence[SamplerStage]) -> Sampler:
    """Raises ``InvalidArgument`` for a chain that does not end in its only chooser, or for values without meaning."""
    _check_order(stages)
    for stage in stages:
        _check_values(stage, n_vocab)
    if [type(stage) for stage in stages] == [Greedy]:
        return GreedySampler(model, n_vocab)
    if ReducedSampler.suits(stages, n_vocab):
        return ReducedSampler(model, n_vocab, stages)
    return ChainSampler(model, n_vocab, stages)


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
