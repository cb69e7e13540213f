"""``sampling.n_probs``: what the model thought of each token, in the metadata. On the fake and on llama.cpp."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fakes.llama import IM_END, N_VOCAB, FakeLlama, FakeVocabulary
from tests.fakes.sampler import FakeSampler
from wasi_nn_backend import Backend, EndOfSequence, ExecutionContext
from wasi_nn_backend.llama.interface import Distribution, Greedy, LogitBias, Penalties, SamplerStage, Temperature
from wasi_nn_backend.sampling import ProbabilityRecorder

N_TOKENS = 20

MakeContext = Callable[..., ExecutionContext]


class Row:
    """A context whose logits are given."""

    def __init__(self, logits: np.ndarray) -> None:
        self._logits = logits.astype(np.float32)

    def logits(self, row: int) -> np.ndarray:
        return self._logits


@pytest.fixture(params=["fake", "native"])
def make_context(request: pytest.FixtureRequest, tiny_model_path: Path) -> Iterator[MakeContext]:
    backends: list[Backend] = []

    def make(**config: Any) -> ExecutionContext:
        settings = {"max_tokens": N_TOKENS, "n_ctx": 512, "threads": 1, "prompt_mode": "raw", "seed": 5} | config
        backends.append(Backend(settings, llama=FakeLlama() if request.param == "fake" else None))
        return backends[-1].load_by_name(tiny_model_path).init_execution_context()

    yield make
    for backend in backends:
        backend.close()


@pytest.mark.parametrize("stages", [[Greedy()], [Penalties(8, 1.5, 0, 0), Temperature(0.3), Distribution(3)]])
@pytest.mark.parametrize("n_top", [1, 7, N_VOCAB + 5])
def test_probabilities_are_the_softmax_of_the_logits(stages: list[SamplerStage], n_top: int) -> None:
    """Whatever the sampler makes of them."""
    recorder = ProbabilityRecorder(FakeSampler(stages), FakeVocabulary(), n_top)
    random = np.random.default_rng(1)
    for n in range(1, 6):
        logits = random.standard_normal(N_VOCAB) * 4
        logits[random.permutation(N_VOCAB)[:30]] = -np.inf
        token = recorder.sample(Row(logits), 0)  # type: ignore[arg-type]
        softmax = np.exp(logits) / np.exp(logits).sum()
        position = recorder.positions(n)[-1]
        assert len(recorder.positions(n + 1)) == n
        assert position.chosen.token == token
        assert position.chosen.probability == pytest.approx(softmax[token], rel=1e-5)
        assert [other.probability for other in position.top] == pytest.approx(np.sort(softmax)[::-1][:n_top], rel=1e-5)
        assert [other.token for other in position.top[:10]] == np.argsort(-softmax)[: min(n_top, 10)].tolist()


def test_equals_come_in_the_order_of_their_ids() -> None:
    recorder = ProbabilityRecorder(FakeSampler([Greedy()]), FakeVocabulary(), 4)
    logits = np.zeros(N_VOCAB)
    logits[[9, 5, 200]] = 2.0
    recorder.sample(Row(logits), 0)  # type: ignore[arg-type]
    assert [other.token for other in recorder.positions(1)[0].top[:3]] == [5, 9, 200]


def test_the_sampler_behind_is_asked_everything() -> None:
    sampler = FakeSampler([Penalties(4, 1.0, 0.0, 50.0), LogitBias(((7, 3.0),)), Greedy()])
    recorder = ProbabilityRecorder(sampler, FakeVocabulary(), 1)
    recorder.accept(7)
    assert recorder.sample(Row(np.zeros(N_VOCAB)), 0) != 7  # type: ignore[arg-type]
    recorder.reset()
    assert recorder.positions(1) == ()
    assert recorder.sample(Row(np.zeros(N_VOCAB)), 0) == 7  # type: ignore[arg-type]
    recorder.close()
    assert sampler.closed
    assert len(recorder.positions(9)) == 1


def test_the_metadata_has_one_entry_for_each_output_token(make_context: MakeContext) -> None:
    context = make_context(n_probs=3)
    text = context.run_inference("tell me")
    positions = context.metadata["probabilities"]
    assert len(positions) == context.metadata["output_tokens"] > 0
    shown_text = "".join(position["text"] for position in positions)
    assert shown_text.encode("ascii", "ignore") == text.encode("ascii", "ignore")  # characters may be cut into tokens
    for position in positions:
        assert set(position) == {"token", "text", "probability", "top"}
        shown = [top["probability"] for top in position["top"]]
        assert shown == sorted(shown, reverse=True)
        assert 0 < position["probability"] <= shown[0]
        assert math.fsum(shown) <= 1 + 1e-6
        assert all(set(top) == {"token", "text", "probability"} for top in position["top"])
    assert json.loads(context.get_output(1))["probabilities"] == positions


def test_they_do_not_change_the_text_and_are_for_their_run_only(make_context: MakeContext) -> None:
    context = make_context()
    plain = context.run_inference("tell me")
    assert "probabilities" not in context.metadata
    assert context.run_inference("tell me", {"logprobs": 2}) == plain
    assert len(context.metadata["probabilities"][0]["top"]) == 2
    assert context.run_inference("tell me") == plain
    assert "probabilities" not in context.metadata


def test_token_by_token_shows_what_was_taken(make_context: MakeContext) -> None:
    context = make_context(n_probs=1, ignore_eos=True)
    context.set_input(0, "tell me")
    context.compute()
    whole = context.metadata["probabilities"]
    context.set_input(0, "tell me")
    for n_taken in range(1, N_TOKENS + 1):
        context.compute_single()
        assert context.metadata["probabilities"] == whole[:n_taken]
    with pytest.raises(EndOfSequence):
        context.compute_single()
    assert context.metadata["probabilities"] == whole


def test_the_token_that_ends_a_text_is_no_output(tiny_model_path: Path) -> None:
    with Backend({"n_probs": 2, "prompt_mode": "raw"}, llama=FakeLlama(end_every=5)) as backend:
        context = backend.load_by_name(tiny_model_path).init_execution_context()
        context.run_inference("tell me")
        positions = context.metadata["probabilities"]
        assert context.metadata["finish_reason"] == "stop"
        assert len(positions) == context.metadata["output_tokens"]
        assert IM_END not in [position["token"] for position in positions]
