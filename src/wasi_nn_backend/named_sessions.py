"""The contexts of one graph that have a ``session_id``: the same id is the same live context.

A graph is loaded by one caller, so two guests never meet here, whatever ids they choose.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from wasi_nn_backend.config import Layer
from wasi_nn_backend.execution_context import ExecutionContext

__all__ = ["NamedSessions"]


class NamedSessions:
    """Thread-safe."""

    def __init__(self) -> None:
        self._opening = threading.Lock()  # held while a context is made, so that no id gets two
        self._lock = threading.Lock()  # of the table; nobody waits for anything with it
        self._contexts: dict[str, ExecutionContext] = {}

    def open(self, session_id: str, layer: Layer, create: Callable[[], ExecutionContext]) -> ExecutionContext:
        """The live context of this id, with one more handle and ``layer`` over its configuration; else a new one.

        Raises ``Busy`` where the configuration of one that is computing would change.
        """
        with self._opening:
            with self._lock:
                context = self._contexts.get(session_id)
            if context is not None and context.retain():
                try:
                    if not context.has_layer(layer):  # or whoever only asks for it would have to wait for its calls
                        context.take_layer(layer)
                except BaseException:
                    context.release()
                    raise
                return context
            context = create()
            with self._lock:
                self._contexts[session_id] = context
            return context

    def forget(self, context: ExecutionContext) -> None:
        """The context is closed; another one may have its id already."""
        with self._lock:
            if self._contexts.get(context.session_id) is context:
                del self._contexts[context.session_id]
