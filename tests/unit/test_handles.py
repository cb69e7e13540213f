"""Handles: never reused, published only when complete, bounded, safe between threads."""

from __future__ import annotations

import threading

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from hypothesis.strategies import integers, sampled_from

from tests.conftest import n_examples
from wasi_nn_backend.errors import Busy, InvalidArgument, RuntimeFailure
from wasi_nn_backend.handles import MAX_HANDLE, HandleTable

LIMIT = 5


def publish(table: HandleTable[str], item: str) -> int:
    with table.reserve() as publish_item:
        return publish_item(item)


class HandleMachine(RuleBasedStateMachine):
    """Any order of calls against a model: a dictionary and the largest number so far."""

    def __init__(self) -> None:
        super().__init__()
        self.table: HandleTable[str] = HandleTable("thing", LIMIT, "close one")
        self.alive: dict[int, str] = {}
        self.n_published = 0

    @rule()
    def publish_one(self) -> None:
        item = f"item {self.n_published}"
        if len(self.alive) == LIMIT:
            with pytest.raises(Busy, match="close one"):
                publish(self.table, item)
            return
        handle = publish(self.table, item)
        assert handle == self.n_published
        self.alive[handle] = item
        self.n_published += 1

    @rule()
    def fail_to_make_one(self) -> None:
        if len(self.alive) == LIMIT:
            return
        with pytest.raises(ZeroDivisionError), self.table.reserve():
            raise ZeroDivisionError

    @rule(handle=integers(0, 40) | integers(0, MAX_HANDLE) | sampled_from([-1, MAX_HANDLE + 1]))
    def look_up(self, handle: int) -> None:
        if handle in self.alive:
            assert self.table.get(handle) == self.alive[handle]
        else:
            with pytest.raises(InvalidArgument):
                self.table.get(handle)

    @rule(handle=integers(0, 40))
    def remove(self, handle: int) -> None:
        if handle in self.alive:
            assert self.table.remove(handle) == self.alive.pop(handle)
        else:
            with pytest.raises(InvalidArgument):
                self.table.remove(handle)

    @rule(handle=integers(0, 40))
    def replace(self, handle: int) -> None:
        if handle in self.alive:
            self.alive[handle] += ", another"
            self.table.replace(handle, self.alive[handle])
        else:
            with pytest.raises(InvalidArgument):
                self.table.replace(handle, "nothing")

    @rule()
    def drain(self) -> None:
        assert self.table.drain() == [self.alive[handle] for handle in sorted(self.alive, reverse=True)]
        self.alive.clear()

    @invariant()
    def holds_what_is_alive(self) -> None:
        assert len(self.table) == len(self.alive)


TestHandles = HandleMachine.TestCase
TestHandles.settings = settings(max_examples=n_examples(60), stateful_step_count=40, deadline=None)


def test_a_reservation_counts_before_anything_is_visible() -> None:
    table: HandleTable[str] = HandleTable("thing", 1, "close one")
    with table.reserve() as publish_item:
        with pytest.raises(InvalidArgument, match="never given out"):
            table.get(0)
        with pytest.raises(Busy):
            publish(table, "second")
        assert publish_item("first") == 0
    assert table.get(0) == "first"


def test_messages_tell_closed_from_unknown() -> None:
    table: HandleTable[str] = HandleTable("graph", 2, "unload one")
    table.remove(publish(table, "a"))
    with pytest.raises(InvalidArgument, match="graph 0 is closed"):
        table.get(0)
    with pytest.raises(InvalidArgument, match="graph 1 was never given out"):
        table.get(1)


def test_the_last_number_is_given_once_and_none_after_it() -> None:
    table: HandleTable[str] = HandleTable("graph", 8, "unload one", first_handle=MAX_HANDLE)
    assert publish(table, "last") == MAX_HANDLE
    table.remove(MAX_HANDLE)
    with pytest.raises(RuntimeFailure, match="spent"):
        publish(table, "one too many")


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(InvalidArgument):
        HandleTable("graph", 0, "unload one")


def test_threads_get_distinct_handles_and_each_is_removed_once() -> None:
    table: HandleTable[str] = HandleTable("thing", 10_000, "close one")
    n_threads, n_each = 8, 200
    handles: list[int] = []
    n_removed: list[int] = []
    start = threading.Barrier(n_threads)

    def work() -> None:
        start.wait()
        mine = [publish(table, "x") for _ in range(n_each)]
        handles.extend(mine)
        removed = 0
        for handle in range(n_threads * n_each):
            try:
                table.remove(handle)
                removed += 1
            except InvalidArgument:
                continue
        n_removed.append(removed)

    threads = [threading.Thread(target=work) for _ in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(handles) == list(range(n_threads * n_each))
    assert sum(n_removed) + len(table) == n_threads * n_each


def test_the_newest_is_the_last_one_published_that_is_open() -> None:
    table: HandleTable[str] = HandleTable("thing", 10, "close one")
    with pytest.raises(InvalidArgument, match="no thing is open"):
        table.newest()
    handles = [publish(table, name) for name in "abc"]
    assert table.newest() == handles[2]
    table.replace(handles[0], "x")
    assert table.newest() == handles[2]
    table.remove(handles[2])
    assert table.newest() == handles[1]
