"""Embeddings of real models: what random weights cannot show."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.host.guests import Driver
from wasi_nn_backend import Backend, Graph, PromptTooLong

pytestmark = pytest.mark.real

#: Two sentences that say nearly the same, and one about something else. Without full stops: the vector is that of the
#: last token, and these models give full stops much the same one.
TRIPLES = [
    ("The cat sat on the mat", "A kitten is lying on the rug", "Trains leave the station at noon"),
    ("How do I bake bread", "What is a good recipe for a loaf of bread", "Who won the football match yesterday"),
    ("The stock market fell sharply today", "Share prices dropped a lot this morning", "My dog likes to swim"),
    ("Paris is the capital of France", "The French capital is Paris", "Bananas are rich in potassium"),
    ("She plays the violin very well", "She is an excellent violinist", "The car needs new tyres"),
    ("The doctor treated the patient", "A physician cared for a sick man", "The rocket reached orbit"),
]
#: 3.6 degrees.
COSINE_OF_THE_SAME = 0.998


@pytest.fixture(scope="module", params=["smollm2_path", "gemma_path"])
def graph(request: pytest.FixtureRequest) -> Iterator[Graph]:
    path: Path = request.getfixturevalue(request.param)
    with Backend(
        {"temperature": 0, "max_tokens": 24, "max_concurrent": 2, "n_ctx": 1024, "default_task_timeout_ms": 0}
    ) as backend:
        yield backend.load_by_name(path)


def test_related_sentences_are_nearer_than_unrelated_ones(graph: Graph) -> None:
    for triple in TRIPLES:
        sentence, related, unrelated = graph.embed(triple)
        assert sentence @ related > sentence @ unrelated + 0.05, triple


def test_batched_is_alone_up_to_the_kernels_rounding(graph: Graph) -> None:
    """llama.cpp computes one row and many rows with different kernels, which round the four bits' products in different
    ways: directions differ by up to 3 degrees (Gemma 3), unrelated sentences' by 30 and more."""
    texts = [sentence for triple in TRIPLES for sentence in triple]
    texts += [". ".join(texts), ". ".join(texts[::-1])]
    vectors = graph.embed(texts)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    alone = np.concatenate([graph.embed([text]) for text in texts])
    assert np.sum(vectors * alone, axis=1).min() > COSINE_OF_THE_SAME


def test_a_text_of_a_whole_batch_and_one_token_more(graph: Graph) -> None:
    text = "word " * 600
    vocabulary = graph.model.vocabulary
    while len(vocabulary.tokenize(text.encode(), add_special=True, parse_special=True)) > 512:
        text = text.removesuffix("word ")
    assert graph.embed([text]).shape == (1, graph.model.n_embd)
    with pytest.raises(PromptTooLong, match="512 at most"):
        graph.embed([text + "word word"])


def test_embedding_beside_generation_changes_neither(graph: Graph) -> None:
    def run(prompt: str) -> str:
        with graph.init_execution_context() as context:
            return context.run_inference(prompt)

    prompts = [question for question, *_ in TRIPLES[:2]]
    texts, vectors = [run(prompt) for prompt in prompts], graph.embed(prompts)
    with ThreadPoolExecutor(3) as threads:
        embeddings = [threads.submit(graph.embed, prompts) for _ in range(2)]
        assert list(threads.map(run, prompts)) == texts
        for future in embeddings:
            assert np.sum(future.result() * vectors, axis=1).min() > COSINE_OF_THE_SAME


def test_a_guest_gets_what_python_gets(smollm2_path: Path) -> None:
    text = TRIPLES[0][0]
    with Backend() as backend:
        backend.register("default", smollm2_path)
        with Driver(backend) as guest:
            context = guest.open(b"default", b'{"embedding": true}')
            document = json.loads(guest.generate(context, text.encode()))
            metadata = json.loads(guest.output(context, 1))
        vector = backend.load_by_name("default").embed([text])[0]
    assert document["n_embedding"] == 576
    np.testing.assert_allclose(document["embedding"], vector, atol=1e-6)
    assert (metadata["input_tokens"], metadata["output_tokens"]) == (6, 0)
