"""The cells of one unified cache, which all streams draw from and may hold together.

llama.cpp lists in each cell which sequences hold it. Here it is the other way round: each stream's positions name their
cells, and each cell counts its holders, so that copying a prefix takes no cells and dropping one of two copies frees
none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.kvcache.operations import CopyStream, KvOperation, RemoveTail, RestoreState

__all__ = ["SharedCells"]


class SharedCells:
    """Not thread-safe. ``n_cells`` is what the cache has; nothing here may take more."""

    def __init__(self, n_cells: int, n_streams: int) -> None:
        self.n_cells = n_cells
        self._streams: list[list[int]] = [[] for _ in range(n_streams)]
        self._n_holders: dict[int, int] = {}
        self._ids = itertools.count()

    @property
    def n_used(self) -> int:
        return len(self._n_holders)

    @property
    def n_free(self) -> int:
        return self.n_cells - len(self._n_holders)

    def n_of(self, stream: int) -> int:
        """Positions that a stream holds, in cells of its own or shared ones."""
        return len(self._streams[stream])

    def n_freed_by(self, streams: Sequence[int]) -> int:
        """Cells that nobody else would hold if these streams were emptied."""
        held: dict[int, int] = {}
        for stream in streams:
            for cell in self._streams[stream]:
                held[cell] = held.get(cell, 0) + 1
        return sum(self._n_holders[cell] == n for cell, n in held.items())

    def is_shared(self, stream: int, first_position: int) -> bool:
        """Whether another stream holds one of this one's cells from ``first_position`` on."""
        return any(self._n_holders[cell] > 1 for cell in self._streams[stream][first_position:])

    def apply(self, operation: KvOperation, n_tokens_of: Callable[[int], int]) -> None:
        """What an operation does to the cells; ``n_tokens_of`` says how many a session's saved state holds."""
        match operation:
            case RemoveTail(stream, first_position):
                self.cut(stream, first_position)
            case CopyStream(source, target, n_tokens):
                self.copy(source, target, n_tokens)
            case RestoreState(session_id, stream):
                self.cut(stream, 0)
                self.append(stream, n_tokens_of(session_id))

    def append(self, stream: int, n_tokens: int) -> None:
        """Raises ``InvalidArgument`` when so many cells are not free."""
        if n_tokens > self.n_free:
            raise InvalidArgument(f"{n_tokens} tokens do not fit: {self.n_free} of {self.n_cells} cells are free")
        for cell in itertools.islice(self._ids, n_tokens):
            self._streams[stream].append(cell)
            self._n_holders[cell] = 1

    def copy(self, source: int, target: int, n_tokens: int) -> None:
        """The target holds the source's first cells too, and nothing else."""
        cells = self._streams[source][:n_tokens]
        for cell in cells:
            self._n_holders[cell] += 1
        self.cut(target, 0)
        self._streams[target] = cells

    def cut(self, stream: int, first: int, end: int | None = None) -> None:
        """A stream gives up positions [first, end)."""
        for cell in self._streams[stream][first:end]:
            if self._n_holders[cell] == 1:
                del self._n_holders[cell]
            else:
                self._n_holders[cell] -= 1
        del self._streams[stream][first:end]
