"""The embedder: batches over callers, turns, and what happens when a batch is stopped or fails."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import n_examples
from tests.fakes.llama import FakeEmbeddingContext, FakeLlama, FakeModel
from wasi_nn_backend.engine import Embedder, EmbeddingJob
from wasi_nn_backend.errors import (
    Cancelled,
    InvalidArgument,
    PromptTooLong,
    RuntimeFailure,
    UnsupportedOperation,
    WasiNNError,
)
from wasi_nn_backend.llama.interface import ContextParams, ModelParams
from wasi_nn_backend.output import embedding_json

N_BATCH = 20
N_TOKENS_MAX = 12
N_SEQUENCES = 4

Texts = Sequence[Sequence[int]]


@pytest.fixture
def model(tmp_path: Path) -> FakeModel:
    path = tmp_path / "model.gguf"
    path.touch()
    return FakeLlama().load_model(ModelParams(path))


def make_context(model: FakeModel) -> FakeEmbeddingContext:
    return model.create_embedding_context(
        ContextParams(n_ctx=N_TOKENS_MAX, n_sequences=N_SEQUENCES, n_batch=N_BATCH, n_cells=N_BATCH)
    )


class Gate:
    """Holds every batch up until the test lets it go, and keeps what was in it."""

    def __init__(self) -> None:
        self.batches: list[list[list[int]]] = []
        self.entered = threading.Semaphore(0)
        self.opened = threading.Semaphore(0)

    def __call__(self, texts: Texts) -> None:
        self.batches.append([list(tokens) for tokens in texts])
        self.entered.release()
        assert self.opened.acquire(timeout=30)

    def await_batch(self) -> None:
        assert self.entered.acquire(timeout=30)

    def open_for(self, n_batches: int) -> None:
        self.opened.release(n_batches)


@pytest.fixture
def gate() -> Gate:
    return Gate()


MakeEmbedder = Callable[[FakeEmbeddingContext], Embedder]


@pytest.fixture
def make_embedder(gate: Gate) -> Iterator[MakeEmbedder]:
    embedders: list[Embedder] = []
    ticks = itertools.count()

    def make(context: FakeEmbeddingContext) -> Embedder:
        embedders.append(Embedder(context, lambda: float(next(ticks))))
        return embedders[-1]

    yield make
    gate.open_for(10_000)
    for embedder in embedders:
        embedder.close()


def finished(job: EmbeddingJob) -> np.ndarray:
    job.wait()
    job.raise_error()
    return job.vectors


def texts_of(lengths: Sequence[int], first: int = 0) -> list[list[int]]:
    """Different texts of these lengths."""
    return [[(first + index) % 250] * length for index, length in enumerate(lengths)]


def alone(model: FakeModel, texts: Texts) -> np.ndarray:
    context = make_context(model)
    vectors = [context.embed([tokens]) for tokens in texts]
    return np.concatenate([vector / np.linalg.norm(vector) for vector in vectors if vector is not None])


# Vectors.


@settings(max_examples=n_examples(60), suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(jobs=st.lists(st.lists(st.integers(1, N_TOKENS_MAX), min_size=1, max_size=12), min_size=1, max_size=5))
def test_whoever_else_asks_everybody_gets_what_alone_would_have_given(model: FakeModel, jobs: list[list[int]]) -> None:
    embedder = Embedder(make_context(model), lambda: 0.0)
    submitted = [
        (texts, embedder.submit(texts)) for n, lengths in enumerate(jobs) if (texts := texts_of(lengths, 20 * n))
    ]
    for texts, job in submitted:
        np.testing.assert_allclose(finished(job), alone(model, texts), atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(job.vectors, axis=1), 1, atol=1e-6)
        assert job.vectors.dtype == np.float32
    embedder.close()


def test_many_texts_take_as_few_batches_as_their_tokens_need(model: FakeModel, make_embedder: MakeEmbedder) -> None:
    context = make_context(model)
    embedder = make_embedder(context)
    finished(embedder.submit(texts_of([5] * 40)))
    assert context.n_calls == 10  # four texts of five tokens fill a batch of 20
    finished(embedder.submit(texts_of([1] * 40)))
    assert context.n_calls == 20  # four texts are the most in one
    finished(embedder.submit(texts_of([N_TOKENS_MAX] * 5)))
    assert context.n_calls == 25


def test_no_texts_give_no_vectors_and_no_batch(model: FakeModel, make_embedder: MakeEmbedder) -> None:
    context = make_context(model)
    assert finished(make_embedder(context).submit([])).shape == (0, context.n_embd)
    assert context.n_calls == 0


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([3, 0, 3], InvalidArgument, r"texts\[1\] makes no tokens"),
        ([3, 3, N_TOKENS_MAX + 1], PromptTooLong, r"texts\[2\] has 13 tokens, .* 12 at most"),
        ([N_TOKENS_MAX + 1], PromptTooLong, "the text has 13 tokens"),
    ],
)
def test_what_cannot_be_embedded_is_named_before_anything_is_computed(
    model: FakeModel, make_embedder: MakeEmbedder, lengths: list[int], error: type[WasiNNError], message: str
) -> None:
    context = make_context(model)
    with pytest.raises(error, match=message):
        make_embedder(context).submit(texts_of(lengths))
    assert context.n_calls == 0


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_vector_without_a_length_is_a_failure_of_its_job_only(
    model: FakeModel, make_embedder: MakeEmbedder, gate: Gate, value: float
) -> None:
    class Odd(FakeEmbeddingContext):
        def _vector(self, tokens: Sequence[int]) -> np.ndarray:
            return np.full(self.n_embd, value) if tokens[0] == 7 else super()._vector(tokens)

    context = Odd(model, make_context(model).params)
    context.before_embed = gate
    embedder = make_embedder(context)
    first = embedder.submit([[1]])
    gate.await_batch()
    good, bad = embedder.submit([[1], [2]]), embedder.submit([[3], [7]])
    gate.open_for(2)
    assert len(finished(good)) == 2
    with pytest.raises(RuntimeFailure, match=r"texts\[1\]"):
        finished(bad)
    assert gate.batches[1] == [[1], [3], [2], [7]]
    assert first.done


# Turns.


def test_callers_take_turns(model: FakeModel, make_embedder: MakeEmbedder, gate: Gate) -> None:
    """One text is in the next batch, however many another caller has."""
    context = make_context(model)
    context.before_embed = gate
    embedder = make_embedder(context)
    many = embedder.submit(texts_of([5] * 100))
    gate.await_batch()
    single = embedder.submit([[200]])
    gate.open_for(2)
    finished(single)
    assert not many.done
    assert [200] in gate.batches[1]


def test_a_long_text_is_not_passed_over_for_ever(model: FakeModel, make_embedder: MakeEmbedder, gate: Gate) -> None:
    context = make_context(model)
    context.before_embed = gate
    embedder = make_embedder(context)
    short = embedder.submit(texts_of([3] * 100))
    gate.await_batch()
    long = embedder.submit([[200] * N_TOKENS_MAX])
    gate.open_for(3)
    finished(long)
    assert not short.done


# Stopping.


def test_a_cancelled_job_ends_at_once_and_leaves_the_others_alone(
    model: FakeModel, make_embedder: MakeEmbedder, gate: Gate
) -> None:
    context = make_context(model)
    context.before_embed = gate
    embedder = make_embedder(context)
    running = embedder.submit(texts_of([1] * 3))
    gate.await_batch()
    waiting, other = embedder.submit(texts_of([5] * 50)), embedder.submit(texts_of([2] * 9))
    embedder.cancel(waiting)
    with pytest.raises(Cancelled):
        finished(waiting)
    gate.open_for(10)
    np.testing.assert_allclose(finished(other), alone(model, texts_of([2] * 9)), atol=1e-6)
    assert len(finished(running)) == 3
    embedder.cancel(other)
    assert other.error is None


def test_a_batch_that_nobody_wants_any_more_is_aborted(
    model: FakeModel, make_embedder: MakeEmbedder, gate: Gate
) -> None:
    context = make_context(model)
    aborts: list[bool] = []
    context.before_embed = gate
    context.request_abort = lambda: aborts.append(True)  # type: ignore[method-assign]
    embedder = make_embedder(context)
    first = embedder.submit([[1]])
    gate.await_batch()
    one, two = embedder.submit([[2]]), embedder.submit([[3]])
    gate.open_for(1)
    finished(first)
    gate.await_batch()
    embedder.cancel(one)
    assert aborts == []  # the other one still waits for this batch
    embedder.cancel(two)
    assert aborts == [True]
    gate.open_for(2)
    assert len(finished(embedder.submit([[4]]))) == 1


def test_closing_ends_what_runs_and_what_waits(model: FakeModel, make_embedder: MakeEmbedder, gate: Gate) -> None:
    context = make_context(model)
    context.before_embed = gate
    embedder = make_embedder(context)
    running = embedder.submit([[1]])
    gate.await_batch()
    waiting = embedder.submit(texts_of([5] * 30))
    asked, request_abort = threading.Event(), context.request_abort
    context.request_abort = lambda: (request_abort(), asked.set())  # type: ignore[method-assign,assignment]
    closer = threading.Thread(target=embedder.close)
    closer.start()
    assert asked.wait(30)
    gate.open_for(1)
    closer.join(30)
    for job in (running, waiting):
        with pytest.raises(Cancelled):
            finished(job)
    assert context.closed
    assert context.n_calls == 1
    embedder.close()
    with pytest.raises(RuntimeFailure, match="ended"):
        embedder.submit([[1]])


def test_a_forked_child_has_no_embedder(
    model: FakeModel, make_embedder: MakeEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = make_context(model)
    embedder = make_embedder(context)
    with monkeypatch.context() as patch:
        patch.setattr(embedder._home, "_pid", -1)
        with pytest.raises(RuntimeFailure, match="forked"):
            embedder.submit([[1]])
        embedder.close()
    assert not context.closed
    assert len(finished(embedder.submit([[1]]))) == 1


@pytest.mark.parametrize("fault", [RuntimeFailure("broken"), UnsupportedOperation("not that"), ValueError("a bug")])
def test_a_fault_ends_the_jobs_in_the_batch_and_not_the_thread(
    model: FakeModel, make_embedder: MakeEmbedder, gate: Gate, fault: Exception
) -> None:
    class Faulty(FakeEmbeddingContext):
        def embed(self, texts: Texts) -> np.ndarray | None:
            vectors = super().embed(texts)
            if [9] in [list(tokens) for tokens in texts]:
                raise fault
            return vectors

    context = Faulty(model, make_context(model).params)
    embedder = make_embedder(context)
    struck = embedder.submit([[1], [9], [2], [3], [4], [5], [6]])
    with pytest.raises(type(fault) if isinstance(fault, WasiNNError) else RuntimeFailure, match=str(fault)):
        finished(struck)
    assert len(finished(embedder.submit([[1], [2]]))) == 2


# The text of a vector.


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=50))
def test_a_vector_as_json_has_ten_digits_and_no_spaces(vector: list[float]) -> None:
    text = embedding_json(vector).decode()
    document = json.loads(text)
    assert list(document) == ["n_embedding", "embedding"]
    assert document["n_embedding"] == len(vector)
    assert document["embedding"] == pytest.approx(vector, rel=1e-9)
    assert text.startswith(f'{{"n_embedding": {len(vector)}, "embedding": [')
    values = text.partition("[")[2]
    assert " " not in values
    assert max(len(value.partition("e")[0].strip("-0.").replace(".", "")) for value in values[:-2].split(",")) <= 10


def test_a_vector_as_json_is_what_wasmedge_writes() -> None:
    vector = [float(np.float32(value)) for value in (0.1, -1.0, 1e-5, 0.0, 1 / 3)]
    expected = b'{"n_embedding": 5, "embedding": [0.1000000015,-1,9.999999747e-06,0,0.3333333433]}'
    assert embedding_json(vector) == expected
