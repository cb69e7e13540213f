"""Every task that is over is told of once: in the log, to listeners, and in totals that never fall."""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.llama import FakeLlama
from tests.unit.test_backend import Gate
from wasi_nn_backend import (
    Backend,
    Busy,
    Cancelled,
    DeadlineExceeded,
    EndOfSequence,
    Graph,
    InvalidArgument,
    PromptTooLong,
    WasiNNError,
)
from wasi_nn_backend.config.logging import LoggingSettings
from wasi_nn_backend.logs import LIBRARY_LOGGER, LogEvent, LogOutput
from wasi_nn_backend.tasks import FinishedTask

CONFIG: dict[str, Any] = {
    "sampling": {"temperature": 0, "repeat_penalty": 1.0, "ignore_eos": True},
    "session": {"prompt_mode": "raw"},
    "stopping": {"max_tokens": 6},
    "model": {"n_ctx": 512},
}


class Clock:
    """Stands still unless a test moves it."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def backend(clock: Clock) -> Iterator[Backend]:
    with Backend(CONFIG, llama=FakeLlama(), clock=clock) as backend:
        yield backend


@pytest.fixture
def graph(backend: Backend, tiny_model_path: Path) -> Graph:
    backend.register("model", tiny_model_path)
    return backend.load_by_name("model")


@pytest.fixture
def finished(backend: Backend) -> list[FinishedTask]:
    tasks: list[FinishedTask] = []
    backend.tasks.subscribe(tasks.append)
    return tasks


def lines_of(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name.endswith(".tasks")]


# What a record says.


def test_a_finished_task_has_its_ids_tokens_and_times(
    graph: Graph, finished: list[FinishedTask], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger=LIBRARY_LOGGER)
    context = graph.init_execution_context({"session_id": "a b", "user_id": "Anna", "priority": "high"})
    context.run_inference("hello")
    context.run_inference("hello you")
    (_, task), (_, line) = finished, lines_of(caplog)
    (identity, figures) = (task.identity, task.figures)
    assert (identity.graph, identity.context_id) == ("model", context.id)
    assert (identity.session_id, identity.user_id, identity.priority) == ("a b", "Anna", "high")
    assert (task.reason, task.error, identity.kind) == ("length", "", "text")
    metadata = context.metadata
    assert figures.n_tokens_prompt == metadata["input_tokens"]
    assert figures.n_tokens_cached == metadata["reused_tokens"] > 0
    assert figures.n_tokens_generated == 6
    assert figures.n_tokens_computed == figures.n_tokens_prompt - figures.n_tokens_cached + 6 - 1
    text = line.getMessage()
    assert text.startswith(f"task finished request={identity.request_id} kind=text graph=model context={context.id} ")
    assert 'session="a b" user=Anna priority=high reason=length tokens_prompt=' in text
    assert text.endswith("waited_ms=0.0 first_token_ms=0.0 total_ms=0.0")
    assert "error" not in text


def test_times_count_from_the_submission(clock: Clock, tiny_model_path: Path) -> None:
    """The clock moves while the first one's first decode is held, and the second one waits for its place."""
    gate = Gate()
    config = CONFIG | {"backend": {"max_concurrent": 1}}
    with Backend(config, llama=FakeLlama(before_decode=gate), clock=clock) as backend, ThreadPoolExecutor(2) as threads:
        tasks: list[FinishedTask] = []
        backend.tasks.subscribe(tasks.append)
        graph = backend.load_by_name(tiny_model_path)
        first, second = graph.init_execution_context(), graph.init_execution_context()
        runs = [threads.submit(first.run_inference, "one")]
        gate.reached.acquire()
        runs.append(threads.submit(second.run_inference, "two"))
        while second.state != "queued":
            os.sched_yield()
        clock.now_s += 2.0
        gate.open()
        for run in runs:
            run.result(timeout=30)
    by_context = {task.identity.context_id: task.figures for task in tasks}
    assert by_context[first.id].waited_s == 0.0
    assert by_context[first.id].first_token_s == by_context[first.id].duration_s == 2.0
    assert by_context[second.id].waited_s == 2.0


def test_json_lines_have_members(graph: Graph, capsys: pytest.CaptureFixture[str]) -> None:
    output = LogOutput(LoggingSettings(level="info", format="json"))
    try:
        graph.init_execution_context({"enable_log": True, "user_id": "Bjørn\n"}).run_inference("hello")
    finally:
        output.close()
    (line,) = [json.loads(text) for text in capsys.readouterr().err.splitlines()]
    assert (line["message"], line["level"], line["logger"]) == ("task finished", "info", "wasi_nn_backend.tasks")
    assert (line["reason"], line["user"], line["error"]) == ("length", "Bjørn\n", None)
    assert line["tokens_generated"] == 6
    assert line["total_ms"] == 0.0


@given(st.dictionaries(st.sampled_from(["a", "b_c"]), st.text() | st.integers() | st.floats(allow_nan=False)))
def test_a_text_line_is_one_line_from_which_programs_get_every_value(fields: dict[str, Any]) -> None:
    line = str(LogEvent("said", fields))
    assert len(line.splitlines()) == 1
    assert all(character.isprintable() for character in line)
    pairs = re.findall(r' (\w+)=("(?:[^"\\]|\\.)*"|\S+)', line)
    assert "said" + "".join(f" {key}={value}" for key, value in pairs) == line
    read = {key: json.loads(value) if value.startswith('"') else value for key, value in pairs}
    assert read == {key: value if isinstance(value, str) else str(value) for key, value in fields.items()}


def test_nothing_is_made_of_a_task_that_nobody_asks_for(
    graph: Graph, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a record was made")

    monkeypatch.setattr("wasi_nn_backend.tasks.FinishedTask", fail)
    caplog.set_level(logging.INFO, logger=LIBRARY_LOGGER)
    assert graph.init_execution_context().run_inference("hello")


# Each end, once.


def test_each_reason_is_told_once(
    backend: Backend, graph: Graph, finished: list[FinishedTask], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger=LIBRARY_LOGGER)
    context = graph.init_execution_context()
    context.run_inference("to its end")
    with pytest.raises(PromptTooLong):
        context.run_inference("x" * 1000)
    with pytest.raises(InvalidArgument):
        graph.init_execution_context().compute()  # without a prompt
    iterator = context.stream("and then nobody listens")
    next(iterator)
    iterator.close()
    context.set_input(0, "token by token")
    for _ in range(6):
        context.compute_single()
    with pytest.raises(EndOfSequence):
        context.compute_single()
    context.fini_single()
    context.compute_single()
    context.close()
    told = [(task.reason, task.error) for task in finished]
    assert told == [
        ("length", ""),
        ("refused", "prompt_too_long"),
        ("refused", "invalid_argument"),
        (told[3][0], ""),
        ("length", ""),
        (told[5][0], ""),
    ]
    assert {told[3][0], told[5][0]} <= {"cancelled", "length"}
    assert [line.getMessage().partition(" ")[0] for line in lines_of(caplog)] == ["task"] * 6
    assert len({task.identity.request_id for task in finished}) == 6
    assert sum(backend.tasks.totals()[0].n_by_reason.values()) == 6


def test_timeouts_and_refusals_of_a_full_queue(clock: Clock, tiny_model_path: Path) -> None:
    gate = Gate()
    limits = {"max_concurrent": 1, "queue_size": 1, "default_task_timeout_ms": 1000}
    with Backend(CONFIG | {"backend": limits}, llama=FakeLlama(before_decode=gate), clock=clock) as backend:
        tasks: list[FinishedTask] = []
        backend.tasks.subscribe(tasks.append)
        graph = backend.load_by_name(tiny_model_path)
        running, waiting, refused = (graph.init_execution_context() for _ in range(3))
        with ThreadPoolExecutor(2) as threads:
            runs = [threads.submit(running.run_inference, "runs")]
            gate.reached.acquire()
            runs.append(threads.submit(waiting.run_inference, "waits"))
            while waiting.state != "queued":
                os.sched_yield()
            with pytest.raises(Busy):
                refused.run_inference("too many")
            assert backend.tasks.totals()[0].n_open == 2
            clock.now_s += 1.5
            gate.open()
            errors = [type(run.exception(timeout=30)) for run in runs]
        assert errors == [DeadlineExceeded] * 2
        by_context = {task.identity.context_id: task for task in tasks}
        assert by_context[refused.id].error == "busy"
        assert by_context[refused.id].figures.waited_s is None
        assert by_context[running.id].reason == by_context[waiting.id].reason == "timeout"
        assert by_context[waiting.id].figures.waited_s == by_context[waiting.id].figures.duration_s == 1.5
        assert by_context[waiting.id].figures.n_tokens_computed == 0
        assert Counter(task.reason for task in tasks) == backend.tasks.totals()[0].n_by_reason


def test_what_is_cut_off_by_the_closing_backend_is_told(tiny_model_path: Path) -> None:
    gate = Gate()
    tasks: list[FinishedTask] = []
    with Backend(CONFIG, llama=FakeLlama(before_decode=gate)) as backend, ThreadPoolExecutor(2) as threads:
        backend.tasks.subscribe(tasks.append)
        graph = backend.load_by_name(tiny_model_path)
        running = threads.submit(graph.init_execution_context().run_inference, "runs")
        gate.reached.acquire()
        closing = threads.submit(backend.close)
        gate.open()
        closing.result(timeout=30)
        assert isinstance(running.exception(timeout=30), Cancelled)
    assert [task.reason for task in tasks] == ["cancelled"]


def test_embeddings_are_tasks(graph: Graph, finished: list[FinishedTask]) -> None:
    graph.embed(["one text", "another"])
    with pytest.raises(InvalidArgument):
        graph.embed([""])
    context = graph.init_execution_context({"embedding": True})
    context.run_inference("a vector")
    assert [(task.identity.kind, task.reason) for task in finished] == [
        ("embedding", "stop"),
        ("embedding", "refused"),
        ("embedding", "stop"),
    ]
    assert [task.identity.context_id for task in finished] == [0, 0, context.id]
    assert finished[0].figures.n_tokens_computed == finished[0].figures.n_tokens_prompt > 2
    assert finished[0].figures.waited_s is None


def test_a_listener_that_fails_costs_nobody_an_answer(
    backend: Backend, graph: Graph, finished: list[FinishedTask], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: FinishedTask) -> None:
        raise ValueError("broken")

    backend.tasks.unsubscribe(finished.append)
    backend.tasks.subscribe(fail)
    backend.tasks.subscribe(finished.append)
    assert graph.init_execution_context().run_inference("hello")
    assert len(finished) == 1
    assert any("listener" in record.getMessage() for record in caplog.records)


# Totals.


def test_totals_of_a_name_outlive_its_graphs_and_count_what_is_not_over(backend: Backend, graph: Graph) -> None:
    context = graph.init_execution_context()
    context.run_inference("one")
    context.set_input(0, "two")
    context.compute_single()
    (now,) = backend.status().tasks
    assert (now.graph, now.n_open, now.n_by_reason) == ("model", 1, {"length": 1})
    assert now.n_tokens_generated > 6
    graph.unload()
    (later,) = backend.status().tasks
    assert later.n_open == 0
    assert sum(later.n_by_reason.values()) == 2
    assert later.n_tokens_generated >= now.n_tokens_generated
    assert later.n_tokens_computed >= now.n_tokens_computed
    with backend.load_by_name("model") as again:
        again.init_execution_context().run_inference("three")
    (end,) = backend.status().tasks
    assert end.n_tokens_generated == later.n_tokens_generated + 6


def test_many_threads_lose_no_task(backend: Backend, graph: Graph, finished: list[FinishedTask]) -> None:
    n_threads, n_calls = 8, 12

    def work(number: int) -> list[str]:
        reasons = []
        with graph.init_execution_context() as context:
            for call in range(n_calls):
                prompt = "x" * 1000 if (number + call) % 4 == 0 else f"{number} asks {call}"
                try:
                    context.run_inference(prompt)
                    reasons.append("length")
                except WasiNNError:
                    reasons.append("refused")
        return reasons

    with ThreadPoolExecutor(n_threads) as threads:
        expected = Counter(reason for reasons in threads.map(work, range(n_threads)) for reason in reasons)
    (totals,) = backend.tasks.totals()
    assert Counter(task.reason for task in finished) == expected == totals.n_by_reason
    assert totals.n_open == 0
    assert totals.n_tokens_generated == 6 * expected["length"]
    engine = graph.statistics()
    assert totals.n_tokens_computed == engine.n_tokens_decoded, "each token of a batch belongs to a task"
    assert totals.n_tokens_prompt == engine.n_tokens_prompt
    assert totals.n_tokens_cached == engine.n_tokens_reused


# The status.


def test_the_status_has_every_engine_once(backend: Backend, graph: Graph, tiny_model_path: Path) -> None:
    same = backend.load_by_name("model")
    other = same.init_execution_context({"n_ctx": 256})
    status = backend.status()
    ids = [engine.id for engine in status.engines]
    assert len(ids) == len(set(ids)) == 2
    assert {row.engine.id for row in status.graphs} == {ids[0]}
    assert {engine.model for engine in status.engines} == {str(tiny_model_path)}
    assert [engine.n_cells for engine in status.engines] == [10 * 512, 10 * 256]
    other.close()
    assert [engine.id for engine in backend.status().engines] == ids[:1]
