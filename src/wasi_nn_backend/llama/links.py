"""From stages to the links of llama.cpp's sampler chain."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

from wasi_nn_backend.errors import RuntimeFailure
from wasi_nn_backend.llama.bindings import native
from wasi_nn_backend.llama.owner import Hold, Owner, Resource
from wasi_nn_backend.llama.stages import (
    Chooser,
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

__all__ = ["LinkMaker"]

#: Below this llama.cpp's division of the logits overflows to infinity and then to NaN; the most probable token is the
#: limit that such a temperature approaches anyway.
_MIN_TEMPERATURE = 1e-6

#: How many of the most probable tokens Mirostat 1 estimates the distribution from, as in llama.cpp's own programs.
_N_MIROSTAT_TOKENS = 100

_N_DRY_PROTOTYPES_MAX = 4


class LinkMaker:
    """Makes sampler chains for one model. Thread-safe.

    DRY's links are cloned from prototypes: making one looks for the breakers in every token of the vocabulary, 14 ms
    for the four of the defaults and 49,000 tokens.
    """

    def __init__(self, model: Resource, n_vocab: int) -> None:
        self.model = model
        self.n_vocab = n_vocab
        self._lock = threading.Lock()
        self._dry_prototypes: dict[Dry, _Prototype] = {}  # the last used is the last

    def chain(self, stages: Sequence[SamplerStage]) -> Any:
        """A ``llama_sampler *`` that the caller owns. The values must have been checked (``llama/sampler.py``).

        Raises ``RuntimeFailure`` when memory is out, ``InvalidArgument`` when the model is closed.
        """
        chain: Any = native.llama_sampler_chain_init(native.llama_sampler_chain_default_params())
        if not chain:
            raise RuntimeFailure("llama.cpp could not create a sampler chain; the process is out of memory")
        try:
            for stage in stages:
                native.llama_sampler_chain_add(chain, self._link(stage))
        except BaseException:
            native.llama_sampler_free(chain)
            raise
        return chain

    def _link(self, stage: SamplerStage) -> Any:
        """One link, which the chain takes ownership of."""
        link: Any
        match stage:
            case Penalties(last_n, repeat, frequency, presence):
                link = native.llama_sampler_init_penalties(self.n_vocab, last_n, repeat, frequency, presence)
            case Dry():
                link = self._dry(stage)
            case LogitBias(biases):
                array: Any = (native.llama_logit_bias * len(biases))()
                array[:] = biases
                link = native.llama_sampler_init_logit_bias(self.n_vocab, len(biases), array)
            case TopNSigma(n):
                link = native.llama_sampler_init_top_n_sigma(n)
            case TopK(k):
                link = native.llama_sampler_init_top_k(k)
            case TopP(p, min_keep):
                link = native.llama_sampler_init_top_p(p, min_keep)
            case MinP(p, min_keep):
                link = native.llama_sampler_init_min_p(p, min_keep)
            case Typical(p, min_keep):
                link = native.llama_sampler_init_typical(p, min_keep)
            case Xtc(probability, threshold, min_keep, seed):
                link = native.llama_sampler_init_xtc(probability, threshold, min_keep, _uint32(seed))
            case Temperature(value):
                link = native.llama_sampler_init_temp(value if value >= _MIN_TEMPERATURE else 0.0)
            case DynamicTemperature():
                link = _dynamic_temperature(stage)
            case Distribution() | Mirostat() | Greedy():
                link = self._chooser(stage)
        return link

    def _chooser(self, stage: Chooser) -> Any:
        link: Any
        match stage:
            case Distribution(seed):
                link = native.llama_sampler_init_dist(_uint32(seed))
            case Mirostat(1, tau, eta, seed):
                n_tokens = _N_MIROSTAT_TOKENS
                link = native.llama_sampler_init_mirostat(self.n_vocab, _uint32(seed), tau, eta, n_tokens)
            case Mirostat(_, tau, eta, seed):
                link = native.llama_sampler_init_mirostat_v2(_uint32(seed), tau, eta)
            case Greedy():
                link = native.llama_sampler_init_greedy()
        return link

    def _dry(self, stage: Dry) -> Any:
        with self._lock:
            prototype = self._dry_prototypes.pop(stage, None)
        if prototype is None:
            prototype = _Prototype(self._new_dry(stage))  # outside of the lock: others need not wait for it
        with self._lock:
            self._dry_prototypes[stage] = prototype
            while len(self._dry_prototypes) > _N_DRY_PROTOTYPES_MAX:
                del self._dry_prototypes[next(iter(self._dry_prototypes))]
        return prototype.clone()

    def _new_dry(self, stage: Dry) -> Any:
        n = len(stage.breakers)
        breakers = (ctypes.c_char_p * n)(*stage.breakers)
        with Hold(self.model) as model:
            # Without breakers llama.cpp does not look at the vocabulary.
            vocabulary = native.llama_model_get_vocab(model) if n else None
            return native.llama_sampler_init_dry(
                vocabulary, stage.multiplier, stage.base, stage.allowed_length, stage.last_n, breakers, n
            )


class _Prototype(Owner):
    """A link that is only cloned. It needs no model: what it took from the vocabulary, it copied."""

    def __init__(self, link: Any) -> None:
        super().__init__(Resource("a sampler's prototype", link, native.llama_sampler_free))

    def clone(self) -> Any:
        with self._native() as link:
            return native.llama_sampler_clone(link)


def _dynamic_temperature(stage: DynamicTemperature) -> Any:
    """The lower end is kept off zero: a nearly certain token would get a temperature at which its logit overflows, and
    of what NaN is left llama.cpp takes the last, the least probable."""
    lowest, highest = stage.value - stage.range, stage.value + stage.range
    if highest <= _MIN_TEMPERATURE:
        return native.llama_sampler_init_temp(0.0)
    if lowest >= _MIN_TEMPERATURE:
        return native.llama_sampler_init_temp_ext(stage.value, stage.range, stage.exponent)
    middle, half = (highest + _MIN_TEMPERATURE) / 2, (highest - _MIN_TEMPERATURE) / 2
    return native.llama_sampler_init_temp_ext(middle, half, stage.exponent)


def _uint32(seed: int) -> int:
    return ctypes.c_uint32(seed).value
