"""Guests that call without end are slowed down; all others never notice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.host.pacing import Pacer


class Machine:
    """A processor with one thread: computing and sleeping both take time."""

    def __init__(self, share: float) -> None:
        self.now_s = 0.0
        self.cpu_s = 0.0
        self.slept_s = 0.0
        self.longest_s = 0.0
        self.pacer = Pacer(share, clock=lambda: self.now_s, cpu_clock=lambda: self.cpu_s, sleep=self.sleep)

    def sleep(self, duration_s: float) -> None:
        assert duration_s > 0
        self.now_s += duration_s
        self.slept_s += duration_s
        self.longest_s = max(self.longest_s, duration_s)

    def call(self, cpu_s: float, waiting_s: float = 0.0) -> None:
        started_s = self.pacer.start()
        self.cpu_s += cpu_s
        self.now_s += cpu_s + waiting_s
        self.pacer.end(started_s)


@given(st.floats(0.01, 1.0), st.lists(st.floats(1e-6, 0.005), min_size=100, max_size=1000))
def test_calls_without_end_get_their_share(share: float, calls: list[float]) -> None:
    machine = Machine(share)
    for cpu_s in calls:
        machine.call(cpu_s)
    assert machine.cpu_s <= 0.1 + share * machine.now_s + 0.02


@given(st.lists(st.tuples(st.floats(0, 0.002), st.floats(0.01, 1.0))))
def test_calls_that_wait_for_a_model_are_not_slowed_down(calls: list[tuple[float, float]]) -> None:
    machine = Machine(0.25)
    for cpu_s, waiting_s in calls:
        machine.call(cpu_s, waiting_s)
    assert machine.slept_s == 0


def test_one_long_call_is_not_paid_for_in_full() -> None:
    machine = Machine(0.25)
    machine.call(10.0)
    assert 0 < machine.slept_s <= 0.1


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5])
def test_a_share_is_a_share(share: float) -> None:
    with pytest.raises(InvalidArgument, match="max_host_share"):
        Pacer(share)


def test_the_first_calls_are_free() -> None:
    machine = Machine(0.25)
    for _ in range(100):
        machine.call(0.0009)
    assert machine.slept_s == 0


def test_time_that_goes_by_gives_back() -> None:
    machine = Machine(0.25)
    for _ in range(1000):
        machine.call(0.001)
    machine.now_s += 10
    slept_s = machine.slept_s
    for _ in range(90):
        machine.call(0.001)
    assert machine.slept_s == slept_s > 0


def test_calls_cost_something_even_where_the_clock_shows_nothing() -> None:
    """wasmtime-py's own work around a call is not on the clock that is read inside of it."""
    machine = Machine(0.25)
    for _ in range(10_000):
        machine.call(0.0)
    assert machine.slept_s > 0
