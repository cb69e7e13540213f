"""A run's text depends on its prompt, settings and seed, not on who else is in its batches."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.llama import FakeLlama
from wasi_nn_backend import Backend, Graph

N_RUNS = 8
#: One way of sampling each, so that a generator or a window that two of them shared would show.
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.9},
    {"temperature": 1.2, "top_k": 0, "top_p": 1.0},
    {"xtc_probability": 0.7, "xtc_threshold": 0.02},
    {"dry_multiplier": 2.0, "dry_allowed_length": 1},
    {"mirostat": 2, "mirostat_tau": 3.0},
    {"mirostat": 1},
    {"dynatemp_range": 0.6, "typical_p": 0.8, "top_n_sigma": 2.0},
    {"temperature": 0.0, "frequency_penalty": 0.5},
]


@pytest.mark.parametrize("llama", ["fake", "native"])
def test_the_same_request_alone_and_among_seven_others(llama: str, tiny_model_path: Path) -> None:
    config = {"n_ctx": 512, "threads": 1, "max_tokens": 100, "ignore_eos": True, "prompt_mode": "raw"}
    with Backend(config | {"max_concurrent": N_RUNS}, llama=FakeLlama() if llama == "fake" else None) as backend:
        graph = backend.load_by_name(tiny_model_path)
        alone = [run(graph, number) for number in range(N_RUNS)]
        assert len(set(alone)) == N_RUNS
        before = graph.statistics()
        start = threading.Barrier(N_RUNS)
        with ThreadPoolExecutor(N_RUNS) as threads:
            together = list(threads.map(lambda number: run(graph, number, start), range(N_RUNS)))
        after = graph.statistics()
    n_steps, n_sequence_steps = after.n_steps - before.n_steps, after.n_sequence_steps - before.n_sequence_steps
    assert n_sequence_steps > 2 * n_steps, "they were not batched"
    assert together == alone


def run(graph: Graph, number: int, start: threading.Barrier | None = None) -> str:
    with graph.init_execution_context({"sampling": SAMPLINGS[number] | {"seed": 40 + number}}) as context:
        if start is not None:
            start.wait()
        return context.run_inference(f"run {number}: the cat sat on the mat")
