"""Whatever sessions do side by side, each says what it would say alone: batched, forked, pushed out of its stream,
interrupted, saved, restored, with or without a prefix of its own or of others.

On the fake and on llama.cpp with the tiny model in f32, whose logits hardly depend on who else is in a batch or how a
prompt is cut into pieces. SmolLM2's do: tests/real/test_kv_invariants.py bounds the difference.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import F32_CACHE
from tests.fakes.llama import FakeLlama, FakeModel
from wasi_nn_backend import Backend, EndOfSequence, ExecutionContext, Graph
from wasi_nn_backend.llama.model import NativeModel

N_USERS = 6
N_ACTIONS = 14
N_CTX = 192
N_BYTES_MAX = 64 << 20

CONFIG: dict[str, Any] = {
    "backend": {"max_concurrent": 3},
    "model": {"n_ctx": N_CTX, "threads": 1, "flash_attention": "off"} | F32_CACHE,
    "sampling": {"temperature": 0, "repeat_penalty": 1.0},
    "stopping": {"max_tokens": 12},
    "session": {"prompt_mode": "raw", "special": True},
}
BEGINNING = "You are a friend of all who ask. You answer in a few words, and you never ask back. "


class User:
    """Does at random what users do. Its prompts depend on nothing but its seed and the answers."""

    def __init__(self, graph: Graph, seed: int, folder: Path) -> None:
        self._graph = graph
        self._random = random.Random(seed)
        self._path = folder / f"session {seed}"
        self._context = graph.init_execution_context()
        self._said = ""
        self.answers: list[tuple[str, str]] = []
        self.n_reused = 0

    def act(self) -> None:
        actions: list[Callable[[], None]] = [
            self.ask,
            self.go_on,
            self.go_on,
            self.fork,
            self.save_and_restore,
            self.look,
        ]
        for _ in range(N_ACTIONS):
            self._random.choice(actions)()
        self._context.close()

    def ask(self) -> None:
        """Begins as others do, and leaves their path somewhere."""
        beginning = BEGINNING[: self._random.randrange(len(BEGINNING))]
        self.answer(f"{beginning}What is {self._random.randrange(100)}?")

    def go_on(self) -> None:
        if len(self._said.encode()) > N_CTX // 2:
            self.ask()
        else:
            self.answer(f"{self._said} And {self._random.randrange(10)}?")

    def answer(self, prompt: str) -> None:
        text = self._context.run_inference(prompt)
        self.answers.append((prompt, text))
        self._said = prompt + text
        self.n_reused += self._context.metadata["reused_tokens"]

    def fork(self) -> None:
        """The fork goes on; its origin says something else and leaves."""
        origin, self._context = self._context, self._context.fork()
        with origin:
            if self._random.random() < 0.5:
                origin.run_inference(f"{self._said} Or {self._random.randrange(10)}?")

    def save_and_restore(self) -> None:
        self._context.save(self._path)
        self._context.close()
        self._context = self._graph.restore(self._path)

    def look(self) -> None:
        """Takes a few tokens and then does something else."""
        self._context.set_input(0, f"{self._said[-60:]} Look, {self._random.randrange(10)}")
        with contextlib.suppress(EndOfSequence):
            for _ in range(self._random.randrange(3)):
                self._context.compute_single()


@pytest.fixture(params=["fake", "tiny model"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    # About every hundredth token ends a text of the fake.
    with Backend(CONFIG, llama=FakeLlama(end_every=97) if request.param == "fake" else None) as backend:
        yield backend


def alone(context: ExecutionContext, prompt: str) -> str:
    context.reset()
    return context.run_inference(prompt)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", ["streams", "unified"])
def test_everybody_says_what_they_would_say_alone(
    backend: Backend, tiny_f32_model_path: Path, layout: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Have the accounting believe that memory is short: two windows and three times that in host memory.
    n_bytes = N_BYTES_MAX * 8 // 10 // (4 * 2 * N_CTX)
    for model in (FakeModel, NativeModel):
        monkeypatch.setattr(model, "kv_bytes_per_token", lambda *_: n_bytes)
    memory = {"kv_layout": layout, "max_memory_mb": N_BYTES_MAX >> 20, "max_cache_tokens": 3 * N_CTX}
    with backend.load_by_name_with_config(tiny_f32_model_path, {"memory": memory}) as graph:
        users = [User(graph, 100 * seed + n, tmp_path) for n in range(N_USERS)]
        with ThreadPoolExecutor(N_USERS) as threads:
            for running in [threads.submit(user.act) for user in users]:
                running.result()
        figures = graph.statistics()
    assert sum(user.n_reused for user in users) > 0
    assert figures.n_tokens_shared > 0
    assert figures.n_tokens_evicted > 0
    answers = [answer for user in users for answer in user.answers]
    assert len(answers) > N_USERS * N_ACTIONS // 3
    config = {"memory": {"enable_token_cache_reuse": False, "kv_layout": "streams"}, "backend": {"max_concurrent": 1}}
    with (
        backend.load_by_name_with_config(tiny_f32_model_path, config) as graph,
        graph.init_execution_context() as context,
    ):
        for prompt, text in answers:
            assert text == alone(context, prompt)
