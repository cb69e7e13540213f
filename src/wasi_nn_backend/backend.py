"""The contract of WASI-NN in Python, in the order of a guest's calls: load, init_execution_context, then
``ExecutionContext`` for set_input, compute, get_output.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from wasi_nn_backend.config import ConfigSource, Layer, Settings, parse_layer, resolve
from wasi_nn_backend.config.parse import UnknownPolicy
from wasi_nn_backend.doors import parse_at_door
from wasi_nn_backend.engine import EngineLease, EngineStore
from wasi_nn_backend.errors import Cancelled, InvalidArgument, InvalidEncoding, NotFound, RuntimeFailure
from wasi_nn_backend.execution_context import ExecutionContext
from wasi_nn_backend.graph import Graph, LoadedModel
from wasi_nn_backend.home_process import HomeProcess
from wasi_nn_backend.llama import load_llama
from wasi_nn_backend.llama.interface import Llama, ProgressCallback
from wasi_nn_backend.log_setup import configured_output
from wasi_nn_backend.owning_backend import OwningBackend
from wasi_nn_backend.registry import BUILTIN_MODELS, Registration, Registry, model_path
from wasi_nn_backend.session import SessionFiles, read_session
from wasi_nn_backend.session_store import SessionStore
from wasi_nn_backend.status import BackendStatus, read_status
from wasi_nn_backend.tasks import TaskBook
from wasi_nn_backend.types import PYTHON_DOOR, Door, ExecutionTarget, GraphEncoding, OwnedDoor

__all__ = ["Backend"]

_log = logging.getLogger(__name__)

_GGUF_MAGIC = b"GGUF"


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
        self._layer = parse_layer(config, name="backend", logs=False)
        self._log = configured_output(resolve([self._layer]).logging, [self._layer])
        self._clock = clock
        self._store = EngineStore(self.llama, clock)
        self.sessions = SessionStore(clock)
        self.session_files = SessionFiles()
        self.tasks = TaskBook()
        self._lock = threading.Lock()
        self._reloading = threading.Lock()
        self._closing = threading.RLock()  # a handler of signals may close in the middle of a close
        self._graphs: set[Graph] = set()
        self._pinned: dict[str, EngineLease] = {}
        self._ids = itertools.count(1)
        self._closed = False
        self._home = HomeProcess()
        # An interpreter that ends while llama.cpp computes crashes: daemon threads are stopped in the middle of it.
        self._close_at_exit = _closer(weakref.ref(self))
        atexit.register(self._close_at_exit)

    def register(self, name: str, model: str | Path, config: ConfigSource = None) -> None:
        """Give a model a name under which guests may load it.

        ``model`` is a path or a built-in model's name; the file may be missing until somebody loads it. ``config`` is a
        layer under what the loading caller sends. A registered model stays in memory, as it was last loaded, until the
        backend closes: the next guest finds it there. Raises ``InvalidArgument`` when the name is taken.
        """
        unknown: UnknownPolicy = "error" if self._layer.strict else "warn"
        layer = parse_layer(config, name=f"graph {name}", unknown=unknown)
        self.registry.add(Registration(name, model_path(model), replace(layer, warnings=())))

    def load(
        self,
        builders: Sequence[bytes],
        encoding: GraphEncoding = GraphEncoding.AUTODETECT,
        target: ExecutionTarget = ExecutionTarget.CPU,
        *,
        config: ConfigSource = None,
        door: Door = PYTHON_DOOR,
        progress: ProgressCallback | None = None,
    ) -> Graph:
        """A graph from the bytes of a GGUF file: ``builders[0]``, and configuration JSON as ``builders[1]`` if present.

        The bytes go to a private file, which lives as long as the graph. ``target`` is a hint that llama.cpp does not
        need: ``model.n_gpu_layers`` decides. ``progress`` as in ``load_by_name``. Raises ``InvalidEncoding``,
        ``InvalidArgument`` (no GGUF), ``TooLarge``, ``Cancelled``.
        """
        if not isinstance(encoding, GraphEncoding):
            raise InvalidArgument(f"the encoding is a GraphEncoding, such as GraphEncoding.GGML; got {encoding!r}")
        if encoding not in (GraphEncoding.GGML, GraphEncoding.AUTODETECT):
            raise InvalidEncoding(f"this backend runs GGUF models: graph encoding {encoding.value} is not ggml")
        if not isinstance(target, ExecutionTarget):
            raise InvalidArgument(f"the execution target is one of cpu, gpu, tpu; got {target!r}")
        parts: object = builders
        if not isinstance(parts, Sequence) or not all(isinstance(part, bytes) for part in parts):
            raise InvalidArgument("load takes a sequence of bytes: [gguf] or [gguf, configuration]")
        if not 1 <= len(builders) <= 2:
            raise InvalidArgument(
                f"load takes a GGUF file and, optionally, configuration; got {len(builders)} builders"
            )
        if not builders[0].startswith(_GGUF_MAGIC):  # the rest of the header is checked in the file
            raise InvalidArgument(f"the model is no GGUF file: it begins with {builders[0][:4]!r}; pass a GGUF model")
        layers = [self._parse(source, door) for source in (*builders[1:], config)]
        # No context manager: the folder belongs to the graph, and goes when that is unloaded.
        folder = tempfile.TemporaryDirectory(prefix="wasi-nn-")
        try:
            path = Path(folder.name, "model.gguf")
            path.touch(mode=0o600)
            path.write_bytes(builders[0])
            graph = Graph(self._owner(door), "(bytes)", door)
            return self._open(graph, path, layers, progress=progress, folder=folder)
        except BaseException:
            folder.cleanup()
            raise

    def load_by_name(
        self,
        name: str | Path,
        *,
        door: Door = PYTHON_DOOR,
        progress: ProgressCallback | None = None,
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
        layers = [self._parse(config, door)]
        registration = self.registry.find(name)
        if registration is not None:
            graph = Graph(self._owner(door), name, door)
            self._open(graph, registration.path, [registration.layer, *layers], progress=progress)
            self._catch_up(graph, registration)
            self._pin(name, graph.retained_lease())
            return graph
        if not door.is_trusted:
            raise NotFound(f'no graph is registered as "{name}"; registered: {self._names()}')
        # Not Path.exists, which raises for names that no file can have.
        if name not in BUILTIN_MODELS and os.sep not in name and not os.path.exists(name):
            raise NotFound(
                f'"{name}" is no registered graph, no built-in model and no file; registered: {self._names()}, '
                f"built in: {', '.join(sorted(BUILTIN_MODELS))}"
            )
        return self._open(Graph(self._owner(door), name, door), model_path(name), layers, progress=progress)

    def restore(self, path: str | Path, *, progress: ProgressCallback | None = None) -> ExecutionContext:
        """``Graph.restore`` on the model that the session was saved with, loaded again under its name or from its path.

        The graph lives as long as the backend. Also raises what ``load_by_name`` raises.
        """
        saved = read_session(path)
        known = self.registry.find(saved.graph) is not None or saved.graph in BUILTIN_MODELS
        return self.load_by_name(saved.graph if known else saved.path, progress=progress).restore(path)

    def reload(
        self,
        name: str | Path,
        model: str | Path | None = None,
        config: ConfigSource = None,
        *,
        progress: ProgressCallback | None = None,
    ) -> None:
        """Put another model behind a name, for whoever loads it from now on and for all graphs of that name.

        ``model`` None loads the same file anew; ``config`` replaces what the name was registered with, None keeps it.
        All of it is loaded before anything changes: where that fails, the old model stays in service. As for calls
        under way see ``Graph.reload``. Raises ``NotFound`` and what ``load_by_name`` raises.
        """
        name = str(name)
        self.check_takes_work()
        with self._reloading:
            old = self.registry.find(name)
            graphs = self._graphs_named(name)
            if old is None:
                if not graphs:
                    raise NotFound(f'no graph "{name}" is registered or loaded; registered: {self._names()}')
                path = None if model is None else model_path(model)
                own = None if config is None else parse_layer(config, name="graph")
                _replace_all(graphs, path, lambda layers: layers if own is None else (*layers[:-1], own), progress)
                return
            layer = old.layer if config is None else parse_layer(config, name=f"graph {name}")
            new = Registration(name, old.path if model is None else model_path(model), layer)
            # Somebody may load it when nobody has it loaded now: what cannot be loaded must not take the name.
            lease = self.acquire(new.path, resolve([self._layer, layer]), progress)
            try:
                _replace_all(graphs, new.path, lambda layers: _replaced(layers, old.layer, layer), progress)
            except BaseException:
                lease.release()
                raise
            self.registry.replace(new)
            self._pin(name, lease)
            for graph in self._graphs_named(name):
                self._catch_up(graph, old)

    def status(self) -> BackendStatus:
        """What is loaded, who has a session, and what they are doing."""
        with self._lock:
            graphs = list(self._graphs)
        return read_status(graphs, self._store, self.tasks, self.now_s())

    def close(self, grace_s: float = 0.0) -> None:
        """Refuse new work, end what runs, and unload every graph; nothing of the backend is left then. Idempotent.

        Calls that are in the batch have ``grace_s`` seconds to finish. Those that wait for a place in it, and what runs
        after that time, end with ``Cancelled`` at the next token, their text so far kept. A signal handler may call it,
        or a call on a context, which is then freed when that call returns. A forked child unloads only what it loaded.
        """
        atexit.unregister(self._close_at_exit)
        if self._home.is_left and all(graph.home.is_left for graph in self._graphs):
            self._closed = True  # without the lock: a thread that is gone may have held it
            return
        with self._lock:
            self._closed = True
            graphs = [graph for graph in self._graphs if not graph.home.is_left]
        contexts = [context for graph in graphs for context in graph.contexts()]
        deadline_s = self.now_s() + grace_s
        error = Cancelled("the run was stopped: the backend is closing")
        for context in contexts:
            if context.state == "queued" or grace_s <= 0:
                context.cancel_run(error)
        if grace_s > 0:
            for context in contexts:
                context.wait_until_idle(max(0.0, deadline_s - self.now_s()))
        for context in contexts:
            context.cancel_run(error)
        with self._closing:  # who closes at the same time returns when it is done, too
            self._take_down(error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # For graphs and contexts of this backend.

    def next_id(self) -> int:
        return next(self._ids)

    def now_s(self) -> float:
        return self._clock()

    def check_takes_work(self) -> None:
        """Raises ``RuntimeFailure`` when the backend closes."""
        if self._closed:
            raise RuntimeFailure("the backend is closed: make a new one")

    def acquire(
        self, path: Path, settings: Settings, progress: ProgressCallback | None = None, adapters: Sequence[str] = ()
    ) -> EngineLease:
        return self._store.acquire(path, settings, progress, adapters)

    def forget(self, graph: Graph) -> None:
        with self._lock:
            self._graphs.discard(graph)

    def _take_down(self, error: Cancelled) -> None:
        with self._lock:
            graphs, self._graphs = self._graphs, set()
            pinned, self._pinned = self._pinned, {}
        for graph in [graph for graph in graphs if not graph.home.is_left]:
            for context in graph.contexts():
                context.shut_down(error)
            graph.release()
        was_open = not self.sessions.is_closed
        self.sessions.close()
        self._store.stop_embedders()
        for lease in pinned.values():
            lease.release()
        self._store.close()
        if was_open:
            _log.info("the backend is closed: nothing runs any more")
        if self._log is not None:
            self._log.close()

    def _parse(self, config: ConfigSource, door: Door) -> Layer:
        """A graph's configuration; its warnings wait for the log that it may ask for."""
        return parse_at_door(config, place="graph", door=door, strict=self._layer.strict, logs=False)

    def _names(self) -> str:
        return ", ".join(self.registry.names()) or "none"

    def _graphs_named(self, name: str) -> list[Graph]:
        with self._lock:
            return [graph for graph in self._graphs if graph.name == name]

    def _pin(self, name: str, lease: EngineLease) -> None:
        """Keep what a registered name was last loaded as in memory: the next guest most often wants the same."""
        with self._lock:
            if self._closed:
                previous: EngineLease | None = lease
            else:
                previous = self._pinned.get(name)
                self._pinned[name] = lease
        if previous is not None:
            previous.release()

    def _owner(self, door: Door) -> OwningBackend[Graph]:
        owner: OwningBackend[Graph] = door.owner if isinstance(door, OwnedDoor) else self
        return owner

    def _catch_up(self, graph: Graph, registration: Registration) -> None:
        """A graph may have been loaded as ``registration`` while that was replaced."""
        current = self.registry.find(graph.name)
        if current is None or not any(layer is registration.layer for layer in graph.layers):
            return
        if graph.path != current.path or current.layer is not registration.layer:
            _replace_all([graph], current.path, lambda layers: _replaced(layers, registration.layer, current.layer))

    def _open(
        self,
        graph: Graph,
        path: Path,
        layers: Sequence[Layer],
        *,
        progress: ProgressCallback | None = None,
        folder: tempfile.TemporaryDirectory[str] | None = None,
    ) -> Graph:
        self.check_takes_work()
        all_layers = (parse_layer(graph.door.defaults, name=graph.door.name), self._layer, *layers)
        graph.open(path, all_layers, layers, progress, folder)
        with self._lock:
            if not self._closed:
                self._graphs.add(graph)
                return graph
        graph.release()
        raise RuntimeFailure("the backend is closed: make a new one")


def _replace_all(
    graphs: Sequence[Graph],
    path: Path | None,
    relayer: Callable[[tuple[Layer, ...]], tuple[Layer, ...]],
    progress: ProgressCallback | None = None,
) -> None:
    """Another model for all of these graphs, or an error and for none of them. A graph that is unloaded meanwhile needs
    none."""
    prepared: list[tuple[Graph, LoadedModel]] = []
    try:
        for graph in graphs:
            prepared.append((graph, graph.prepare(path or graph.path, relayer(graph.layers), progress)))
    except BaseException:
        for _, loaded in prepared:
            loaded.lease.release()
        raise
    for graph, loaded in prepared:
        if not graph.replace(loaded):
            _log.info('the graph "%s" was unloaded while it was reloaded', graph.name)


def _replaced(layers: tuple[Layer, ...], old: Layer, new: Layer) -> tuple[Layer, ...]:
    return tuple(new if layer is old else layer for layer in layers)


def _closer(reference: weakref.ref[Backend]) -> Callable[[], None]:
    """Closes a backend if it still exists, without keeping it alive until then."""

    def close() -> None:
        backend = reference()
        if backend is not None:
            backend.close()

    return close
