"""Embeddings through the contract of WASI-NN and ``Graph.embed``, on the fake and on llama.cpp with small models."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.doors import both_doors
from tests.effects import changes
from tests.fakes.llama import FakeEmbeddingContext, FakeLlama
from tests.tiny_encoder import write_tiny_encoder
from wasi_nn_backend import (
    Backend,
    Busy,
    Cancelled,
    ExecutionContext,
    Graph,
    InvalidArgument,
    PromptTooLong,
    RuntimeFailure,
    UnsupportedOperation,
)
from wasi_nn_backend.engine import EmbeddingJob

door = both_doors(__name__)
#: Ctrl-C reaches the thread that waits, which is an event loop's there.
NOT_ASYNCIO = {"test_an_interrupted_embed_leaves_nothing_behind"}
TEXTS = ["the cat sat on the mat", "a", "one two three", "the cat sat on the hat", "zz top", "größer € 日本"]
ON = {"model": {"embedding": True}}

MakeGraph = Callable[..., Graph]


@pytest.fixture(params=["fake", "native"])
def llama(request: pytest.FixtureRequest) -> FakeLlama | None:
    """None is the native library, on the tiny model."""
    return FakeLlama() if request.param == "fake" else None


@pytest.fixture
def backends() -> Iterator[list[Backend]]:
    made: list[Backend] = []
    yield made
    for backend in made:
        backend.close()


@pytest.fixture
def make_graph(llama: FakeLlama | None, backends: list[Backend], tiny_model_path: Path) -> MakeGraph:
    def make(**config: Any) -> Graph:
        settings = {"max_tokens": 12, "n_ctx": 256, "batch_size": 64, "threads": 1, "temperature": 0} | config
        backends.append(Backend(settings, llama=llama))
        return backends[-1].load_by_name(str(tiny_model_path))

    return make


@pytest.fixture
def make_fake_graph(backends: list[Backend], tmp_path: Path) -> Callable[..., tuple[FakeLlama, Graph]]:
    def make(llama: FakeLlama, **config: Any) -> tuple[FakeLlama, Graph]:
        path = tmp_path / "fake.gguf"
        path.touch()
        backends.append(Backend({"n_ctx": 256, "batch_size": 64} | config, llama=llama))
        return llama, backends[-1].load_by_name(str(path))

    return make


def computed(context: ExecutionContext, text: str) -> npt.NDArray[np.float32]:
    context.set_input(0, text)
    context.compute()
    document = json.loads(context.get_output(0))
    assert document["n_embedding"] == len(document["embedding"])
    return np.array(document["embedding"], dtype=np.float32)


# Every way of asking gives the same vectors.


def test_all_ways_of_embedding_agree(make_graph: MakeGraph) -> None:
    graph = make_graph()
    vectors = graph.embed(TEXTS)
    assert vectors.shape == (len(TEXTS), graph.model.n_embd)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    with graph.init_execution_context(ON) as context:
        for text, vector in zip(TEXTS, vectors, strict=True):
            np.testing.assert_allclose(computed(context, text), vector, atol=1e-3)
            np.testing.assert_allclose(graph.embed([text])[0], vector, atol=1e-3)
        document = context.get_output(0).decode()
        assert context.run_inference(TEXTS[-1]) == document
        assert list(context.stream(TEXTS[-1])) == [document]
        assert context.get_output(0).decode() == document
    with graph.init_execution_context() as context:
        assert json.loads(context.run_inference(TEXTS[0], {"embedding": True})) == pytest.approx(
            {"n_embedding": graph.model.n_embd, "embedding": pytest.approx(vectors[0].tolist(), abs=1e-3)}
        )


def test_order_and_number_of_texts_do_not_matter(make_graph: MakeGraph) -> None:
    graph = make_graph()
    texts = [f"{'word ' * (n % 9)}{n}" for n in range(70)]
    vectors = graph.embed(texts)
    np.testing.assert_allclose(graph.embed(texts[::-1]), vectors[::-1], atol=1e-3)
    np.testing.assert_allclose(graph.embed(tuple(texts[:1])), vectors[:1], atol=1e-3)
    assert graph.embed([]).shape == (0, graph.model.n_embd)
    same = graph.embed(["the same"] * 40)
    np.testing.assert_allclose(same, same[:1].repeat(40, axis=0), atol=1e-3)


def test_threads_get_their_own_vectors(make_graph: MakeGraph) -> None:
    graph = make_graph()
    groups = [[f"{'word ' * (n % 5)}{group} {n}" for n in range(1 + group)] for group in range(12)]
    alone = [graph.embed(texts) for texts in groups]
    with ThreadPoolExecutor(12) as threads:
        for vectors, expected in zip(threads.map(graph.embed, groups), alone, strict=True):
            np.testing.assert_allclose(vectors, expected, atol=1e-3)


def test_generation_and_embedding_do_not_disturb_each_other(make_graph: MakeGraph) -> None:
    graph = make_graph(max_tokens=40, repeat_penalty=1.0, prompt_mode="raw")
    prompts = [f"prompt {n}" for n in range(4)]

    def run(prompt: str) -> str:
        with graph.init_execution_context() as context:
            return context.run_inference(prompt)

    texts, vectors = [run(prompt) for prompt in prompts], graph.embed(TEXTS)
    with ThreadPoolExecutor(8) as threads:
        runs = [threads.submit(run, prompt) for prompt in prompts]
        embeddings = [threads.submit(graph.embed, TEXTS) for _ in range(4)]
        assert [future.result() for future in runs] == texts
        for future in embeddings:
            np.testing.assert_allclose(future.result(), vectors, atol=1e-3)


def test_an_encoder_embeds_and_generates_nothing(backends: list[Backend], tmp_path: Path) -> None:
    write_tiny_encoder(tmp_path / "encoder.gguf")
    backends.append(Backend())
    graph = backends[0].load_by_name(tmp_path / "encoder.gguf")
    vectors = graph.embed(["a cat", "a dog", "a cat"])
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-5)
    assert graph.statistics().n_steps == 0
    with graph.init_execution_context() as context:
        context.set_input(0, "a cat")
        with pytest.raises(UnsupportedOperation, match=r"encoder.*model\.embedding"):
            context.compute()
        context.set_input(1, '{"embedding": true}')
        np.testing.assert_allclose(computed(context, "a cat"), vectors[0], atol=1e-5)
        with pytest.raises(UnsupportedOperation):
            context.save(tmp_path / "session")


# A context in embedding mode.


def test_metadata_counts_the_input_and_no_output(make_graph: MakeGraph) -> None:
    graph = make_graph(**ON)
    n_tokens = len(graph.model.vocabulary.tokenize(TEXTS[0].encode(), add_special=True, parse_special=True))
    with graph.init_execution_context() as context:
        context.set_input(0, TEXTS[0])
        assert context.metadata["input_tokens"] == n_tokens  # without a chat template
        context.compute()
        metadata = json.loads(context.get_output(1))
        assert (metadata["input_tokens"], metadata["output_tokens"]) == (n_tokens, 0)
        assert metadata["finish_reason"] == "stop"
        assert metadata["duration_ms"] >= 0
        assert context.messages == ()


def test_computing_again_gives_the_vector_again(make_graph: MakeGraph) -> None:
    with make_graph(**ON).init_execution_context() as context:
        first = computed(context, TEXTS[0])
        context.compute()
        np.testing.assert_allclose(json.loads(context.get_output(0))["embedding"], first, atol=1e-6)


@changes("model.embedding")
def test_embedding_can_be_switched_on_and_off(make_graph: MakeGraph) -> None:
    graph = make_graph(repeat_penalty=1.0)
    with graph.init_execution_context() as context, graph.init_execution_context() as other:
        first = context.run_inference("hello")
        assert other.run_inference("hello") == first
        context.set_input(1, '{"embedding": true}')
        np.testing.assert_allclose(computed(context, TEXTS[0]), graph.embed(TEXTS[:1])[0], atol=1e-3)
        context.set_input(1, '{"embedding": false}')
        # The vector was no turn of the conversation.
        assert context.run_inference("and now?") == other.run_inference("and now?")
        assert len(context.messages) == 4


def test_a_prompt_outlives_the_switch(make_graph: MakeGraph) -> None:
    graph = make_graph(prompt_mode="raw")
    with graph.init_execution_context() as context:
        context.set_input(0, TEXTS[0])
        n_tokens = context.metadata["input_tokens"]
        context.set_input(1, '{"embedding": true}')
        assert context.metadata["input_tokens"] == n_tokens
        context.compute()
        assert b"n_embedding" in context.get_output(0)


def test_there_are_no_single_tokens_of_a_vector(make_graph: MakeGraph) -> None:
    with make_graph(**ON).init_execution_context() as context:
        context.set_input(0, TEXTS[0])
        for _ in range(2):
            with pytest.raises(UnsupportedOperation, match="call compute"):
                context.compute_single()
        assert context.get_output_single(0) == b""
        context.fini_single()
        context.compute()
        assert b"n_embedding" in context.get_output(0)


def test_a_vector_is_not_streamed(make_graph: MakeGraph) -> None:
    with make_graph(**ON, stream_stdout=True).init_execution_context() as context:
        context.set_input(0, TEXTS[0])
        written: list[bytes] = []
        context.compute(stdout=written.append)
        assert written == []
        assert context.get_output(0)


def test_a_fork_embeds_too(make_graph: MakeGraph) -> None:
    with make_graph(**ON).init_execution_context() as context:
        vector = computed(context, TEXTS[0])
        with context.fork() as fork:
            fork.compute()
            np.testing.assert_allclose(json.loads(fork.get_output(0))["embedding"], vector, atol=1e-6)


# What cannot be embedded.


@pytest.mark.parametrize("limits", [{}, {"n_ctx": 128, "batch_size": 500}], ids=["a batch", "a prompt"])
def test_texts_end_at_the_batch_or_the_window(make_graph: MakeGraph, limits: dict[str, int]) -> None:
    n_tokens_max = min(limits.get("batch_size", 64), limits.get("n_ctx", 256) - 4)
    graph = make_graph(prompt_mode="raw", **limits)

    def text(n_tokens: int) -> str:
        vocabulary = graph.model.vocabulary
        n_special = len(vocabulary.tokenize(b"", add_special=True, parse_special=False))
        text = "q" * (n_tokens - n_special)
        assert len(vocabulary.tokenize(text.encode(), add_special=True, parse_special=True)) == n_tokens
        return text

    assert graph.embed([text(n_tokens_max)] * 2).shape[0] == 2
    with pytest.raises(PromptTooLong, match=rf"texts\[1\] has {n_tokens_max + 1} tokens.*{n_tokens_max} at most"):
        graph.embed(["x", text(n_tokens_max + 1)])
    with graph.init_execution_context(ON) as context:
        computed(context, text(n_tokens_max))
        context.set_input(0, text(n_tokens_max + 1))
        with pytest.raises(PromptTooLong):
            context.compute()
        assert context.get_output(0) == b""
        assert context.metadata["input_tokens"] == n_tokens_max + 1
        computed(context, "x")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("one text", "list of texts"),
        (b"one text", "list of texts"),
        (["a", ""], r"texts\[1\] is empty"),
        (["a", None], r"texts\[1\] is a NoneType"),
        ([b"a"], r"texts\[0\] is a bytes"),
    ],
)
def test_what_is_no_text_is_refused(make_graph: MakeGraph, texts: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        make_graph().embed(texts)


def test_an_empty_prompt_has_no_vector(make_graph: MakeGraph) -> None:
    with make_graph(**ON).init_execution_context() as context:
        with pytest.raises(InvalidArgument, match="no prompt"):
            context.compute()
        context.set_input(0, b"")
        with pytest.raises(InvalidArgument, match="empty"):
            context.compute()


# Memory.


def test_the_embedding_context_is_made_once_at_first_use_and_freed_at_unload(
    make_fake_graph: Callable[..., tuple[FakeLlama, Graph]],
) -> None:
    llama, graph = make_fake_graph(FakeLlama())
    contexts = llama.models[0].embedding_contexts
    with graph.init_execution_context(ON) as context, graph.init_execution_context({**ON, "temperature": 1}) as other:
        assert contexts == []
        graph.embed(["a"])
        computed(context, "b")
        computed(other, "c")
        other.run_inference("d", {"embedding": True, "seed": 5})
    graph.embed(["e"])
    assert [context.closed for context in contexts] == [False]
    assert len(llama.models) == 1
    graph.unload()
    assert [context.closed for context in contexts] == [True]
    assert llama.models[0].closed


def test_a_graph_for_embeddings_reserves_no_memory_to_generate(
    make_fake_graph: Callable[..., tuple[FakeLlama, Graph]],
) -> None:
    llama, graph = make_fake_graph(FakeLlama(), embedding=True)
    with graph.init_execution_context() as context:
        computed(context, "a")
    assert llama.models[0].contexts == []
    graph.unload()
    assert [context.closed for context in llama.models[0].embedding_contexts] == [True]


def test_cells_count_against_the_limit_and_are_given_back(
    make_fake_graph: Callable[..., tuple[FakeLlama, Graph]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 512 KiB a token, 64 MiB are 128 tokens."""
    monkeypatch.setattr("tests.fakes.llama.FakeModel.kv_bytes_per_token", lambda *_: 512 << 10)
    limits = {"max_memory_mb": 128, "n_ctx": 128, "max_concurrent": 1, "batch_size": 64}
    llama, graph = make_fake_graph(FakeLlama(), **limits)
    for _ in range(3):  # 64 MiB for the window, 32 MiB for embeddings, each time
        graph.embed(["a"])
        with (
            pytest.raises(InvalidArgument, match=r"65 tokens need 32 MiB.* 96 MiB.* 128") as _,
            graph.init_execution_context({**ON, "batch_size": 65}) as context,
        ):
            computed(context, "a")
        graph.unload()
        llama, graph = make_fake_graph(llama, **limits)


# Stopping.


class Gate:
    """Holds up the first batch."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()

    def open_at_abort(self, context: FakeEmbeddingContext) -> None:
        request_abort = context.request_abort
        context.request_abort = lambda: (request_abort(), self.opened.set())  # type: ignore[method-assign,assignment]

    def __call__(self, texts: Sequence[Sequence[int]]) -> None:
        self.entered.set()
        assert self.opened.wait(30)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


def in_thread(call: Callable[[], Any], gate: Gate) -> tuple[threading.Thread, list[Any]]:
    """Start a call and wait until its batch is computed; the list gets its result or exception."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert gate.entered.wait(30)
    return thread, results


def test_cancel_ends_a_compute_while_its_batch_runs(
    make_fake_graph: Callable[..., tuple[FakeLlama, Graph]], gate: Gate
) -> None:
    _, graph = make_fake_graph(FakeLlama(before_embed=gate), embedding=True)
    context = graph.init_execution_context()
    context.set_input(0, "a")
    thread, results = in_thread(context.compute, gate)
    with pytest.raises(Busy):
        context.compute()
    context.cancel()
    thread.join(30)
    assert isinstance(results[0], Cancelled)
    assert context.get_output(0) == b""
    assert context.metadata["finish_reason"] == "cancelled"
    gate.opened.set()
    computed(context, "b")


@pytest.mark.parametrize("close", ["context", "backend"])
def test_closing_ends_a_compute(
    make_fake_graph: Callable[..., tuple[FakeLlama, Graph]], backends: list[Backend], gate: Gate, close: str
) -> None:
    llama, graph = make_fake_graph(FakeLlama(before_embed=gate), embedding=True)
    context = graph.init_execution_context()
    context.set_input(0, "a")
    thread, results = in_thread(context.compute, gate)
    gate.open_at_abort(llama.models[0].embedding_contexts[0])
    (context if close == "context" else backends[-1]).close()
    thread.join(30)
    assert isinstance(results[0], Cancelled)


def test_closing_the_backend_ends_embed(
    make_fake_graph: Callable[..., tuple[FakeLlama, Graph]], backends: list[Backend], gate: Gate
) -> None:
    llama, graph = make_fake_graph(FakeLlama(before_embed=gate))
    thread, results = in_thread(lambda: graph.embed(["a"] * 500), gate)
    gate.open_at_abort(llama.models[0].embedding_contexts[0])
    backends[-1].close()
    thread.join(30)
    assert isinstance(results[0], Cancelled)
    assert llama.models[0].embedding_contexts[0].closed
    assert llama.models[0].closed
    with pytest.raises(InvalidArgument, match="unloaded"):
        graph.embed(["a"])


def test_unloading_lets_a_running_embed_finish(
    make_fake_graph: Callable[..., tuple[FakeLlama, Graph]], gate: Gate
) -> None:
    llama, graph = make_fake_graph(FakeLlama(before_embed=gate))
    thread, results = in_thread(lambda: graph.embed(["a"] * 100), gate)
    graph.unload()
    gate.opened.set()
    thread.join(30)
    assert results[0].shape == (100, 8)
    assert llama.models[0].closed


def test_an_interrupted_embed_leaves_nothing_behind(
    make_fake_graph: Callable[..., tuple[FakeLlama, Graph]], gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(job: EmbeddingJob, callback: Callable[[], None]) -> None:
        assert gate.entered.wait(30)
        raise KeyboardInterrupt

    llama, graph = make_fake_graph(FakeLlama(before_embed=gate))
    graph.embed([])
    gate.open_at_abort(llama.models[0].embedding_contexts[0])
    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingJob, "when_ready", interrupt)
        with pytest.raises(KeyboardInterrupt):
            graph.embed(["a"] * 10_000)
    assert gate.opened.is_set()  # the batch was aborted
    assert len(graph.embed(["b"])) == 1
    assert llama.models[0].embedding_contexts[0].n_calls == 2


def test_a_failing_llama_is_reported(make_fake_graph: Callable[..., tuple[FakeLlama, Graph]]) -> None:
    def fail(texts: Sequence[Sequence[int]]) -> None:
        raise RuntimeFailure("no memory")

    _, graph = make_fake_graph(FakeLlama(before_embed=fail))
    with pytest.raises(RuntimeFailure, match="no memory"):
        graph.embed(["a"])
    with graph.init_execution_context(ON) as context:
        context.set_input(0, "a")
        with pytest.raises(RuntimeFailure, match="no memory"):
            context.compute()
        assert context.metadata["finish_reason"] == "error"
