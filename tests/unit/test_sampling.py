"""From settings to the sampler chain: which stages, in which order, with which numbers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.llama import IM_END, N_VOCAB, FakeSampler, FakeVocabulary
from wasi_nn_backend.config import Settings
from wasi_nn_backend.config.sampling import SamplingSettings
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
)
from wasi_nn_backend.sampling import build_stages
from wasi_nn_backend.sampling.chain import RANDOM_SEED

N_CTX = 512
NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0, "seed": 7}
BAN = LogitBias(((IM_END, float("-inf")),))


class EndlessVocabulary(FakeVocabulary):
    end_of_generation_tokens = ()


def stages_of(vocabulary: FakeVocabulary | None = None, **sampling: Any) -> tuple[SamplerStage, ...]:
    chosen = Settings(sampling=SamplingSettings(**sampling))
    return build_stages(chosen, vocabulary or FakeVocabulary(), N_CTX)


def test_the_defaults() -> None:
    assert stages_of() == (
        Penalties(64, 1.1, 0.0, 0.0),
        TopK(40),
        TopP(0.9, 1),
        MinP(0.05, 1),
        Temperature(0.7),
        Distribution(RANDOM_SEED),
    )


def test_everything_at_once_comes_in_the_order_of_llama_cpp() -> None:
    chain = stages_of(
        ignore_eos=True,
        penalty_last_n=8,
        repeat_penalty=1.2,
        frequency_penalty=0.3,
        presence_penalty=-0.4,
        top_k=5,
        typical_p=0.8,
        top_p=0.7,
        min_p=0.1,
        min_keep=3,
        temperature=1.5,
        seed=42,
    )
    assert chain == (
        BAN,
        Penalties(8, 1.2, 0.3, -0.4),
        TopK(5),
        Typical(0.8, 3),
        TopP(0.7, 3),
        MinP(0.1, 3),
        Temperature(1.5),
        Distribution(42),
    )


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ({}, ()),
        ({"top_k": 1}, (TopK(1),)),
        ({"top_k": -1}, ()),
        ({"top_k": N_VOCAB - 1}, (TopK(N_VOCAB - 1),)),
        ({"top_k": N_VOCAB}, ()),
        ({"top_p": 0.5}, (TopP(0.5, 1),)),
        ({"top_p": 0.0}, (TopP(0.0, 1),)),
        ({"min_p": 0.5}, (MinP(0.5, 1),)),
        ({"typical_p": 0.5, "min_keep": 2}, (Typical(0.5, 2),)),
        ({"temperature": 0.9}, (Temperature(0.9),)),
        ({"repeat_penalty": 1.1}, (Penalties(64, 1.1, 0.0, 0.0),)),
        ({"frequency_penalty": 0.1}, (Penalties(64, 1.0, 0.1, 0.0),)),
        ({"presence_penalty": 0.1}, (Penalties(64, 1.0, 0.0, 0.1),)),
        ({"repeat_penalty": 1.1, "penalty_last_n": -1}, (Penalties(N_CTX, 1.1, 0.0, 0.0),)),
        ({"repeat_penalty": 1.1, "penalty_last_n": 0}, ()),
        ({"ignore_eos": True}, (BAN,)),
    ],
)
def test_one_key_changes_one_stage(change: dict[str, Any], stages: tuple[SamplerStage, ...]) -> None:
    assert stages_of(**(NEUTRAL | change)) == (*stages, Distribution(7))


def test_temperature_zero_is_greedy_after_the_penalties() -> None:
    narrowing = {"top_k": 5, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.5}
    assert stages_of(**(NEUTRAL | narrowing | {"temperature": 0.0})) == (Greedy(),)
    assert stages_of(temperature=0.0, ignore_eos=True) == (BAN, Penalties(64, 1.1, 0.0, 0.0), Greedy())


@pytest.mark.parametrize(("seed", "drawn"), [(-1, RANDOM_SEED), (0, 0), (5, 5), (2**32 - 1, RANDOM_SEED)])
def test_seeds(seed: int, drawn: int) -> None:
    assert stages_of(**(NEUTRAL | {"seed": seed})) == (Distribution(drawn),)


def test_nothing_is_banned_where_nothing_ends_a_text() -> None:
    assert stages_of(EndlessVocabulary(), **(NEUTRAL | {"ignore_eos": True})) == (Distribution(7),)


_sampling = st.fixed_dictionaries(
    {
        "temperature": st.floats(0.0, 2.0),
        "top_k": st.integers(-1, 300),
        "top_p": st.floats(0.0, 1.0),
        "min_p": st.floats(0.0, 1.0),
        "typical_p": st.floats(0.0, 1.0),
        "repeat_penalty": st.floats(0.1, 2.0),
        "penalty_last_n": st.integers(-1, 100),
        "seed": st.integers(-1, 2**32 - 1),
        "ignore_eos": st.booleans(),
    }
)
_ORDER = (LogitBias, Penalties, TopK, Typical, TopP, MinP, Temperature, Distribution, Greedy)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(_sampling)
def test_any_settings_make_a_chain_that_ends_in_its_one_choice(sampling: dict[str, Any]) -> None:
    chain = stages_of(**sampling)
    ranks = [_ORDER.index(type(stage)) for stage in chain]
    assert ranks == sorted(set(ranks))
    assert [isinstance(stage, Distribution | Greedy) for stage in chain] == [False] * (len(chain) - 1) + [True]
    assert isinstance(chain[-1], Greedy) == (sampling["temperature"] == 0.0)
    FakeSampler(chain)
