"""What the host keeps for one store: the guest's graphs and contexts, its last error, whether it is to stop."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

from wasi_nn_backend.dialects import Dialect
from wasi_nn_backend.errors import (
    Busy,
    Cancelled,
    ErrorCode,
    SecurityViolation,
    TooLarge,
    UnsupportedOperation,
    WasiNNError,
)
from wasi_nn_backend.handles import HandleTable
from wasi_nn_backend.host.limits import Allowance, HostLimits
from wasi_nn_backend.host.pacing import Pacer
from wasi_nn_backend.host.tenant import Tenant

if TYPE_CHECKING:
    from wasi_nn_backend.backend import Backend
    from wasi_nn_backend.execution_context import ExecutionContext
    from wasi_nn_backend.graph import Graph

__all__ = ["PRELOAD_PREFIX", "GuestError", "GuestState"]

#: WasmEdge's way of naming a host file in a builder. Any guest could open any model file with it.
PRELOAD_PREFIX = b"preload:"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GuestError:
    """One failed call as the host knows it; the guest saw ``errno`` only."""

    function: str
    code: ErrorCode
    errno: int
    message: str

    def __str__(self) -> str:
        return f"{self.function}: {self.code.value} ({self.errno}): {self.message}"


class GuestState:
    """The host's side of one store. Calls come from the guest's thread; ``stop`` and ``close`` from any. A context
    manager that closes: graphs and contexts of the guest live until then.

    ``write_stdout`` gets the text of guests that ask for ``stream-stdout``. ``last_error`` is the last failed call,
    the end of a sequence not counted. ``fault`` is the first exception that is a defect of this program, not of the
    guest.
    """

    def __init__(
        self,
        backend: Backend,
        dialect: Dialect,
        *,
        limits: HostLimits,
        write_stdout: Callable[[bytes], None],
    ) -> None:
        self.backend = Tenant(backend, limits)
        self.dialect = dialect
        self.limits = limits
        self.write_stdout = write_stdout
        self.graphs: HandleTable[Graph] = HandleTable("graph", limits.max_graphs, "unload one first")
        self.contexts: HandleTable[ExecutionContext] = HandleTable(
            "execution context", limits.max_contexts, "finalize one first"
        )
        self.held = Allowance(limits.max_held_bytes, "prompts, configuration and tensors")
        self.models = Allowance(limits.max_model_bytes, "models from the guest's memory")
        self.pacer = Pacer(limits.max_host_share)
        self.last_error: GuestError | None = None
        self.fault: BaseException | None = None
        self._lock = threading.Lock()
        self._running: ExecutionContext | None = None
        self._open_runs: set[int] = set()  # handles of contexts with a token-by-token run
        self._is_stopped = False
        self._is_inside_guest = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def is_stopped(self) -> bool:
        return self._is_stopped

    def check_builders(self, head: bytes, n_bytes: int) -> None:
        """May the guest have a model made of builders of ``n_bytes`` together, the first of which begins with ``head``?

        Raises ``SecurityViolation`` (a ``preload:`` path), ``UnsupportedOperation`` (no models of guests here),
        ``TooLarge``, ``Busy``.
        """
        if head.startswith(PRELOAD_PREFIX):
            raise SecurityViolation("load: 'preload:' names a file of the host: register it and load it by name")
        if not self.limits.allow_load_bytes:
            raise UnsupportedOperation("load: this host takes no models from guests: register one and load it by name")
        if n_bytes > self.limits.max_model_bytes:
            raise TooLarge(f"load: {n_bytes} bytes of builders, {self.limits.max_model_bytes} is this host's limit")
        self.models.check(None, n_bytes)

    def may_go_on(self, fraction_loaded: float) -> bool:
        """For ``progress`` of a load: False once the guest is to stop."""
        return not self._is_stopped

    def stop(self) -> None:
        """Cancel what runs and refuse all further calls. Repeat it until the guest has ended.

        Repeating closes a gap that no flag can: a compute that is about to enter its context has nothing to cancel.
        """
        with self._lock:
            self._is_stopped = True
            running = self._running
        if running is not None:
            running.cancel()

    @contextmanager
    def running(self, context: ExecutionContext) -> Iterator[ExecutionContext]:
        """Marks ``context`` as what ``stop`` has to cancel, for the length of the block."""
        with self._lock:
            self.check_not_stopped()
            self._running = context
        try:
            yield context
        finally:
            with self._lock:
                self._running = None

    @contextmanager
    def open_run(self, handle: int) -> Iterator[None]:
        """A step of a token-by-token run on a context; the run is over when the step fails. Raises ``Busy`` when too
        many are open."""
        if handle not in self._open_runs and len(self._open_runs) >= self.limits.max_open_runs:
            raise Busy(
                f"{len(self._open_runs)} token-by-token runs are open, which is this host's limit: read one to its end "
                "or call fini_single"
            )
        self._open_runs.discard(handle)
        yield
        self._open_runs.add(handle)

    def end_run(self, handle: int) -> None:
        """A context has no token-by-token run any more, if it had one."""
        self._open_runs.discard(handle)

    def end_runs_on(self, graph: Graph) -> None:
        """A graph is unloaded, which ends the token-by-token runs of its contexts."""
        self._open_runs = {handle for handle in self._open_runs if self.contexts.get(handle).graph is not graph}

    def check_not_stopped(self) -> None:
        if self._is_stopped:
            raise Cancelled("the host is stopping this guest: nothing more is done for it")

    @contextmanager
    def inside_guest(self) -> Iterator[None]:
        """For the length of the block a call of the guest waits for the guest's own code, which may call nothing."""
        self._is_inside_guest = True
        try:
            yield
        finally:
            self._is_inside_guest = False

    def check_may_call(self) -> None:
        """Raises ``Cancelled`` for a guest that is to end, ``Busy`` for a call out of its own ``malloc``, which could
        go on for as long as there is stack."""
        self.check_not_stopped()
        if self._is_inside_guest:
            raise Busy("the guest's malloc calls WASI-NN while WASI-NN waits for it: allocate without calling back")

    def record_error(self, function: str, error: WasiNNError) -> int:
        """Remember an error for the report about this guest; returns its number."""
        errno = self.dialect.errno(error.code)
        if error.code is not ErrorCode.END_OF_SEQUENCE:
            self.last_error = GuestError(function, error.code, errno, str(error))
            _log.debug("guest call failed: %s", self.last_error)
        return errno

    def record_fault(self, function: str, error: BaseException) -> int:
        """Remember a defect of this program; returns the number for a runtime error."""
        errno = self.dialect.errno(ErrorCode.RUNTIME_ERROR)
        self.last_error = GuestError(function, ErrorCode.RUNTIME_ERROR, errno, f"{type(error).__name__}: {error}")
        if self.fault is None:
            self.fault = error
        if not isinstance(error, Exception):
            # A signal or the interpreter's exit arrived inside the call: the guest must not run on as if nothing
            # were.
            self._is_stopped = True
        _log.error("a defect of the host in %s, not of the guest: please report it", function, exc_info=error)
        return errno

    def close(self) -> None:
        """Close all contexts, then all graphs, newest first, each whatever became of the others. Idempotent."""
        self.stop()
        for context in self.contexts.drain():
            self._close_one("an execution context", context.close)
        for graph in self.graphs.drain():
            self._close_one("a graph", graph.unload)

    def _close_one(self, what: str, close: Callable[[], None]) -> None:
        try:
            close()
        except WasiNNError as error:
            _log.warning("closing %s of a guest that has ended: %s", what, error)
        except Exception as error:
            self.record_fault(f"closing {what}", error)
