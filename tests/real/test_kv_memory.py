"""KV memory on real models: windows that shift, prompts that are shared, sessions that sleep."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from wasi_nn_backend import Backend

pytestmark = pytest.mark.real

N_CTX = 128
GREEDY = {"temperature": 0, "repeat_penalty": 1.0}


@pytest.mark.parametrize("fixture", ["smollm2_path", "gemma_path"])
def test_generation_goes_on_for_four_windows(fixture: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(fixture)
    config = {
        "n_ctx": N_CTX,
        "max_concurrent": 1,
        "default_task_timeout_ms": 0,
        "max_tokens": 4 * N_CTX,
        "ignore_eos": True,
        "prompt_mode": "raw",
    }
    with Backend(config | {"temperature": 0.8, "seed": 5, "n_keep_tokens": 16, "n_discard_tokens": 0}) as backend:
        context = backend.load_by_name(str(path)).init_execution_context()
        text = context.run_inference("Once upon a time there was a ship that")
        assert context.metadata["output_tokens"] == 4 * N_CTX
        assert context.metadata["finish_reason"] == "length"
        assert context.metadata["shifted_tokens"] >= 3 * N_CTX // 2
        tail = text[len(text) // 2 :].split()
        assert len(set(tail)) > len(tail) // 10, "the text after the shifts is one word over and over"


def test_a_system_prompt_is_computed_once_for_all_who_arrive_together(smollm2_path: Path) -> None:
    system = "You are a patient librarian who knows every book of the town and answers in one sentence. " * 12
    config = GREEDY | {"n_ctx": 1024, "max_concurrent": 8, "max_tokens": 6, "system_prompt": system}
    with Backend(config) as backend:
        graph = backend.load_by_name(str(smollm2_path))
        contexts = [graph.init_execution_context() for _ in range(8)]
        with ThreadPoolExecutor(8) as threads:
            texts = list(threads.map(lambda pair: pair[1].run_inference(f"Book {pair[0]}?"), enumerate(contexts)))
        assert all(texts)
        metadata = [context.metadata for context in contexts]
        n_shared = min(each["input_tokens"] for each in metadata) - 20
        n_computed = sum(each["input_tokens"] - each["reused_tokens"] for each in metadata)
        assert n_computed <= n_shared + 8 * 40


def test_sessions_that_share_one_stream_say_what_they_say_in_streams_of_their_own(smollm2_path: Path) -> None:
    names = ["Alice", "Bruno", "Clara"]
    texts = []
    for max_concurrent in (1, 3):
        config = GREEDY | {"n_ctx": 512, "max_concurrent": max_concurrent, "max_tokens": 16}
        with Backend(config | {"enable_token_cache_reuse": False}) as backend:
            graph = backend.load_by_name(str(smollm2_path))
            contexts = [graph.init_execution_context() for _ in names]
            questions = [f"My name is {name}. Greet me, please." for name in names]
            texts.append([context.run_inference(q) for context, q in zip(contexts, questions, strict=True)])
            texts[-1] += [context.run_inference("And now in other words.") for context in contexts]
            for context in contexts:
                assert context.metadata["reused_tokens"] > context.metadata["input_tokens"] // 2
            assert graph.statistics().n_sessions_in_host == (2 if max_concurrent == 1 else 0)
    assert texts[0] == texts[1]
