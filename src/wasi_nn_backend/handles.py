"""Numbers that stand for objects of ours in a foreign program: a guest's graphs, a C host's execution contexts.

Handles count up from 0 and are never reused, so a stale one is an error and never somebody else's object. Only
complete objects get a number: ``reserve`` takes the room before the work, ``publish`` makes the finished object
visible.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from wasi_nn_backend.errors import Busy, InvalidArgument, RuntimeFailure

__all__ = ["MAX_HANDLE", "HandleTable"]

#: Every dialect passes handles as 32-bit words.
MAX_HANDLE = 0xFFFF_FFFF

T = TypeVar("T")


class HandleTable(Generic[T]):
    """One kind of object, at most ``limit`` of them alive at a time. Thread-safe; holds no lock while others work.

    ``noun`` names the kind in messages ("graph"), ``remedy`` says what a caller can do when the table is full.
    """

    def __init__(self, noun: str, limit: int, remedy: str, *, first_handle: int = 0) -> None:
        if limit < 1:
            raise InvalidArgument(f"a table of {noun}s with room for {limit} is of no use: give a limit of 1 or more")
        self._noun = noun
        self._limit = limit
        self._remedy = remedy
        self._lock = threading.Lock()
        self._objects: dict[int, T] = {}
        self._n_reserved = 0
        self._next_handle = first_handle

    def __len__(self) -> int:
        return len(self._objects)

    @contextmanager
    def reserve(self) -> Iterator[Callable[[T], int]]:
        """Room for one object that is still to be made; yields ``publish(object) -> handle``.

        Leaving the block gives unused room back. Raises ``Busy`` when the table is full and ``RuntimeFailure`` when
        all numbers are spent, both before the caller has built anything.
        """
        self._take_room()
        try:
            yield self._publish
        finally:
            with self._lock:
                self._n_reserved -= 1

    def get(self, handle: int) -> T:
        """The object behind a handle; ``InvalidArgument`` for a number that was never given out or is closed."""
        # One dictionary look-up is atomic under the interpreter lock, and this is on every call's path.
        try:
            return self._objects[handle]
        except KeyError:
            raise self._unknown(handle) from None

    def newest(self) -> int:
        """The handle of the open object that was published last; ``InvalidArgument`` when there is none."""
        with self._lock:
            for handle in reversed(self._objects):
                return handle
        raise InvalidArgument(f"no {self._noun} is open: open one first")

    def replace(self, handle: int, item: T) -> None:
        """Let an open handle stand for another object."""
        with self._lock:
            if handle not in self._objects:
                raise self._unknown(handle)
            self._objects[handle] = item

    def remove(self, handle: int) -> T:
        """Take the object out, for the caller to close. The second removal is ``InvalidArgument``, whoever asks."""
        with self._lock:
            try:
                return self._objects.pop(handle)
            except KeyError:
                raise self._unknown(handle) from None

    def drain(self) -> list[T]:
        """Take everything out, newest first: the order in which dependent objects are closed."""
        with self._lock:
            objects = list(reversed(self._objects.values()))
            self._objects.clear()
            return objects

    def _take_room(self) -> None:
        with self._lock:
            if self._next_handle + self._n_reserved > MAX_HANDLE:
                raise RuntimeFailure(f"all 2^32 {self._noun} handles are spent: start a new instance")
            if len(self._objects) + self._n_reserved >= self._limit:
                raise Busy(f"{self._limit} {self._noun}s are open, which is the limit: {self._remedy}")
            self._n_reserved += 1

    def _publish(self, item: T) -> int:
        with self._lock:
            handle = self._next_handle
            self._next_handle += 1
            self._objects[handle] = item
            return handle

    def _unknown(self, handle: int) -> InvalidArgument:
        state = "is closed" if handle < self._next_handle else "was never given out"
        return InvalidArgument(f"{self._noun} {handle} {state}: use a handle that the host returned and that is open")
