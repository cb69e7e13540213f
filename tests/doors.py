"""One test suite for both ways into the backend from Python: what a file tests on ``Backend`` runs on ``AsyncBackend``.

``BlockingBackend`` has the calls of ``Backend`` and makes each of them as an awaited call of ``AsyncBackend``, on an
event loop in a thread of its own.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import pytest

from wasi_nn_backend import AsyncBackend, AsyncExecutionContext, AsyncGraph

__all__ = ["both_doors"]


class LoopThread:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.facades: dict[object, Blocking] = {}
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()

    def result(self, call: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(call, self.loop).result()

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        assert not asyncio.all_tasks(self.loop)
        self.loop.close()


class Blocking:
    """An asynchronous object with blocking calls. What it has not, and what begins with an underscore, is looked up in
    the object under it: some tests look inside."""

    def __init__(self, asynchronous: Any, thread: LoopThread) -> None:
        self._asynchronous = asynchronous
        self._thread = thread

    def __getattr__(self, name: str) -> Any:
        kind = type(self._asynchronous)
        if name.startswith("_") or not (hasattr(kind, name) or name == "graph"):
            return getattr(self._inner(), name)
        member = getattr(kind, name, None)
        if inspect.isasyncgenfunction(member):
            return lambda *args, **kwargs: self._iterate(member(self._asynchronous, *args, **kwargs))
        if inspect.iscoroutinefunction(member):
            return lambda *args, **kwargs: self._call(member, *args, **kwargs)
        return self._wrapped(getattr(self._asynchronous, name))

    def _inner(self) -> Any:
        for name in ("_context", "_graph", "_backend"):
            if (inner := vars(self._asynchronous).get(name)) is not None:
                return inner
        return self._thread.result(_opened(self._asynchronous))

    def _call(self, member: Callable[..., Coroutine[Any, Any, Any]], *args: Any, **kwargs: Any) -> Any:
        given = [argument._asynchronous if isinstance(argument, Blocking) else argument for argument in args]
        return self._wrapped(self._thread.result(member(self._asynchronous, *given, **kwargs)))

    def _iterate(self, pieces: AsyncIterator[str]) -> Iterator[str]:
        try:
            while (piece := self._thread.result(_next(pieces))) is not None:
                yield piece
        finally:
            self._thread.result(_close(pieces))

    def _wrapped(self, value: Any) -> Any:
        is_ours = isinstance(value, AsyncBackend | AsyncGraph | AsyncExecutionContext)
        return self._thread.facades.setdefault(value, Blocking(value, self._thread)) if is_ours else value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("_asynchronous", "_thread"):
            super().__setattr__(name, value)
        else:
            setattr(self._inner(), name, value)

    def __enter__(self) -> Any:
        self._thread.result(self._asynchronous.__aenter__())
        return self

    def __exit__(self, *raised: Any) -> None:
        self._thread.result(self._asynchronous.__aexit__(*raised))


async def _opened(backend: AsyncBackend) -> Any:
    return await backend._runner.wait(backend._opened)


async def _next(pieces: AsyncIterator[str]) -> str | None:
    return await anext(pieces, None)


async def _close(pieces: Any) -> None:
    await pieces.aclose()


def both_doors(module: str) -> Any:
    """A fixture, to be called ``door``, that runs each test of a module twice, with its name ``Backend`` standing for
    the one or the other. tests/conftest.py leaves out the second time where it would say nothing new, and for tests
    that the module has in ``NOT_ASYNCIO``."""

    @pytest.fixture(params=["threads", "asyncio"], autouse=True)
    def door(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        if request.param == "threads":
            yield
            return
        thread = LoopThread()

        def make(*args: Any, **kwargs: Any) -> Any:
            """Opened here: what is wrong with the configuration is to be said where the backend is made."""
            return Blocking(AsyncBackend(*args, **kwargs), thread).__enter__()

        monkeypatch.setattr(sys.modules[module], "Backend", make)
        yield
        thread.close()

    return door
