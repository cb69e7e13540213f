"""Ctrl-C while work runs: asked to stop, waited for, and in the end not waited for."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from wasi_nn_backend.cli import interrupts
from wasi_nn_backend.cli.interrupts import Cancellation, run_interruptibly
from wasi_nn_backend.cli.termination import Terminated

WAIT_S = 30.0


def press_ctrl_c() -> None:
    ident = threading.main_thread().ident
    assert ident is not None
    signal.pthread_kill(ident, signal.SIGINT)


def test_the_value_and_the_handler_come_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    assert run_interruptibly(lambda _: 42) == 42
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_comes_back() -> None:
    def fail(_: Cancellation) -> None:
        raise ZeroDivisionError("here")

    with pytest.raises(ZeroDivisionError, match="here"):
        run_interruptibly(fail)


def test_ctrl_c_cancels_and_waits_for_the_end() -> None:
    ended = threading.Event()

    def work(cancellation: Cancellation) -> str:
        asked = threading.Event()
        with cancellation.calling(asked.set):
            press_ctrl_c()
            assert asked.wait(WAIT_S)
        assert cancellation.requested
        ended.set()
        return "the result of work that was told to stop is not the result that was asked for"

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run_interruptibly(work)
    assert ended.is_set()
    assert signal.getsignal(signal.SIGINT) is before


def test_the_request_is_repeated_until_the_work_hears_it() -> None:
    """A cancel that comes before there is something to cancel is lost."""
    heard = threading.Semaphore(0)

    def work(cancellation: Cancellation) -> None:
        with cancellation.calling(heard.release):
            press_ctrl_c()
            for _ in range(3):
                assert heard.acquire(timeout=WAIT_S)

    with pytest.raises(KeyboardInterrupt):
        run_interruptibly(work)


def test_a_hook_that_comes_after_the_request_is_called() -> None:
    cancellation = Cancellation()
    cancellation.request()
    calls = []
    with cancellation.calling(lambda: calls.append(1)):
        assert calls == [1]
    cancellation.request()
    assert calls == [1], "the hook is called after its block has ended"


def test_work_on_another_thread_runs_without_a_handler() -> None:
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(run_interruptibly(lambda _: 1)))
    thread.start()
    thread.join(WAIT_S)
    assert results == [1]


def test_a_second_ctrl_c_does_not_wait() -> None:
    program = """
import threading
from tests.cli.test_interrupts import press_ctrl_c
from wasi_nn_backend.cli.interrupts import run_interruptibly

def work(cancellation):
    asked = threading.Event()
    with cancellation.calling(asked.set):
        press_ctrl_c()
        asked.wait()
        press_ctrl_c()
        threading.Event().wait()

run_interruptibly(work)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_at_the_very_end_is_not_lost(
    number: signal.Signals, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes when the work has ended and nobody reads the pipe any more."""
    close = interrupts._Wakeup.close

    def close_late(wakeup: interrupts._Wakeup) -> set[int]:
        signal.raise_signal(number)
        return close(wakeup)

    monkeypatch.setattr(interrupts._Wakeup, "close", close_late)
    with pytest.raises(error):
        run_interruptibly(lambda _: 42)
