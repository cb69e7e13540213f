"""Who may wait, and for how long."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.llama import FakeContext, FakeLlama, FakeModel
from wasi_nn_backend.engine import Engine, EngineOptions, Generation, GenerationLimits
from wasi_nn_backend.engine.queue_gate import QueueGate
from wasi_nn_backend.errors import Busy, Cancelled, DeadlineExceeded
from wasi_nn_backend.llama.interface import ContextParams, DecodeBatch, Greedy, ModelParams
from wasi_nn_backend.output import FinishReason
from wasi_nn_backend.scheduler import Request


class Machine:
    """An engine of one sequence whose steps and clock the test moves."""

    def __init__(self, model: FakeModel, **options: object) -> None:
        self.model = model
        self.now_s = 0.0
        self.seconds_per_step = 0.0
        self.may_step = threading.Event()
        context: FakeContext = model.create_context(ContextParams(n_ctx=256, n_sequences=1, n_batch=64))
        context.before_decode = self.step
        self.engine = Engine(context, model.vocabulary, lambda: self.now_s, EngineOptions(**options))  # type: ignore[arg-type]
        self.n_submitted = 0

    def step(self, batch: DecodeBatch) -> None:
        assert self.may_step.wait(30)
        self.now_s += self.seconds_per_step

    def submit(self, *, timeout_s: float | None = None, n_tokens: int = 5) -> Generation:
        self.n_submitted += 1
        request = Request(self.n_submitted, self.n_submitted, [65 + self.n_submitted] * 4)
        limits = GenerationLimits(n_tokens_max=n_tokens, timeout_s=timeout_s)
        generation = Generation(request, self.model.create_sampler([Greedy()]), limits, streams=True)
        self.engine.submit(generation)
        return generation

    def run_first(self) -> Generation:
        """One request that runs and cannot end before ``may_step``."""
        first = self.submit()
        while self.engine_waits():
            pass
        return first

    def engine_waits(self) -> bool:
        return self.engine.n_waiting > 0


@pytest.fixture
def model(tmp_path: Path) -> FakeModel:
    path = tmp_path / "model.gguf"
    path.touch()
    return FakeLlama().load_model(ModelParams(path))


@pytest.fixture
def machines(model: FakeModel) -> Iterator[list[Machine]]:
    made: list[Machine] = []
    yield made
    for machine in made:
        machine.may_step.set()
        machine.engine.close()


def test_one_more_than_may_wait_is_refused_at_once(model: FakeModel, machines: list[Machine]) -> None:
    machine = Machine(model, n_waiting_max=2)
    machines.append(machine)
    runs = [machine.run_first(), machine.submit(), machine.submit()]
    with pytest.raises(Busy, match="2 tasks wait"):
        machine.submit()
    machine.engine.cancel(runs[2])
    machine.may_step.set()
    assert all(run.wait(30) for run in runs)
    assert [run.finish_reason for run in runs] == [FinishReason.LENGTH, FinishReason.LENGTH, FinishReason.CANCELLED]
    assert machine.submit().wait(30)
    assert not machine.engine_waits()


def test_one_warning_for_each_crossing(caplog: pytest.LogCaptureFixture) -> None:
    gate = QueueGate(5, 3)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            gate.enter()
        with pytest.raises(Busy):
            gate.enter()
        assert len(caplog.records) == 1
        for _ in range(3):
            gate.leave()
        for _ in range(3):
            gate.enter()
    assert len(caplog.records) == 2


def test_who_waits_too_long_is_removed_and_never_run(model: FakeModel, machines: list[Machine]) -> None:
    machine = Machine(model)
    machines.append(machine)
    first, late = machine.run_first(), machine.submit(timeout_s=10.0)
    machine.seconds_per_step = 11.0
    machine.may_step.set()
    assert first.wait(30)
    assert late.wait(30)
    assert late.finish_reason is FinishReason.TIMEOUT
    assert isinstance(late.error, DeadlineExceeded)
    assert "still waiting" in str(late.error)
    assert not late.request.has_started
    assert first.finish_reason is FinishReason.LENGTH


def test_without_clean_up_it_is_told_when_its_turn_comes(model: FakeModel, machines: list[Machine]) -> None:
    machine = Machine(model, drops_late_waiting=False)
    machines.append(machine)
    first, late = machine.run_first(), machine.submit(timeout_s=10.0)
    machine.seconds_per_step = 11.0
    machine.may_step.set()
    assert first.wait(30)
    assert late.wait(30)
    assert late.request.has_started
    assert (late.finish_reason, first.finish_reason) == (FinishReason.TIMEOUT, FinishReason.LENGTH)


def test_who_runs_too_long_stops_at_the_next_token_with_the_text_so_far(
    model: FakeModel, machines: list[Machine]
) -> None:
    machine = Machine(model)
    machines.append(machine)
    machine.seconds_per_step = 1.0
    machine.may_step.set()
    run = machine.submit(timeout_s=6.5, n_tokens=50)
    assert run.wait(30)
    assert run.finish_reason is FinishReason.TIMEOUT
    assert "text so far is kept" in str(run.error)
    assert 5 <= run.n_tokens_output <= 7
    assert run.text
    again = machine.submit(n_tokens=3)
    assert again.wait(30)
    assert again.finish_reason is FinishReason.LENGTH


def test_closing_answers_those_that_wait(model: FakeModel, machines: list[Machine]) -> None:
    machine = Machine(model)
    runs = [machine.run_first(), machine.submit(timeout_s=5.0), machine.submit()]
    closer = threading.Thread(target=machine.engine.close)
    closer.start()
    machine.may_step.set()
    closer.join()
    assert all(isinstance(run.error, Cancelled) for run in runs)
    assert not machine.engine_waits()
