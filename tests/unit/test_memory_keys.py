"""What each key of ``memory`` and ``backend`` changes, on the fake: 64 bytes a cached token, a token a byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.effects import changes
from tests.fakes.llama import FakeLlama
from wasi_nn_backend import Backend, ContextFull, ExecutionContext, Graph

BASE: dict[str, Any] = {
    "n_ctx": 512,
    "threads": 1,
    "max_tokens": 10,
    "ignore_eos": True,
    "prompt_mode": "raw",
    "temperature": 0,
}
MIB = 1 << 20
N_BYTES_PER_TOKEN = 64

LoadGraph = Callable[..., Graph]


@pytest.fixture
def load(tiny_model_path: Path) -> Iterator[LoadGraph]:
    backends: list[Backend] = []

    def load_one(**config: Any) -> Graph:
        backends.append(Backend({**BASE, **config}, llama=FakeLlama()))
        return backends[-1].load_by_name(tiny_model_path)

    yield load_one
    for backend in backends:
        backend.close()


def prompt(name: str) -> str:
    return name * 50


def ask(context: ExecutionContext, name: str) -> int:
    """How many tokens of the prompt were cached."""
    context.run_inference(prompt(name))
    return int(context.metadata["reused_tokens"])


def contexts(graph: Graph, n: int) -> list[ExecutionContext]:
    return [graph.init_execution_context({"cache_salt": str(i)}) for i in range(n)]


@changes("backend.max_concurrent")
def test_max_concurrent_is_how_many_sequences_there_are(load: LoadGraph) -> None:
    assert load(max_concurrent=3).statistics().n_kv_bytes == 3 * 512 * N_BYTES_PER_TOKEN
    assert load(max_concurrent=5).statistics().n_kv_bytes == 5 * 512 * N_BYTES_PER_TOKEN


@changes("memory.max_memory_mb")
def test_max_memory_mb_limits_the_sequences(load: LoadGraph) -> None:
    n_ctx = 40 * MIB // N_BYTES_PER_TOKEN
    # Half of what the threshold leaves is for two windows and a bit, since host memory is to have some.
    assert load(n_ctx=n_ctx, max_memory_mb=220).statistics().n_kv_bytes == 2 * 40 * MIB
    assert load(n_ctx=n_ctx, max_memory_mb=0).statistics().n_kv_bytes == 10 * 40 * MIB


@changes("memory.memory_pressure_threshold")
def test_the_threshold_decides_what_is_left_for_sessions_in_host_memory(load: LoadGraph) -> None:
    for threshold, n_in_host in ((0.8, 0), (0.95, 1)):
        graph = load(
            n_ctx=55 * MIB // N_BYTES_PER_TOKEN,
            max_concurrent=1,
            max_memory_mb=64,
            memory_pressure_threshold=threshold,
        )
        for context, name in zip(contexts(graph, 2), "ab", strict=True):
            ask(context, name)
        assert graph.statistics().n_sessions_in_host == n_in_host


@changes("memory.max_cache_tokens")
def test_max_cache_tokens_is_what_is_kept_at_most(load: LoadGraph) -> None:
    for n_max, keeps_all in ((100, False), (1000, True)):
        graph = load(max_concurrent=2, max_cache_tokens=n_max)
        for context, name in zip(contexts(graph, 4), "abcd", strict=True):
            ask(context, name)
        assert (graph.statistics().n_tokens_cached == 4 * 60) == keeps_all


@changes("memory.cache_strategy")
def test_cache_strategy_chooses_who_leaves_a_stream(load: LoadGraph) -> None:
    for strategy, first_stays in (("lru", True), ("fifo", False)):
        # Nothing is left for host memory: who leaves a stream is forgotten.
        graph = load(
            n_ctx=16 * MIB // N_BYTES_PER_TOKEN,
            max_concurrent=2,
            max_memory_mb=64,
            memory_pressure_threshold=0.5,
            cache_strategy=strategy,
        )
        first, second, third = contexts(graph, 3)
        for context, name in ((first, "a"), (second, "b"), (first, "a"), (third, "c")):
            ask(context, name)
        assert (ask(first, "a") > 0) == first_stays


@changes("memory.cache_deletion_strategy")
def test_cache_deletion_strategy_chooses_who_is_forgotten(load: LoadGraph) -> None:
    for strategy, first_stays in (("lru", True), ("fifo", False)):
        graph = load(
            max_concurrent=4,
            max_cache_tokens=140,
            cache_deletion_strategy=strategy,
            enable_partial_cache_deletion=False,
        )
        first, second, third = contexts(graph, 3)
        for context, name in ((first, "a"), (second, "b"), (first, "a"), (third, "c")):
            ask(context, name)
        assert (ask(first, "a") > 0) == first_stays


@changes("memory.enable_partial_cache_deletion")
def test_a_session_loses_its_tail_or_everything(load: LoadGraph) -> None:
    for partial in (True, False):
        graph = load(max_concurrent=2, max_cache_tokens=100, enable_partial_cache_deletion=partial)
        first, second = contexts(graph, 2)
        ask(first, "a")
        ask(second, "b")
        assert (0 < ask(first, "a") < 50) == partial


@changes("memory.enable_token_cache_reuse", "session.cache_salt")
def test_equal_prompts_are_shared_unless_that_is_off_or_the_salts_differ(load: LoadGraph) -> None:
    for reuse, salts, shares in ((True, "xx", True), (False, "xx", False), (True, "xy", False)):
        graph = load(max_concurrent=2, enable_token_cache_reuse=reuse)
        first, second = (graph.init_execution_context({"cache_salt": salt}) for salt in salts)
        ask(first, "a")
        assert (ask(second, "a") > 0) == shares


@changes("memory.context_shifting", "memory.n_keep_tokens", "memory.n_discard_tokens")
def test_a_full_window_is_shifted_by_so_many_tokens_behind_so_many(load: LoadGraph) -> None:
    window = {"n_ctx": 128, "max_tokens": 300, "max_concurrent": 1}

    def run(**config: Any) -> tuple[str, int]:
        context = load(**window, **config).init_execution_context()
        return context.run_inference("on and on"), int(context.metadata["shifted_tokens"])

    text, n_shifted = run(n_keep_tokens=16, n_discard_tokens=32)
    assert n_shifted
    assert n_shifted % 32 == 0
    assert run(n_keep_tokens=16, n_discard_tokens=48)[1] % 48 == 0
    other_text, other_n_shifted = run(n_keep_tokens=64, n_discard_tokens=32)
    assert other_n_shifted == n_shifted
    assert other_text != text
    with pytest.raises(ContextFull):
        run(context_shifting=False)
