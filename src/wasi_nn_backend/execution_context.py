"""One user's side of a graph: set_input, compute, get_output, and the token-by-token calls."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from wasi_nn_backend.config import ConfigSource, Layer, Settings
from wasi_nn_backend.config.layers import merge
from wasi_nn_backend.context_lifetime import ContextState
from wasi_nn_backend.context_steps import ContextSteps, TextSink
from wasi_nn_backend.engine import EngineLease, ExportedCells, SessionStatistics, iterate_steps, run_steps, same_engine
from wasi_nn_backend.errors import Cancelled, InvalidArgument
from wasi_nn_backend.output import FinishReason, RunMetadata
from wasi_nn_backend.owning_graph import OwningGraph
from wasi_nn_backend.session import (
    AnyRun,
    Message,
    SavedSession,
    Session,
    SessionFile,
    count_prompt_tokens,
    start_run,
    write_session,
)
from wasi_nn_backend.types import CONFIG_INDEX, METADATA_INDEX, Tensor, input_bytes

__all__ = ["ANONYMOUS", "ExecutionContext", "TextSink"]

#: Over a layer that may hold another context's ``session_id``.
ANONYMOUS = Layer("anonymous", {"session": {"session_id": ""}})
_NO_CELLS = ExportedCells((), b"", None)


class ExecutionContext(ContextSteps):
    """Made by ``Graph.init_execution_context``. One call at a time: a second thread gets ``Busy``; ``cancel`` and
    ``close`` may come from any thread at any time. A context manager that closes.

    With a ``session.session_id`` it is the session of that name: who asks the graph for the name again gets this
    object, as one more holder, and it lives until the last one has closed it.
    """

    graph: OwningGraph[ExecutionContext]

    def __init__(
        self,
        graph: OwningGraph[ExecutionContext],
        context_id: int,
        layer: Layer,
        *,
        session: Session | None = None,
        file: SessionFile | None = None,
    ) -> None:
        super().__init__(graph, context_id, layer)
        self.file = file  # where finished turns are kept
        self._session = session or Session(context_id, graph.door.prompt_mode, graph.chat_templates)
        self._n_tokens_input: int | None = None  # of a prompt that was set since the last run started

    # WASI-NN, in the order of a guest's calls.

    def set_input(self, index: int, tensor: Tensor | bytes | str) -> None:
        """Index 1: configuration JSON for this context, over what it has. Any other index: the prompt.

        Dimensions are not looked at. A token-by-token run under way ends with a new prompt, and keeps its settings
        under new configuration. Raises ``InvalidArgument`` (closed, unloaded, wrong value), ``InvalidEncoding`` (not
        JSON), ``Busy``; then nothing has changed.
        """
        with self._enter(needs_graph=True):
            data = input_bytes(tensor)
            if index == CONFIG_INDEX:
                self._configure(self.graph.parse(data, "context"))
            else:
                self._take_prompt(data, self.settings)

    def compute(self, stdout: TextSink | None = None) -> None:
        """Generate for the prompt that was set, all of it; the text is then at output index 0.

        ``stdout`` receives the text as it comes when ``session.stream_stdout`` is on. Computing again without a new
        prompt generates again. With ``model.embedding`` on, the output is the prompt's vector as JSON instead. Raises
        ``InvalidArgument`` (no prompt), ``PromptTooLong``, ``ContextFull`` and ``Cancelled`` (text so far is kept for
        get_output), ``RuntimeFailure``.
        """
        run_steps(self.compute_steps(stdout))

    def get_output(self, index: int = 0) -> bytes:
        """Index 1: metadata JSON. Any other index: the text of the last run, empty before the first."""
        if index == METADATA_INDEX:
            return self.run_metadata.to_json()
        self.settle()  # or what an iterator that was closed early has put out would still grow
        run = self._run
        return b"" if run is None else run.text

    def compute_single(self, stdout: TextSink | None = None, config: ConfigSource = None) -> None:
        """Generate one token; its text is then at ``get_output_single(0)``.

        The first call computes the prompt, under ``config`` for this run only. Raises ``EndOfSequence`` when the run is
        over (the model ended it, a stop string, ``stopping.max_tokens``), ``UnsupportedOperation`` in embedding mode,
        and what ``compute`` raises; the call after that starts again.
        """
        run_steps(self.compute_single_steps(stdout, config))

    def get_output_single(self, index: int = 0) -> bytes:
        """Index 1: metadata JSON. Any other: the last token's text; empty before one, and while a character is
        incomplete."""
        if index == METADATA_INDEX:
            return self.run_metadata.to_json()
        run = self._run
        return b"" if run is None else run.last_piece

    def fini_single(self) -> None:
        """End a token-by-token run and clear its output; the prompt stays. Always possible on an open context."""
        with self._enter():
            self._end_open_run()
            self._run = None
            self._n_tokens_input = count_prompt_tokens(self._session, self._lease, self.settings)

    # For embedders.

    def run_inference(self, prompt: str | bytes, config: ConfigSource = None) -> str:
        """set_input, compute and get_output in one. ``config`` holds for this call only."""
        return run_steps(self.inference_steps(prompt, config))

    def stream(self, prompt: str | bytes, config: ConfigSource = None) -> Iterator[str]:
        """``run_inference`` in pieces, as they are generated. Work starts at the first ``next``.

        Closing the iterator early, or another call on this context, cancels the run; what was generated until then
        counts as the answer. After another call, or ``close``, the iterator raises ``Cancelled``.
        """
        return iterate_steps(self.stream_steps(prompt, config))

    def cancel(self) -> None:
        """Stop a run from another thread, also one whose prompt is still being prepared: its caller gets ``Cancelled``.
        Without effect when nothing runs."""
        self.cancel_run(None)

    def fork(self) -> ExecutionContext:
        """A second context that goes on from everything so far: configuration, conversation, pending prompt.

        What is cached here is copied when the fork first runs, not computed again (unless
        ``memory.enable_token_cache_reuse`` is off).
        """
        with self._enter(needs_graph=True):
            return self.graph.fork_context(merge((self._layer, ANONYMOUS), name="context"), self._session)

    def save(self, path: str | Path) -> None:
        """Write the conversation and its KV cells to a file, for ``Backend.restore`` or ``Graph.restore``.

        Written beside the target and renamed. Raises ``RuntimeFailure`` when the file cannot be written, ``Busy``.
        """
        with self._enter(needs_graph=True):
            self._end_open_run()
            saved = self._to_save(self._require_lease().engine.export_session(self.id))
        write_session(path, saved)

    def statistics(self) -> SessionStatistics:
        """Counts over this context's finished runs on its present model, and what of it is cached. Raises
        ``InvalidArgument`` when the graph is unloaded."""
        lease = self._lease
        if lease is None and self.graph.alive:  # the graph was reloaded, and this has not run since
            return SessionStatistics()
        return self._require_lease().session_statistics(self.id)

    @property
    def state(self) -> ContextState:
        """What it is doing now, seen from outside."""
        is_entered, run = self._calling.locked(), self._run
        if run is None or run.finish_reason is not None or not (is_entered or self._runs_on()):
            return "running" if is_entered else "idle"
        return "running" if run.has_started else "queued"

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation so far, in chat mode."""
        self.settle()  # what an iterator that was closed early has put out is part of it
        return self._session.messages

    def reset(self) -> None:
        """Forget the conversation, also where it is kept on disk, the pending prompt and the output; configuration
        stays."""
        with self._enter():
            self._end_open_run()
            self._session.clear()
            self._run = None
            self._n_tokens_input = None
            if self.file is not None:
                self.file.delete()

    @property
    def run_metadata(self) -> RunMetadata:
        """Figures of the last run; after ``set_input`` those of the prompt."""
        self.settle()
        llama = self.graph.llama
        run, n_tokens_input = self._run, self._n_tokens_input
        if run is not None and n_tokens_input is None:
            return run.metadata(llama.build_number, llama.build_commit)
        return RunMetadata(n_tokens_input or 0, 0, llama.build_number, llama.build_commit)

    @property
    def metadata(self) -> dict[str, Any]:
        """What output index 1 holds as JSON."""
        return self.run_metadata.full()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    # For the graph, and for doors.

    def drop_input(self) -> None:
        """Forget the prompt that was set, so that computing again raises ``InvalidArgument``; for a door that refuses
        the next one itself. Output and conversation stay. Raises what ``set_input`` raises."""
        with self._enter(needs_graph=True):
            self._end_open_run()
            self._session.drop_input()
            self._require_lease().dismiss(self.id)
            self._n_tokens_input = None

    def cancel_run(self, error: Cancelled | None) -> None:
        if self._home.is_left:
            return
        with self._beginning:  # what comes before a call begins is cleared by it
            self._cancelled_with = error or Cancelled("the run was cancelled")
        run = self._run  # only now: ``_start`` sets the run before it looks, so one of the two sees the other
        if run is not None:
            run.cancel(error)

    def resume(self, saved: SavedSession) -> None:
        """Go on from a saved session; its cells are used if they fit and computed again if they do not."""
        with self._enter(needs_graph=True):
            self._session.resume(saved.messages, saved.n_left_out)
            if saved.cells.tokens:
                self._require_lease().engine.adopt_session(self.id, saved.cells, self.settings.session.cache_salt)

    def take_layer(self, layer: Layer) -> None:
        """Take configuration over what it has."""
        with self._enter(needs_graph=True):
            self._configure(layer)

    def has_layer(self, layer: Layer) -> bool:
        """Whether its own configuration says all of this already."""
        own = self._layer.values
        given = [(section, key, value) for section, keys in layer.values.items() for key, value in keys.items()]
        return all(key in own.get(section, {}) and own[section][key] == value for section, key, value in given)

    @property
    def layer(self) -> Layer:
        """Its own configuration."""
        return self._layer

    @property
    def pending_input(self) -> bytes | None:
        """A prompt that is set and not answered yet."""
        return self._session.pending_input

    # Inside.

    def _configure(self, layer: Layer) -> None:
        """Take configuration; where it changes model or context settings, the engine that they need comes first."""
        merged = merge((self._layer, layer), name="context")
        settings = self.graph.settings_with(merged)
        self._check_same_session(settings)
        if not same_engine(settings, self.settings):
            lease = self.graph.lease(settings)
            self._end_open_run()
            self._give_up_lease(wait=False)
            self._lease = lease
        self._layer, self.settings = merged, settings
        if self._n_tokens_input is not None:
            self._n_tokens_input = count_prompt_tokens(self._session, self._lease, settings)

    def _call_settings(self, config: ConfigSource) -> Settings:
        if config is None:
            return self.settings
        settings = self.graph.settings_with(self._layer, self.graph.parse(config, "call"))
        self._check_same_session(settings)
        return settings

    def _check_same_session(self, settings: Settings) -> None:
        if settings.session.session_id != self.session_id:
            raise InvalidArgument(
                f'execution context {self.id} is the session "{self.session_id}" and cannot become '
                f'"{settings.session.session_id}": pass session.session_id to Graph.init_execution_context'
            )

    def _take_prompt(self, prompt: bytes, settings: Settings) -> None:
        self._end_open_run()
        self._session.set_input(prompt)
        self._require_lease().expect(self.id)
        self._n_tokens_input = count_prompt_tokens(self._session, self._lease, settings)

    def _start(self, settings: Settings, *, streams: bool, single: bool = False) -> AnyRun:
        """Submit the pending prompt. The run before it and its output are gone, whether that works or not: a guest that
        reads on after an error must not take them for the answer."""
        self._run = None
        lease = self._lease_for(settings)
        task = self.graph.new_task(self.id, settings)
        try:
            run = start_run(self._session, lease, settings, task, streams=streams, single=single)
        except BaseException:
            lease.release()
            raise
        finally:  # it has come, perhaps to another engine, or will not
            self._require_lease().dismiss(self.id)
        self._run, self._n_tokens_input = run, None
        if self._cancelled_with is not None:  # while this was on its way
            run.cancel(self._cancelled_with)
        return run

    def _finish(self, run: AnyRun) -> None:
        """The caller is done with a run, early or not: end it, record the turn, give its engine back."""
        if self._home.is_left:  # in the middle of the call: the run, its turn and its engine are the parent's
            run.cancel()
            return
        run.end()
        if run.finish_reason is not FinishReason.ERROR and (
            run.text or run.finish_reason is not FinishReason.CANCELLED
        ):
            self._session.finish_turn(run.prompt, run.text)
            if self.file is not None and run.prompt.turn is not None:
                self.file.write(self._to_save(_NO_CELLS))
        if self._lease is None or run.lease.key != self._lease.key:  # an engine for this call, or of a former model
            run.lease.forget_session(self.id, wait=False)
        run.lease.release()

    def _abandon(self, run: AnyRun) -> None:
        """An iterator is closed, perhaps by the garbage collector, which runs on any thread, the engine's too, and in
        whoever holds a lock: take none, and wait for nothing. ``settle`` does the rest."""
        run.cancel()
        if self._open_run is run:
            self._abandoned = run

    def _end_stream(self, run: AnyRun) -> None:
        """An iterator has come to its end."""
        run.cancel()
        with self._hold(timeout_s=0) as is_held:
            if is_held and self._open_run is run:
                self._end_open_run()

    def _end_open_run(self) -> None:
        run, self._open_run, self._abandoned = self._open_run, None, None
        if run is not None:
            self._finish(run)

    def _lease_for(self, settings: Settings) -> EngineLease:
        if same_engine(settings, self.settings):
            return self._require_lease().retain()
        return self.graph.lease(settings)

    def _to_save(self, cells: ExportedCells) -> SavedSession:
        layer = merge((self._layer, ANONYMOUS), name="saved")  # the file is the session's name
        return SavedSession(
            fingerprint=self.graph.fingerprint,
            graph=self.graph.name,
            path=str(self.graph.path),
            config=layer.as_document(),
            messages=self._session.messages,
            n_left_out=self._session.n_left_out,
            cells=cells,
        )
