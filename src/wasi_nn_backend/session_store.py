"""The open contexts of a backend: how many there may be, and which one goes when there are too many or nobody uses it.

Contexts are looked at from outside here: one that works refuses to go, whatever its place in the order.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from wasi_nn_backend.config.backend import BackendSettings
from wasi_nn_backend.errors import Busy, RuntimeFailure

__all__ = ["SessionPlaces", "SessionStore", "StoredContext"]

_log = logging.getLogger(__name__)

#: The timer looks again after this share of the time-out at the earliest, and after a second at the latest of those
#: waits, so that many contexts that expire one after the other cost one look.
_WAIT_MIN_SHARE = 0.05
_WAIT_MIN_S = 1.0


class StoredContext(Protocol):
    """What the store asks of a context."""

    @property
    def last_used_s(self) -> float: ...

    @property
    def limits(self) -> BackendSettings: ...

    def remove_if_idle(self, reason: str, *, now_s: float, expired_only: bool) -> bool:
        """Close it for ``reason``; False while it works, or is not yet idle for its time-out where that is asked."""


class SessionPlaces(Protocol):
    """What graphs need of the store."""

    def place(self, limits: BackendSettings) -> AbstractContextManager[Callable[[StoredContext], None]]:
        """See ``SessionStore.place``."""

    def discard(self, context: StoredContext) -> None: ...

    def look(self) -> None: ...


class SessionStore:
    """Thread-safe. ``clock`` gives seconds. A thread removes what nobody uses, from the first context on."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._contexts: dict[StoredContext, Hashable] = {}  # and whose they are
        self._n_reserved = 0
        self._closed = False
        self._next_look_s = float("inf")
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        return len(self._contexts)

    @contextmanager
    def place(self, limits: BackendSettings, owner: Hashable = None) -> Iterator[Callable[[StoredContext], None]]:
        """Room for one context that is still to be made; yields what takes it in.

        Closes the least recently used idle context where there is none: one of whoever has most of them, so that nobody
        who opens many costs those their context who have few. Raises ``Busy`` when all are in use, or may not be
        closed, and ``RuntimeFailure`` when the store is closed.
        """
        self._reserve(limits, owner)
        try:
            yield lambda context: self._add(context, owner)
        finally:
            with self._lock:
                self._n_reserved -= 1

    def discard(self, context: StoredContext) -> None:
        """The context is closed."""
        with self._lock:
            self._contexts.pop(context, None)

    def look(self) -> None:
        """Have the timer look at once: time-outs have changed."""
        self._wake.set()

    def remove_expired(self) -> float | None:
        """Close what nobody used for its time-out. Returns the seconds until the next one is due; None for never."""
        now_s = self._clock()
        with self._lock:
            contexts = list(self._contexts)
        due_s, wait_min_s = float("inf"), 0.0
        for context in contexts:
            limits = context.limits
            if not limits.auto_cleanup:
                continue
            timeout_s = limits.idle_timeout_ms / 1000
            expires_s = context.last_used_s + timeout_s
            if expires_s <= now_s:
                reason = f"nobody used it for {timeout_s:g} seconds, which is backend.idle_timeout_ms"
                if context.remove_if_idle(reason, now_s=now_s, expired_only=True):
                    _log.info("an idle execution context was closed: %s", reason)
                    continue
                expires_s = now_s + timeout_s  # it works
            if expires_s < due_s:
                due_s, wait_min_s = expires_s, min(_WAIT_MIN_S, timeout_s * _WAIT_MIN_SHARE)
        with self._lock:
            self._next_look_s = due_s
        return None if due_s == float("inf") else max(due_s - now_s, wait_min_s)

    def close(self) -> None:
        """Refuse new contexts and end the timer. What is open is for others to close. Idempotent."""
        with self._lock:
            self._closed = True
            thread, self._thread = self._thread, None
        self._wake.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _reserve(self, limits: BackendSettings, owner: Hashable) -> None:
        while True:
            with self._lock:
                if self._closed:
                    raise RuntimeFailure("the backend is closed: make a new one")
                if len(self._contexts) + self._n_reserved < limits.max_sessions:
                    self._n_reserved += 1
                    return
                owners = dict(self._contexts)
            if not limits.auto_cleanup:
                raise Busy(
                    f"{limits.max_sessions} execution contexts are open, which is backend.max_sessions, and "
                    "backend.auto_cleanup is off: close one or raise the limit"
                )
            self._remove_one(owners, limits, owner)

    def _remove_one(self, owners: dict[StoredContext, Hashable], limits: BackendSettings, owner: Hashable) -> None:
        """The least recently used of those that let themselves be closed, and not of somebody who has no more of them
        than ``owner``, who needs the place."""
        n_of = Counter(owners.values())
        contexts = [each for each, whose in owners.items() if whose == owner or n_of[whose] > n_of[owner]]
        now_s = self._clock()
        reason = (
            f"it was the least recently used of {limits.max_sessions} open ones, which is backend.max_sessions, when "
            "another one was needed"
        )
        for context in sorted(contexts, key=lambda each: (-n_of[owners[each]], each.last_used_s)):
            if context.limits.auto_cleanup and context.remove_if_idle(reason, now_s=now_s, expired_only=False):
                _log.info("an execution context was closed: %s", reason)
                return
        with self._lock:
            if len(self._contexts) + self._n_reserved < limits.max_sessions:
                return  # others have closed theirs meanwhile
        raise Busy(
            f"{limits.max_sessions} execution contexts are open, which is backend.max_sessions, and all are in use: "
            "close one, try again later or raise the limit"
        )

    def _add(self, context: StoredContext, owner: Hashable) -> None:
        limits = context.limits
        with self._lock:
            if self._closed:
                raise RuntimeFailure("the backend is closed: make a new one")
            self._contexts[context] = owner
            if not limits.auto_cleanup:
                return
            if self._thread is None:
                self._thread = threading.Thread(
                    target=_watch, args=(weakref.ref(self), self._wake), name="wasi-nn-sessions", daemon=True
                )
                self._thread.start()
            expires_s = context.last_used_s + limits.idle_timeout_ms / 1000
            if expires_s < self._next_look_s:
                self._next_look_s = expires_s
                self._wake.set()

    @property
    def is_closed(self) -> bool:
        return self._closed


def _watch(reference: weakref.ref[SessionStore], wake: threading.Event) -> None:
    """The timer's thread. It sleeps until the next context is due, and keeps no backend alive that nobody closed."""
    wait_s: float | None = None
    while True:
        wake.wait(wait_s)
        wake.clear()
        store = reference()
        if store is None or store.is_closed:
            return
        wait_s = store.remove_expired()
        del store
