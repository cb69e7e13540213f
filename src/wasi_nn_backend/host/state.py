"""What the host keeps for one store: the guest's graphs and contexts, its last error, whether it is to stop."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wasi_nn_backend.dialects import Dialect
from wasi_nn_backend.errors import Busy, Cancelled, ErrorCode, WasiNNError
from wasi_nn_backend.handles import HandleTable
from wasi_nn_backend.host.limits import HostLimits

if TYPE_CHECKING:
    from wasi_nn_backend.backend import Backend
    from wasi_nn_backend.execution_context import ExecutionContext
    from wasi_nn_backend.graph import Graph

__all__ = ["GuestError", "GuestState"]

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
    """The host's side of one store. Calls come from the guest's thread; ``stop`` and ``close`` from any.

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
        self.backend = backend
        self.dialect = dialect
        self.limits = limits
        self.write_stdout = write_stdout
        self.graphs: HandleTable[Graph] = HandleTable("graph", limits.max_graphs, "unload one first")
        self.contexts: HandleTable[ExecutionContext] = HandleTable(
            "execution context", limits.max_contexts, "finalize one first"
        )
        self.last_error: GuestError | None = None
        self.fault: BaseException | None = None
        self._lock = threading.Lock()
        self._running: ExecutionContext | None = None
        self._is_stopped = False
        self._is_inside_guest = False

    @property
    def is_stopped(self) -> bool:
        return self._is_stopped

    def stop(self) -> None:
        """Cancel what runs and refuse all further calls. Repeat it until the guest has ended.

        Repeating closes a gap that no flag can: a compute that has been entered but not yet reached the backend's
        queue has nothing to cancel.
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
