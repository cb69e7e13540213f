"""Calls in steps, carried out by a thread that blocks; tests/unit/test_async_backend.py has those that no thread waits
for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from wasi_nn_backend.engine import Steps, TextSteps, iterate_steps, run_steps
from wasi_nn_backend.engine.steps import Bell


class Point:
    """Is ready when it is told, by another thread, or raises what a signal would."""

    def __init__(self, interrupt: BaseException | None = None) -> None:
        self.interrupt = interrupt

    def when_ready(self, callback: Callable[[], None]) -> None:
        if self.interrupt is not None:
            raise self.interrupt
        threading.Thread(target=callback).start()

    def cancel(self) -> None:
        raise AssertionError("nobody asked for that")


def counting(n_points: int, ends: list[str], interrupt: BaseException | None = None) -> Steps[int]:
    try:
        for _ in range(n_points):
            yield Point()
        if interrupt is not None:
            yield Point(interrupt)
        return n_points
    finally:
        ends.append("ended")


@pytest.mark.parametrize("n_points", [0, 1, 5])
def test_the_result_is_what_the_steps_return(n_points: int) -> None:
    ends: list[str] = []
    assert run_steps(counting(n_points, ends)) == n_points
    assert ends == ["ended"]


def test_an_interrupt_ends_the_call_before_it_reaches_the_caller() -> None:
    ends: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run_steps(counting(2, ends, KeyboardInterrupt()))
    assert ends == ["ended"]


def test_texts_come_as_they_are_asked_for() -> None:
    done: list[int] = []

    def steps() -> TextSteps:
        try:
            for n in range(5):
                yield Point()
                done.append(n)
                yield str(n)
        finally:
            done.append(-1)

    texts = iterate_steps(steps())
    assert done == []
    assert [next(texts), next(texts)] == ["0", "1"]
    assert done == [0, 1]
    texts.close()  # type: ignore[attr-defined]
    assert done == [0, 1, -1]
    assert list(iterate_steps(steps())) == list("01234")


def test_every_callback_is_made_exactly_once() -> None:
    """Whoever adds one and whoever rings may do so at the same moment."""
    bell, is_time = Bell(), threading.Event()
    n_calls = [0] * 4000

    def add(n: int) -> None:
        def call() -> None:
            n_calls[n] += 1

        bell.add(call)
        if is_time.is_set():
            bell.ring()

    def ring(n: int) -> None:
        if n > 1000:
            is_time.set()
        bell.ring()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda n: ring(n) if n % 3 == 0 else add(n), range(len(n_calls))))
    assert n_calls == [int(n % 3 != 0) for n in range(len(n_calls))]
