"""From settings to the sampler chain: which stages, in which order, with which numbers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import n_examples
from tests.fakes.llama import IM_END, N_VOCAB, FakeVocabulary
from tests.fakes.sampler import FakeSampler
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
    Xtc,
)
from wasi_nn_backend.sampling import build_stages, n_tokens_seen
from wasi_nn_backend.sampling.chain import RANDOM_SEED

N_CTX = 512
NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0, "seed": 7}
INF = float("inf")
BAN = LogitBias(((IM_END, -INF),))
BREAKERS = (b"\n", b":", b'"', b"*")


class EndlessVocabulary(FakeVocabulary):
    end_of_generation_tokens = ()


class SuppressingVocabulary(FakeVocabulary):
    suppressed_tokens = (7, 9)


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


EVERYTHING: dict[str, Any] = {
    "ignore_eos": True,
    "penalty_last_n": 8,
    "repeat_penalty": 1.2,
    "frequency_penalty": 0.3,
    "presence_penalty": -0.4,
    "dry_multiplier": 0.8,
    "dry_base": 1.5,
    "dry_allowed_length": 3,
    "dry_penalty_last_n": 100,
    "dry_sequence_breakers": ("€",),
    "top_n_sigma": 2.0,
    "top_k": 5,
    "typical_p": 0.8,
    "top_p": 0.7,
    "min_p": 0.1,
    "xtc_probability": 0.5,
    "xtc_threshold": 0.2,
    "min_keep": 3,
    "temperature": 1.5,
    "dynatemp_range": 0.5,
    "dynatemp_exponent": 1.2,
    "seed": 42,
}
STAGES: dict[str, SamplerStage] = {
    "penalties": Penalties(8, 1.2, 0.3, -0.4),
    "dry": Dry(0.8, 1.5, 3, 100, ("€".encode(),)),
    "top_n_sigma": TopNSigma(2.0),
    "top_k": TopK(5),
    "typ_p": Typical(0.8, 3),
    "top_p": TopP(0.7, 3),
    "min_p": MinP(0.1, 3),
    "xtc": Xtc(0.5, 0.2, 3, 42),
    "temperature": DynamicTemperature(1.5, 0.5, 1.2),
}


def test_everything_at_once_comes_in_the_order_of_llama_cpp() -> None:
    assert stages_of(**EVERYTHING) == (BAN, *STAGES.values(), Distribution(42))


@settings(derandomize=True, deadline=None, max_examples=n_examples(50))
@given(st.permutations(list(STAGES)), st.integers(0, len(STAGES)))
def test_samplers_are_run_in_the_order_of_their_names(names: list[str], n: int) -> None:
    chain = stages_of(**EVERYTHING, samplers=tuple(names[:n]))
    assert chain == (BAN, *(STAGES[name] for name in names[:n]), Distribution(42))


@pytest.mark.parametrize(("version", "temperature"), [(1, 0.5), (2, 0.5), (2, 1.0)])
def test_mirostat_replaces_all_but_biases_and_temperature(version: int, temperature: float) -> None:
    mirostat = {"mirostat": version, "mirostat_tau": 4.0, "mirostat_eta": 0.2, "temperature": temperature}
    temperatures = (Temperature(0.5),) if temperature != 1.0 else ()
    drawn = Mirostat(1 if version == 1 else 2, 4.0, 0.2, 42)
    assert stages_of(**EVERYTHING | mirostat) == (BAN, *temperatures, drawn)
    assert stages_of(**EVERYTHING | mirostat | {"temperature": 0.0}) == (BAN, Greedy())


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ({}, ()),
        ({"top_k": 1}, (TopK(1),)),
        ({"top_k": -1}, ()),
        ({"top_k": N_VOCAB - 1}, (TopK(N_VOCAB - 1),)),
        ({"top_k": N_VOCAB + 1}, (TopK(N_VOCAB + 1),)),
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
        ({"dry_multiplier": 0.5}, (Dry(0.5, 1.75, 2, N_CTX, BREAKERS),)),
        ({"dry_multiplier": 0.5, "dry_penalty_last_n": 0}, ()),
        ({"dry_base": 1.1, "dry_allowed_length": 5, "dry_sequence_breakers": ()}, ()),
        ({"top_n_sigma": 1.0}, (TopNSigma(1.0),)),
        ({"top_n_sigma": 0.0}, ()),
        ({"xtc_probability": 0.1}, (Xtc(0.1, 0.1, 1, 7),)),
        ({"xtc_probability": 0.1, "xtc_threshold": 0.51}, ()),
        ({"dynatemp_range": 0.1}, (DynamicTemperature(1.0, 0.1, 1.0),)),
        ({"dynatemp_exponent": 2.0}, ()),
        ({"mirostat_tau": 1.0, "mirostat_eta": 1.0}, ()),
        ({"logit_bias": ((3, 1.5), (4, -99.9))}, (LogitBias(((3, 1.5), (4, -99.9))),)),
        ({"logit_bias": ((3, -100.0), (4, -1e6))}, (LogitBias(((3, -INF), (4, -INF))),)),
        ({"logit_bias": ((3, 1.5), (3, 1.0))}, (LogitBias(((3, 2.5),)),)),
        ({"logit_bias": ((IM_END, 50.0),), "ignore_eos": True}, (BAN,)),
    ],
)
def test_one_key_changes_one_stage(change: dict[str, Any], stages: tuple[SamplerStage, ...]) -> None:
    assert stages_of(**(NEUTRAL | change)) == (*stages, Distribution(7))


def test_temperature_zero_is_greedy_after_the_penalties() -> None:
    narrowing = {"top_k": 5, "top_p": 0.5, "min_p": 0.1, "top_n_sigma": 1.0}
    assert stages_of(**(NEUTRAL | narrowing | {"temperature": 0.0})) == (Greedy(),)
    assert stages_of(temperature=0.0, ignore_eos=True) == (BAN, Penalties(64, 1.1, 0.0, 0.0), Greedy())


def test_temperature_zero_keeps_what_may_leave_out_the_most_probable_token() -> None:
    """As in llama.cpp, where it is a stage like others: what comes before it counts, what comes after has no choice."""
    zero = EVERYTHING | {"temperature": 0.0, "dynatemp_range": 0.0}
    before = [stage for name, stage in STAGES.items() if name != "temperature"]
    assert stages_of(**zero) == (BAN, *before, Greedy())
    order = ("top_k", "penalties", "top_p", "min_p", "temperature", "xtc", "typ_p")
    assert stages_of(**zero, samplers=order) == (BAN, TopK(5), STAGES["penalties"], Greedy())
    assert stages_of(**zero, samplers=("top_k", "temperature")) == (BAN, Greedy())
    assert stages_of(**zero, samplers=("top_k",)) == (BAN, TopK(5), Distribution(42))
    assert stages_of(**zero | {"dynatemp_range": 0.5})[-2:] == (DynamicTemperature(0.0, 0.5, 1.2), Distribution(42))


@pytest.mark.parametrize(("seed", "drawn"), [(-1, RANDOM_SEED), (0, 0), (5, 5), (2**32 - 1, RANDOM_SEED)])
def test_seeds(seed: int, drawn: int) -> None:
    assert stages_of(**(NEUTRAL | {"seed": seed})) == (Distribution(drawn),)


def test_nothing_is_banned_where_nothing_ends_a_text() -> None:
    assert stages_of(EndlessVocabulary(), **(NEUTRAL | {"ignore_eos": True})) == (Distribution(7),)


def test_what_the_model_s_file_suppresses_is_banned() -> None:
    assert stages_of(SuppressingVocabulary(), **NEUTRAL)[0] == LogitBias(((7, -INF), (9, -INF)))


@pytest.mark.parametrize("token", [N_VOCAB, 2**31 - 1])
def test_a_bias_of_a_token_that_does_not_exist_is_an_error(token: int) -> None:
    with pytest.raises(InvalidArgument, match=rf"sampling\.logit_bias names token {token}.* 0 to {N_VOCAB - 1}"):
        stages_of(logit_bias=((3, 1.0), (token, 1.0)))


def test_banning_every_token_is_an_error() -> None:
    bans = tuple((token, -100.0) for token in range(N_VOCAB) if token != IM_END)
    assert stages_of(logit_bias=bans)
    with pytest.raises(InvalidArgument, match="bans every token"):
        stages_of(logit_bias=bans, ignore_eos=True)


def test_the_choice_depends_on_the_longest_window() -> None:
    assert n_tokens_seen(stages_of(**NEUTRAL)) == 0
    assert n_tokens_seen(stages_of()) == 64
    assert n_tokens_seen(stages_of(dry_multiplier=0.1)) == N_CTX
    assert n_tokens_seen(stages_of(dry_multiplier=0.1, dry_penalty_last_n=3)) == 64


_sampling = st.fixed_dictionaries(
    {
        "temperature": st.floats(0.0, 2.0),
        "top_k": st.integers(-1, 300),
        "top_p": st.floats(0.0, 1.0),
        "min_p": st.floats(0.0, 1.0),
        "typical_p": st.floats(0.0, 1.0),
        "repeat_penalty": st.floats(0.1, 2.0),
        "penalty_last_n": st.integers(-1, 100),
        "seed": st.integers(-1, 2**31),
        "ignore_eos": st.booleans(),
        "dry_multiplier": st.floats(0.0, 5.0),
        "top_n_sigma": st.floats(-1.0, 5.0),
        "xtc_probability": st.floats(0.0, 1.0),
        "xtc_threshold": st.floats(0.0, 1.0),
        "dynatemp_range": st.sampled_from([0.0, 0.5]),
        "mirostat": st.sampled_from([0, 0, 0, 1, 2]),
    }
)
_ORDER = (
    LogitBias,
    Penalties,
    Dry,
    TopNSigma,
    TopK,
    Typical,
    TopP,
    MinP,
    Xtc,
    Temperature,
    DynamicTemperature,
    Distribution,
    Mirostat,
    Greedy,
)
_CHOOSERS = (Distribution, Mirostat, Greedy)


@settings(derandomize=True, deadline=None, max_examples=n_examples(100))
@given(_sampling)
def test_any_settings_make_a_chain_that_ends_in_its_one_choice(sampling: dict[str, Any]) -> None:
    chain = stages_of(**sampling)
    ranks = [_ORDER.index(type(stage)) for stage in chain]
    assert ranks == sorted(set(ranks))
    assert [isinstance(stage, _CHOOSERS) for stage in chain] == [False] * (len(chain) - 1) + [True]
    is_greedy = sampling["temperature"] == 0.0 and (sampling["dynatemp_range"] == 0.0 or sampling["mirostat"] > 0)
    assert isinstance(chain[-1], Greedy) == is_greedy
    FakeSampler(chain)
