"""The engine against llama.cpp itself, on SmolLM2: the same tokens, alone and in company."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from wasi_nn_backend import Backend
from wasi_nn_backend.bench.raw_loop import RawLoop
from wasi_nn_backend.engine import Engine, Generation, GenerationLimits
from wasi_nn_backend.llama import load_llama
from wasi_nn_backend.llama.interface import ContextParams, DecodeBatch, Greedy, Model, ModelParams
from wasi_nn_backend.scheduler import Request

pytestmark = pytest.mark.real

N_TOKENS = 64
N_CTX = 512
TOPICS = ("the sea", "a lost dog", "snow", "bread", "trains", "the moon", "a king", "rivers", "chess", "glass")


@pytest.fixture(scope="module")
def model(smollm2_path: Path) -> Iterator[Model]:
    model = load_llama().load_model(ModelParams(path=smollm2_path))
    yield model
    model.close()


def prompt_tokens(model: Model, topic: str) -> list[int]:
    """A prompt of exactly ``N_TOKENS`` tokens about a topic."""
    text = f"<|im_start|>user\nTell me a long story about {topic}. It should have {len(topic)} parts, "
    text += "a beginning that surprises, a middle that worries and an end that comforts; name the people in it. " * 3
    tokens = model.vocabulary.tokenize(text.encode(), add_special=True, parse_special=True)
    assert len(tokens) >= N_TOKENS
    return tokens[:N_TOKENS]


def generate(engine: Engine, model: Model, prompts: list[list[int]]) -> list[list[int]]:
    """``N_TOKENS`` tokens for each prompt, all at once, past any end-of-generation token's neighbours."""
    generations = [
        Generation(
            Request(id=i, session_id=i, tokens=list(prompt)),
            model.create_sampler([Greedy()]),
            GenerationLimits(n_tokens_max=N_TOKENS),
            streams=False,
        )
        for i, prompt in enumerate(prompts)
    ]
    for generation in generations:
        engine.submit(generation)
    for generation in generations:
        generation.wait()
        assert generation.error is None
    for i in range(len(prompts)):
        engine.forget_session(i)
    return [generation.request.tokens[N_TOKENS:] for generation in generations]


def test_greedy_tokens_equal_those_of_a_plain_loop(model: Model, smollm2_path: Path) -> None:
    """One request at a time, so that the batches have the same shapes: then every token must be the same."""
    prompts = [prompt_tokens(model, topic) for topic in TOPICS]
    context = model.create_context(ContextParams(n_ctx=N_CTX, n_sequences=4, n_threads=2))
    engine = Engine(context, model.vocabulary, time.monotonic)
    try:
        mine = [generate(engine, model, [prompt])[0] for prompt in prompts]
    finally:
        engine.close()
    with RawLoop(smollm2_path, n_sequences=1, n_ctx=N_CTX, n_threads=2) as loop:
        plain = [loop.generate([prompt], N_TOKENS)[0] for prompt in prompts]
    for mine_tokens, plain_tokens in zip(mine, plain, strict=True):
        # The engine stops before an end-of-generation token and keeps the last token for the next turn's decode.
        assert len(mine_tokens) >= 8
        assert plain_tokens[: len(mine_tokens)] == mine_tokens
        if len(mine_tokens) < N_TOKENS - 1:
            assert model.vocabulary.is_end_of_generation(plain_tokens[len(mine_tokens)])


def logits_after(model: Model, tokens: list[int], n_chunk: int, company: list[int]) -> npt.NDArray[np.float32]:
    """Logits, [n_vocab], after a prompt decoded in chunks, beside another sequence if ``company`` has tokens."""
    context = model.create_context(ContextParams(n_ctx=N_CTX, n_sequences=2, n_threads=2))
    batch, row = DecodeBatch(), 0
    for first in range(0, len(tokens), n_chunk):
        batch.clear()
        row = batch.add(tokens[first : first + n_chunk], first, 0, logits_for_last=True)
        if company:
            batch.add(company[first : first + n_chunk], first, 1, logits_for_last=False)
        context.decode(batch)
    logits = np.array(context.logits(row))
    context.close()
    return logits


def test_sequences_in_one_batch_do_not_disturb_each_other(model: Model, smollm2_path: Path) -> None:
    """Two guests' streams at once give what each gives alone, with the same seed.

    What rounds differently with the batch's shape is attention: llama.cpp computes it with other kernels for one query
    token than for several, and a prompt that joins a batch beside a generating sequence is cut into one token and the
    rest. A last bit that flips the rounding of an 8-bit activation shows as a relative difference of some 0.02 in the
    logits, and texts may part at a near tie. So: where the logits do not depend on the shape, the texts must be equal;
    where they do, the difference is held under 0.1.
    """
    tokens, company = (prompt_tokens(model, topic) for topic in TOPICS[:2])
    whole = logits_after(model, tokens, N_TOKENS, [])
    shapes = [(1, []), (7, []), (1, company), (N_TOKENS, company)]
    difference = max(
        float(np.linalg.norm(logits_after(model, tokens, n_chunk, beside) - whole) / np.linalg.norm(whole))
        for n_chunk, beside in shapes
    )
    print(f"relative difference of the logits between shapes of the batch: {difference:.3g}")
    assert difference < 0.1
    config = {"temperature": 0.8, "top_k": 40, "seed": 11, "max_tokens": 48, "threads": 2, "max_concurrent": 2}
    questions = ["Tell me a story about the sea.", "Tell me a story about a lost dog."]
    with Backend(config | {"default_task_timeout_ms": 0}) as backend:
        graph = backend.load_by_name(str(smollm2_path))
        apart = []
        for question in questions:
            with graph.init_execution_context() as context:
                apart.append("".join(context.stream(question)))
        start = threading.Barrier(2)

        def stream(question: str) -> str:
            with graph.init_execution_context() as context:
                start.wait()
                return "".join(context.stream(question))

        with ThreadPoolExecutor(2) as threads:
            together = list(threads.map(stream, questions))
    for one, other in itertools.pairwise([apart, together]):
        if difference == 0.0:
            assert one == other
        assert all(text.strip() for text in (*one, *other))
