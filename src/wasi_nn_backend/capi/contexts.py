"""The execution contexts of one C host by number. A session has one number, however often it is opened."""

from __future__ import annotations

import threading
from collections.abc import Callable

from wasi_nn_backend.errors import Busy
from wasi_nn_backend.execution_context import ExecutionContext
from wasi_nn_backend.handles import HandleTable
from wasi_nn_backend.types import CONFIG_INDEX

__all__ = ["ContextTable"]

_N_CONTEXTS_MAX = 1 << 20
_N_CLOSED_KEPT = 1024


class ContextTable:
    """Thread-safe. Each opening needs its ``close``: a handle is valid until the last one.

    C programs compare numbers, and a server asks for a session at each request: a number for each opening would make
    one session look like many, and fill the table. Once a limit has closed a session, the next opening makes a new
    context under a new number, since the conversation is not the same. The old number can be read and closed. Such
    servers never close, so of all numbers of contexts that a limit has closed or whose graph is unloaded, the
    ``n_closed_kept`` that were used last stay valid, or a few more.
    """

    def __init__(self, n_closed_kept: int = _N_CLOSED_KEPT) -> None:
        self._handles: HandleTable[ExecutionContext] = HandleTable(
            "execution context", _N_CONTEXTS_MAX, "close one", first_handle=1
        )
        self._lock = threading.Lock()
        self._n_openings: dict[int, int] = {}
        self._of_session: dict[ExecutionContext, int] = {}
        self._by_name: dict[str, ExecutionContext] = {}  # the last one that was opened
        self._n_closed_kept = self._n_handles_to_look_at = n_closed_kept

    def __contains__(self, handle: int) -> bool:
        return handle in self._n_openings

    def get(self, handle: int) -> ExecutionContext:
        """Raises ``InvalidArgument`` for a number that was never given out or is closed."""
        return self._handles.get(handle)

    def last_opened(self, session_id: str) -> ExecutionContext | None:
        """The session of this name, perhaps one that a limit has closed; None when no handle to it is open."""
        with self._lock:
            return self._by_name.get(session_id)

    def add(self, make: Callable[[], ExecutionContext]) -> int:
        """The handle of the context that ``make`` opens. Raises what that raises, and ``Busy`` for too many."""
        dropped: list[ExecutionContext] = []
        with self._handles.reserve() as publish:
            context = make()
            with self._lock:
                handle = self._of_session.get(context)
                if handle is None:
                    dropped = self._drop_old_ones()
                    handle = publish(context)
                    self._n_openings[handle] = 0
                    self._remember(context, handle)
                self._n_openings[handle] += 1
        for old in dropped:
            old.shut_down()  # of an unloaded graph: nobody else is left to close it
        return handle

    def configure(self, handle: int, config: bytes) -> None:
        """Input 1: configuration, which may name the session that the handle is to stand for from then on.

        A handle that was opened more than once keeps its session. Raises what ``Graph.configure`` raises.
        """
        context = self.get(handle)
        with self._lock:
            is_shared = self._n_openings.get(handle, 0) > 1
        if is_shared:
            context.set_input(CONFIG_INDEX, config)
            return
        is_held = context.retain()  # for somebody who opens this session meanwhile, and gets this handle
        try:
            other = context.graph.configure(context, config)
        except BaseException:
            if is_held:
                context.release()
            raise
        is_taken = other is not context and not self._move(handle, context, other)
        if is_taken:
            other.release()
        if is_held and not (is_taken and handle in self):
            context.release()
        if is_taken:
            self.get(handle)  # raises where it was closed meanwhile
            raise Busy(f"execution context {handle} was opened by another caller meanwhile: it keeps its session")

    def _move(self, handle: int, context: ExecutionContext, other: ExecutionContext) -> bool:
        """Let the handle stand for ``other``, unless it was opened again or closed."""
        with self._lock:
            if self._n_openings.get(handle) != 1:
                return False
            self._handles.replace(handle, other)
            self._forget(context, handle)
            self._remember(other, handle)
            return True

    def close(self, handle: int) -> None:
        """Take one opening back; the last one closes the handle. Raises ``InvalidArgument`` when it is closed."""
        with self._lock:
            context = self._handles.get(handle)
            self._n_openings[handle] -= 1
            if not self._n_openings[handle]:
                self._drop(context, handle)
        context.close()

    def drain(self) -> list[ExecutionContext]:
        """Take everything out."""
        with self._lock:
            self._n_openings.clear()
            self._of_session.clear()
            self._by_name.clear()
            return self._handles.drain()

    def _drop_old_ones(self) -> list[ExecutionContext]:
        """Looks when there are twice as many handles as were left the last time: each is looked at a few times."""
        if len(self._n_openings) <= self._n_handles_to_look_at:
            return []
        found = [(self._handles.get(handle), handle) for handle in self._n_openings]
        ended = [item for item in found if _has_ended(item[0])]
        ended.sort(key=lambda item: item[0].last_used_s)
        dropped = ended[: -self._n_closed_kept]
        for context, handle in dropped:
            self._drop(context, handle)
        self._n_handles_to_look_at = max(self._n_closed_kept, 2 * len(self._n_openings))
        return [context for context, _ in dropped]

    def _drop(self, context: ExecutionContext, handle: int) -> None:
        del self._n_openings[handle]
        self._handles.remove(handle)
        self._forget(context, handle)
        self._n_handles_to_look_at = max(
            self._n_closed_kept, min(self._n_handles_to_look_at, 2 * len(self._n_openings))
        )

    def _remember(self, context: ExecutionContext, handle: int) -> None:
        if context.session_id:
            self._of_session.setdefault(context, handle)
            self._by_name[context.session_id] = context

    def _forget(self, context: ExecutionContext, handle: int) -> None:
        """The handle does not stand for the context any more."""
        if self._of_session.get(context) == handle:
            del self._of_session[context]
            if self._by_name.get(context.session_id) is context:
                del self._by_name[context.session_id]


def _has_ended(context: ExecutionContext) -> bool:
    """Nothing can be computed in it any more, and nothing is."""
    return context.is_closed or (not context.graph.alive and context.state == "idle")
