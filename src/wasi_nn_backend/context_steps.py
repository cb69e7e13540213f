"""The calls of an execution context that wait for its engine, in steps.

``ExecutionContext`` carries them out on its caller's thread, ``async_backend`` without one.
"""

from __future__ import annotations

import codecs
from abc import abstractmethod
from collections.abc import Callable

from wasi_nn_backend.config import ConfigSource, Settings
from wasi_nn_backend.context_lifetime import ContextLifetime
from wasi_nn_backend.engine import Steps, TextSteps
from wasi_nn_backend.errors import Busy, Cancelled, EndOfSequence, InvalidArgument
from wasi_nn_backend.session import AnyRun
from wasi_nn_backend.types import input_bytes

__all__ = ["ContextSteps", "TextSink"]

#: Receives text bytes as they are generated. What it raises ends the run and reaches the caller of compute.
TextSink = Callable[[bytes], None]


class ContextSteps(ContextLifetime):
    """What each of these does and raises stands at the call of ``ExecutionContext`` that it is named after."""

    def compute_steps(self, stdout: TextSink | None) -> Steps[None]:
        """``compute``."""
        with self._enter(needs_graph=True):
            yield from self._compute(self.settings, stdout)

    def compute_single_steps(self, stdout: TextSink | None, config: ConfigSource) -> Steps[None]:
        """``compute_single``."""
        with self._enter(needs_graph=True):
            run = self._open_run
            if run is None or not run.is_single:
                self._end_open_run()
                run = self._open_run = self._start(self._call_settings(config), streams=True, single=True)
            piece = yield from _take_piece(run)
            if piece is None:
                self._end_open_run()
                run.raise_error()
                raise EndOfSequence("the run is over: there is no further token")
            if stdout is not None and piece and self.settings.session.stream_stdout:
                stdout(piece)

    def inference_steps(self, prompt: str | bytes, config: ConfigSource) -> Steps[str]:
        """``run_inference``."""
        with self._enter(needs_graph=True):
            settings = self._call_settings(config)
            self._take_prompt(input_bytes(prompt), settings)
            run = yield from self._compute(settings, None)
            return run.text.decode(errors="replace")

    def stream_steps(self, prompt: str | bytes, config: ConfigSource) -> TextSteps:
        """``stream``: the context is free for other calls while a piece of text is outside."""
        with self._enter(needs_graph=True):
            settings = self._call_settings(config)
            self._take_prompt(input_bytes(prompt), settings)
            run = self._open_run = self._start(settings, streams=True)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        try:
            while (piece := (yield from self._next_piece(run))) is not None:
                if text := decoder.decode(piece):
                    yield text
        except GeneratorExit:
            self._abandon(run)
            raise
        except BaseException:
            self._end_stream(run)
            raise
        self._end_stream(run)
        run.raise_error()
        if text := decoder.decode(b"", final=True):
            yield text

    def _compute(self, settings: Settings, stdout: TextSink | None) -> Steps[AnyRun]:
        self._end_open_run()
        sink = stdout if settings.session.stream_stdout and not settings.model.embedding else None
        run = self._start(settings, streams=sink is not None)
        try:
            if sink is None:
                yield run
            else:
                while (piece := (yield from _take_piece(run))) is not None:
                    if piece:
                        sink(piece)
        finally:
            self._finish(run)
        run.raise_error()
        return run

    def _next_piece(self, run: AnyRun) -> Steps[bytes | None]:
        """The next piece of an iterator's run, which may have ended since the last one."""
        try:
            with self._enter():
                if self._open_run is not run:
                    ended_by = "another call on its context" if self.graph.alive else "unloading its graph"
                    raise Cancelled(f"the iteration was ended by {ended_by}")
                return (yield from _take_piece(run))
        except (Busy, InvalidArgument) as error:
            if self._closed_because:  # by a limit, when nobody had read on for long
                raise
            raise Cancelled(f"the iteration was ended: {error}") from error  # such a call is inside, or it was closed

    @abstractmethod
    def _call_settings(self, config: ConfigSource) -> Settings: ...

    @abstractmethod
    def _take_prompt(self, prompt: bytes, settings: Settings) -> None: ...

    @abstractmethod
    def _start(self, settings: Settings, *, streams: bool, single: bool = False) -> AnyRun: ...

    @abstractmethod
    def _finish(self, run: AnyRun) -> None: ...

    @abstractmethod
    def _abandon(self, run: AnyRun) -> None: ...

    @abstractmethod
    def _end_stream(self, run: AnyRun) -> None: ...


def _take_piece(run: AnyRun) -> Steps[bytes | None]:
    yield run
    return run.take_piece()
