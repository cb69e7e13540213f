"""A loaded model under one configuration, and the contexts on it."""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from wasi_nn_backend.config import ConfigSource, Layer, Settings, resolve
from wasi_nn_backend.doors import ConfigPlace, parse_at_door
from wasi_nn_backend.engine import EngineLease, EngineStatistics, same_engine
from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.execution_context import ExecutionContext
from wasi_nn_backend.llama.interface import Llama, Model, ProgressCallback
from wasi_nn_backend.log_setup import configured_output
from wasi_nn_backend.session import ChatTemplates, Session, embed_texts, model_fingerprint, read_session
from wasi_nn_backend.types import Door

__all__ = ["Graph", "OwningBackend"]

_log = logging.getLogger(__name__)


class OwningBackend(Protocol):
    """What a graph needs of its backend."""

    llama: Llama

    def next_id(self) -> int: ...

    def acquire(
        self,
        path: Path,
        settings: Settings,
        progress: ProgressCallback | None = None,
        adapters: Sequence[str] = (),
    ) -> EngineLease: ...

    def forget(self, graph: Graph) -> None: ...


class Graph:
    """A loaded model under one configuration. Made by ``Backend.load*``; a context manager that unloads."""

    def __init__(self, backend: OwningBackend, name: str, path: Path, layers: Sequence[Layer], door: Door) -> None:
        self.name = name
        self.path = path
        self.door = door
        self.settings = resolve(layers)
        self._layers = tuple(layers)
        self._backend = backend
        self._lock = threading.Lock()
        self._lease: EngineLease | None = None
        self._at_release = ExitStack()
        self._contexts: set[ExecutionContext] = set()
        self.fingerprint = ""  # of the file as it was loaded: it may be replaced
        self.chat_templates = ChatTemplates()

    @property
    def alive(self) -> bool:
        """Loaded, and not unloaded yet."""
        return self._lease is not None

    @property
    def model(self) -> Model:
        """The weights. Raises ``InvalidArgument`` when the graph is unloaded."""
        return self._require_lease().model

    @property
    def llama(self) -> Llama:
        return self._backend.llama

    def init_execution_context(self, config: ConfigSource = None) -> ExecutionContext:
        """A context with a sequence of its own. Raises ``InvalidArgument`` when the graph is unloaded or the
        configuration is wrong."""
        self._require_lease()
        context = ExecutionContext(self, self.next_id(), self.parse(config, "context"))
        with self._lock:
            self._contexts.add(context)
        return context

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """One vector of length 1 a text, shape [n_texts, n_embd]: what a context's compute gives in embedding mode.

        >>> cat, kitten, train = graph.embed(["a cat", "a kitten", "a train"])
        >>> bool(cat @ kitten > cat @ train)
        True

        Many texts share a batch, also those of other callers; each is computed as if it were alone, up to rounding. Any
        graph can do it, whatever ``model.embedding`` says, and while it generates. Any thread may call it. Raises
        ``PromptTooLong`` and ``InvalidArgument`` (a text is empty, the graph is unloaded, no memory) before anything is
        computed, and ``Cancelled`` when the backend closes.
        """
        lease = self._require_lease().retain()
        try:
            return embed_texts(lease, texts)
        finally:
            lease.release()

    def restore(self, path: str | Path) -> ExecutionContext:
        """A context that goes on from ``ExecutionContext.save``, without computing again what was saved.

        Raises ``NotFound`` (no such file), ``InvalidArgument`` (damaged, of another format or another model).
        """
        saved = read_session(Path(path))
        if saved.fingerprint != self.fingerprint:
            raise InvalidArgument(
                f'{path} was saved with another model ({saved.path}) than "{self.name}": load that one'
            )
        context = self.init_execution_context(saved.config)
        context.resume(saved)
        return context

    def statistics(self) -> EngineStatistics:
        """Counts and memory of the graph's engine, which graphs under equal settings share; embeddings do not count."""
        return self._require_lease().statistics()

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
        own_layers: Sequence[Layer],
        progress: ProgressCallback | None,
        folder: tempfile.TemporaryDirectory[str] | None,
    ) -> None:
        """Load the model, or share it. ``folder`` is the graph's to delete. Called once."""
        output = configured_output(self.settings.logging, own_layers)
        if output is not None:
            self._at_release.callback(output.close)
        if folder is not None:
            self._at_release.callback(folder.cleanup)
        try:
            self._lease = self._backend.acquire(self.path, self.settings, progress)
            self.fingerprint = model_fingerprint(self._lease.model, self.path)
        except BaseException:
            if not self.release():
                self._at_release.close()
            raise
        _log.info('the graph "%s" is loaded: %s', self.name, self._lease.model.description)

    def release(self) -> bool:
        """Give the engine back; False when that was done before."""
        with self._lock:
            lease, self._lease = self._lease, None
            contexts = list(self._contexts)
        if lease is None:
            return False
        for context in contexts:
            context.detach()
        lease.release()
        self._at_release.close()
        return True

    def close_contexts(self) -> None:
        with self._lock:
            contexts = list(self._contexts)
        for context in contexts:
            context.shut_down()

    # For contexts of this graph.

    def next_id(self) -> int:
        return self._backend.next_id()

    def fork_context(self, layer: Layer, session: Session) -> ExecutionContext:
        context_id = self.next_id()
        context = ExecutionContext(self, context_id, layer, session.copy(context_id))
        with self._lock:
            self._contexts.add(context)
        return context

    def parse(self, config: ConfigSource, place: ConfigPlace) -> Layer:
        """A context's or a call's configuration; raises what ``parse_layer`` raises."""
        strict = any(layer.strict for layer in self._layers)
        return parse_at_door(config, place=place, door=self.door, strict=strict)

    def settings_with(self, *layers: Layer) -> Settings:
        return resolve((*self._layers, *layers))

    def lease(self, settings: Settings) -> EngineLease:
        own = self._require_lease()
        if same_engine(settings, self.settings):
            return own.retain()
        adapters = [adapter.path for adapter in self.settings.model.lora]
        return self._backend.acquire(self.path, settings, adapters=adapters)

    def forget(self, context: ExecutionContext) -> None:
        with self._lock:
            self._contexts.discard(context)

    def _require_lease(self) -> EngineLease:
        lease = self._lease
        if lease is None:
            raise InvalidArgument(f'the graph "{self.name}" is unloaded: load it again')
        return lease
