"""The contract of WASI-NN in Python, in the order of a guest's calls: load, init_execution_context, then
``ExecutionContext`` for set_input, compute, get_output.
"""

from __future__ import annotations

import atexit
import itertools
import os
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from wasi_nn_backend.config import ConfigSource, Layer, Settings, parse_layer, resolve
from wasi_nn_backend.doors import parse_at_door
from wasi_nn_backend.engine import EngineLease, EngineStatistics, EngineStore, same_engine
from wasi_nn_backend.errors import InvalidArgument, InvalidEncoding, NotFound, RuntimeFailure
from wasi_nn_backend.execution_context import ExecutionContext
from wasi_nn_backend.llama import load_llama
from wasi_nn_backend.llama.interface import Llama, Model, ProgressCallback
from wasi_nn_backend.registry import BUILTIN_MODELS, Registration, Registry, model_path
from wasi_nn_backend.session import Session, embed_texts, model_fingerprint, read_session
from wasi_nn_backend.types import PYTHON_DOOR, Door, ExecutionTarget, GraphEncoding

__all__ = ["Backend", "Graph"]


class Backend:
    """Models, graphs and contexts of one program. Thread-safe; a context manager that closes what is left.

    ``config`` is a layer under everything that graphs and contexts bring. ``llama`` replaces the native library in
    tests. ``clock`` gives seconds.
    """

    def __init__(
        self,
        config: ConfigSource = None,
        *,
        llama: Llama | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.llama = load_llama() if llama is None else llama
        self.registry = Registry()
        self._layer = parse_layer(config, name="backend")
        self._store = EngineStore(self.llama, clock)
        self._lock = threading.Lock()
        self._graphs: set[Graph] = set()
        self._pinned: dict[str, EngineLease] = {}
        self._ids = itertools.count(1)
        self._closed = False
        # An interpreter that ends while llama.cpp computes crashes: daemon threads are stopped in the middle of it.
        self._close_at_exit = _closer(weakref.ref(self))
        atexit.register(self._close_at_exit)

    def register(self, name: str, model: str | Path, config: ConfigSource = None) -> None:
        """Give a model a name under which guests may load it.

        ``model`` is a path or a built-in model's name; the file may be missing until somebody loads it. ``config`` is a
        layer under what the loading caller sends. A registered model stays in memory, as it was last loaded, until the
        backend closes: the next guest finds it there. Raises ``InvalidArgument`` when the name is taken.
        """
        self.registry.add(Registration(name, model_path(model), parse_layer(config, name=f"graph {name}")))

    def load(
        self,
        builders: Sequence[bytes],
        encoding: GraphEncoding = GraphEncoding.AUTODETECT,
        target: ExecutionTarget = ExecutionTarget.CPU,
        *,
        config: ConfigSource = None,
        door: Door = PYTHON_DOOR,
    ) -> Graph:
        """A graph from the bytes of a GGUF file: ``builders[0]``, and configuration JSON as ``builders[1]`` if present.

        The bytes go to a private file, which lives as long as the graph. ``target`` is a hint that llama.cpp does not
        need: ``model.n_gpu_layers`` decides. Raises ``InvalidEncoding``, ``InvalidArgument`` (no GGUF), ``TooLarge``.
        """
        if encoding not in (GraphEncoding.GGML, GraphEncoding.AUTODETECT):
            raise InvalidEncoding(f"this backend runs GGUF models: graph encoding {encoding.value} is not ggml")
        if not isinstance(target, ExecutionTarget):
            raise InvalidArgument(f"the execution target is one of cpu, gpu, tpu; got {target!r}")
        if not all(isinstance(part, bytes) for part in builders):
            raise InvalidArgument("load takes a sequence of bytes: [gguf] or [gguf, configuration]")
        if not 1 <= len(builders) <= 2:
            raise InvalidArgument(
                f"load takes a GGUF file and, optionally, configuration; got {len(builders)} builders"
            )
        layers = [parse_at_door(builders[1], name="builder 1", door=door)] if len(builders) > 1 else []
        layers.append(parse_at_door(config, name="graph", door=door))
        # No context manager: the folder belongs to the graph, and goes when that is unloaded.
        folder = tempfile.TemporaryDirectory(prefix="wasi-nn-")
        try:
            path = Path(folder.name, "model.gguf")
            path.write_bytes(builders[0])
            return self._open("(bytes)", path, layers, door=door, folder=folder)
        except BaseException:
            folder.cleanup()
            raise

    def load_by_name(
        self, name: str | Path, *, door: Door = PYTHON_DOOR, progress: ProgressCallback | None = None
    ) -> Graph:
        """A graph of a registered model or, for trusted callers, a built-in model's name or a GGUF's path.

        ``progress`` is called with the fraction loaded and cancels by returning False. Raises ``NotFound`` (no such
        name), ``ModelNotFound`` (its file is missing), ``InvalidArgument`` (bad file), ``Cancelled``.
        """
        return self.load_by_name_with_config(name, None, door=door, progress=progress)

    def load_by_name_with_config(
        self,
        name: str | Path,
        config: ConfigSource,
        *,
        door: Door = PYTHON_DOOR,
        progress: ProgressCallback | None = None,
    ) -> Graph:
        """``load_by_name`` with configuration for this graph; also raises what ``parse_layer`` raises."""
        if not isinstance(name, str | Path):
            raise InvalidArgument(f"a graph's name is a str, or a Path to a GGUF file; got {type(name).__name__}")
        name = str(name)
        layers = [parse_at_door(config, name="graph", door=door)]
        registration = self.registry.find(name)
        if registration is not None:
            graph = self._open(name, registration.path, [registration.layer, *layers], door=door, progress=progress)
            self._pin(graph)
            return graph
        if not door.is_trusted:
            raise NotFound(f'no graph is registered as "{name}"; registered: {self._names()}')
        if name not in BUILTIN_MODELS and os.sep not in name and not Path(name).exists():
            raise NotFound(
                f'"{name}" is no registered graph, no built-in model and no file; registered: {self._names()}, '
                f"built in: {', '.join(sorted(BUILTIN_MODELS))}"
            )
        return self._open(name, model_path(name), layers, door=door, progress=progress)

    def restore(self, path: str | Path) -> ExecutionContext:
        """``Graph.restore`` on the model that the session was saved with, loaded again under its name or from its path.

        The graph lives as long as the backend. Also raises what ``load_by_name`` raises.
        """
        saved = read_session(Path(path))
        known = self.registry.find(saved.graph) is not None or saved.graph in BUILTIN_MODELS
        return self.load_by_name(saved.graph if known else saved.path).restore(path)

    def close(self) -> None:
        """Unload every graph: running computes end with ``Cancelled``. Idempotent."""
        atexit.unregister(self._close_at_exit)
        with self._lock:
            self._closed = True
            graphs, self._graphs = self._graphs, set()
            pinned, self._pinned = self._pinned, {}
        for graph in graphs:
            graph.close_contexts()
            graph.release()
        self._store.stop_embedders()
        for lease in pinned.values():
            lease.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # For graphs and contexts of this backend.

    def next_id(self) -> int:
        return next(self._ids)

    def acquire(self, path: Path, settings: Settings, progress: ProgressCallback | None = None) -> EngineLease:
        return self._store.acquire(path, settings, progress)

    def forget(self, graph: Graph) -> None:
        with self._lock:
            self._graphs.discard(graph)

    def _names(self) -> str:
        return ", ".join(self.registry.names()) or "none"

    def _pin(self, graph: Graph) -> None:
        """Keep what a registered name was last loaded as in memory: the next guest most often wants the same."""
        lease = graph.lease(graph.settings)
        with self._lock:
            if self._closed:
                previous: EngineLease | None = lease
            else:
                previous = self._pinned.get(graph.name)
                self._pinned[graph.name] = lease
        if previous is not None:
            previous.release()

    def _open(
        self,
        name: str,
        path: Path,
        layers: Sequence[Layer],
        *,
        door: Door,
        progress: ProgressCallback | None = None,
        folder: tempfile.TemporaryDirectory[str] | None = None,
    ) -> Graph:
        all_layers = (parse_layer(door.defaults, name=door.name), self._layer, *layers)
        graph = Graph(self, name, path, all_layers, door)
        graph.open(progress, folder)
        with self._lock:
            if not self._closed:
                self._graphs.add(graph)
                return graph
        graph.release()
        raise RuntimeFailure("the backend is closed: make a new one")


def _closer(reference: weakref.ref[Backend]) -> Callable[[], None]:
    """Closes a backend if it still exists, without keeping it alive until then."""

    def close() -> None:
        backend = reference()
        if backend is not None:
            backend.close()

    return close


class Graph:
    """A loaded model under one configuration. Made by ``Backend.load*``; a context manager that unloads."""

    def __init__(self, backend: Backend, name: str, path: Path, layers: Sequence[Layer], door: Door) -> None:
        self.name = name
        self.path = path
        self.door = door
        self.settings = resolve(layers)
        self._layers = tuple(layers)
        self._backend = backend
        self._lock = threading.Lock()
        self._lease: EngineLease | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._contexts: set[ExecutionContext] = set()
        self.fingerprint = ""  # of the file as it was loaded: it may be replaced

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
        layer = parse_at_door(config, name="context", door=self.door)
        context = ExecutionContext(self, self.next_id(), layer)
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

    def open(self, progress: ProgressCallback | None, folder: tempfile.TemporaryDirectory[str] | None) -> None:
        """Load the model, or share it. ``folder`` is the graph's to delete. Called once."""
        self._folder = folder
        self._lease = self._backend.acquire(self.path, self.settings, progress)
        try:
            self.fingerprint = model_fingerprint(self._lease.model, self.path)
        except BaseException:
            self.release()
            raise

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
        if self._folder is not None:
            self._folder.cleanup()
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

    def settings_with(self, *layers: Layer) -> Settings:
        return resolve((*self._layers, *layers))

    def lease(self, settings: Settings) -> EngineLease:
        own = self._require_lease()
        return own.retain() if same_engine(settings, self.settings) else self._backend.acquire(self.path, settings)

    def forget(self, context: ExecutionContext) -> None:
        with self._lock:
            self._contexts.discard(context)

    def _require_lease(self) -> EngineLease:
        lease = self._lease
        if lease is None:
            raise InvalidArgument(f'the graph "{self.name}" is unloaded: load it again')
        return lease
