"""The end of a backend, and what can be seen of it before."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.doors import both_doors
from tests.fakes.llama import FakeLlama
from tests.unit.test_backend import Gate
from wasi_nn_backend import Backend, Cancelled, ExecutionContext, RuntimeFailure
from wasi_nn_backend.engine import Engine

door = both_doors(__name__)
CONFIG: dict[str, Any] = {"temperature": 0, "max_tokens": 20, "threads": 1, "max_concurrent": 2, "n_ctx": 512}


@pytest.fixture
def gate() -> Gate:
    return Gate()


def wait_for_states(contexts: list[ExecutionContext], expected: list[str]) -> None:
    while sorted(context.state for context in contexts) != sorted(expected):
        os.sched_yield()


def wait_until_submitted(contexts: list[ExecutionContext]) -> None:
    while any(context._run is None for context in contexts):
        os.sched_yield()


def test_closing_with_a_grace_time_lets_the_batch_finish(gate: Gate, tiny_model_path: Path) -> None:
    """Two are in the batch and two wait: the first ones get their whole text, the others an error."""
    n_threads = threading.active_count()
    llama = FakeLlama(before_decode=gate)
    with Backend(CONFIG, llama=FakeLlama()) as alone:
        expected = alone.load_by_name(tiny_model_path).init_execution_context().run_inference("Hello")
    backend = Backend(CONFIG, llama=llama)
    graph = backend.load_by_name(tiny_model_path)
    contexts = [graph.init_execution_context() for _ in range(4)]
    idle = graph.init_execution_context()
    with ThreadPoolExecutor(6) as threads, gate:
        running = [threads.submit(context.run_inference, "Hello") for context in contexts[:2]]
        wait_until_submitted(contexts[:2])
        for _ in range(3):
            gate.reached.acquire()
            gate.let_through()
        wait_for_states(contexts[:2], ["running"] * 2)
        waiting = [threads.submit(context.run_inference, "Hello") for context in contexts[2:]]
        gate.reached.acquire()
        wait_for_states(contexts, ["queued"] * 2 + ["running"] * 2)
        closing = threads.submit(backend.close, 60.0)
        while not backend._closed:
            os.sched_yield()
        for call in (
            lambda: idle.run_inference("too late"),
            graph.init_execution_context,
            lambda: backend.load_by_name(tiny_model_path),
            lambda: graph.embed(["x"]),
        ):
            with pytest.raises(RuntimeFailure, match="closed"):
                call()
        gate.open()
        for future in waiting:
            with pytest.raises(Cancelled, match="the backend is closing"):
                future.result(timeout=30)
        assert [future.result(timeout=30) for future in running] == [expected] * 2
        closing.result(timeout=30)
    assert threading.active_count() == n_threads
    assert all(context.closed for model in llama.models for context in model.contexts)


def test_closing_stops_what_is_longer_than_the_grace_time(tiny_model_path: Path, tmp_path: Path) -> None:
    """On real llama.cpp; nothing is left behind, neither threads nor the file of a model that came as bytes."""
    n_threads = threading.active_count()
    backend = Backend(CONFIG | {"max_tokens": 10_000_000, "ignore_eos": True})
    graph = backend.load([tiny_model_path.read_bytes()])
    folder = graph.path.parent
    contexts = [graph.init_execution_context() for _ in range(3)]
    with ThreadPoolExecutor(3) as threads:
        running = [threads.submit(context.run_inference, "For ever") for context in contexts]
        wait_until_submitted(contexts)
        while not any(context.get_output(0) for context in contexts):
            os.sched_yield()
        backend.close(grace_s=0.05)
        for future in running:
            with pytest.raises(Cancelled, match="the backend is closing"):
                future.result(timeout=30)
    assert any(context.get_output(0) for context in contexts)
    assert not folder.exists()
    assert threading.active_count() == n_threads
    backend.close(grace_s=1.0)


def test_all_who_close_return_when_nothing_is_left(gate: Gate, tiny_model_path: Path) -> None:
    llama = FakeLlama(before_decode=gate)
    backend = Backend(CONFIG, llama=llama)
    context = backend.load_by_name(tiny_model_path).init_execution_context()

    def close() -> bool:
        backend.close()
        return all(context.closed for model in llama.models for context in model.contexts)

    with ThreadPoolExecutor(3) as threads, gate:
        running = threads.submit(context.run_inference, "Hello", {"max_tokens": 100_000, "ignore_eos": True})
        gate.reached.acquire()
        closing = [threads.submit(close) for _ in range(2)]
        gate.open()
        assert all(future.result(timeout=30) for future in closing)
        with pytest.raises(Cancelled):
            running.result(timeout=30)


def test_unloading_waits_for_nobody_and_refuses_new_work(gate: Gate, tiny_model_path: Path) -> None:
    with (
        Backend(CONFIG, llama=FakeLlama(before_decode=gate)) as backend,
        ThreadPoolExecutor(1) as threads,
        gate,
    ):
        graph = backend.load_by_name(tiny_model_path)
        context, idle = graph.init_execution_context(), graph.init_execution_context()
        running = threads.submit(context.run_inference, "Last words")
        gate.reached.acquire()
        graph.unload()  # the decode stands still until the gate opens
        for call in (graph.init_execution_context, lambda: idle.run_inference("new"), lambda: graph.embed(["x"])):
            with pytest.raises(Exception, match="unloaded"):
                call()
        gate.open()
        assert running.result(timeout=30)


def test_the_status_is_plain_data(gate: Gate, tiny_model_path: Path) -> None:
    clock = [50.0]
    llama = FakeLlama(before_decode=gate)
    with (
        Backend(CONFIG | {"max_concurrent": 1}, llama=llama, clock=lambda: clock[0]) as backend,
        ThreadPoolExecutor(3) as threads,
        gate,
    ):
        backend.register("default", tiny_model_path)
        graph = backend.load_by_name("default")
        idle = graph.init_execution_context({"session_id": "alice"})
        gate.let_through(100)
        idle.run_inference("Hello", {"max_tokens": 2})
        n_left = 0
        while gate._open.acquire(blocking=False):
            n_left += 1
        assert n_left > 0
        while gate.reached.acquire(blocking=False):
            pass
        clock[0] += 7
        working = [graph.init_execution_context(), graph.init_execution_context()]
        runs = [threads.submit(context.run_inference, "Hello") for context in working]
        gate.reached.acquire()
        wait_for_states(working, ["running", "queued"])
        asked = threads.submit(backend.status)  # answered between two steps
        gate.open()
        status = asked.result(timeout=30)
        row = json.loads(json.dumps(dataclasses.asdict(status)))
        assert [(each["name"], each["model"], each["n_sessions"]) for each in row["graphs"]] == [
            ("default", str(tiny_model_path), 3)
        ]
        assert row["graphs"][0]["engine"]["n_runs"] >= 1
        first = row["sessions"][0]
        assert (first["session_id"], first["graph"], first["state"]) == ("alice", "default", "idle")
        assert first["age_s"] == first["idle_s"] == 7
        assert first["n_tokens_cached"] > 0
        assert row["n_queued"] + row["n_running"] <= 2
        for run in runs:
            run.result(timeout=30)
        assert {each.state for each in backend.status().sessions} == {"idle"}
    assert backend.status().graphs == ()


def test_an_iterator_is_told_that_its_graph_was_unloaded(tiny_model_path: Path) -> None:
    with Backend(CONFIG, llama=FakeLlama()) as backend:
        graph = backend.load_by_name(tiny_model_path)
        pieces = graph.init_execution_context().stream("Hello")
        next(pieces)
        graph.unload()
        with pytest.raises(Cancelled, match="unloading its graph"):
            list(pieces)


def test_the_status_asks_each_engine_once(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    n_tokens_cached = Engine.n_tokens_cached

    def count(engine: Engine, session_ids: Sequence[int]) -> dict[int, int]:
        asked.append(len(session_ids))
        return n_tokens_cached(engine, session_ids)

    monkeypatch.setattr(Engine, "n_tokens_cached", count)
    with Backend(CONFIG, llama=FakeLlama()) as backend:
        graph = backend.load_by_name(tiny_model_path)
        contexts = [graph.init_execution_context() for _ in range(5)]
        contexts.append(graph.init_execution_context({"n_ctx": 256}))
        for context in contexts[1:]:
            context.run_inference("Hello")
        expected = {context.id: context.statistics().n_tokens_cached for context in contexts}
        assert {row.id: row.n_tokens_cached for row in backend.status().sessions} == expected
        assert sorted(asked) == [1, 5]
        assert sum(n_tokens > 0 for n_tokens in expected.values()) == 5
