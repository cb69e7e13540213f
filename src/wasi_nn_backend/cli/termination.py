"""SIGTERM as an exception, so that what is open is closed on the way out. Imports nothing that takes time."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

__all__ = ["Terminated", "sigterm_raises"]


class Terminated(BaseException):
    """SIGTERM. Like ``KeyboardInterrupt``, but nobody at a terminal wants to go on after it."""


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """While the block runs, the main thread gets ``Terminated``; by default the system ends the process on the spot."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _raise(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise Terminated
