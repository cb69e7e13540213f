"""Every way of sampling chooses what llama.cpp's own chain over the whole vocabulary chooses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from wasi_nn_backend.errors import RuntimeFailure
from wasi_nn_backend.llama import load_llama
from wasi_nn_backend.llama.chain import ChainSampler
from wasi_nn_backend.llama.context import NativeContext
from wasi_nn_backend.llama.interface import (
    ContextParams,
    DecodeBatch,
    Distribution,
    Greedy,
    LogitBias,
    MinP,
    ModelParams,
    Penalties,
    SamplerStage,
    Temperature,
    TopK,
    TopP,
    Typical,
)
from wasi_nn_backend.llama.model import NativeModel
from wasi_nn_backend.llama.reduced import ReducedSampler

N_ROWS = 4
N_STEPS = 30
INFINITY = float("inf")

CHAINS: dict[str, list[SamplerStage]] = {
    "configuration's defaults": [Penalties(64, 1.1, 0.0, 0.0), TopK(40), TopP(0.9, 1), MinP(0.05, 1), Temperature(0.7)],
    "wasmedge's defaults": [TopK(40), TopP(0.95, 0), MinP(0.05, 0), Temperature(0.8)],
    "all stages": [
        LogitBias(((7, 4.0), (9, -INFINITY), (11, -2.0))),
        Penalties(16, 1.3, 0.4, 0.6),
        TopK(20),
        Typical(0.9, 1),
        TopP(0.9, 2),
        MinP(0.02, 1),
        Temperature(1.3),
    ],
    "rewards for repeating": [Penalties(32, 0.8, -1.0, -0.5), TopK(5), Temperature(1.0)],
    "the largest window": [Penalties(4096, 1.2, 0.1, 0.1), TopK(10), Temperature(1.0)],
    "top-1": [TopK(1), Temperature(0.5)],
}


@pytest.fixture(scope="module", params=["tiny", pytest.param("smollm2", marks=pytest.mark.real)])
def decoded(request: pytest.FixtureRequest) -> Iterator[tuple[NativeModel, NativeContext]]:
    """A context whose last decode has logits in some rows: the tests write their own numbers over them."""
    path: Path = request.getfixturevalue("tiny_model_path" if request.param == "tiny" else "smollm2_path")
    model = load_llama().load_model(ModelParams(path))
    context = model.create_context(ContextParams(n_ctx=128, n_sequences=N_ROWS))
    yield model, context
    context.close()
    model.close()


def decode(context: NativeContext) -> list[int]:
    """One token in each sequence, from scratch; returns the rows that have logits."""
    batch = DecodeBatch()
    for sequence in range(N_ROWS):
        context.remove(sequence, 0)
    rows = [batch.add([5], 0, sequence, logits_for_last=True) for sequence in range(N_ROWS)]
    context.decode(batch)
    return rows


def write_logits(context: NativeContext, rows: list[int], chooser: np.random.Generator, kind: str) -> None:
    for row in rows:
        logits = context.logits(row)
        logits[:] = chooser.normal(0, 3, len(logits))
        if kind == "ties":
            np.round(logits, 1, out=logits)
        elif kind == "few":
            logits[chooser.permutation(len(logits))[12:]] = -INFINITY


@pytest.mark.parametrize("kind", ["random", "ties", "few"])
@pytest.mark.parametrize("name", CHAINS)
def test_the_same_tokens_for_the_same_seed(decoded: tuple[NativeModel, NativeContext], name: str, kind: str) -> None:
    model, context = decoded
    chooser = np.random.default_rng(len(name))
    n_vocab = model.vocabulary.n_tokens
    stages = [[*CHAINS[name], Distribution(seed)] for seed in range(N_ROWS)]
    assert all(ReducedSampler.suits(each, n_vocab) for each in stages) or n_vocab < 4 * 40
    mine = [model.create_sampler(each) for each in stages]
    whole = [ChainSampler(model._resource, n_vocab, each) for each in stages]
    chosen = []
    for step in range(N_STEPS):
        rows = decode(context)
        write_logits(context, rows, chooser, kind)
        for row, sampler, reference in zip(rows, mine, whole, strict=True):
            token = sampler.sample(context, row)
            assert token == reference.sample(context, row), f"step {step}"
            chosen.append(token)
    assert len(set(chosen)) > 5 or kind == "few"
    for sampler in (*mine, *whole):
        sampler.close()


def test_greedy_with_penalties_too(decoded: tuple[NativeModel, NativeContext]) -> None:
    model, context = decoded
    chooser = np.random.default_rng(3)
    stages: list[SamplerStage] = [LogitBias(((3, 2.0),)), Penalties(24, 1.4, 0.3, 0.2), Greedy()]
    mine, whole = model.create_sampler(stages), ChainSampler(model._resource, model.vocabulary.n_tokens, stages)
    for _ in range(N_STEPS):
        rows = decode(context)
        write_logits(context, rows, chooser, "random")
        assert [mine.sample(context, row) for row in rows] == [whole.sample(context, row) for row in rows]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_an_error(decoded: tuple[NativeModel, NativeContext], value: float) -> None:
    model, context = decoded
    rows = decode(context)
    context.logits(rows[0])[17] = value
    for stages in (CHAINS["configuration's defaults"], CHAINS["wasmedge's defaults"]):
        with pytest.raises(RuntimeFailure, match="largest logit"):
            model.create_sampler([*stages, Distribution(1)]).sample(context, rows[0])
