"""``Backend`` for asyncio."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self, cast

from wasi_nn_backend.async_backend.calls import CallRunner, LoadProgress
from wasi_nn_backend.async_backend.execution_context import AsyncExecutionContext
from wasi_nn_backend.async_backend.graph import AsyncGraph
from wasi_nn_backend.backend import Backend
from wasi_nn_backend.config import ConfigSource
from wasi_nn_backend.errors import RuntimeFailure
from wasi_nn_backend.execution_context import ExecutionContext
from wasi_nn_backend.graph import Graph
from wasi_nn_backend.llama.interface import Llama, ProgressCallback
from wasi_nn_backend.status import BackendStatus
from wasi_nn_backend.types import PYTHON_DOOR, Door, ExecutionTarget, GraphEncoding

__all__ = ["AsyncBackend"]


class AsyncBackend:
    """``Backend`` for programs on asyncio: the same calls with the same results and errors, to be awaited.

    >>> async def ask(question: str) -> None:
    ...     async with AsyncBackend({"temperature": 0}) as backend:
    ...         graph = await backend.load_by_name("smollm2")
    ...         async with await graph.init_execution_context() as context:
    ...             async for piece in context.stream(question):
    ...                 print(piece, end="", flush=True)

    Cancelling the task that awaits a call cancels the call. ``asyncio.CancelledError`` is raised when that has really
    ended, so nothing goes on behind the program's back; calls of a moment and those that wait for the disk are not
    broken off, only waited for. What is made for a task that is cancelled meanwhile is closed again.

    The library is loaded, and ``config`` looked at, with ``async with`` or the first call. Event loops are not blocked:
    prompts are tokenised on up to four threads, models loaded and contexts closed on four others, and what computes or
    waits for its turn needs none. ``progress`` and ``stdout`` are called on those threads; they reach a loop through
    ``loop.call_soon_threadsafe``. One backend may serve several loops.
    """

    def __init__(
        self,
        config: ConfigSource = None,
        *,
        llama: Llama | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make = partial(Backend, config, llama=llama, clock=clock)
        self._backend: Backend | None = None
        self._lock = threading.Lock()
        self._runner = CallRunner()

    async def register(self, name: str, model: str | Path, config: ConfigSource = None) -> None:
        """Give a model a name under which guests may load it."""
        await self._runner.wait(lambda: self._opened().register(name, model, config))

    async def load(
        self,
        builders: Sequence[bytes],
        encoding: GraphEncoding = GraphEncoding.AUTODETECT,
        target: ExecutionTarget = ExecutionTarget.CPU,
        *,
        config: ConfigSource = None,
        door: Door = PYTHON_DOOR,
        progress: ProgressCallback | None = None,
    ) -> AsyncGraph:
        """A graph from the bytes of a GGUF file and, if present, configuration JSON."""
        return await self._load(
            lambda backend, told: backend.load(builders, encoding, target, config=config, door=door, progress=told),
            progress,
        )

    async def load_by_name(
        self, name: str | Path, *, door: Door = PYTHON_DOOR, progress: ProgressCallback | None = None
    ) -> AsyncGraph:
        """A graph of a registered model, a built-in model's name or a GGUF's path."""
        return await self._load(lambda backend, told: backend.load_by_name(name, door=door, progress=told), progress)

    async def load_by_name_with_config(
        self,
        name: str | Path,
        config: ConfigSource,
        *,
        door: Door = PYTHON_DOOR,
        progress: ProgressCallback | None = None,
    ) -> AsyncGraph:
        """``load_by_name`` with configuration for this graph."""
        return await self._load(
            lambda backend, told: backend.load_by_name_with_config(name, config, door=door, progress=told), progress
        )

    async def restore(self, path: str | Path, *, progress: ProgressCallback | None = None) -> AsyncExecutionContext:
        """A context that goes on from a saved session, on the model that it was saved with."""
        told = LoadProgress(self._runner, progress)
        context = await self._runner.make(
            lambda: self._opened().restore(path, progress=told), _discard_restored, told.cancel
        )
        return AsyncGraph(_graph_of(context), self._runner).wrap(context)

    async def reload(
        self,
        name: str | Path,
        model: str | Path | None = None,
        config: ConfigSource = None,
        *,
        progress: ProgressCallback | None = None,
    ) -> None:
        """Put another model behind a name, for whoever loads it from now on and for all graphs of that name."""
        told = LoadProgress(self._runner, progress)
        await self._runner.make(
            lambda: self._opened().reload(name, model, config, progress=told), lambda _: None, told.cancel
        )

    async def status(self) -> BackendStatus:
        """What is loaded, who has a session, and what they are doing."""
        return await self._runner.wait(lambda: self._opened().status())

    async def close(self, grace_s: float = 0.0) -> None:
        """Refuse new work, end what runs, unload every graph, and end the threads. Idempotent.

        Whoever awaits a call gets its result within ``grace_s`` seconds or ``Cancelled``.
        """
        await self._runner.close(partial(self._close, grace_s))

    async def aclose(self) -> None:
        """``close``, under the name that ``contextlib.aclosing`` looks for."""
        await self.close()

    async def __aenter__(self) -> Self:
        try:
            await self._runner.wait(self._opened)
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    # On threads.

    def _opened(self) -> Backend:
        with self._lock:
            if self._backend is None:
                if self._runner.is_closing:
                    raise RuntimeFailure("the backend is closed: make a new one")
                self._backend = self._make()
            return self._backend

    def _close(self, grace_s: float) -> None:
        with self._lock:
            backend = self._backend
        if backend is not None:
            backend.close(grace_s)

    async def _load(
        self, load: Callable[[Backend, ProgressCallback], Graph], progress: ProgressCallback | None
    ) -> AsyncGraph:
        told = LoadProgress(self._runner, progress)
        graph = await self._runner.make(lambda: load(self._opened(), told), _discard_graph, told.cancel)
        return AsyncGraph(graph, self._runner)


def _graph_of(context: ExecutionContext) -> Graph:
    return cast(Graph, context.graph)  # whose protocol is the part of it that a context needs


def _discard_graph(graph: Graph) -> None:
    with graph:  # leaving it unloads it, also where that was done before
        return


def _discard_restored(context: ExecutionContext) -> None:
    context.release()
    _discard_graph(_graph_of(context))
