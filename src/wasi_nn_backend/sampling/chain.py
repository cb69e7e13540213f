"""From the configuration's sampling section to llama.cpp's sampler chain, in llama.cpp's standard order.

penalties, top-k, typical-p, top-p, min-p, temperature, then the draw (``common_sampler_init`` in llama.cpp).
"""

from __future__ import annotations

from wasi_nn_backend.config import Settings
from wasi_nn_backend.llama.interface import (
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
    Vocabulary,
)

__all__ = ["RANDOM_SEED", "build_stages"]

#: llama.cpp's LLAMA_DEFAULT_SEED: draw a seed from the system.
RANDOM_SEED = 0xFFFFFFFF


def build_stages(settings: Settings, vocabulary: Vocabulary, n_ctx: int) -> tuple[SamplerStage, ...]:
    """The chain for one run. Stages that would change nothing are left out: each costs time on every token.

    ``n_ctx`` resolves a penalty window of -1. A temperature of 0 takes the most probable token after the penalties.
    """
    sampling = settings.sampling
    stages: list[SamplerStage] = []
    if sampling.ignore_eos and vocabulary.end_of_generation_tokens:
        stages.append(LogitBias(tuple((token, float("-inf")) for token in vocabulary.end_of_generation_tokens)))
    penalties = _penalties(settings, n_ctx)
    if penalties is not None:
        stages.append(penalties)
    if sampling.temperature <= 0.0:
        return (*stages, Greedy())
    if 0 < sampling.top_k < vocabulary.n_tokens:
        stages.append(TopK(sampling.top_k))
    if sampling.typical_p < 1.0:
        stages.append(Typical(sampling.typical_p, sampling.min_keep))
    if sampling.top_p < 1.0:
        stages.append(TopP(sampling.top_p, sampling.min_keep))
    if sampling.min_p > 0.0:
        stages.append(MinP(sampling.min_p, sampling.min_keep))
    if sampling.temperature != 1.0:
        stages.append(Temperature(sampling.temperature))
    return (*stages, Distribution(RANDOM_SEED if sampling.seed < 0 else sampling.seed))


def _penalties(settings: Settings, n_ctx: int) -> Penalties | None:
    sampling = settings.sampling
    last_n = n_ctx if sampling.penalty_last_n < 0 else sampling.penalty_last_n
    neutral = (sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty) == (1.0, 0.0, 0.0)
    if last_n == 0 or neutral:
        return None
    return Penalties(last_n, sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty)
