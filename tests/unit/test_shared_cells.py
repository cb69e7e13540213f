"""The cells of a unified cache against lists of objects: streams share a cell if they hold the same object."""

from __future__ import annotations

import random

import pytest

from tests.fakes.memory import PlainMemory, compute
from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.kvcache import CopyStream, RemoveTail, RestoreState, StreamPool
from wasi_nn_backend.kvcache.cells import SharedCells

N_STREAMS, N_CELLS = 5, 120


class Objects:
    """The same operations on lists."""

    def __init__(self) -> None:
        self.streams: list[list[object]] = [[] for _ in range(N_STREAMS)]

    def n_used(self, without: set[int] | None = None) -> int:
        return len({id(cell) for i, cells in enumerate(self.streams) if i not in (without or ()) for cell in cells})

    def is_shared(self, stream: int, first: int) -> bool:
        others = {id(cell) for i, cells in enumerate(self.streams) if i != stream for cell in cells}
        return any(id(cell) in others for cell in self.streams[stream][first:])


@pytest.mark.parametrize("seed", range(6))
def test_counts_agree_with_objects_that_are_shared(seed: int) -> None:
    chooser = random.Random(seed)
    cells, objects = SharedCells(N_CELLS, N_STREAMS), Objects()
    for _ in range(2000):
        stream, other = chooser.randrange(N_STREAMS), chooser.randrange(N_STREAMS)
        position = chooser.randrange(40)
        match chooser.choice(["append", "append", "cut", "copy", "hole", "restore"]):
            case "append":
                n = chooser.randrange(12)
                if n > cells.n_free:
                    with pytest.raises(InvalidArgument, match="do not fit"):
                        cells.append(stream, n)
                else:
                    cells.append(stream, n)
                    objects.streams[stream] += [object() for _ in range(n)]
            case "cut":
                cells.apply(RemoveTail(stream, position), lambda _: 0)
                del objects.streams[stream][position:]
            case "copy" if stream != other:
                cells.apply(CopyStream(stream, other, position), lambda _: 0)
                objects.streams[other] = objects.streams[stream][:position]
            case "hole":
                cells.cut(stream, position, position + 5)
                del objects.streams[stream][position : position + 5]
            case "restore" if cells.n_free >= 9:
                cells.apply(RestoreState(1, stream), lambda session_id: 8 + session_id)
                objects.streams[stream] = [object() for _ in range(9)]
        assert cells.n_used == objects.n_used()
        assert cells.n_free == N_CELLS - cells.n_used >= 0
        assert [cells.n_of(i) for i in range(N_STREAMS)] == [len(each) for each in objects.streams]
        assert cells.is_shared(stream, position) == objects.is_shared(stream, position)
        assert cells.n_freed_by(sorted({stream, other})) == cells.n_used - objects.n_used(without={stream, other})
    for stream in range(N_STREAMS):
        cells.cut(stream, 0)
    assert (cells.n_used, cells.n_free) == (0, N_CELLS)


def run(pool: StreamPool, memory: PlainMemory, session_id: int, tokens: list[int]) -> None:
    room = pool.make_room_for(session_id, "", tokens, n_running=0)
    assert room is not None
    memory.apply(room)
    assignment = pool.assign(session_id, tokens)
    assert assignment is not None
    memory.apply(assignment.operations)
    rest = tokens[assignment.n_tokens_reused :]
    compute(memory.streams[assignment.stream], rest)
    pool.append(assignment.stream, rest)
    assert pool.n_cells_used == memory.n_distinct_cells()


def test_room_is_made_of_idle_sessions_and_of_no_others() -> None:
    pool = StreamPool(4, 60, n_cells=100)
    memory = PlainMemory(pool)
    run(pool, memory, 1, [1] * 50)
    run(pool, memory, 2, [2] * 30)
    assert pool.make_room_for(3, "", [3] * 40, n_running=2) is None
    pool.release(0)
    room = pool.make_room_for(3, "", [3] * 40, n_running=1)
    assert room is not None
    memory.apply(room)
    assert set(memory.host) == {1}
    assert pool.n_cells_free == 70
    assert pool.make_room_for(3, "", [3] * 68, n_running=1) is None, "those that run need some to grow"


def test_what_a_prompt_goes_on_from_stays() -> None:
    pool = StreamPool(4, 60, n_cells=100)
    memory = PlainMemory(pool)
    run(pool, memory, 1, [1] * 50)
    run(pool, memory, 2, [2] * 40)
    for stream in range(2):
        pool.release(stream)
    room = pool.make_room_for(1, "", [1] * 50 + [9] * 10, n_running=0)
    assert room is not None
    assert memory.host == {}
    run(pool, memory, 1, [1] * 50 + [9] * 10)
    assert pool.n_tokens_of(2) == 40


def test_a_cache_smaller_than_a_window_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="cannot hold"):
        StreamPool(2, 60, n_cells=59)
