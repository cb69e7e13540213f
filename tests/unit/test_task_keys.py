"""What the keys of ``task`` and of the queue in ``backend`` change, on the fake: one sequence, whose steps the test
lets happen."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.doors import both_doors
from tests.effects import changes
from tests.fakes.llama import FakeLlama
from wasi_nn_backend import Backend, Busy, DeadlineExceeded, ExecutionContext, WasiNNError
from wasi_nn_backend.llama.interface import DecodeBatch

door = both_doors(__name__)
BASE: dict[str, Any] = {
    "n_ctx": 512,
    "max_concurrent": 1,
    "max_tokens": 5,
    "ignore_eos": True,
    "prompt_mode": "raw",
    "temperature": 0,
    "performance": {"batch_timeout_ms": 0},
}


class Machine:
    """A backend that is busy with one long run until ``go``; notes in which order prompts were computed."""

    def __init__(self, model: Path, config: dict[str, Any]) -> None:
        self.now_s = 0.0
        self.seconds_per_step = 0.0
        self.steps = threading.Event()
        self.may_step = threading.Event()
        llama = FakeLlama(before_decode=self.step)
        self.backend = Backend({**BASE, **config}, llama=llama, clock=lambda: self.now_s)
        self.graph = self.backend.load_by_name(model)
        self.engine = self.graph.lease(self.graph.settings).engine
        self.order = ""
        self.errors: dict[str, WasiNNError] = {}
        self.contexts: dict[str, ExecutionContext] = {}
        self.threads: list[threading.Thread] = []

    def step(self, batch: DecodeBatch) -> None:
        if len(batch) > 1 and chr(batch.tokens[-1]) not in self.order:
            self.order += chr(batch.tokens[-1])
        self.steps.set()
        assert self.may_step.wait(30)
        self.now_s += self.seconds_per_step

    def start(self, name: str, **config: Any) -> None:
        """Returns when the run waits, or, the first one, runs."""
        context = self.contexts[name] = self.graph.init_execution_context(config)
        context.set_input(0, name * 30)
        n_waiting = self.engine.n_waiting
        self.threads.append(threading.Thread(target=self.run, args=(name, context)))
        self.threads[-1].start()
        if len(self.threads) == 1:
            assert self.steps.wait(30)
        else:
            while self.engine.n_waiting == n_waiting and name not in self.errors:
                pass

    def run(self, name: str, context: ExecutionContext) -> None:
        try:
            context.compute()
        except WasiNNError as error:
            self.errors[name] = error

    def go(self) -> None:
        self.may_step.set()
        for thread in self.threads:
            thread.join()


Load = Callable[..., Machine]


@pytest.fixture
def load(tiny_model_path: Path) -> Iterator[Load]:
    machines: list[Machine] = []

    def load_one(**config: Any) -> Machine:
        machines.append(Machine(tiny_model_path, config))
        return machines[-1]

    yield load_one
    for machine in machines:
        machine.go()
        machine.backend.close()


@changes("task.priority", "backend.priority_scheduling_enabled")
def test_higher_priorities_go_first_unless_that_is_off(load: Load) -> None:
    for enabled, order in ((True, "adcb"), (False, "abcd")):
        machine = load(priority_scheduling_enabled=enabled)
        machine.start("a")
        for name, priority in (("b", "low"), ("c", "normal"), ("d", "high")):
            machine.start(name, priority=priority)
        machine.go()
        assert machine.order == order


@changes("task.user_id", "backend.fair_scheduling_enabled")
def test_users_take_turns_unless_that_is_off(load: Load) -> None:
    for enabled, order in ((True, "adbc"), (False, "abcd")):
        machine = load(fair_scheduling_enabled=enabled)
        for name in "abc":
            machine.start(name, user_id="one")
        machine.start("d", user_id="another")
        machine.go()
        assert machine.order == order


@changes("backend.queue_size", "backend.queue_reject_threshold")
def test_a_full_queue_refuses_at_once(load: Load) -> None:
    for limits, n_refused in (({"queue_size": 2}, 2), ({"queue_reject_threshold": 3}, 1), ({}, 0)):
        machine = load(**limits)
        for name in "abcde":
            machine.start(name)
        assert len(machine.errors) == n_refused
        assert all(isinstance(error, Busy) for error in machine.errors.values())
        machine.go()
        assert len(machine.errors) == n_refused


@changes("backend.queue_warning_threshold")
def test_one_warning_when_so_many_wait(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    for threshold, n_warnings in ((2, 1), (100, 0)):
        machine = load(queue_warning_threshold=threshold)
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            for name in "abcde":
                machine.start(name)
            assert sum("tasks wait" in record.message for record in caplog.records) == n_warnings


@changes("task.timeout_ms", "backend.default_task_timeout_ms")
def test_tasks_end_after_their_time_out(load: Load) -> None:
    for config, ends in (
        ({}, True),
        ({"default_task_timeout_ms": 0}, False),
        ({"default_task_timeout_ms": 50_000}, True),
    ):
        machine = load(**config)
        machine.seconds_per_step = 40.0
        machine.may_step.set()
        machine.start("a", max_tokens=3)
        machine.go()
        assert isinstance(machine.errors.get("a"), DeadlineExceeded) == ends
        assert machine.contexts["a"].get_output()
    machine = load()
    machine.seconds_per_step = 40.0
    machine.may_step.set()
    machine.start("a", max_tokens=3, timeout_ms=600_000)
    machine.go()
    assert machine.errors == {}


@changes("backend.auto_queue_cleanup")
def test_late_tasks_leave_the_queue_or_are_told_when_it_is_their_turn(load: Load) -> None:
    for cleanup, message in ((True, "still waiting"), (False, "was not over")):
        machine = load(auto_queue_cleanup=cleanup)
        machine.start("a", timeout_ms=0, max_tokens=9)
        machine.start("b", timeout_ms=1000)
        machine.seconds_per_step = 0.5
        machine.go()
        assert message in str(machine.errors["b"])
