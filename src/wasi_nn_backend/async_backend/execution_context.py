"""``ExecutionContext`` for asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from wasi_nn_backend.async_backend.calls import CallRunner
from wasi_nn_backend.config import ConfigSource, Settings
from wasi_nn_backend.context_lifetime import ContextState
from wasi_nn_backend.engine import SessionStatistics
from wasi_nn_backend.execution_context import ExecutionContext, TextSink
from wasi_nn_backend.output import RunMetadata
from wasi_nn_backend.session import Message
from wasi_nn_backend.types import Tensor

if TYPE_CHECKING:
    from wasi_nn_backend.async_backend.graph import AsyncGraph

__all__ = ["AsyncExecutionContext"]


class AsyncExecutionContext:
    """Made by ``AsyncGraph.init_execution_context``. What its calls do and raise stands at those of
    ``ExecutionContext``; an asynchronous context manager that closes.

    One call at a time: a second task gets ``Busy``. Cancelling the task that awaits a call cancels the call, which
    leaves the batch at its next token; ``asyncio.CancelledError`` comes when that has happened, and the context can be
    used at once. Text so far is at ``get_output``.
    """

    def __init__(self, graph: AsyncGraph, context: ExecutionContext, runner: CallRunner) -> None:
        self.graph = graph
        self._context = context
        self._runner = runner

    # WASI-NN, in the order of a guest's calls.

    async def set_input(self, index: int, tensor: Tensor | bytes | str) -> None:
        """Index 1: configuration JSON for this context. Any other index: the prompt."""
        await self._runner.run(self._context.set_input, index, tensor)

    async def compute(self, stdout: TextSink | None = None) -> None:
        """Generate for the prompt that was set. ``stdout`` is called on a thread, not on the event loop."""
        await self._runner.steps(self._context.compute_steps(stdout))

    async def get_output(self, index: int = 0) -> bytes:
        """Index 1: metadata JSON. Any other index: the text of the last run. Gives other tasks no turn."""
        return self._context.get_output(index)

    async def compute_single(self, stdout: TextSink | None = None, config: ConfigSource = None) -> None:
        """Generate one token. Cancelling it ends the token-by-token run."""
        await self._runner.steps(self._context.compute_single_steps(stdout, config))

    async def get_output_single(self, index: int = 0) -> bytes:
        """Index 1: metadata JSON. Any other: the last token's text. Gives other tasks no turn."""
        return self._context.get_output_single(index)

    async def fini_single(self) -> None:
        """End a token-by-token run and clear its output."""
        await self._runner.run(self._context.fini_single)

    # For embedders.

    async def run_inference(self, prompt: str | bytes, config: ConfigSource = None) -> str:
        """set_input, compute and get_output in one."""
        return await self._runner.steps(self._context.inference_steps(prompt, config))

    async def stream(self, prompt: str | bytes, config: ConfigSource = None) -> AsyncIterator[str]:
        """``run_inference`` in pieces, as they are generated; use it with ``async for``.

        A loop that is left early leaves the run to Python, which ends it some time later. To have it ended there and
        then, put the iterator into ``contextlib.aclosing``.
        """
        steps = self._context.stream_steps(prompt, config)
        try:
            while (text := await self._runner.next_text(steps)) is not None:
                yield text
        finally:
            await self._runner.run(steps.close)

    async def cancel(self) -> None:
        """Stop a run from another task: whoever awaits it gets ``Cancelled``. Never waits."""
        self._context.cancel()

    async def fork(self) -> AsyncExecutionContext:
        """A second context that goes on from everything so far."""
        return await self.graph.adopt(self._context.fork)

    async def save(self, path: str | Path) -> None:
        """Write the conversation and its KV cells to a file."""
        await self._runner.wait(self._context.save, path)

    async def statistics(self) -> SessionStatistics:
        """Counts over this context's finished runs."""
        return await self._runner.wait(self._context.statistics)

    async def reset(self) -> None:
        """Forget the conversation, the pending prompt and the output."""
        await self._runner.wait(self._context.reset)

    async def close(self) -> None:
        """Give this handle back; the last one stops what runs and frees the sequence's cells before returning."""
        await self._runner.wait(self._context.close)

    async def aclose(self) -> None:
        """``close`` that may come after another one."""
        await self._runner.wait(self._context.release)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    # What needs no waiting.

    @property
    def id(self) -> int:
        return self._context.id

    @property
    def session_id(self) -> str:
        """Its name; empty for contexts that are each their own session."""
        return self._context.session_id

    @property
    def settings(self) -> Settings:
        """The settings in force for its calls."""
        return self._context.settings

    @property
    def state(self) -> ContextState:
        """What it is doing now, seen from outside."""
        return self._context.state

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation so far, in chat mode."""
        return self._context.messages

    @property
    def run_metadata(self) -> RunMetadata:
        """Figures of the last run; after ``set_input`` those of the prompt."""
        return self._context.run_metadata

    @property
    def metadata(self) -> dict[str, Any]:
        """What output index 1 holds as JSON."""
        return self._context.metadata
