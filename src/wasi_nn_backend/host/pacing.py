"""How much of the host's time a guest's calls may take, apart from what the engine computes for it.

Every call runs Python, and only one thread of a process does that at a time. A guest that calls without end, whatever
the answer, would leave the engine's thread the switch interval of 5 ms to wait each time it comes back from llama.cpp:
texts of others took three times as long. So calls beyond a share of the time wait a moment before they return. Guests
that wait for a model themselves never come near it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from wasi_nn_backend.errors import InvalidArgument

__all__ = ["Pacer"]

#: Processor time that a guest may use at once: its first calls load a model and read a prompt.
_BURST_S = 0.1
#: Processor time around each call that its thread's clock does not show here: wasmtime-py's own. Measured.
_AROUND_CALL_S = 0.00002
#: The longest that is owed for one call, so that a long prompt is not paid for four times.
_OWED_MAX_S = 0.02
#: Shorter pauses would cost more than they give.
_PAUSE_MIN_S = 0.001


class Pacer:
    """Holds one guest's calls to ``share`` of the time (0 to 1), once they have used the first tenth of a second.

    ``cpu_clock`` gives the calling thread's processor time, ``clock`` the time, both in seconds.
    """

    def __init__(
        self,
        share: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.thread_time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not 0 < share <= 1:
            raise InvalidArgument(f"max_host_share is {share}: give more than 0, and 1 at most")
        self._share = share
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._sleep = sleep
        self._used_s = 0.0  # and not given back by time that went by
        self._last_s = clock()

    def start(self) -> float:
        """A call begins; what ``end`` wants to know."""
        return self._cpu_clock()

    def end(self, started_cpu_s: float) -> None:
        """The call is over: wait as long as the guest owes."""
        now_s = self._clock()
        used_s = max(0.0, self._used_s - (now_s - self._last_s) * self._share) + self._cpu_clock() - started_cpu_s
        used_s += _AROUND_CALL_S
        self._last_s = now_s
        self._used_s = min(used_s, _BURST_S + _OWED_MAX_S)
        pause_s = (self._used_s - _BURST_S) / self._share
        if pause_s >= _PAUSE_MIN_S:
            self._sleep(pause_s)
