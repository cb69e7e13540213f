"""How many requests may wait for an engine: one more is refused at once, before anything is done for it."""

from __future__ import annotations

import logging
import threading

from wasi_nn_backend.errors import Busy

__all__ = ["QueueGate"]

_log = logging.getLogger(__name__)


class QueueGate:
    """Thread-safe. ``n_max`` may wait; ``n_warning`` of them are worth one warning, and another one only after the
    queue has been shorter again."""

    def __init__(self, n_max: int, n_warning: int) -> None:
        self._n_max = n_max
        self._n_warning = n_warning
        self._lock = threading.Lock()
        self._n_waiting = 0
        self._has_warned = False

    @property
    def n_waiting(self) -> int:
        return self._n_waiting

    def enter(self) -> None:
        """Raises ``Busy`` when the queue is full."""
        with self._lock:
            if self._n_waiting >= self._n_max:
                raise Busy(
                    f"{self._n_waiting} tasks wait for this model already: try again later, or raise "
                    f"backend.queue_size and backend.queue_reject_threshold"
                )
            self._n_waiting += 1
            warns = self._n_waiting >= self._n_warning and not self._has_warned
            self._has_warned = self._has_warned or warns
            n_waiting = self._n_waiting
        if warns:
            _log.warning("%d tasks wait for a model; from %d on they are refused", n_waiting, self._n_max)

    def leave(self) -> None:
        """A request started, or will not."""
        with self._lock:
            self._n_waiting -= 1
            if self._n_waiting < self._n_warning:
                self._has_warned = False
