"""A loaded model under one configuration, and the contexts on it."""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from wasi_nn_backend.config import ConfigSource, Layer, Settings, resolve
from wasi_nn_backend.config.backend import BackendSettings
from wasi_nn_backend.config.layers import merge
from wasi_nn_backend.doors import ConfigPlace, parse_at_door
from wasi_nn_backend.engine import EngineLease, EngineStatistics, Steps, run_steps, same_engine
from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.execution_context import ANONYMOUS, ExecutionContext
from wasi_nn_backend.home_process import HomeProcess
from wasi_nn_backend.llama.interface import Llama, Model, ProgressCallback
from wasi_nn_backend.log_setup import configured_output
from wasi_nn_backend.named_sessions import NamedSessions
from wasi_nn_backend.owning_backend import OwningBackend
from wasi_nn_backend.registry import model_path
from wasi_nn_backend.session import ChatTemplates, Session, SessionFile, embed_texts, model_fingerprint, read_session
from wasi_nn_backend.tasks import Task, TaskKind
from wasi_nn_backend.types import Door

__all__ = ["Graph", "LoadedModel"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model as it was loaded for a graph. ``fingerprint`` is that of the file then: it may be replaced."""

    path: Path
    layers: tuple[Layer, ...]
    settings: Settings
    lease: EngineLease
    fingerprint: str


class Graph:
    """A loaded model under one configuration. Made by ``Backend.load*``; a context manager that unloads."""

    def __init__(self, backend: OwningBackend[Graph], name: str, door: Door) -> None:
        self.name = name
        self.door = door
        self._backend = backend
        self._lock = threading.Lock()
        self._reloading = threading.Lock()  # one after the other
        self._loaded: LoadedModel | None = None
        self._is_alive = False
        self._version = 0
        self._at_release = ExitStack()
        self.chat_templates = ChatTemplates()
        self._contexts: set[ExecutionContext] = set()
        self._named = NamedSessions()
        self.home = HomeProcess()

    @property
    def alive(self) -> bool:
        """Loaded, and not unloaded yet."""
        return self._is_alive

    @property
    def path(self) -> Path:
        """The model's file."""
        return self._last_loaded().path

    @property
    def settings(self) -> Settings:
        """The settings in force for contexts that bring none."""
        return self._last_loaded().settings

    @property
    def fingerprint(self) -> str:
        """Tells its model from others."""
        return self._last_loaded().fingerprint

    @property
    def model(self) -> Model:
        """The weights. Raises ``InvalidArgument`` when the graph is unloaded."""
        return self._require_lease().model

    @property
    def llama(self) -> Llama:
        return self._backend.llama

    def init_execution_context(self, config: ConfigSource = None) -> ExecutionContext:
        """A context with a sequence of its own; with a ``session.session_id`` that is open on this graph, that context.

        Such a context has one more holder then, each of whom closes it once, and takes the rest of ``config`` over what
        it has. Where ``backend.save_dir`` is set, a trusted caller's session goes on from its last finished turn.

        At ``backend.max_sessions`` the least recently used idle context is closed. Raises ``Busy`` when that cannot be
        done, or configuration is meant for a session that is computing, ``InvalidArgument`` (the graph is unloaded,
        wrong configuration, a damaged saved session), ``RuntimeFailure`` (the backend is closed, no ``save_dir``).
        """
        return self._open_context(self.parse(config, "context"))

    def configure(self, context: ExecutionContext, config: ConfigSource) -> ExecutionContext:
        """Give a context configuration; returns the one to go on with.

        For callers who can name their session only when they have a context: where ``config`` has another
        ``session.session_id`` than the context, that session is opened, gets what the context has (its configuration
        and a prompt that waits), and the context is closed. Raises what ``init_execution_context`` raises; then nothing
        has changed.
        """
        layer = self.parse(config, "context")
        session_id = layer.values.get("session", {}).get("session_id", context.session_id)
        if session_id == context.session_id:
            context.take_layer(layer)
            return context
        other = self._open_context(merge((context.layer, layer), name="context"))
        if (pending := context.pending_input) is not None:
            try:
                other.set_input(0, pending)
            except BaseException:
                other.release()
                raise
        context.release()
        return other

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """One vector of length 1 a text, shape [n_texts, n_embd]: what a context's compute gives in embedding mode.

        >>> cat, kitten, train = graph.embed(["a cat", "a kitten", "a train"])
        >>> bool(cat @ kitten > cat @ train)

        Many texts share a batch, also those of other callers; each is computed as if it were alone, up to rounding. Any
        graph can do it, whatever ``model.embedding`` says, and while it generates. Any thread may call it. Raises
        ``PromptTooLong`` and ``InvalidArgument`` (a text is empty, the graph is unloaded, no memory) before anything is
        computed, and ``Cancelled`` or ``RuntimeFailure`` when the backend closes.
        """
        return run_steps(self.embed_steps(texts))

    def embed_steps(self, texts: Sequence[str]) -> Steps[npt.NDArray[np.float32]]:
        """``embed``, in steps."""
        lease = self.retained_lease()
        try:
            self.check_takes_work()
            task = self.new_task(0, self.settings, "embedding")
            return (yield from embed_texts(lease, texts, task))
        finally:
            lease.release()

    def restore(self, path: str | Path) -> ExecutionContext:
        """A context that goes on from ``ExecutionContext.save``, without computing again what was saved.

        Raises ``NotFound`` (no such file), ``InvalidArgument`` (damaged, of another format or another model).
        """
        saved = read_session(path)
        if saved.fingerprint != self.fingerprint:
            raise InvalidArgument(
                f'{path} was saved with another model ({saved.path}) than "{self.name}": load that one'
            )
        layer = self.parse(saved.config, "context")
        context = self._new_context(merge((layer, ANONYMOUS), name="context"))
        context.resume(saved)
        return context

    def statistics(self) -> EngineStatistics:
        """Counts and memory of the graph's engine, which graphs under equal settings share; embeddings do not count."""
        return self._require_lease().statistics()

    def reload(
        self, model: str | Path | None = None, config: ConfigSource = None, *, progress: ProgressCallback | None = None
    ) -> None:
        """Put another model in place of this one, or the same file anew, while the graph serves.

        It is loaded beside the old one, which stays in service until then, and if that fails. Running calls finish on
        the old model; the next call of each context goes to the new one, with its history, which is computed again.
        ``config`` replaces what the graph was loaded with; None keeps it. Raises what ``Backend.load_by_name`` raises.
        """
        with self._reloading:
            path = self.path if model is None else model_path(model)
            layers = self._last_loaded().layers
            if config is not None:
                layers = (*layers[:-1], parse_at_door(config, place="graph", door=self.door))
            if not self.replace(self.prepare(path, layers, progress)):
                raise InvalidArgument(f'the graph "{self.name}" is unloaded: load it again')

    def unload(self) -> None:
        """Refuse new work at once; running computes finish, and contexts keep what they have put out.

        Raises ``InvalidArgument`` the second time.
        """
        if not self.release():
            raise InvalidArgument(f'the graph "{self.name}" is unloaded already')
        self._backend.forget(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()
        self._backend.forget(self)

    # For the backend.

    def open(
        self,
        path: Path,
        layers: Sequence[Layer],
        own_layers: Sequence[Layer],
        progress: ProgressCallback | None,
        folder: tempfile.TemporaryDirectory[str] | None,
    ) -> None:
        """Load the model, or share it. ``own_layers`` are those that only this graph has. ``folder`` is the graph's to
        delete. Called once."""
        output = configured_output(resolve(layers).logging, own_layers)
        if output is not None:
            self._at_release.callback(output.close)
        try:
            self._loaded = self.prepare(path, layers, progress)
        except BaseException:
            self._at_release.close()
            raise
        if folder is not None:
            self._at_release.callback(folder.cleanup)
        self._is_alive = True
        _log.info('the graph "%s" is loaded: %s', self.name, self._loaded.lease.model.description)

    def prepare(self, path: Path, layers: Sequence[Layer], progress: ProgressCallback | None = None) -> LoadedModel:
        """A model that this graph may have next. Its lease is the caller's until ``replace`` takes it."""
        settings = resolve(layers)
        lease = self._backend.acquire(path, settings, progress)
        try:
            return LoadedModel(path, tuple(layers), settings, lease, model_fingerprint(lease.model, path))
        except BaseException:
            lease.release()
            raise

    def replace(self, loaded: LoadedModel) -> bool:
        """Take a prepared model into service; False, with its lease given back, when the graph is unloaded."""
        with self._lock:
            is_alive, old = self._is_alive, self._last_loaded()
            if is_alive:
                self._loaded = loaded
                self._version += 1
            contexts = list(self._contexts)
        if not is_alive:
            loaded.lease.release()
            return False
        for context in contexts:
            context.settle()
        old.lease.release()
        self._backend.sessions.look()
        return True

    def release(self) -> bool:
        """Give the engine back; False when that was done before."""
        if self.home.is_left:
            was_alive, self._is_alive = self._is_alive, False
            return was_alive
        with self._lock:
            was_alive, self._is_alive = self._is_alive, False
            contexts = list(self._contexts)
        if not was_alive:
            return False
        for context in contexts:
            context.settle()
        self._last_loaded().lease.release()
        _log.info('the graph "%s" is unloaded', self.name)
        self._at_release.close()
        return True

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self._last_loaded().layers

    def retained_lease(self) -> EngineLease:
        """A second lease on its engine. Raises ``InvalidArgument`` when the graph is unloaded."""
        with self._lock:
            return self._require_lease().retain()

    def contexts(self) -> list[ExecutionContext]:
        """Those that are open."""
        with self._lock:
            return list(self._contexts)

    # For contexts of this graph.

    @property
    def version(self) -> int:
        return self._version

    @property
    def limits(self) -> BackendSettings:
        return self.settings.backend

    def next_id(self) -> int:
        return self._backend.next_id()

    def new_task(self, context_id: int, settings: Settings, kind: TaskKind = "text") -> Task:
        return self._backend.tasks.new(self.next_id(), self.name, context_id, settings, kind)

    def now_s(self) -> float:
        return self._backend.now_s()

    def check_takes_work(self) -> None:
        self.home.check()
        self._backend.check_takes_work()

    def fork_context(self, layer: Layer, session: Session) -> ExecutionContext:
        return self._new_context(layer, session=session)

    def parse(self, config: ConfigSource, place: ConfigPlace) -> Layer:
        """A context's or a call's configuration; raises what ``parse_layer`` raises."""
        strict = any(layer.strict for layer in self.layers)
        return parse_at_door(config, place=place, door=self.door, strict=strict)

    def settings_with(self, *layers: Layer) -> Settings:
        return resolve((*self._last_loaded().layers, *layers))

    def lease(self, settings: Settings) -> EngineLease:
        with self._lock:
            own = self._require_lease()
            if same_engine(settings, self.settings):
                return own.retain()
        adapters = [adapter.path for adapter in self.settings.model.lora]
        return self._backend.acquire(self.path, settings, adapters=adapters)

    def forget(self, context: ExecutionContext) -> None:
        with self._lock:
            self._contexts.discard(context)
        self._named.forget(context)
        self._backend.sessions.discard(context)
        if context.file is not None:
            context.file.release()

    # Inside.

    def _open_context(self, layer: Layer) -> ExecutionContext:
        self._require_lease()
        self.check_takes_work()
        session_id = self.settings_with(layer).session.session_id
        if not session_id:
            return self._new_context(layer)
        return self._named.open(session_id, layer, lambda: self._new_session(session_id, layer))

    def _new_session(self, session_id: str, layer: Layer) -> ExecutionContext:
        """A context with a name, and with what was saved of it."""
        save_dir = self.limits.save_dir
        if not save_dir or not self.door.is_trusted:  # guests' ids say nothing about who they are
            return self._new_context(layer)
        file = self._backend.session_files.claim(save_dir, self.name, session_id)
        try:
            saved = file.read()
            if saved is not None:
                known = self.parse(saved.config, "context")
                name = Layer("name", {"session": {"session_id": session_id}})
                layer = merge((known, layer, name), name="context")
            context = self._new_context(layer, file=file)
        except BaseException:
            file.release()
            raise
        if saved is not None:
            context.resume(saved)
        return context

    def _new_context(
        self, layer: Layer, *, session: Session | None = None, file: SessionFile | None = None
    ) -> ExecutionContext:
        with self._backend.sessions.place(self.limits) as take:
            context_id = self.next_id()
            copy = None if session is None else session.copy(context_id)
            context = ExecutionContext(self, context_id, layer, session=copy, file=file)
            with self._lock:
                self._contexts.add(context)
            try:
                take(context)
            except BaseException:
                context.release()
                raise
        context.settle()  # it may have been reloaded before it knew of this one
        return context

    def _last_loaded(self) -> LoadedModel:
        if self._loaded is None:
            raise RuntimeError("a graph is used before it is opened")  # a fault of the backend
        return self._loaded

    def _require_lease(self) -> EngineLease:
        if not self._is_alive:
            raise InvalidArgument(f'the graph "{self.name}" is unloaded: load it again')
        return self._last_loaded().lease
