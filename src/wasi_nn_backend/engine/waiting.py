"""Waiting for another thread without losing Ctrl-C."""

from __future__ import annotations

import threading

__all__ = ["wait_for"]

_WAKE_UP_S = 0.25


def wait_for(event: threading.Event) -> None:
    """Block until the event is set. Signals interrupt it on the main thread.

    In slices: where the kernel hands Ctrl-C to another thread, a main thread that waits for a lock sleeps on.
    """
    while not event.wait(_WAKE_UP_S):
        pass
