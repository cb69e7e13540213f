"""Every sampler chooses what llama.cpp's own chain chooses: the same tokens for the same seed, whatever the logits."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.conftest import n_examples
from wasi_nn_backend.errors import InvalidArgument, RuntimeFailure
from wasi_nn_backend.llama import load_llama
from wasi_nn_backend.llama.bindings import native
from wasi_nn_backend.llama.candidates import CandidateFinder, Candidates
from wasi_nn_backend.llama.chain import ChainSampler
from wasi_nn_backend.llama.context import NativeContext
from wasi_nn_backend.llama.greedy import GreedySampler
from wasi_nn_backend.llama.interface import (
    ContextParams,
    DecodeBatch,
    Distribution,
    Dry,
    DynamicTemperature,
    Greedy,
    LogitBias,
    MinP,
    Mirostat,
    ModelParams,
    Penalties,
    Sampler,
    SamplerStage,
    Temperature,
    TopK,
    TopNSigma,
    TopP,
    Typical,
    Xtc,
)
from wasi_nn_backend.llama.links import LinkMaker
from wasi_nn_backend.llama.model import NativeModel
from wasi_nn_backend.llama.owner import Hold, Resource
from wasi_nn_backend.llama.reduced import ReducedSampler
from wasi_nn_backend.llama.sampler import open_sampler

Logits = npt.NDArray[np.float32]
Random = np.random.Generator

INF = float("inf")
N_VOCAB = 50_257  # no multiple of anything
REST: list[SamplerStage] = [TopP(0.9, 1), MinP(0.05, 1), Temperature(0.7), Distribution(7)]
CHAINS: dict[str, list[SamplerStage]] = {
    "defaults": [Penalties(64, 1.1, 0.0, 0.0), TopK(40), *REST],
    "no penalties": [TopK(40), TopP(0.95, 1), MinP(0.05, 1), Temperature(0.8), Distribution(1)],
    "all": [
        LogitBias(((3, -INF), (8, 2.5), (301, -1.0))),
        Penalties(20, 1.3, 0.4, -0.2),
        TopK(30),
        Typical(0.9, 2),
        TopP(0.99, 3),
        MinP(0.01, 2),
        Temperature(1.5),
        Distribution(99),
    ],
    "flat": [Penalties(500, 0.8, -0.5, 0.0), TopK(80), Temperature(2.0), Distribution(5)],
    "above the heap sort's limit": [TopK(200), Temperature(1.3), Distribution(4)],
    "of one": [LogitBias(((1, 5.0),)), TopK(1), Distribution(4)],
    "zero temperature": [Penalties(8, 1.2, 0.1, 0.1), TopK(20), Temperature(0.0), Distribution(4)],
    "draws only": [TopK(64), Distribution(12)],
    "greedy": [LogitBias(((9, -INF), (10, 1.0))), Penalties(64, 1.1, 0.2, 0.3), Greedy()],
    "greedy with bans": [LogitBias(((9, -INF), (10, -INF))), Greedy()],
    "bans": [LogitBias(((9, -INF), (10, -0.5))), Penalties(64, 1.0, 0.0, 0.4), TopK(40), *REST],
    "greedy top-k": [Penalties(64, 1.1, 0.0, 0.0), TopK(40), TopP(0.5, 1), Greedy()],
    "DRY": [Dry(0.9, 1.75, 1, 512, ()), TopK(40), Temperature(1.2), Distribution(6)],
    "DRY and penalties, greedy": [Dry(2.0, 1.5, 1, 100, ()), Penalties(32, 1.2, 0.0, 0.1), Greedy()],
    "XTC": [Penalties(64, 1.1, 0.0, 0.0), TopK(40), MinP(0.02, 1), Xtc(0.6, 0.05, 1, 21), *REST[2:]],
    "XTC, greedy": [TopK(20), Xtc(0.5, 0.05, 1, 3), Greedy()],
    "dynamic temperature": [TopK(50), TopP(0.98, 1), DynamicTemperature(1.0, 0.7, 1.3), Distribution(15)],
    "dynamic temperature from zero": [TopK(50), DynamicTemperature(0.4, 0.5, 2.0), Distribution(16)],
    "all after the top-k": [
        TopK(60),
        TopNSigma(1.0),
        Temperature(1.1),
        LogitBias(((5, 3.0), (5, -1.0), (7, -INF))),
        Penalties(40, 1.3, 0.1, 0.0),
        Dry(0.5, 1.2, 1, 60, ()),
        TopK(30),
        Distribution(17),
    ],
}
#: Those that look at more of the distribution than a top-k keeps.
WHOLE_CHAINS: dict[str, list[SamplerStage]] = {
    "no top-k": [Penalties(64, 1.1, 0.0, 0.0), *REST],
    "top-n-sigma": [TopNSigma(1.5), TopK(40), Distribution(2)],
    "typical": [Typical(0.7, 1), Distribution(3)],
    "XTC alone": [Xtc(0.9, 0.02, 1, 5), Distribution(4)],
    "dynamic temperature alone": [DynamicTemperature(0.9, 0.6, 1.0), Distribution(5)],
    "mirostat": [LogitBias(((3, -INF),)), Temperature(0.8), Mirostat(1, 5.0, 0.1, 8)],
    "mirostat 2": [Temperature(1.3), Mirostat(2, 3.0, 0.2, 9)],
    "top-k of all": [TopK(10**6), Temperature(0.8), Distribution(10)],
    "temperature first": [Temperature(1.5), TopK(40), Distribution(11)],
}
ALL_CHAINS = CHAINS | WHOLE_CHAINS


def smooth(random: Random, n: int) -> Logits:
    return random.standard_normal(n, dtype=np.float32) * np.float32(random.choice([0.1, 3.0, 10.0]))


def full_of_ties(random: Random, n: int) -> Logits:
    logits: Logits = np.round(random.standard_normal(n) * 3, int(random.integers(0, 3))).astype(np.float32)
    return logits


def few_finite(random: Random, n: int) -> Logits:
    logits = smooth(random, n)
    logits[random.permutation(n)[int(random.integers(12, 120)) :]] = -np.inf
    return logits


def constant(random: Random, n: int) -> Logits:
    logits: Logits = np.full(n, float(random.choice([0.0, -0.0, 3.5])), dtype=np.float32)
    return logits


def tie_at_the_edge(random: Random, n: int) -> Logits:
    """One pair of equals somewhere around the top-k's end, another at the very top in half of the cases."""
    logits = smooth(random, n)
    order = np.argsort(-logits)
    for i in (int(random.integers(25, 85)), 0)[: int(random.integers(1, 3))]:
        logits[order[i + 1]] = logits[order[i]]
    return logits


def crowded_at_the_beginning(random: Random, n: int) -> Logits:
    """Frequent tokens have low ids: all of the top in a few neighbouring columns."""
    logits = smooth(random, n)
    logits[: n // 50] += 30.0
    return logits


KINDS = [smooth, full_of_ties, few_finite, constant, tie_at_the_edge, crowded_at_the_beginning]


class GivenLogits(NativeContext):
    """A context that holds one row of logits, as large as wished, and no model."""

    def __init__(self) -> None:
        # Not the base's: that one decodes.
        self.row: Logits = np.empty(0, dtype=np.float32)
        self._own = Resource("given logits", 0, lambda _pointer: None)
        self._holder = object()
        self._own.add_holder(self._holder)
        self._finder = CandidateFinder()

    def pointer(self) -> Hold:
        return Hold(self._own)

    def set(self, logits: Logits) -> None:
        self.row = logits
        self._finder.start(np.stack([logits, logits[::-1]]))

    def logits(self, row: int) -> Logits:
        return self.row

    def candidates(self, row: int, n_top: int) -> Candidates:
        return self._finder.find(0, n_top)

    def best(self, row: int) -> tuple[int, float]:
        token = self._finder.best(0)
        return token, float(self.row[token])


class Reference:
    """``llama_sampler_sample`` over given logits: llama.cpp's whole chain on the whole vocabulary."""

    def __init__(self, links: LinkMaker, stages: Sequence[SamplerStage]) -> None:
        self._chain = links.chain(stages)
        n_vocab = links.n_vocab
        self._data = np.zeros(n_vocab, dtype=[("id", "i4"), ("logit", "f4"), ("p", "f4")])

    def accept(self, token: int) -> None:
        native.llama_sampler_accept(self._chain, token)

    def sample(self, logits: Logits) -> int:
        self._data["id"], self._data["logit"], self._data["p"] = np.arange(len(logits)), logits, 0.0
        array: Any = native.llama_token_data_array(size=len(logits), selected=-1, sorted=False)
        array.data = ctypes.cast(self._data.ctypes.data, type(array.data))
        native.llama_sampler_apply(self._chain, ctypes.byref(array))
        token = int(array.data[array.selected].id)  # not the n-th of the memory: XTC moves the beginning
        self.accept(token)
        return token

    def close(self) -> None:
        native.llama_sampler_free(self._chain)


@pytest.fixture(scope="module")
def links() -> LinkMaker:
    """For a model that is none: samplers only hold it."""
    load_llama()
    resource = Resource("no model", 0, lambda _pointer: None)
    resource.add_holder(resource)
    return LinkMaker(resource, N_VOCAB)


@pytest.fixture
def given_logits(links: LinkMaker) -> GivenLogits:
    return GivenLogits()


class Applied:
    """Records what the last ``llama_sampler_apply`` left: the tokens to choose from, in order, with probabilities."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n_given = 0
        self.left = b""
        self._apply = native.llama_sampler_apply
        monkeypatch.setattr(native, "llama_sampler_apply", self)

    def __call__(self, chain: Any, reference: Any) -> None:
        array = reference._obj
        self.n_given = array.size
        self._apply(chain, reference)
        self.left = ctypes.string_at(array.data, 12 * array.size)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_are_llama_cpp_s(
    links: LinkMaker,
    given_logits: GivenLogits,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    kind: Callable[[Random, int], Logits],
) -> None:
    """And so are the tokens that were drawn from, their order and their probabilities, bit by bit."""
    applied = Applied(monkeypatch)
    draws = isinstance(CHAINS[name][-1], Distribution)
    random = np.random.default_rng(11)
    sampler, reference = open_sampler(links, CHAINS[name]), Reference(links, CHAINS[name])
    assert isinstance(sampler, ReducedSampler)
    for token in random.integers(0, 400, 40).tolist():
        sampler.accept(token)
        reference.accept(token)
    for _ in range(n_examples(20)):
        given_logits.set(kind(random, N_VOCAB))
        token, left = sampler.sample(given_logits, 0), applied.left if draws else b""
        assert token == reference.sample(given_logits.row)
        assert not draws or left == applied.left
    reference.close()


@pytest.mark.parametrize("last_n", [1, 64, 5000])
def test_penalised_tokens_may_be_the_most_probable_ones(
    links: LinkMaker, given_logits: GivenLogits, last_n: int
) -> None:
    """The window is full of what is on top, so that what comes below it has to be found, too."""
    random = np.random.default_rng(12)
    stages: list[SamplerStage] = [Penalties(last_n, 1.8, 0.3, 0.5), TopK(40), Temperature(1.5), Distribution(1)]
    sampler, reference = open_sampler(links, stages), Reference(links, stages)
    logits = smooth(random, N_VOCAB)
    for token in np.argsort(-logits)[: min(last_n, 3000)].tolist():
        sampler.accept(token)
        reference.accept(token)
    for _ in range(n_examples(100)):
        given_logits.set(logits + random.standard_normal(N_VOCAB, dtype=np.float32) / np.float32(10))
        assert sampler.sample(given_logits, 0) == reference.sample(given_logits.row)
    reference.close()


def test_repetitions_may_be_the_most_probable_ones(links: LinkMaker, given_logits: GivenLogits) -> None:
    """One token was followed by each of the most probable ones, so that after it DRY punishes them all."""
    random = np.random.default_rng(18)
    stages: list[SamplerStage] = [Dry(50.0, 1.1, 1, 2000, ()), TopK(40), Temperature(1.5), Distribution(1)]
    sampler, reference = open_sampler(links, stages), Reference(links, stages)
    logits = smooth(random, N_VOCAB)
    before = int(logits.argmin())
    punished = np.argsort(-logits)[:300].tolist()
    for token in [other for best in punished for other in (before, best)]:
        sampler.accept(token)
        reference.accept(token)
    chosen = []
    for _ in range(50):
        sampler.accept(before)
        reference.accept(before)
        given_logits.set(logits)
        chosen.append(sampler.sample(given_logits, 0))
        assert chosen[-1] == reference.sample(given_logits.row)
    assert len(set(chosen)) == 50
    assert not set(chosen) & set(punished)
    reference.close()


def test_tokens_that_a_penalty_favours_come_up_from_anywhere(links: LinkMaker, given_logits: GivenLogits) -> None:
    """A small window that moves on, and nothing but what is in it can be chosen."""
    random = np.random.default_rng(17)
    stages: list[SamplerStage] = [Penalties(6, 1.0, 0.0, -100.0), TopK(4), Distribution(1)]
    sampler, reference = open_sampler(links, stages), Reference(links, stages)
    chosen = set()
    for _ in range(200):
        for token in random.integers(0, N_VOCAB, 3).tolist():
            sampler.accept(token)
            reference.accept(token)
        given_logits.set(smooth(random, N_VOCAB))
        token = sampler.sample(given_logits, 0)
        assert token == reference.sample(given_logits.row)
        chosen.add(token)
    assert len(chosen) > 50
    reference.close()


@pytest.mark.parametrize("name", ["defaults", "no penalties"])
def test_ties_alone_need_the_whole_vocabulary(
    links: LinkMaker, given_logits: GivenLogits, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    applied = Applied(monkeypatch)
    sampler = open_sampler(links, CHAINS[name])
    random = np.random.default_rng(13)
    for _ in range(100):
        given_logits.set(smooth(random, N_VOCAB))
        sampler.sample(given_logits, 0)
        assert applied.n_given < 200
    given_logits.set(constant(random, N_VOCAB))
    sampler.sample(given_logits, 0)
    assert applied.n_given == N_VOCAB


def test_a_seed_starts_over_after_reset(links: LinkMaker, given_logits: GivenLogits) -> None:
    random = np.random.default_rng(14)
    rows = [smooth(random, N_VOCAB) for _ in range(20)]
    sampler = open_sampler(links, CHAINS["all"])

    def run() -> list[int]:
        sampler.reset()
        chosen = []
        for row in rows:
            given_logits.set(row)
            chosen.append(sampler.sample(given_logits, 0))
        return chosen

    assert run() == run()


@pytest.mark.parametrize("name", [*CHAINS, "whole chain"])
@pytest.mark.parametrize(
    ("token", "value"), [(0, np.nan), (N_VOCAB - 1, np.nan), (30_000, np.inf), (slice(None), -np.inf)]
)
def test_logits_that_are_no_numbers_are_an_error(
    links: LinkMaker, given_logits: GivenLogits, name: str, token: int | slice, value: float
) -> None:
    logits = smooth(np.random.default_rng(15), N_VOCAB)
    logits[token] = value
    given_logits.set(logits)
    sampler = open_sampler(links, CHAINS.get(name, REST))
    for _ in range(2):
        with pytest.raises(RuntimeFailure, match="largest logit"):
            sampler.sample(given_logits, 0)


ENDS = {
    "greedy": [Greedy()],
    "top-k": [TopK(40), Distribution(1)],
    "top-k of one": [TopK(1), Distribution(1)],
    "penalties": [Penalties(64, 1.1, 0.0, 0.0), TopK(40), MinP(0.1, 2), Distribution(1)],
    **{name: stages for name, stages in WHOLE_CHAINS.items() if not isinstance(stages[0], LogitBias)},
}


@pytest.mark.parametrize("name", ENDS)
def test_banning_all_that_is_possible_is_an_error(links: LinkMaker, given_logits: GivenLogits, name: str) -> None:
    """Of nothing but minus infinities llama.cpp would take the last token."""
    logits = np.full(N_VOCAB, -np.inf, dtype=np.float32)
    logits[[5, 6]] = 1.0
    given_logits.set(logits)
    sampler = open_sampler(links, [LogitBias(((5, -INF), (6, -INF))), *ENDS[name]])
    for _ in range(2):
        with pytest.raises(RuntimeFailure, match="no token is left"):
            sampler.sample(given_logits, 0)


@pytest.mark.parametrize(
    ("stages", "kind"),
    [
        ([Greedy()], GreedySampler),
        ([Penalties(64, 1.1, 0, 0), Greedy()], ReducedSampler),
        ([TopK(40), Distribution(1)], ReducedSampler),
        ([TopK(0), Distribution(1)], ChainSampler),
        ([TopK(-1), Distribution(1)], ChainSampler),
        ([TopK(N_VOCAB + 1), Distribution(1)], ChainSampler),
        ([TopK(5000), Distribution(1)], ChainSampler),
        ([TopP(0.9, 1), TopK(40), Distribution(1)], ChainSampler),
        ([Temperature(0.5), TopK(40), Distribution(1)], ChainSampler),
        ([TopNSigma(1.0), TopK(40), Distribution(1)], ChainSampler),
        ([Xtc(0.5, 0.1, 1, 1), TopK(40), Distribution(1)], ChainSampler),
        ([Mirostat(2, 5.0, 0.1, 1)], ChainSampler),
        ([TopK(40), Mirostat(1, 5.0, 0.1, 1)], ReducedSampler),
        ([Penalties(64, 1.1, 0, 0), LogitBias(((1, 1.0),)), TopK(40), Distribution(1)], ReducedSampler),
        ([Dry(1.0, 1.75, 2, 64, ()), Penalties(64, 1.1, 0, 0), TopK(40), Distribution(1)], ReducedSampler),
        ([TopK(40), Penalties(64, 1.1, 0, 0), Distribution(1)], ReducedSampler),
        ([LogitBias(((1, 1.0), (1, 2.0))), TopK(40), Distribution(1)], ChainSampler),
        ([LogitBias(tuple((t, 1.0) for t in range(1000))), TopK(40), Distribution(1)], ChainSampler),
        ([Penalties(64, 1.1, 0, 0), Distribution(1)], ChainSampler),
    ],
)
def test_which_chains_are_cut_short(links: LinkMaker, stages: list[SamplerStage], kind: type[Sampler]) -> None:
    assert type(open_sampler(links, stages)) is kind


def test_tokens_outside_of_the_vocabulary_are_refused(links: LinkMaker) -> None:
    for stages in ([Greedy()], CHAINS["defaults"], REST):
        sampler = open_sampler(links, stages)
        for token in (-1, N_VOCAB, 2**40):
            with pytest.raises(InvalidArgument, match="outside of the vocabulary"):
                sampler.accept(token)


class TestWithAModel:
    """The same through a decode, against ``llama_sampler_sample``: a vocabulary of 320, of which much is on top."""

    @pytest.fixture
    def model(self, tiny_model_path: Path) -> Iterator[NativeModel]:
        with load_llama().load_model(ModelParams(tiny_model_path)) as model:
            yield model

    @pytest.mark.parametrize("name", ALL_CHAINS)
    def test_the_tokens_are_llama_cpp_s(self, model: NativeModel, name: str) -> None:
        random = np.random.default_rng(16)
        n_vocab = model.vocabulary.n_tokens
        sampler, chain = model.create_sampler(ALL_CHAINS[name]), model.links.chain(ALL_CHAINS[name])
        batch = DecodeBatch()
        with model.create_context(ContextParams(n_ctx=256, n_sequences=2)) as context:
            for i in range(n_examples(200)):
                for sequence_id in range(2):
                    context.remove(sequence_id, 0)
                batch.clear()
                rows = [batch.add([40 + i % 200, 41], 0, s, logits_for_last=True) for s in range(2)]
                context.decode(batch)
                # llama.cpp's own memory: what is written here, its chain sees.
                for row in rows:
                    if i % 2:
                        context.logits(row)[:] = KINDS[i // 2 % len(KINDS)](random, n_vocab)
                for row in rows:
                    with context.pointer() as pointer:
                        token = native.llama_sampler_sample(chain, pointer, row)
                    assert sampler.sample(context, row) == token
        native.llama_sampler_free(chain)

    def test_dry_samplers_of_equal_settings_have_windows_of_their_own(self, model: NativeModel) -> None:
        """They are cloned from one that is kept; of other settings, only a few are."""
        stages: list[SamplerStage] = [Dry(1e4, 1.75, 1, 64, (b":",)), Greedy()]
        batch = DecodeBatch()
        with model.create_context(ContextParams(n_ctx=256)) as context:
            row = batch.add([40], 0, 0, logits_for_last=True)
            context.decode(batch)
            best = int(context.logits(row).argmax())
            for i in range(10):
                sampler = model.create_sampler(stages)
                for token in (200, best, 200) if i % 2 else ():
                    sampler.accept(token)
                assert (sampler.sample(context, row) == best) is (i % 2 == 0)
                model.create_sampler([replace(stages[0], multiplier=i + 1.0), Greedy()])

    def test_every_decode_has_its_own_candidates(self, model: NativeModel) -> None:
        sampler = model.create_sampler([TopK(1), Distribution(1)])
        batch, token = DecodeBatch(), 40
        with model.create_context(ContextParams(n_ctx=256)) as context:
            for position in range(100):
                batch.clear()
                row = batch.add([token], position, 0, logits_for_last=True)
                context.decode(batch)
                token = sampler.sample(context, row)
                assert token == int(context.logits(row).argmax())
