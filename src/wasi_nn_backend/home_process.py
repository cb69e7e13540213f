"""Forked children: the threads of what was made before the fork stay behind in the parent, and with them the locks that
they held then."""

from __future__ import annotations

import os

from wasi_nn_backend.errors import RuntimeFailure

__all__ = ["HomeProcess"]


class HomeProcess:
    """The process in which something was made. A child must not wait there for a thread, a lock or an engine."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def is_left(self) -> bool:
        """Whether this is a forked child of it."""
        return os.getpid() != self._pid

    def check(self) -> None:
        """Raises ``RuntimeFailure`` in a forked child."""
        if self.is_left:
            raise RuntimeFailure("the model was loaded before this process was forked: load it again in this process")
