"""Streams and host states as plain lists: what the accounting's operations do to a memory, without a llama.

A cell is a token and a digest of all that it could see when it was computed, so that a copied, restored or shifted cell
is told from one that would have been computed in its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from wasi_nn_backend.kvcache import (
    CopyStream,
    DropHostState,
    KvOperation,
    RemoveTail,
    RestoreState,
    SaveState,
    StreamPool,
)

Cell = tuple[int, int]
N_BYTES_PER_TOKEN = 10


def compute(cells: list[Cell], tokens: Sequence[int]) -> None:
    """Append tokens as a decode would."""
    seen = tuple(digest for _, digest in cells[-3:])
    for token in tokens:
        digest = hash((token, len(cells), seen))
        cells.append((token, digest))
        seen = (*seen[-2:], digest)


def computed(tokens: Sequence[int]) -> list[Cell]:
    cells: list[Cell] = []
    compute(cells, tokens)
    return cells


class PlainMemory:
    def __init__(self, pool: StreamPool) -> None:
        self.pool = pool
        self.streams: list[list[Cell]] = [[] for _ in range(pool.n_streams)]
        self.host: dict[int, list[Cell]] = {}
        self.n_saves = 0

    def apply(self, operations: Iterable[KvOperation]) -> None:
        n_saves = self.n_saves
        for operation in operations:
            match operation:
                case RemoveTail(stream, first_position):
                    del self.streams[stream][first_position:]
                case CopyStream(source, target, n_tokens):
                    assert source != target
                    assert len(self.streams[source]) >= n_tokens
                    self.streams[target] = self.streams[source][:n_tokens]
                case SaveState(stream, session_id):
                    self.n_saves += 1
                    self.host[session_id] = list(self.streams[stream])
                    self.pool.record_saved(session_id, N_BYTES_PER_TOKEN * len(self.streams[stream]))
                case RestoreState(session_id, stream):
                    self.streams[stream] = [(token, digest) for token, digest in self.host[session_id]]  # new cells
                case DropHostState(session_id):
                    del self.host[session_id]
        if self.n_saves > n_saves:  # their sizes are known now
            self.apply(self.pool.enforce_limits())

    def n_distinct_cells(self) -> int:
        """As a unified cache counts: what was copied from one stream to another is one cell."""
        return len({id(cell) for cells in self.streams for cell in cells})

    def shares_cells(self, stream: int, first_position: int) -> bool:
        """Whether cells from a position on are another stream's too, in the same count."""
        others = {id(cell) for other, cells in enumerate(self.streams) if other != stream for cell in cells}
        return any(id(cell) in others for cell in self.streams[stream][first_position:])

    def shift(self, stream: int, n_keep: int, n_discard: int) -> None:
        del self.streams[stream][n_keep : n_keep + n_discard]
        self.pool.shift(stream, n_keep, n_discard)
