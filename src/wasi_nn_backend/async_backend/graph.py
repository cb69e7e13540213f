"""``Graph`` for asyncio."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from wasi_nn_backend.async_backend.calls import CallRunner, LoadProgress
from wasi_nn_backend.async_backend.execution_context import AsyncExecutionContext
from wasi_nn_backend.config import ConfigSource, Settings
from wasi_nn_backend.engine import EngineStatistics
from wasi_nn_backend.execution_context import ExecutionContext
from wasi_nn_backend.graph import Graph
from wasi_nn_backend.llama.interface import Model, ProgressCallback
from wasi_nn_backend.types import Door

__all__ = ["AsyncGraph"]


class AsyncGraph:
    """A loaded model under one configuration. Made by ``AsyncBackend.load*``; an asynchronous context manager that
    unloads. What its calls do and raise stands at those of ``Graph``."""

    def __init__(self, graph: Graph, runner: CallRunner) -> None:
        self._graph = graph
        self._runner = runner
        self._contexts: WeakValueDictionary[int, AsyncExecutionContext] = WeakValueDictionary()

    async def init_execution_context(self, config: ConfigSource = None) -> AsyncExecutionContext:
        """A context with a sequence of its own, or the one that is open under its ``session.session_id``."""
        return await self.adopt(partial(self._graph.init_execution_context, config))

    async def configure(self, context: AsyncExecutionContext, config: ConfigSource) -> AsyncExecutionContext:
        """Give a context configuration; returns the one to go on with."""
        given = context._context

        def discard(found: ExecutionContext) -> None:
            if found is not given:
                found.release()

        found = await self._runner.make(partial(self._graph.configure, given, config), discard, lambda: None)
        return self.wrap(found)

    async def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """One vector of length 1 a text, shape [n_texts, n_embd]."""
        return await self._runner.steps(self._graph.embed_steps(texts))

    async def restore(self, path: str | Path) -> AsyncExecutionContext:
        """A context that goes on from ``AsyncExecutionContext.save``."""
        return await self.adopt(partial(self._graph.restore, path))

    async def statistics(self) -> EngineStatistics:
        """Counts and memory of the graph's engine."""
        return await self._runner.wait(self._graph.statistics)

    async def reload(
        self, model: str | Path | None = None, config: ConfigSource = None, *, progress: ProgressCallback | None = None
    ) -> None:
        """Put another model in place of this one, or the same file anew, while the graph serves. Cancelling it leaves
        the old one in service, unless the new one was ready already."""
        told = LoadProgress(self._runner, progress)
        reload = partial(self._graph.reload, model, config, progress=told)
        await self._runner.make(reload, lambda _: None, told.cancel)

    async def unload(self) -> None:
        """Refuse new work at once; running computes finish, and contexts keep what they have put out."""
        await self._runner.wait(self._graph.unload)

    async def aclose(self) -> None:
        """``unload`` that may come after another one."""
        await self._runner.wait(self._graph.__exit__, None, None, None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    # What needs no waiting.

    @property
    def name(self) -> str:
        return self._graph.name

    @property
    def door(self) -> Door:
        return self._graph.door

    @property
    def alive(self) -> bool:
        """Loaded, and not unloaded yet."""
        return self._graph.alive

    @property
    def path(self) -> Path:
        """The model's file."""
        return self._graph.path

    @property
    def settings(self) -> Settings:
        """The settings in force for contexts that bring none."""
        return self._graph.settings

    @property
    def fingerprint(self) -> str:
        """Tells its model from others."""
        return self._graph.fingerprint

    @property
    def model(self) -> Model:
        """The weights. Raises ``InvalidArgument`` when the graph is unloaded."""
        return self._graph.model

    # For contexts of this graph.

    async def adopt(self, make: Callable[[], ExecutionContext]) -> AsyncExecutionContext:
        """A context that ``make`` gives, and that is closed again when nobody waits for it any more."""
        return self.wrap(await self._runner.make(make, ExecutionContext.release, lambda: None))

    def wrap(self, context: ExecutionContext) -> AsyncExecutionContext:
        """The same object for the same context, as long as somebody has it."""
        return self._contexts.setdefault(context.id, AsyncExecutionContext(self, context, self._runner))
