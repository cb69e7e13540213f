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
from wasi_nn_backend.errors import InvalidArgument, InvalidEncoding, NotFound, RuntimeFailure
from wasi_nn_backend.execution_context import ExecutionContext
from wasi_nn_backend.graph import Graph
from wasi_nn_backend.llama import load_llama
from wasi_nn_backend.llama.interface import Llama, ProgressCallback
from wasi_nn_backend.log_setup import configured_output
from wasi_nn_backend.registry import BUILTIN_MODELS, Registration, Registry, model_path
from wasi_nn_backend.session import read_session
from wasi_nn_backend.types import PYTHON_DOOR, Door, ExecutionTarget, GraphEncoding

__all__ = ["Backend"]

_log = logging.getLogger(__name__)


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
        layers = [self._parse(source, door) for source in (*builders[1:], config)]
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
        layers = [self._parse(config, door)]
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
        if self._log is not None:
            self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # For graphs and contexts of this backend.

    def next_id(self) -> int:
        return next(self._ids)

    def acquire(
        self, path: Path, settings: Settings, progress: ProgressCallback | None = None, adapters: Sequence[str] = ()
    ) -> EngineLease:
        return self._store.acquire(path, settings, progress, adapters)

    def forget(self, graph: Graph) -> None:
        with self._lock:
            self._graphs.discard(graph)

    def _parse(self, config: ConfigSource, door: Door) -> Layer:
        """A graph's configuration; its warnings wait for the log that it may ask for."""
        return parse_at_door(config, place="graph", door=door, strict=self._layer.strict, logs=False)

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
        graph.open(layers, progress, folder)
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
