"""When runs have to end for lack of time, the next one first."""

from __future__ import annotations

import heapq

from wasi_nn_backend.engine.generation import Generation

__all__ = ["Deadlines"]

#: Entries of the heap for each run that has a limit, at most two of them its own: the rest belongs to forgotten ones.
_N_ENTRIES_PER_RUN_MAX = 4


class Deadlines:
    """Looking costs the same however many there are. The engine's thread owns it."""

    def __init__(self) -> None:
        self._generations: dict[int, Generation] = {}  # by their requests' ids
        self._heap: list[tuple[float, int, bool]] = []  # time in seconds, request's id, whether it is the time-out

    def add(self, generation: Generation) -> None:
        """Its limit on generating, and its time-out, if it has them; both count from its submission."""
        limits, number = generation.limits, generation.request.id
        for limit_s, is_timeout in ((limits.duration_max_s, False), (limits.timeout_s, True)):
            if limit_s is not None:
                self._generations[number] = generation
                heapq.heappush(self._heap, (generation.submitted_s + limit_s, number, is_timeout))

    def __len__(self) -> int:
        """How many entries are kept."""
        return len(self._heap)

    def due(self, now_s: float) -> list[tuple[Generation, bool]]:
        """Those whose time is over, and whether by their time-out. Each is told once; who was forgotten is left out."""
        found = []
        while self._heap and self._heap[0][0] <= now_s:
            _, number, is_timeout = heapq.heappop(self._heap)
            if (generation := self._generations.get(number)) is not None:
                found.append((generation, is_timeout))
        return found

    def forget(self, generation: Generation) -> None:
        """It is over. Its entries would stay behind one that is days away, so they go when there are many of them:
        rarely enough that each run pays for a few."""
        self._generations.pop(generation.request.id, None)
        if len(self._heap) > _N_ENTRIES_PER_RUN_MAX * len(self._generations):
            self._heap = [entry for entry in self._heap if entry[1] in self._generations]
            heapq.heapify(self._heap)
