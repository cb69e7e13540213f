"""Opening a sampler: which implementation a chain of stages gets, and what is refused.

All of them choose what llama.cpp's own chain chooses; they differ in how much of the vocabulary they hand to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.llama.chain import ChainSampler
from wasi_nn_backend.llama.greedy import GreedySampler
from wasi_nn_backend.llama.interface import TwoStepSampler
from wasi_nn_backend.llama.links import LinkMaker
from wasi_nn_backend.llama.reduced import ReducedSampler
from wasi_nn_backend.llama.stages import (
    Chooser,
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

__all__ = ["open_sampler"]

_N_WINDOW_TOKENS_MAX = 2**24
_N_BREAKER_BYTES_MAX = 40  # llama.cpp cuts longer ones off, perhaps in the middle of a character
#: Logits are some tens. What these bounds allow leaves them far from float's end, 3e38, whatever is combined.
_REPEAT_MAX = 1e6
_PENALTY_MAX = 1e9
_TEMPERATURE_MAX = 1e3
_SURPRISE_MAX = 1e3


def open_sampler(links: LinkMaker, stages: Sequence[SamplerStage]) -> TwoStepSampler:
    """Raises ``InvalidArgument`` for a chain that does not end in its only chooser, or for values without meaning."""
    _check_order(stages)
    for stage in stages:
        if not (_is_good_change(stage, links.n_vocab) and _is_good_choice(stage)):
            raise InvalidArgument(f"the sampler stage {stage} has a value out of range; see its description")
    if [type(stage) for stage in stages] == [Greedy]:
        return GreedySampler(links)
    if ReducedSampler.suits(stages, links.n_vocab):
        return ReducedSampler(links, stages)
    return ChainSampler(links, stages)


def _check_order(stages: Sequence[SamplerStage]) -> None:
    choosers = [index for index, stage in enumerate(stages) if isinstance(stage, Chooser)]
    if choosers != [len(stages) - 1]:
        raise InvalidArgument(
            f"a sampler chain needs exactly one Distribution, Mirostat or Greedy, as its last stage; got {list(stages)}"
        )


# Refused is what would make llama.cpp compute infinities and NaN, on some of which it aborts the process.


def _is_good_change(stage: SamplerStage, n_vocab: int) -> bool:
    """Of the stages that change single logits."""
    match stage:
        case Penalties(last_n, repeat, frequency, presence):
            numbers = 1 / _REPEAT_MAX <= repeat <= _REPEAT_MAX and _within(frequency, presence, bound=_PENALTY_MAX)
            return numbers and 0 <= last_n <= _N_WINDOW_TOKENS_MAX
        case Dry(multiplier, base, allowed_length, last_n, breakers):
            numbers = 0 <= multiplier <= _PENALTY_MAX and 0 <= base <= _PENALTY_MAX
            lengths = 0 <= allowed_length < 2**31 and 0 <= last_n <= _N_WINDOW_TOKENS_MAX
            return numbers and lengths and all(map(_is_good_breaker, breakers))
        case LogitBias(biases):
            banned = {token for token, bias in biases if bias == -math.inf}
            good = all(0 <= token < n_vocab and bias < math.inf for token, bias in biases)
            return good and len(banned) < n_vocab
        case _:
            return True


def _is_good_choice(stage: SamplerStage) -> bool:
    """Of the stages that choose, or leave out what is not to be chosen."""
    match stage:
        case TopP(p, min_keep) | MinP(p, min_keep) | Typical(p, min_keep):
            return 0 <= p <= 1 and min_keep >= 0
        case Xtc(probability, threshold, min_keep):
            return 0 <= probability <= 1 and 0 <= threshold <= 1 and min_keep >= 0
        case TopK(k):
            return -(2**31) <= k < 2**31
        case TopNSigma(n):
            return math.isfinite(n)
        case Temperature(value):
            return 0 <= value <= _TEMPERATURE_MAX
        case DynamicTemperature(value, range_, exponent):
            return 0 <= value <= _TEMPERATURE_MAX and 0 <= range_ <= _TEMPERATURE_MAX and 0 <= exponent < math.inf
        case Mirostat(version, tau, eta):
            return version in (1, 2) and 0 <= tau <= _SURPRISE_MAX and 0 <= eta <= _SURPRISE_MAX
        case _:
            return True


def _within(*values: float, bound: float) -> bool:
    return all(abs(value) <= bound for value in values)  # false for NaN


def _is_good_breaker(breaker: bytes) -> bool:
    return 0 < len(breaker) <= _N_BREAKER_BYTES_MAX and b"\0" not in breaker
