"""Runs a guest on a thread of its own, so that the caller can be interrupted, and says how it ended.

A guest ends by itself, by a trap, or because it is stopped: by its timeout, by Ctrl-C in the main thread, or by
``stop``. Stopping cancels what the host computes for it and raises its engine's epoch, which traps it at its next
loop or call. One thing cannot be stopped: a guest that blocks inside WASI (reading a terminal, sleeping). It is left
behind on its thread after a grace period, with its graphs closed; the thread ends when the call does.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from wasmtime import Trap, WasmtimeError

from wasi_nn_backend.errors import InvalidArgument, RuntimeFailure
from wasi_nn_backend.host.component_guest import open_guest
from wasi_nn_backend.host.guest import Guest, RunConfig
from wasi_nn_backend.host.invoke import InvokeValue
from wasi_nn_backend.host.module_cache import ModuleCache
from wasi_nn_backend.host.state import GuestError

if TYPE_CHECKING:
    from wasi_nn_backend.backend import Backend

__all__ = ["GuestResult", "GuestRunner", "Outcome", "RunConfig", "StartTimer", "StopReason", "Timer", "run_module"]

StopReason = Literal["timeout", "interrupt", "stop"]
Outcome = Literal["exited", "trapped", "timeout", "interrupt", "stop"]

#: What shells report: 128 + SIGABRT, coreutils' timeout, 128 + SIGINT, 128 + SIGTERM.
_EXIT_STATUS: dict[Outcome, int] = {"trapped": 134, "timeout": 124, "interrupt": 130, "stop": 143}

_STOP_REPEAT_S = 0.02
_WAKE_UP_S = 0.25
_GRACE_S = 3.0

_log = logging.getLogger(__name__)


class Timer(Protocol):
    def cancel(self) -> None: ...


#: Calls an action once after some seconds, on any thread, unless cancelled first.
StartTimer = Callable[[float, Callable[[], None]], Timer]


@dataclass(frozen=True, slots=True)
class GuestResult:
    """How a guest ended.

    ``exit_status`` is what a command that ran this guest should exit with. ``reason`` is the trap's text, why the guest
    was stopped, or the error that an invoked function of a component returned. ``last_error`` is its last failed
    WASI-NN call, ``fault`` an exception that was a defect of the host. ``returned`` holds the results of an invoked
    export. ``was_left_behind``: it could not be stopped, see the module.
    """

    outcome: Outcome
    exit_status: int
    reason: str | None = None
    last_error: GuestError | None = None
    fault: BaseException | None = None
    returned: tuple[InvokeValue, ...] = ()
    was_left_behind: bool = False


def run_module(config: RunConfig, backend: Backend) -> GuestResult:
    """Run one module to its end. Raises ``WasiNNError`` only for a module that could not be started."""
    return GuestRunner(config, backend).run()


class GuestRunner:
    """One run. ``run`` blocks the caller; ``stop`` ends the guest from any other thread. Used once.

    ``niceness`` is the least that the guest's thread has on Linux, 0 to 19, and with it what its calls start: not
    engines, but the thread that closes idle contexts, if the guest's is the backend's first.

    Raises ``InvalidArgument`` for a ``timeout_s`` below 0 or not a number; infinity is no limit.
    """

    def __init__(
        self,
        config: RunConfig,
        backend: Backend,
        *,
        modules: ModuleCache | None = None,
        start_timer: StartTimer | None = None,
        grace_s: float = _GRACE_S,
        niceness: int = 0,
    ) -> None:
        self._config = config
        self._timeout_s = _checked_timeout_s(config.timeout_s)
        self._modules = modules
        self._backend = backend
        self._start_timer = start_timer or _start_thread_timer
        self._niceness = niceness
        self._n_stop_repeats = max(1, round(grace_s / _STOP_REPEAT_S))
        self._lock = threading.Lock()
        self._guest: Guest | None = None
        self._stop_reason: StopReason | None = None
        self._was_started = False
        self._wake = threading.Event()  # the guest has ended or is to be stopped
        self._ended = threading.Event()
        self._result: GuestResult | None = None
        self._failure: BaseException | None = None

    def stop(self, reason: StopReason = "stop") -> None:
        """End the guest; the first reason counts. Returns at once; without effect on a guest that has ended."""
        with self._lock:
            self._stop_reason = self._stop_reason or reason
        self._interrupt()
        self._wake.set()

    def run(self) -> GuestResult:
        """Run to the end. Raises ``WasiNNError`` for a module that could not be started."""
        with self._lock:
            if self._was_started:
                raise InvalidArgument("this runner has been used: make one for each run")
            self._was_started = True
        timer: Timer | None = None
        try:
            threading.Thread(target=self._work, name="wasi-nn-guest", daemon=True).start()
            if self._timeout_s is not None:
                timer = self._start_timer(self._timeout_s, lambda: self.stop("timeout"))
            # In slices: where the kernel hands Ctrl-C to another thread, a main thread that waits for a lock sleeps on.
            while not self._wake.wait(_WAKE_UP_S):
                pass
        except KeyboardInterrupt:
            self.stop("interrupt")
        finally:
            if timer is not None:
                timer.cancel()
        if not self._wait_for_end():
            return self._leave_behind()
        if self._failure is not None:
            raise self._failure
        if self._result is None:
            raise RuntimeError("the guest's thread ended without a result")
        return self._result

    def _wait_for_end(self) -> bool:
        """Give a guest that is to be stopped the grace period; returns whether it has ended."""
        try:
            for _ in range(self._n_stop_repeats):
                if self._ended.wait(_STOP_REPEAT_S):
                    return True
                self._interrupt()
        except KeyboardInterrupt:
            _log.info("interrupted a second time: not waiting for the guest any longer")
        return self._ended.is_set()

    def _interrupt(self) -> None:
        with self._lock:
            guest = self._guest
        if guest is not None:
            guest.interrupt()

    def _work(self) -> None:
        guest = None
        _stand_back(self._niceness)
        try:
            guest = open_guest(self._config, self._backend, self._modules)
            with self._lock:
                self._guest = guest
                is_stopped = self._stop_reason is not None
            if is_stopped:
                guest.interrupt()
            ending = _run_guest(guest)
            # A stop that comes while the last output is being delivered no longer changes how the guest ended.
            stop_reason = self._stop_reason
            guest.close()
            self._result = self._describe(guest, stop_reason, *ending)
        except BaseException as error:
            # Raised again where run() was called; a thread has nobody to raise it to.
            self._failure = error
            if guest is not None:
                guest.close()
        finally:
            self._ended.set()
            self._wake.set()

    def _describe(
        self, guest: Guest, stop_reason: StopReason | None, trap_reason: str | None, returned: tuple[InvokeValue, ...]
    ) -> GuestResult:
        outcome: Outcome = "exited"
        exit_status = guest.exit_status or 0
        reason = guest.failure
        if stop_reason is not None:
            # Even if it went on to exit by itself: it did so because its calls were cancelled.
            outcome, reason = stop_reason, self._stop_text(stop_reason)
        elif trap_reason is not None:
            outcome, reason = "trapped", trap_reason
        return GuestResult(
            outcome=outcome,
            exit_status=_EXIT_STATUS.get(outcome, exit_status),
            reason=reason,
            last_error=guest.state.last_error,
            fault=guest.state.fault or guest.output_error,
            returned=returned,
        )

    def _leave_behind(self) -> GuestResult:
        with self._lock:
            guest, stop_reason = self._guest, self._stop_reason or "stop"
        if guest is not None:
            guest.state.close()
        return GuestResult(
            outcome=stop_reason,
            exit_status=_EXIT_STATUS[stop_reason],
            reason=f"{self._stop_text(stop_reason)}; it does not react (blocked in a WASI call) and was left behind",
            last_error=guest.state.last_error if guest else None,
            fault=guest.state.fault if guest else None,
            was_left_behind=True,
        )

    def _stop_text(self, reason: StopReason) -> str:
        if reason == "timeout":
            return f"the guest ran longer than {self._config.timeout_s:g} seconds and was stopped"
        return "the guest was interrupted" if reason == "interrupt" else "the guest was stopped by its host"


def _checked_timeout_s(timeout_s: float | None) -> float | None:
    """What a timer can wait for: Python's have an end, 292 years on Linux, and fail beyond it."""
    if timeout_s is None:
        return None
    if not timeout_s >= 0:  # NaN is neither above nor below
        raise InvalidArgument(f"timeout_s is {timeout_s:g}: give seconds, 0 or more, or None for no limit")
    return min(timeout_s, threading.TIMEOUT_MAX)


def _run_guest(guest: Guest) -> tuple[str | None, tuple[InvokeValue, ...]]:
    """The reason of a trap, or None, and what the entry point returned."""
    try:
        return None, guest.run()
    except RuntimeFailure:
        if guest.state.is_stopped:  # it had no text to return because its calls were cancelled
            return None, ()
        raise
    except (Trap, WasmtimeError) as error:
        return (None if guest.exit_status is not None else _trap_reason(error)), ()


def _trap_reason(error: Trap | WasmtimeError) -> str:
    """wasmtime's text on one line: the cause first, then where it happened."""
    where, separator, cause = str(error).partition("Caused by:")
    if not separator:
        return " ".join(str(error).split())
    frames = [line.strip() for line in where.splitlines()[1:] if line.strip()]
    return " ".join(cause.split()) + (f" (at {frames[0]})" if frames else "")


def _stand_back(niceness: int) -> None:
    """Give the calling thread less of a machine that is fully used. Linux only: elsewhere niceness is a process's."""
    if sys.platform != "linux" or niceness <= os.getpriority(os.PRIO_PROCESS, 0):
        return
    try:
        os.setpriority(os.PRIO_PROCESS, 0, niceness)
    except OSError as error:  # forbidden in some sandboxes: the guest runs all the same
        _log.debug("the guest's thread keeps its priority: %s", error)


def _start_thread_timer(delay_s: float, action: Callable[[], None]) -> Timer:
    timer = threading.Timer(delay_s, action)
    timer.daemon = True
    timer.start()
    return timer
