"""From the configuration's sampling section to llama.cpp's sampler chain.

As llama.cpp's own programs have it (``common_sampler_init``): biases first, then the samplers of ``samplers`` in their
order, then the draw. With Mirostat the temperature and the biases are all that is left of the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from wasi_nn_backend.config import Settings
from wasi_nn_backend.config.sampling import SamplingSettings
from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.llama.interface import (
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
    Vocabulary,
    Xtc,
)

__all__ = ["RANDOM_SEED", "build_stages", "n_tokens_seen"]

#: llama.cpp's LLAMA_DEFAULT_SEED: draw a seed from the system.
RANDOM_SEED: Final = 0xFFFFFFFF

#: A bias that is no more added, but bans its token.
_BAN: Final = -100.0

#: XTC with a larger threshold would never find two tokens that reach it.
_XTC_THRESHOLD_MAX: Final = 0.5


def build_stages(settings: Settings, vocabulary: Vocabulary, n_ctx: int) -> tuple[SamplerStage, ...]:
    """The chain for one run. Stages that would change nothing are left out: each costs time on every token.

    ``n_ctx`` resolves windows of -1. Raises ``InvalidArgument`` for biases of tokens that the model does not have, and
    for those that ban them all.
    """
    sampling = settings.sampling
    stages: list[SamplerStage] = []
    biases = _biases(sampling, vocabulary)
    if biases is not None:
        stages.append(biases)
    seed = RANDOM_SEED if sampling.seed < 0 else sampling.seed
    if sampling.mirostat:
        return (*stages, *_mirostat(sampling, seed))
    for name in sampling.samplers:
        if name == "temperature" and _is_greedy(sampling):
            return (*_that_change_the_most_probable(stages), Greedy())
        stage = _stage(name, sampling, n_ctx, seed)
        if stage is not None:
            stages.append(stage)
    return (*stages, Distribution(seed))


def n_tokens_seen(stages: Iterable[SamplerStage]) -> int:
    """How many of the tokens before it the choice depends on: the longest window of the stages."""
    return max((stage.last_n for stage in stages if isinstance(stage, Penalties | Dry)), default=0)


def _is_greedy(sampling: SamplingSettings) -> bool:
    return sampling.temperature <= 0.0 and sampling.dynatemp_range <= 0.0


def _that_change_the_most_probable(stages: list[SamplerStage]) -> list[SamplerStage]:
    """Without those at the end that only leave out less probable tokens: what Greedy takes stays the same."""
    n = len(stages)
    while n and isinstance(stages[n - 1], TopNSigma | TopK | TopP | MinP):
        n -= 1
    return stages[:n]


def _biases(sampling: SamplingSettings, vocabulary: Vocabulary) -> LogitBias | None:
    """Each token once: llama.cpp applies only the first of two biases where it looks at a part of the vocabulary."""
    sums: dict[int, float] = {}
    for token, bias in sampling.logit_bias:
        if not 0 <= token < vocabulary.n_tokens:
            raise InvalidArgument(
                f"sampling.logit_bias names token {token}, but the model's tokens are 0 to {vocabulary.n_tokens - 1}: "
                f"use the ids of this model's vocabulary"
            )
        sums[token] = sums.get(token, 0.0) + (bias if bias > _BAN else float("-inf"))
    banned = (*vocabulary.suppressed_tokens, *(vocabulary.end_of_generation_tokens if sampling.ignore_eos else ()))
    sums.update(dict.fromkeys(banned, float("-inf")))
    if sum(bias == float("-inf") for bias in sums.values()) == vocabulary.n_tokens:
        raise InvalidArgument(
            "sampling.logit_bias bans every token of the model: leave at least one that can be chosen"
        )
    return LogitBias(tuple(sums.items())) if sums else None


def _mirostat(sampling: SamplingSettings, seed: int) -> tuple[SamplerStage, ...]:
    if sampling.temperature <= 0.0:
        return (Greedy(),)
    draw = Mirostat(1 if sampling.mirostat == 1 else 2, sampling.mirostat_tau, sampling.mirostat_eta, seed)
    return (draw,) if sampling.temperature == 1.0 else (Temperature(sampling.temperature), draw)


def _stage(name: str, sampling: SamplingSettings, n_ctx: int, seed: int) -> SamplerStage | None:
    """The stage of a name in ``samplers``; None for one that would change nothing."""
    match name:
        case "penalties":
            return _penalties(sampling, n_ctx)
        case "dry":
            return _dry(sampling, n_ctx)
        case "top_n_sigma" if sampling.top_n_sigma > 0.0:
            return TopNSigma(sampling.top_n_sigma)
        case "top_k" if sampling.top_k > 0:  # also where it keeps all: it sorts, and the draw goes along the order
            return TopK(sampling.top_k)
        case "typ_p" if sampling.typical_p < 1.0:
            return Typical(sampling.typical_p, sampling.min_keep)
        case "top_p" if sampling.top_p < 1.0:
            return TopP(sampling.top_p, sampling.min_keep)
        case "min_p" if sampling.min_p > 0.0:
            return MinP(sampling.min_p, sampling.min_keep)
        case "xtc" if sampling.xtc_probability > 0.0 and sampling.xtc_threshold <= _XTC_THRESHOLD_MAX:
            return Xtc(sampling.xtc_probability, sampling.xtc_threshold, sampling.min_keep, seed)
        case "temperature":
            return _temperature(sampling)
    return None


def _temperature(sampling: SamplingSettings) -> Temperature | DynamicTemperature | None:
    if sampling.dynatemp_range > 0.0:
        return DynamicTemperature(sampling.temperature, sampling.dynatemp_range, sampling.dynatemp_exponent)
    return None if sampling.temperature == 1.0 else Temperature(sampling.temperature)


def _penalties(sampling: SamplingSettings, n_ctx: int) -> Penalties | None:
    last_n = n_ctx if sampling.penalty_last_n < 0 else sampling.penalty_last_n
    neutral = (sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty) == (1.0, 0.0, 0.0)
    if last_n == 0 or neutral:
        return None
    return Penalties(last_n, sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty)


def _dry(sampling: SamplingSettings, n_ctx: int) -> Dry | None:
    last_n = n_ctx if sampling.dry_penalty_last_n < 0 else sampling.dry_penalty_last_n
    if last_n == 0 or sampling.dry_multiplier == 0.0:
        return None
    breakers = tuple(breaker.encode() for breaker in sampling.dry_sequence_breakers)
    return Dry(sampling.dry_multiplier, sampling.dry_base, sampling.dry_allowed_length, last_n, breakers)
