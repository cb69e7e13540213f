"""Many guests at once, each in a store of its own, their work in one batch of the engine.

A worker runs one guest after the other (``runner.py`` gives each its thread, timeout and end) and keeps what has been
compiled (``module_cache.py``). A guest that traps, runs out of something or cannot be stopped costs its own output and
nothing else: the worker goes on, with a new engine where the old one was left behind.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from wasi_nn_backend.errors import InvalidArgument, WasiNNError
from wasi_nn_backend.host.guest import RunConfig
from wasi_nn_backend.host.module_cache import ModuleCache, SharedCode
from wasi_nn_backend.host.runner import GuestResult, GuestRunner, StopReason

if TYPE_CHECKING:
    from wasi_nn_backend.backend import Backend

__all__ = ["GuestOutput", "GuestPool"]

_MIB = 1 << 20
#: Guests that are taken from ``map``'s input before their turn, for each worker: enough to keep them busy.
_N_AHEAD_PER_WORKER = 2
#: In slices: where the kernel hands Ctrl-C to another thread, a main thread that waits for a lock sleeps on.
_WAKE_UP_S = 0.25
#: Less would make the pauses of a guest that calls without end longer than a second.
_HOST_SHARE_MIN = 0.02

#: Of guests' threads, on Linux: a tenth of what the engine's get where both want a core. All of the model's users wait
#: for those, and guests that compute without end would make a step of two threads twice as long.
_NICENESS = 10

_log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class GuestOutput:
    """What became of one guest.

    ``exit_status`` is what a command that ran it alone would exit with; 1 for a guest that could not be started.
    ``error`` says what went wrong; None for a guest that exited with 0. ``result`` is None where it never ran.
    """

    stdout: bytes
    stderr: bytes
    exit_status: int
    error: str | None
    result: GuestResult | None = None


class GuestPool:
    """Runs guests on ``n_workers`` threads. Thread-safe; a context manager that stops what runs and waits for it.

    >>> with GuestPool(backend, n_workers=8) as pool:
    ...     for output in pool.map(RunConfig("ask.wasm", args=["default", line]) for line in lines):
    ...         print(output.stdout.decode())

    A guest's output is captured, up to ``max_output_bytes`` a stream: one that writes more is stopped. It reads
    ``RunConfig.stdin`` or nothing.
    """

    def __init__(
        self, backend: Backend, n_workers: int, *, max_output_bytes: int = 16 * _MIB, use_cache: bool = True
    ) -> None:
        if n_workers < 1:
            raise InvalidArgument(f"a pool of {n_workers} workers runs nothing: give 1 or more")
        self._backend = backend
        self._n_workers = n_workers
        self._max_output_bytes = max_output_bytes
        self._use_cache = use_cache
        self._code = SharedCode()
        self._caches: SimpleQueue[ModuleCache] = SimpleQueue()
        for _ in range(n_workers):
            self._caches.put(self._new_cache())
        self._executor = ThreadPoolExecutor(n_workers, thread_name_prefix="wasi-nn-pool")
        self._lock = threading.Lock()
        self._running: set[GuestRunner] = set()
        self._stop_reason: StopReason | None = None

    def submit(self, config: RunConfig) -> Future[GuestOutput]:
        """Run a guest when a worker is free. Raises ``InvalidArgument`` when the pool is closed."""
        try:
            return self._executor.submit(self._run, config)
        except RuntimeError:
            raise InvalidArgument("the pool is closed: make a new one") from None

    def map(self, configs: Iterable[RunConfig | WasiNNError]) -> Generator[GuestOutput, None, None]:
        """Run a guest for each config; their outputs come in the same order, each as soon as it can.

        ``configs`` is read on a thread of its own, at most two guests a worker ahead of the output that is asked for,
        and may take its time. An error in place of a config is the output of that guest; what reading ``configs``
        raises is raised here, after the outputs before it.
        """
        room = threading.Semaphore(_N_AHEAD_PER_WORKER * self._n_workers)
        pending: SimpleQueue[Future[GuestOutput] | BaseException | None] = SimpleQueue()
        is_over = threading.Event()

        def feed() -> None:
            try:
                source = iter(configs)
                while room.acquire() and not is_over.is_set():
                    pending.put(self._submit_one(next(source)))
            except StopIteration:
                pending.put(None)
            except BaseException as error:  # raised again where the outputs are read
                pending.put(error)

        threading.Thread(target=feed, name="wasi-nn-pool-input", daemon=True).start()
        try:
            while (item := _in_slices(partial(pending.get, timeout=_WAKE_UP_S))) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield _in_slices(partial(item.result, _WAKE_UP_S))
                room.release()
        finally:
            is_over.set()
            room.release()

    def stop(self, reason: StopReason = "stop") -> None:
        """End the guests that run, and those that wait for a worker before they begin. Returns at once."""
        with self._lock:
            self._stop_reason = self._stop_reason or reason
            running = list(self._running)
        for runner in running:
            runner.stop(reason)

    def close(self) -> None:
        """``stop``, and wait until all workers have ended. Idempotent."""
        self.stop()
        self._executor.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _submit_one(self, config: object) -> Future[GuestOutput]:
        if isinstance(config, RunConfig):
            return self.submit(config)
        if not isinstance(config, WasiNNError):
            config = InvalidArgument(f"a guest is described by a RunConfig, got {type(config).__name__}")
        failed: Future[GuestOutput] = Future()
        failed.set_result(_not_started(config))
        return failed

    def _run(self, config: RunConfig) -> GuestOutput:
        modules = self._caches.get()
        stdout, stderr = _Capture(self._max_output_bytes), _Capture(self._max_output_bytes)
        result = None
        try:
            # Together they may take as much of the host's time as one guest alone.
            share = max(_HOST_SHARE_MIN, config.limits.max_host_share / self._n_workers)
            limits = replace(config.limits, max_host_share=share)
            config = replace(config, stdout=stdout.take, stderr=stderr.take, inherit_stdin=False, limits=limits)
            runner = GuestRunner(config, self._backend, modules=modules, niceness=_NICENESS)
            stdout.stop = stderr.stop = runner.stop
            result = self._run_to_end(runner)
        except WasiNNError as error:
            return _not_started(error)
        except Exception as error:
            _log.exception("a defect of the host while it ran a guest, not of the guest: please report it")
            return GuestOutput(b"", b"", 1, f"{type(error).__name__}: {error}")
        finally:
            # A guest that does not end keeps its engine.
            self._caches.put(self._new_cache() if result is not None and result.was_left_behind else modules)
        error_text = _error_of(result)
        if stdout.is_full or stderr.is_full:
            error_text = f"the guest wrote more than {self._max_output_bytes} bytes and was stopped"
        return GuestOutput(bytes(stdout.data), bytes(stderr.data), result.exit_status, error_text, result)

    def _run_to_end(self, runner: GuestRunner) -> GuestResult:
        with self._lock:
            stop_reason = self._stop_reason
            self._running.add(runner)
        try:
            if stop_reason is not None:
                runner.stop(stop_reason)
            return runner.run()
        finally:
            with self._lock:
                self._running.discard(runner)

    def _new_cache(self) -> ModuleCache:
        return ModuleCache(self._code, use_cache=self._use_cache)


class _Capture:
    """One stream's output, up to ``n_bytes_max``; ``stop`` is called when it is full."""

    def __init__(self, n_bytes_max: int) -> None:
        self.data = bytearray()
        self.is_full = False
        self.stop: Callable[[], None] | None = None
        self._n_bytes_max = n_bytes_max

    def take(self, data: bytes) -> None:
        n_free = self._n_bytes_max - len(self.data)
        self.data += data[:n_free]
        if len(data) > n_free and not self.is_full:
            self.is_full = True
            if self.stop is not None:
                self.stop()


def _in_slices(wait: Callable[[], T]) -> T:
    """Call ``wait``, which gives up after a while, until it has something."""
    while True:
        try:
            return wait()
        except (Empty, TimeoutError):
            continue


def _not_started(error: WasiNNError) -> GuestOutput:
    return GuestOutput(b"", b"", 1, f"{error} (code {error.code.value})")


def _error_of(result: GuestResult) -> str | None:
    if result.outcome == "exited" and result.exit_status == 0:
        return None
    if result.outcome == "trapped":
        text = f"the guest trapped: {result.reason}"
    else:
        text = result.reason or f"the guest exited with status {result.exit_status}"
    return text if result.last_error is None else f"{text}; last WASI-NN error: {result.last_error}"
