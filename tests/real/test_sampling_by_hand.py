"""Settings against llama.cpp's own chain, built by hand from the same settings: the same seed gives the same tokens.

The hand-built side shares nothing with the package's samplers: it adds llama.cpp's samplers as ``common_sampler_init``
in llama.cpp does, those that would change nothing included, and samples with ``llama_sampler_sample``.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from wasi_nn_backend import Backend
from wasi_nn_backend.config import parse_layer, resolve
from wasi_nn_backend.config.sampling import SamplingSettings
from wasi_nn_backend.llama import load_llama
from wasi_nn_backend.llama.bindings import native
from wasi_nn_backend.llama.interface import ContextParams, DecodeBatch, DecodeStatus, ModelParams
from wasi_nn_backend.llama.model import NativeModel
from wasi_nn_backend.llama.owner import Hold
from wasi_nn_backend.llama.reduced import ReducedSampler
from wasi_nn_backend.sampling import build_stages

N_TOKENS = 200
N_CTX = 512
N_COMBINATIONS = 20
N_COMBINATIONS_FAST = 8
PROMPT = "the cat sat on the mat: the dog sat on the mat, and the cat sat on the dog. the cat"
#: Alike on both sides, so that both compute the same logits.
MODEL_KEYS = {"n_ctx": N_CTX, "threads": 1, "flash_attention": "off"}
REAL_PROMPT = "Once upon a time, in a small village by the sea, there lived a clockmaker who"
REAL_SETTINGS: list[dict[str, Any]] = [
    {"dry_multiplier": 0.8, "dry_penalty_last_n": 100, "xtc_probability": 0.5, "xtc_threshold": 0.05, "min_p": 0.01},
    {"top_k": 0, "top_n_sigma": 1.0, "dynatemp_range": 0.6, "repeat_penalty": 1.15},
    {"mirostat": 2, "mirostat_tau": 4.0},
]


def random_settings(seed: int) -> dict[str, Any]:
    """Each key at its default or anywhere in a range in which it matters; some keys switch others off."""
    draw = random.Random(seed)

    def perhaps(probability: float, low: float, high: float, default: float) -> float:
        return round(draw.uniform(low, high), 3) if draw.random() < probability else default

    order = list(SamplingSettings.model_fields["samplers"].default)
    if draw.random() < 0.3:
        draw.shuffle(order)
        order = order[draw.randrange(3) :]
    return {
        "samplers": order,
        "seed": draw.randrange(2**31),
        "temperature": draw.choice([0.0, 0.3, 0.7, 1.0, 1.4, 2.0]),
        "dynatemp_range": perhaps(0.3, 0.1, 1.5, 0.0),
        "dynatemp_exponent": perhaps(0.3, 0.5, 3.0, 1.0),
        "top_k": draw.choice([-1, 1, 5, 20, 40, 70, 80, 1000]),
        "top_p": perhaps(0.6, 0.1, 1.0, 1.0),
        "min_p": perhaps(0.4, 0.0, 0.3, 0.0),
        "typical_p": perhaps(0.3, 0.2, 1.0, 1.0),
        "top_n_sigma": perhaps(0.2, 0.3, 3.0, -1.0),
        "xtc_probability": perhaps(0.3, 0.1, 1.0, 0.0),
        "xtc_threshold": perhaps(0.5, 0.01, 0.5, 0.1),
        "min_keep": draw.choice([1, 1, 2, 10]),
        "repeat_penalty": perhaps(0.6, 0.8, 1.8, 1.0),
        "frequency_penalty": perhaps(0.3, -0.5, 1.0, 0.0),
        "presence_penalty": perhaps(0.3, -0.5, 1.0, 0.0),
        "penalty_last_n": draw.choice([-1, 0, 8, 64]),
        "dry_multiplier": perhaps(0.4, 0.1, 3.0, 0.0),
        "dry_base": perhaps(0.5, 1.0, 3.0, 1.75),
        "dry_allowed_length": draw.choice([1, 2, 4]),
        "dry_penalty_last_n": draw.choice([-1, 30, 100]),
        "dry_sequence_breakers": draw.choice([[], ["\n", ":", '"', "*"], ["the", " s"]]),
        "mirostat": draw.choice([0] * 10 + [1, 2]),
        "mirostat_tau": perhaps(0.5, 1.0, 8.0, 5.0),
        "mirostat_eta": perhaps(0.5, 0.01, 1.0, 0.1),
        "logit_bias": [
            [draw.randrange(100), draw.choice([-100, -2.5, 1.5, 4.0])] for _ in range(draw.choice([0, 0, 6]))
        ],
    }


class HandBuilt:
    """One generation by llama.cpp's functions alone."""

    def __init__(self, model: NativeModel, settings: dict[str, Any]) -> None:
        self._model = model
        self._set = {name: field.default for name, field in SamplingSettings.model_fields.items()} | settings
        self._chain = native.llama_sampler_chain_init(native.llama_sampler_chain_default_params())
        with Hold(model._resource) as pointer:
            self._vocabulary = native.llama_model_get_vocab(pointer)
            self._add_biases()
            if self._set["mirostat"]:
                self._add_mirostat()
            else:
                for name in self._set["samplers"]:
                    native.llama_sampler_chain_add(self._chain, self._sampler(name))
                native.llama_sampler_chain_add(self._chain, native.llama_sampler_init_dist(self._set["seed"]))

    def _add_biases(self) -> None:
        pairs = [(token, bias if bias > -100 else float("-inf")) for token, bias in self._set["logit_bias"]]
        n_vocab = self._model.vocabulary.n_tokens
        pairs += [(t, float("-inf")) for t in range(n_vocab) if native.llama_vocab_is_eog(self._vocabulary, t)]
        biases = (native.llama_logit_bias * len(pairs))(*pairs)
        native.llama_sampler_chain_add(self._chain, native.llama_sampler_init_logit_bias(n_vocab, len(pairs), biases))

    def _add_mirostat(self) -> None:
        s, n_vocab = self._set, self._model.vocabulary.n_tokens
        native.llama_sampler_chain_add(self._chain, native.llama_sampler_init_temp(s["temperature"]))
        if s["mirostat"] == 1:
            link = native.llama_sampler_init_mirostat(n_vocab, s["seed"], s["mirostat_tau"], s["mirostat_eta"], 100)
        else:
            link = native.llama_sampler_init_mirostat_v2(s["seed"], s["mirostat_tau"], s["mirostat_eta"])
        native.llama_sampler_chain_add(self._chain, link)

    def _sampler(self, name: str) -> Any:
        s = self._set
        match name:
            case "penalties":
                last_n = N_CTX if s["penalty_last_n"] == -1 else s["penalty_last_n"]
                penalties = s["repeat_penalty"], s["frequency_penalty"], s["presence_penalty"]
                return native.llama_sampler_init_penalties(self._model.vocabulary.n_tokens, last_n, *penalties)
            case "dry":
                last_n = N_CTX if s["dry_penalty_last_n"] == -1 else s["dry_penalty_last_n"]
                breakers = [breaker.encode() for breaker in s["dry_sequence_breakers"]]
                array = (ctypes.c_char_p * len(breakers))(*breakers)
                numbers = s["dry_multiplier"], s["dry_base"], s["dry_allowed_length"], last_n
                return native.llama_sampler_init_dry(self._vocabulary, *numbers, array, len(breakers))
            case "top_n_sigma":
                return native.llama_sampler_init_top_n_sigma(s["top_n_sigma"])
            case "top_k":
                return native.llama_sampler_init_top_k(s["top_k"])
            case "typ_p":
                return native.llama_sampler_init_typical(s["typical_p"], s["min_keep"])
            case "top_p":
                return native.llama_sampler_init_top_p(s["top_p"], s["min_keep"])
            case "min_p":
                return native.llama_sampler_init_min_p(s["min_p"], s["min_keep"])
            case "xtc":
                numbers = s["xtc_probability"], s["xtc_threshold"], s["min_keep"], s["seed"]
                return native.llama_sampler_init_xtc(*numbers)
            case "temperature":
                numbers = s["temperature"], s["dynatemp_range"], s["dynatemp_exponent"]
                return native.llama_sampler_init_temp_ext(*numbers)
        raise AssertionError(name)

    def generate(self, prompt: str) -> list[int]:
        tokens = self._model.vocabulary.tokenize(prompt.encode(), add_special=True, parse_special=True)
        for token in tokens:
            native.llama_sampler_accept(self._chain, token)
        params = ContextParams(n_ctx=N_CTX, n_sequences=2, flash_attention="off")
        batch, chosen, position = DecodeBatch(), list[int](), 0
        with self._model.create_context(params) as context:
            while len(chosen) < N_TOKENS:
                batch.clear()
                row = batch.add(tokens, position, 0, logits_for_last=True)
                assert context.decode(batch) is DecodeStatus.DONE
                position += len(tokens)
                with context.pointer() as pointer:
                    tokens = [native.llama_sampler_sample(self._chain, pointer, row)]
                chosen += tokens
        native.llama_sampler_free(self._chain)
        return chosen


@pytest.fixture(scope="module")
def tiny(tiny_model_path: Path) -> Iterator[NativeModel]:
    with load_llama().load_model(ModelParams(tiny_model_path)) as model:
        yield model


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Iterator[NativeModel]:
    with load_llama().load_model(ModelParams(smollm2_path)) as model:
        yield model


def generated(path: Path, settings: dict[str, Any], prompt: str) -> list[int]:
    """The tokens of a whole run: configuration, session, engine."""
    sampling = settings | {"ignore_eos": True, "n_probs": 1}
    config = {"backend": {"max_concurrent": 2, "default_task_timeout_ms": 0}, "model": MODEL_KEYS, "sampling": sampling}
    stopping = {"stopping": {"max_tokens": N_TOKENS}, "session": {"prompt_mode": "raw"}}
    with Backend(config | stopping) as backend, backend.load_by_name(path).init_execution_context() as context:
        context.run_inference(prompt)
        return [position["token"] for position in context.metadata["probabilities"]]


def is_reduced(model: NativeModel, settings: dict[str, Any]) -> bool:
    """Whether llama.cpp is given a part of the vocabulary only."""
    chosen = resolve([parse_layer({"sampling": settings}, name="test")])
    return ReducedSampler.suits(build_stages(chosen, model.vocabulary, N_CTX), model.vocabulary.n_tokens)


def check(path: Path, model: NativeModel, settings: dict[str, Any], prompt: str, patch: pytest.MonkeyPatch) -> None:
    expected = HandBuilt(model, settings).generate(prompt)
    assert len(expected) == N_TOKENS
    assert generated(path, settings, prompt) == expected
    if is_reduced(model, settings):
        patch.setattr(ReducedSampler, "suits", lambda *_arguments: False)
        assert generated(path, settings, prompt) == expected


@pytest.mark.parametrize(
    "combination",
    [
        pytest.param(seed, marks=[pytest.mark.slow] if seed >= N_COMBINATIONS_FAST else [])
        for seed in range(N_COMBINATIONS)
    ],
)
def test_random_settings_give_llama_cpp_s_tokens(
    tiny: NativeModel, tiny_model_path: Path, combination: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(tiny_model_path, tiny, random_settings(combination), PROMPT, monkeypatch)


def test_the_random_settings_cover_every_sampler(tiny: NativeModel) -> None:
    """And both ways of sampling, and greedy runs."""
    combinations = [random_settings(seed) for seed in range(N_COMBINATIONS)]
    assert 5 <= sum(is_reduced(tiny, settings) for settings in combinations) <= 15
    for key in random_settings(0):
        assert len({str(settings[key]) for settings in combinations}) > 1, key
    assert {settings["mirostat"] for settings in combinations} == {0, 1, 2}
    assert any(settings["temperature"] == 0.0 and not settings["mirostat"] for settings in combinations)


@pytest.mark.real
@pytest.mark.parametrize("settings", REAL_SETTINGS)
def test_settings_give_llama_cpp_s_tokens_with_smollm2(
    smollm2: NativeModel, smollm2_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    check(smollm2_path, smollm2, settings | {"seed": 20}, REAL_PROMPT, monkeypatch)
