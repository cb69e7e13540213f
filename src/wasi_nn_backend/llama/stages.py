"""Descriptions of sampler stages: what ``sampling`` decides, and what ``llama`` turns into links of llama.cpp's chain.

The numbers mean what llama.cpp's function of the same name makes of them. Which values it cannot take is checked where
a sampler is opened.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "Chooser",
    "Distribution",
    "Dry",
    "DynamicTemperature",
    "Greedy",
    "LogitBias",
    "MinP",
    "Mirostat",
    "Penalties",
    "SamplerStage",
    "Temperature",
    "TopK",
    "TopNSigma",
    "TopP",
    "Typical",
    "Xtc",
]


@dataclass(frozen=True, slots=True)
class Penalties:
    """``llama_sampler_init_penalties``. ``last_n`` 0 disables, -1 is not accepted here: callers resolve it to n_ctx."""

    last_n: int
    repeat: float
    frequency: float
    presence: float


@dataclass(frozen=True, slots=True)
class Dry:
    """``llama_sampler_init_dry``: a token that would make a repetition longer loses ``multiplier * base ** n`` logits.

    ``n`` is by how many tokens the repetition is longer than ``allowed_length``. Repetitions are looked for in the last
    ``last_n`` tokens (no -1 here either), and end at a breaker. ``breakers`` are UTF-8, without zero bytes.
    """

    multiplier: float
    base: float
    allowed_length: int
    last_n: int
    breakers: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class LogitBias:
    """``llama_sampler_init_logit_bias``: (token, added to its logit) pairs; ``float("-inf")`` bans a token."""

    biases: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class TopNSigma:
    """Keeps what is at most ``n`` standard deviations of all logits below the largest."""

    n: float


@dataclass(frozen=True, slots=True)
class TopK:
    """Keeps the ``k`` most probable, and sorts them; 0 or less does nothing."""

    k: int


@dataclass(frozen=True, slots=True)
class TopP:
    p: float
    min_keep: int


@dataclass(frozen=True, slots=True)
class MinP:
    p: float
    min_keep: int


@dataclass(frozen=True, slots=True)
class Typical:
    p: float
    min_keep: int


@dataclass(frozen=True, slots=True)
class Xtc:
    """At times (``probability``) drops all but the last of those tokens whose probability reaches ``threshold``."""

    probability: float
    threshold: float
    min_keep: int
    seed: int


@dataclass(frozen=True, slots=True)
class Temperature:
    value: float


@dataclass(frozen=True, slots=True)
class DynamicTemperature:
    """``llama_sampler_init_temp_ext``: from ``value - range`` where one token is certain to ``value + range``."""

    value: float
    range: float
    exponent: float


@dataclass(frozen=True, slots=True)
class Distribution:
    """Draws from what the stages before it left. ``seed`` is 32 bits; 0xFFFFFFFF makes llama.cpp pick a random one."""

    seed: int


@dataclass(frozen=True, slots=True)
class Mirostat:
    """``llama_sampler_init_mirostat`` (``_v2``): draws so that the surprise of the text stays near ``tau`` bits."""

    version: Literal[1, 2]
    tau: float
    eta: float
    seed: int


@dataclass(frozen=True, slots=True)
class Greedy:
    """Takes the most probable token, the lowest id among equals."""


#: The stages that choose a token. A chain has exactly one, as its last.
Chooser = Distribution | Mirostat | Greedy

#: One link of llama.cpp's sampler chain.
SamplerStage = (
    Penalties
    | Dry
    | LogitBias
    | TopNSigma
    | TopK
    | TopP
    | MinP
    | Typical
    | Xtc
    | Temperature
    | DynamicTemperature
    | Chooser
)
