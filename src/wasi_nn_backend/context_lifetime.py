"""Who holds an execution context, who works on it, and until when it lives.

``ExecutionContext`` builds on this. What it has to know: a context has one or more holders, one call at a time, an
engine's lease that follows its graph (which may be unloaded, or get another model), and may be closed from outside
while nobody uses it.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from wasi_nn_backend.config import Layer, Settings
from wasi_nn_backend.config.backend import BackendSettings
from wasi_nn_backend.engine import EngineLease
from wasi_nn_backend.errors import Busy, Cancelled, InvalidArgument
from wasi_nn_backend.home_process import HomeProcess
from wasi_nn_backend.output import FinishReason
from wasi_nn_backend.owning_graph import OwningGraph
from wasi_nn_backend.session import AnyRun

__all__ = ["ContextLifetime", "ContextState"]

#: ``queued``: its run waits for a place in the batch. ``running``: a call works on it, or an iterator's run goes on.
ContextState = Literal["idle", "queued", "running"]


class ContextLifetime(ABC):
    """The part of an execution context that is not about its text."""

    def __init__(self, graph: OwningGraph[Any], context_id: int, layer: Layer) -> None:
        self.graph = graph
        self.id = context_id
        self._layer = layer
        self._version = graph.version  # before all that depends on it: a change in between is seen by the next call
        self.settings: Settings = graph.settings_with(layer)
        self.created_s = self.last_used_s = graph.now_s()
        self._calling = threading.Lock()  # held by the one call that works on this context
        self._entered = threading.Lock()  # and within it this one, which those who only look take for a moment
        self._inside: list[int] = []  # the threads that hold ``_entered`` or are about to
        self._closing = threading.RLock()
        self._n_handles = 1
        self._closed_because: str | None = None
        self._must_free = False  # closed within a call on it, which frees it when it ends
        self._home = HomeProcess()
        self._beginning = threading.RLock()  # a signal handler that cancels may find its own thread in it
        self._cancelled_with: Cancelled | None = None  # by ``cancel_run``, since the call that is inside began
        self._run: AnyRun | None = None  # the last one: a compute's, or a token-by-token run, perhaps under way
        self._open_run: AnyRun | None = None  # one that goes on between calls: compute_single's or an iterator's
        self._abandoned: AnyRun | None = None  # that one, when its iterator is gone and it has not been ended yet
        # An engine that only this context's settings need must not come and go with every compute.
        self._lease: EngineLease | None = graph.lease(self.settings)

    @abstractmethod
    def cancel_run(self, error: Cancelled | None) -> None:
        """End what runs. ``error``: what its caller gets, instead of hearing that it was cancelled."""

    @abstractmethod
    def _end_open_run(self) -> None: ...

    @property
    def limits(self) -> BackendSettings:
        return self.graph.limits

    @property
    def session_id(self) -> str:
        """Its name; empty for contexts that are each their own session."""
        return self.settings.session.session_id

    @property
    def lease(self) -> EngineLease | None:
        """That on its engine; None when it has let go of it: its graph was unloaded, or reloaded and not used since."""
        return self._lease

    @property
    def is_closed(self) -> bool:
        """By its last holder or by a limit."""
        return self._closed_because is not None

    def close(self) -> None:
        """Give this handle back; the last one stops what runs and frees the sequence's cells before returning.

        Raises ``InvalidArgument`` when all handles were given back before. A context that was closed by a limit still
        takes its holders' ``close``.
        """
        if not self.release():
            raise InvalidArgument(f"execution context {self.id} is closed already")

    def retain(self) -> bool:
        """One more handle; False when it is too late for that."""
        with self._closing:
            if self._closed_because is not None:
                return False
            self._n_handles += 1
            return True

    def release(self) -> bool:
        """``close`` that tells whether there was a handle to give back instead of raising."""
        if self._home.is_left:
            self.shut_down()
            return True
        with self._closing:
            if not self._n_handles:
                return False
            self._n_handles -= 1
            if self._n_handles:
                return True
        self.shut_down(Cancelled("the run was stopped: its execution context was closed"))
        return True

    def shut_down(self, error: Cancelled | None = None) -> None:
        """End it, whoever holds it: its calls end with ``error``, and its cells are free when this returns.

        Within a call on it, in its sink or in a signal handler, they are when that call has ended.
        """
        if self._home.is_left:
            self._closed_because = ""  # what there is to free is the parent's
            return
        with self._closing:
            if self._closed_because is not None:
                return
            self._closed_because = ""  # later calls are refused
        self.cancel_run(error)
        if threading.get_ident() in self._inside:
            self._must_free = True
            return
        with self._hold():
            self._free(wait=True)

    def remove_if_idle(self, reason: str, *, now_s: float, expired_only: bool) -> bool:
        """Close it for ``reason`` unless somebody works on it. A token-by-token run or an iterator that was used within
        the idle time-out keeps it open; ``expired_only``: so does any use."""
        with self._hold(timeout_s=0) as is_held:
            if not is_held:
                return False
            is_expired = now_s - self.last_used_s >= self.limits.idle_timeout_ms / 1000
            if self._runs_on() or not (is_expired or (self._read_run is None and not expired_only)):
                return False
            with self._closing:
                if self._closed_because is not None:
                    return False
                self._closed_because = reason
            self._free(wait=False)
        return True

    def settle(self) -> None:
        """See to what has happened to it from outside, now or when the call that is inside returns: its iterator is
        gone, its graph was unloaded or has another model, its own call has closed it."""
        if self._home.is_left or self._is_settled:
            return
        with self._hold(timeout_s=0):
            return  # leaving it settles

    def wait_until_idle(self, timeout_s: float) -> bool:
        """Until no call is inside and no iterator's run goes on; False after ``timeout_s``. Within a call on it, until
        that call's run is over."""
        deadline_s = self.graph.now_s() + timeout_s
        if threading.get_ident() in self._inside:
            run = self._run
        else:
            with self._hold(timeout_s=max(0.0, timeout_s)) as is_held:
                if not is_held:
                    return False
                run = self._read_run
        if run is None or run.is_single:
            return True
        return run.wait(max(0.0, deadline_s - self.graph.now_s()))

    @property
    def _is_abandoned(self) -> bool:
        run = self._open_run
        return run is not None and run is self._abandoned

    @property
    def _read_run(self) -> AnyRun | None:
        """The open run, unless it was abandoned or cancelled: nobody goes on with such a one."""
        run = self._open_run
        if run is None or self._is_abandoned or run.finish_reason is FinishReason.CANCELLED:
            return None
        return run

    def _runs_on(self) -> bool:
        """Whether an iterator's run goes on between its reader's calls. A token-by-token run waits for its caller."""
        run = self._read_run
        return run is not None and not run.is_single and run.finish_reason is None

    @contextmanager
    def _enter(self, *, needs_graph: bool = False) -> Iterator[None]:
        self._home.check()
        with self._beginning:
            if not self._calling.acquire(blocking=False):
                raise Busy(f"execution context {self.id} is working on another call: wait for it or cancel it")
            self._cancelled_with = None  # before it is seen whether this is closed: closing cancels afterwards
        try:
            with self._hold():  # the timer and a reload are no reason to refuse a call
                try:
                    self._check_open()
                    if needs_graph:
                        self._check_graph()
                    yield
                finally:
                    self.last_used_s = self.graph.now_s()
        finally:
            self._calling.release()

    @contextmanager
    def _hold(self, timeout_s: float = -1) -> Iterator[bool]:
        """Hold ``_entered``, and settle what has happened meanwhile; yields False where others did for ``timeout_s``,
        without end below 0. They settle it then.

        Not for a thread that is inside: it would wait for itself. A call in steps may be left by another thread.
        """
        own, is_held = threading.get_ident(), False
        self._inside.append(own)  # before it is so, or a signal handler in between would wait for its own thread
        try:
            is_held = self._entered.acquire(timeout=timeout_s)
            yield is_held
        finally:
            try:
                if is_held:
                    self._leave()
            finally:
                self._inside.remove(own)
                if is_held:
                    self.settle()  # what has happened since it was left, seen by nobody else

    def _check_open(self) -> None:
        if self._closed_because is not None:
            why = f": {self._closed_because}; make a new context or raise that limit" if self._closed_because else ""
            raise InvalidArgument(f"execution context {self.id} is closed{why}")
        if self._is_abandoned:
            self._end_open_run()

    def _check_graph(self) -> None:
        if not self.graph.alive:
            raise InvalidArgument(f'the graph "{self.graph.name}" is unloaded: load it and make a new context')
        self.graph.check_takes_work()
        if self._version != self.graph.version:
            self._take_new_model()

    def _take_new_model(self) -> None:
        """The graph was reloaded: the history goes on with its new model. Raises what leasing an engine raises, and
        again at the next call."""
        version = self.graph.version
        settings = self.graph.settings_with(self._layer)
        lease = self.graph.lease(settings)
        self._let_go_of_old_model()
        self._lease, self.settings, self._version = lease, settings, version

    def _let_go_of_old_model(self) -> None:
        """A token-by-token run under way has a lease of its own and finishes where it began."""
        if self._open_run is None:
            self._give_up_lease(wait=False)
            return
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.release()

    def _leave(self) -> None:
        """Let the next call in, and before it see to what ``settle`` says."""
        try:
            if self._is_abandoned:
                self._end_open_run()
            if self._must_free:
                self._must_free = False
                self._free(wait=True)
            elif self._lease is not None and not self.graph.alive:
                self._end_open_run()
                self._give_up_lease(wait=False)
            elif self._lease is not None and self._version != self.graph.version:
                self._let_go_of_old_model()
        finally:
            self._entered.release()

    @property
    def _is_settled(self) -> bool:
        if self._must_free or self._is_abandoned:
            return False
        return self._lease is None or (self.graph.alive and self._version == self.graph.version)

    def _free(self, *, wait: bool) -> None:
        """Once, by who closed it, holding it, so that others who close find nothing left. ``wait``: for the cells."""
        self._end_open_run()
        self._give_up_lease(wait=wait)
        self.graph.forget(self)

    def _require_lease(self) -> EngineLease:
        if self._lease is None:
            raise InvalidArgument(f'the graph "{self.graph.name}" is unloaded: load it and make a new context')
        return self._lease

    def _give_up_lease(self, *, wait: bool) -> None:
        """Free this session's cells and let the engine go. ``wait``: until the cells are free."""
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.forget_session(self.id, wait=wait)
            lease.release()
