"""Which run's time is over next, and what is kept of runs that are over."""

from __future__ import annotations

import gc
import time
import weakref
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import n_examples
from tests.fakes.llama import FakeLlama, FakeModel
from wasi_nn_backend.engine import Engine, Generation, GenerationLimits
from wasi_nn_backend.engine.deadlines import Deadlines
from wasi_nn_backend.llama.interface import ContextParams, Greedy, ModelParams
from wasi_nn_backend.scheduler import Request

MONTH_S = 2_600_000.0


@pytest.fixture(scope="module")
def model() -> FakeModel:
    return FakeLlama().load_model(ModelParams(Path(__file__)))


def generation(
    model: FakeModel, number: int, limits: GenerationLimits, *, credit_tokens: int | None = None, submitted_s: float = 0
) -> Generation:
    request = Request(number, number, [1, 2, 3], credit_tokens)
    made = Generation(request, model.create_sampler([Greedy()]), limits, streams=False)
    made.submitted_s = submitted_s
    return made


_limits_s = st.one_of(st.none(), st.integers(1, 20).map(float))
_events = st.tuples(st.sampled_from(["add", "add", "forget", "look"]), st.integers(0, 9), _limits_s, _limits_s)


@settings(derandomize=True, deadline=None, max_examples=n_examples(100))
@given(st.lists(_events, max_size=40))
def test_each_limit_is_told_once_and_not_of_a_run_that_is_over(
    model: FakeModel, events: list[tuple[str, int, float | None, float | None]]
) -> None:
    deadlines, now_s = Deadlines(), 0.0
    alive: dict[int, Generation] = {}
    expected: list[tuple[float, int, bool]] = []  # when, whose, whether it is a time-out
    for number, (event, value, duration_max_s, timeout_s) in enumerate(events):
        if event == "add":
            limits = GenerationLimits(duration_max_s=duration_max_s, timeout_s=timeout_s)
            alive[number] = generation(model, number, limits, submitted_s=now_s)
            deadlines.add(alive[number])
            given_s = ((duration_max_s, False), (timeout_s, True))
            expected += [(now_s + limit_s, number, is_timeout) for limit_s, is_timeout in given_s if limit_s]
        elif event == "forget" and alive:
            over = list(alive)[value % len(alive)]
            deadlines.forget(alive.pop(over))
            expected = [entry for entry in expected if entry[1] != over]
            assert len(deadlines) <= 4 * len(alive)
        else:
            now_s += value
            told = [(each.request.id, is_timeout) for each, is_timeout in deadlines.due(now_s)]
            assert told == [(whose, is_timeout) for when_s, whose, is_timeout in sorted(expected) if when_s <= now_s]
            expected = [entry for entry in expected if entry[0] > now_s]
        assert len(deadlines) >= len(expected)


def test_the_engine_keeps_nothing_of_runs_that_are_over_beside_one_with_much_time(model: FakeModel) -> None:
    engine = Engine(
        model.create_context(ContextParams(n_ctx=64, n_sequences=2, n_batch=32)), model.vocabulary, time.monotonic
    )
    over: list[weakref.ref[Generation]] = []
    try:
        # With credit for one token it neither ends nor keeps the others from running.
        engine.submit(generation(model, 0, GenerationLimits(duration_max_s=MONTH_S), credit_tokens=1))
        for number in range(1, 31):
            limits = GenerationLimits(n_tokens_max=1, duration_max_s=2 * MONTH_S, timeout_s=2 * MONTH_S)
            short = generation(model, number, limits)
            engine.submit(short)
            assert short.wait(30)
            over.append(weakref.ref(short))
            del short
        engine.statistics()  # its thread has gone on from the last run
        gc.collect()
        assert sum(each() is not None for each in over) <= 1
    finally:
        engine.close()
