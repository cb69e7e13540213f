"""What each key of ``performance`` changes, and ``memory.kv_layout``, on the fake: a token a byte."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.effects import changes
from tests.fakes.llama import FakeLlama
from wasi_nn_backend import Backend, ExecutionContext, Graph
from wasi_nn_backend.llama.interface import DecodeBatch

BASE: dict[str, Any] = {"n_ctx": 256, "max_tokens": 6, "ignore_eos": True, "prompt_mode": "raw", "temperature": 0}


class Recorded:
    """A graph, and how many tokens of how many sequences each of its steps had."""

    def __init__(self, model: Path, config: dict[str, Any]) -> None:
        self.steps: list[tuple[int, int]] = []
        self.backend = Backend({**BASE, **config}, llama=FakeLlama(before_decode=self.record))
        self.graph: Graph = self.backend.load_by_name(model)

    def record(self, batch: DecodeBatch) -> None:
        self.steps.append((len(batch), len(set(batch.sequence_ids))))

    def contexts(self, n: int) -> list[ExecutionContext]:
        made = [self.graph.init_execution_context() for _ in range(n)]
        for i, context in enumerate(made):
            context.set_input(0, chr(65 + i) * 40)
        return made

    def run(self, n: int) -> None:
        """All prompts are set before the first computes."""
        threads = [threading.Thread(target=context.compute) for context in self.contexts(n)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


@pytest.fixture
def load(tiny_model_path: Path) -> Iterator[Callable[..., Recorded]]:
    made: list[Recorded] = []

    def load_one(**config: Any) -> Recorded:
        made.append(Recorded(tiny_model_path, config))
        return made[-1]

    yield load_one
    for each in made:
        each.backend.close()


@changes("performance.batch_processing")
def test_without_batches_there_is_one_sequence_a_step(load: Callable[..., Recorded]) -> None:
    for batch_processing in (True, False):
        recorded = load(performance={"batch_processing": batch_processing, "batch_timeout_ms": 10_000})
        recorded.run(4)
        assert (max(n for _, n in recorded.steps) > 1) == batch_processing


@changes("performance.batch_size")
def test_a_step_has_no_more_tokens_than_the_batch_size(load: Callable[..., Recorded]) -> None:
    for batch_size, longest in ((7, 7), (100, 40)):
        recorded = load(performance={"batch_size": batch_size})
        recorded.run(1)
        assert max(n for n, _ in recorded.steps) in (longest, longest + 1)  # with the token that begins a text


@changes("performance.batch_timeout_ms")
def test_who_comes_first_waits_for_prompts_that_are_set_unless_told_not_to(load: Callable[..., Recorded]) -> None:
    recorded = load(performance={"batch_timeout_ms": 10_000})
    recorded.run(4)
    assert recorded.steps[0][1] == 4
    recorded = load(performance={"batch_timeout_ms": 0})
    first, *_others = recorded.contexts(4)  # which never compute
    first.compute()
    assert recorded.steps[0][1] == 1


@changes("memory.kv_layout")
def test_in_the_unified_layout_more_sequences_share_the_cells(load: Callable[..., Recorded]) -> None:
    short = {"n_ctx": 300_000, "max_concurrent": 4, "max_memory_mb": 64}
    assert load(**short, kv_layout="streams").graph.statistics().n_sequences == 1
    assert load(**short, kv_layout="unified").graph.statistics().n_sequences == 4
