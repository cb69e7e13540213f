"""When runs have to end for lack of time, the next one first."""

from __future__ import annotations

import heapq
import itertools

from wasi_nn_backend.engine.generation import Generation

__all__ = ["Deadlines"]


class Deadlines:
    """Looking costs the same however many there are. The engine's thread owns it."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Generation, bool]] = []
        self._order = itertools.count()

    def add(self, generation: Generation) -> None:
        """Its limit on generating, and its time-out, if it has them; both count from its submission."""
        limits = generation.limits
        for limit_s, is_timeout in ((limits.duration_max_s, False), (limits.timeout_s, True)):
            if limit_s is not None:
                entry = (generation.submitted_s + limit_s, next(self._order), generation, is_timeout)
                heapq.heappush(self._heap, entry)

    def __bool__(self) -> bool:
        return bool(self._heap)

    def due(self, now_s: float) -> list[tuple[Generation, bool]]:
        """Those whose time is over, and whether by their time-out. Each is told once; who is done is left out."""
        found = []
        while self._heap and (self._heap[0][0] <= now_s or self._heap[0][2].done):
            _, _, generation, is_timeout = heapq.heappop(self._heap)
            if not generation.done:
                found.append((generation, is_timeout))
        return found
