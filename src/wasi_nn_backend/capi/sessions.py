"""Session ids of C hosts: one id, one live context."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["SessionIds"]


class SessionIds:
    """Which context's handle each session id stands for. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._handles: dict[str, int] = {}

    def find_or_make(self, session_id: str, make: Callable[[], int]) -> int:
        """The handle of a session; ``make`` opens a context for a new one, once, however many threads ask."""
        with self._lock:
            handle = self._handles.get(session_id)
            if handle is None:
                handle = self._handles[session_id] = make()
            return handle

    def forget(self, handle: int) -> None:
        """The context is closed: its id is free."""
        with self._lock:
            self._handles = {name: other for name, other in self._handles.items() if other != handle}
