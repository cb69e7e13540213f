"""Who owns a piece of native memory, and when it is freed.

Two classes share the work. A ``Resource`` is the native object itself with the set of its holders: the owner, its
children's resources, and calls that are under way. It is freed when the last holder lets go. An ``Owner`` is what
callers have: closing it, or losing the last reference to it, lets go once.

A model that is closed while a context of it is open therefore lives on until that context closes, and a call that
runs in another thread when its object is closed ends before the memory goes away.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Self

from wasi_nn_backend.errors import InvalidArgument

__all__ = ["Owner", "Resource"]


class Hold:
    """One call's claim on a resource: ``with`` gives the native pointer and keeps it valid until the block ends."""

    __slots__ = ("_resource",)

    def __init__(self, resource: Resource) -> None:
        self._resource = resource

    def __enter__(self) -> int:
        self._resource.add_holder(self)
        return self._resource.pointer

    def __exit__(self, *_error: object) -> None:
        self._resource.drop_holder(self)


class Resource:
    """A native object that is freed when nobody holds it any more.

    ``name`` is what messages call it. ``free`` is called once with the pointer, in whichever thread lets go last. The
    resource holds its ``parent``.
    """

    __slots__ = ("_free", "_freed", "_holders", "_lock", "_parent", "name", "pointer")

    def __init__(self, name: str, pointer: int, free: Callable[[int], None], parent: Resource | None = None) -> None:
        self.name = name
        self.pointer = pointer
        self._free = free
        self._freed = False
        # A set of tokens and a re-entrant lock instead of a counter: the garbage collector may close another owner in
        # the middle of any line here, in this thread, and an interrupted ``+= 1`` would lose that one's step.
        self._holders: set[object] = set()
        self._lock = threading.RLock()
        self._parent = parent
        if parent is not None:
            parent.add_holder(self)

    def add_holder(self, holder: object) -> None:
        """Raises ``InvalidArgument`` when the object is gone."""
        with self._lock:
            if self._freed:
                raise InvalidArgument(f"{self.name} is closed; open a new one")
            self._holders.add(holder)

    def drop_holder(self, holder: object) -> None:
        with self._lock:
            self._holders.discard(holder)
            last = not self._holders and not self._freed
            if last:
                self._freed = True
        if not last:
            return
        self._free(self.pointer)
        if self._parent is not None:
            self._parent.drop_holder(self)


class Owner:
    """Base of the wrappers: idempotent ``close``, ``with`` support, and an error for use after close."""

    def __init__(self, resource: Resource) -> None:
        self._resource = resource
        claim = object()
        resource.add_holder(claim)
        self._release = weakref.finalize(self, resource.drop_holder, claim)
        # At interpreter exit nothing is freed: a daemon thread may still be inside a native call on this very memory,
        # and the process returns all of it a moment later.
        self._release.atexit = False

    @property
    def closed(self) -> bool:
        return not self._release.alive

    def close(self) -> None:
        """Let go of the native object. Idempotent, from any thread; it is freed when its last user has gone."""
        self._release()

    def _native(self) -> Hold:
        """``with self._native() as pointer``: valid for the block. Raises ``InvalidArgument`` after close."""
        if not self._release.alive:
            raise InvalidArgument(f"{self._resource.name} is closed; open a new one")
        return Hold(self._resource)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()
