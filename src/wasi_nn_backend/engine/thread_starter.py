"""Starts threads from a thread of its own.

On Linux a thread begins with the niceness of the one that starts it, and cannot lower it again without privileges.
Guests of a pool stand back behind the engine (``host/runner.py``), and one of them may be the first to need a model:
its engine would stand back as well.
"""

from __future__ import annotations

import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor

__all__ = ["ThreadStarter"]


class ThreadStarter:
    """Threads that it starts have the niceness of the one that created it. Thread-safe."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="wasi-nn-starter")
        # Now, not at the first need: the executor's thread inherits, too. Refused where no thread may start, or the
        # main thread has ended; ``start`` does without then.
        with contextlib.suppress(RuntimeError):
            self._executor.submit(int).result()

    def start(self, thread: threading.Thread) -> None:
        """Start it, and wait until it has begun. From the caller's thread where its own is gone: in a forked child,
        when the main thread has ended, after ``close``."""
        if os.getpid() != self._pid:
            thread.start()
            return
        try:
            started = self._executor.submit(thread.start)
        except RuntimeError:
            thread.start()
        else:
            started.result()

    def close(self) -> None:
        """Idempotent. The threads that were started go on."""
        if os.getpid() == self._pid:  # a child may have inherited the executor's lock in a locked state
            self._executor.shutdown()
