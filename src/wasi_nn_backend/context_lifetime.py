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
        self._closing = threading.Lock()
        self._n_handles = 1
        self._closed_because: str | None = None
        self._beginning = threading.RLock()  # a signal handler that cancels may find its own thread in it
        self._cancelled_with: Cancelled | None = None  # by ``cancel_run``, since the call that is inside began
        self._open_run: AnyRun | None = None  # one that goes on between calls: compute_single's or an iterator's
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
        with self._closing:
            if not self._n_handles:
                return False
            self._n_handles -= 1
            if self._n_handles:
                return True
        self.shut_down(Cancelled("the run was stopped: its execution context was closed"))
        return True

    def shut_down(self, error: Cancelled | None = None) -> None:
        """End it, whoever holds it: its calls end with ``error``, and its cells are free when this returns."""
        with self._closing:
            if self._closed_because is not None:
                return
            self._closed_because = ""  # later calls are refused
        self.cancel_run(error)
        with self._entered:
            self._end_open_run()
            self._give_up_lease(wait=True)
        self.graph.forget(self)

    def remove_if_idle(self, reason: str, *, now_s: float, expired_only: bool) -> bool:
        """Close it for ``reason`` unless somebody works on it. A token-by-token run or an iterator that was used within
        the idle time-out keeps it open; ``expired_only``: so does any use."""
        if not self._entered.acquire(blocking=False):
            return False
        try:
            is_expired = now_s - self.last_used_s >= self.limits.idle_timeout_ms / 1000
            if self._runs_on() or not (is_expired or (self._open_run is None and not expired_only)):
                return False
            with self._closing:
                if self._closed_because is not None:
                    return False
                self._closed_because = reason
            self._end_open_run()
            self._give_up_lease(wait=False)
        finally:
            self._entered.release()
        self.graph.forget(self)
        return True

    def follow_graph(self) -> None:
        """The graph was unloaded or has another model: let go of the old engine, now or when the call that is inside
        returns."""
        if self._entered.acquire(blocking=False):
            self._leave()

    def wait_until_idle(self, timeout_s: float) -> bool:
        """Until no call is inside and no iterator's run goes on; False after ``timeout_s``."""
        deadline_s = self.graph.now_s() + timeout_s
        if not self._entered.acquire(timeout=max(0.0, timeout_s)):
            return False
        run = self._open_run
        self._entered.release()
        if run is None or run.is_single:
            return True
        return run.wait(max(0.0, deadline_s - self.graph.now_s()))

    def _runs_on(self) -> bool:
        """Whether an iterator's run goes on between its reader's calls. A token-by-token run waits for its caller."""
        run = self._open_run
        return run is not None and not run.is_single and run.finish_reason is None

    @contextmanager
    def _enter(self, *, needs_graph: bool = False) -> Iterator[None]:
        with self._beginning:
            if not self._calling.acquire(blocking=False):
                raise Busy(f"execution context {self.id} is working on another call: wait for it or cancel it")
            self._cancelled_with = None  # before it is seen whether this is closed: closing cancels afterwards
        try:
            self._entered.acquire()  # the timer and a reload are no reason to refuse a call
            try:
                if self._closed_because is not None:
                    why = f": {self._closed_because}; make a new context or raise that limit"
                    raise InvalidArgument(f"execution context {self.id} is closed{why if self._closed_because else ''}")
                if needs_graph:
                    self._check_graph()
                yield
            finally:
                self.last_used_s = self.graph.now_s()
                self._leave()
        finally:
            self._calling.release()

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
        """Let the next call in; before and after, see whether the graph has changed meanwhile."""
        while True:
            if self._lease is not None and not self.graph.alive:
                self._end_open_run()
                self._give_up_lease(wait=False)
            elif self._lease is not None and self._version != self.graph.version:
                self._let_go_of_old_model()
            self._entered.release()
            is_settled = self._lease is None or (self.graph.alive and self._version == self.graph.version)
            if is_settled or not self._entered.acquire(blocking=False):
                return

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
