"""Sessions on SmolLM2 that were forked, saved or served from a cache say what they would have said else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.new_process import continue_here, continue_in_a_new_process
from wasi_nn_backend import Backend, ExecutionContext, Graph
from wasi_nn_backend.engine import Engine, Generation, GenerationLimits
from wasi_nn_backend.llama import load_llama
from wasi_nn_backend.llama.interface import ContextParams, DecodeBatch, DecodeStatus, Greedy, Model, ModelParams
from wasi_nn_backend.scheduler import Request

pytestmark = pytest.mark.real

N_CTX = 512
N_GENERATED = 24
#: The layout and the kind of attention would otherwise be measured, and might come out differently in a new process.
CONFIG: dict[str, Any] = {
    "temperature": 0,
    "default_task_timeout_ms": 0,
    "repeat_penalty": 1.0,
    "n_ctx": N_CTX,
    "max_tokens": 24,
    "threads": 2,
    "flash_attention": "off",
    "kv_layout": "streams",
}


def two_turns(graph: Graph) -> ExecutionContext:
    context = graph.init_execution_context()
    context.run_inference("My name is Ada and I live in Lisbon, near the river.")
    context.run_inference("What is my city known for?")
    return context


def test_a_fork_goes_on_as_its_origin_would_have(smollm2_path: Path) -> None:
    """The same cells and the same batches: equal tokens, and no more of them computed. The reference is in a backend of
    its own, since of two that ask the same in one, the second shares the first one's prompt."""
    questions = ["Name one thing to eat there.", "And where do I live?"]
    with Backend(CONFIG) as backend:
        context = two_turns(backend.load_by_name(smollm2_path))
        expected = [continue_here(context, question) for question in questions]
    with Backend(CONFIG) as backend:
        context = two_turns(backend.load_by_name(smollm2_path))
        fork = context.fork()
        continued = [continue_here(fork, questions[0])]
        context.run_inference("Let us talk about the weather instead.")
        continued.append(continue_here(fork, questions[1]))
        assert continued == expected
        assert fork.metadata["reused_tokens"] > fork.metadata["input_tokens"] // 2


def test_restored_in_a_new_process_equals_never_left(smollm2_path: Path, tmp_path: Path) -> None:
    """The same cells and the same batches again: equal tokens, and no more of them computed. One session is saved from
    its stream, one from host memory."""
    config = CONFIG | {"max_concurrent": 1}
    paths = [tmp_path / "asleep", tmp_path / "awake"]
    question = "Tell me what you remember of me."
    with Backend(config) as backend:
        graph = backend.load_by_name(smollm2_path)
        contexts = [two_turns(graph) for _ in paths]
        assert graph.statistics().n_sessions_in_host == 1
        for context, path in zip(contexts, paths, strict=True):
            context.save(path)
        expected = [continue_here(context, question) for context in contexts]
    restored = continue_in_a_new_process(config, paths, question)
    assert restored == expected
    for each in restored:
        assert each.n_tokens_reused > each.n_tokens_input // 2


@pytest.fixture(scope="module")
def model(smollm2_path: Path) -> Iterator[Model]:
    model = load_llama().load_model(ModelParams(path=smollm2_path))
    yield model
    model.close()


def tokens_of(model: Model, text: str) -> list[int]:
    return model.vocabulary.tokenize(text.encode(), add_special=True, parse_special=True)


def test_a_prefix_hit_equals_a_miss(model: Model) -> None:
    """Up to rounding. A prompt whose beginning is cached is decoded in other pieces than a whole one, and attention
    rounds differently for one token than for several: the logits' relative difference is held under 0.1. Where the
    texts part, the two tokens' logits must lie closer together than twice the largest difference that this makes.
    """
    system = "<|im_start|>system\nYou are a patient librarian who knows every book of the town.<|im_end|>\n" * 3
    questions = ["Which book is about whales?", "Who wrote it?", "Name a book about the sea."]
    prompts = [
        tokens_of(model, f"{system}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
        for question in questions
    ]
    context = model.create_context(ContextParams(n_ctx=N_CTX, n_sequences=4, n_threads=2, flash_attention="off"))
    engine = Engine(context, model.vocabulary, time.monotonic)
    try:
        generate(engine, model, 0, prompts[0])
        for n, prompt in enumerate(prompts[1:], 1):
            miss = generate(engine, model, 100 + n, prompt, salt=f"of its own {n}")
            hit = generate(engine, model, n, prompt)
            assert miss.n_tokens_reused == 0
            assert len(tokens_of(model, system)) <= hit.n_tokens_shared < len(prompt)
            check_equal_up_to_rounding(model, prompt, miss, hit)
    finally:
        engine.close()


def generate(engine: Engine, model: Model, session_id: int, prompt: list[int], salt: str = "") -> Request:
    request = Request(id=session_id, session_id=session_id, tokens=list(prompt), salt=salt)
    limits = GenerationLimits(n_tokens_max=N_GENERATED)
    generation = Generation(request, model.create_sampler([Greedy()]), limits, streams=False)
    engine.submit(generation)
    generation.wait()
    assert generation.error is None
    return request


def check_equal_up_to_rounding(model: Model, prompt: list[int], miss: Request, hit: Request) -> None:
    n_same = 0
    while n_same < min(len(miss.tokens), len(hit.tokens)) and miss.tokens[n_same] == hit.tokens[n_same]:
        n_same += 1
    generated = [[token] for token in miss.tokens[len(prompt) : n_same]]
    n = hit.n_tokens_shared
    whole = logits_after(model, [prompt, *generated])
    in_pieces = logits_after(model, [prompt[:n], prompt[n:], *generated])
    difference = float(np.linalg.norm(in_pieces - whole) / np.linalg.norm(whole))
    print(f"{n_same - len(prompt)} equal tokens, relative difference of the logits behind them {difference:.3g}")
    assert difference < 0.1
    if n_same < min(len(miss.tokens), len(hit.tokens)):
        gap = abs(float(whole[miss.tokens[n_same]] - whole[hit.tokens[n_same]]))
        assert gap <= 2 * float(np.abs(in_pieces - whole).max())


def logits_after(model: Model, pieces: list[list[int]]) -> npt.NDArray[np.float32]:
    """Logits, [n_vocab], after tokens that are decoded piece by piece."""
    context = model.create_context(ContextParams(n_ctx=N_CTX, n_sequences=1, n_threads=2, flash_attention="off"))
    batch, n_tokens, row = DecodeBatch(), 0, 0
    for piece in pieces:
        batch.clear()
        row = batch.add(piece, n_tokens, 0, logits_for_last=True)
        assert context.decode(batch) is DecodeStatus.DONE
        n_tokens += len(piece)
    logits = np.array(context.logits(row))
    context.close()
    return logits
