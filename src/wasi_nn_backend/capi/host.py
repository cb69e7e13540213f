"""One C host's backend: its graphs and contexts by number. Hosts of one configuration share models and batches."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass

from wasi_nn_backend.backend import Backend
from wasi_nn_backend.capi.contexts import ContextTable
from wasi_nn_backend.capi.models import Environment
from wasi_nn_backend.config import Layer, parse_layer
from wasi_nn_backend.config.layers import merge
from wasi_nn_backend.errors import InvalidArgument, NotFound
from wasi_nn_backend.execution_context import ExecutionContext
from wasi_nn_backend.graph import Graph
from wasi_nn_backend.handles import HandleTable
from wasi_nn_backend.types import Door

__all__ = ["Host", "HostTable"]

_N_HOSTS_MAX = 4096
_N_GRAPHS_MAX = 4096
#: Far from what programs have in a pointer by mistake, such as 0, 1 or an address.
_FIRST_BACKEND = 0x4E4E_0001


class Host:
    """What ``ctx`` stands for."""

    def __init__(self, backend: Backend, door: Door, environment: Environment, release: Callable[[], None]) -> None:
        self.backend = backend
        # Programs that never look at the graph's number pass 0: the first one has it.
        self.graphs: HandleTable[Graph] = HandleTable("graph", _N_GRAPHS_MAX, "unload one")
        self.contexts = ContextTable()
        self._door = door
        self._environment = environment
        self._release = release
        self._loaded: dict[int, None] = {}  # the handles of open graphs, in the order of loading
        self._lock = threading.Lock()
        self._naming = threading.Lock()  # held while a session is opened, so that no id gets one on two graphs
        self._closed = False

    def load_by_name(self, name: str, config: bytes | None) -> Graph:
        path = self._environment.find(name, is_trusted=self._door.is_trusted)
        if not self._door.is_trusted:
            # Untrusted doors load what is registered, and the rules above just said that this may be.
            name = str(path)
            if self.backend.registry.find(name) is None:
                with contextlib.suppress(InvalidArgument):  # another instance, which shares the backend, was faster
                    self.backend.register(name, path)
        return self.backend.load_by_name_with_config(str(path), config, door=self._door)

    def check_takes_bytes(self) -> None:
        """Raises ``SecurityViolation`` where callers load models by their names only."""
        self._environment.check_bytes(is_trusted=self._door.is_trusted)

    def add_graph(self, make: Callable[[], Graph]) -> int:
        with self.graphs.reserve() as publish:
            graph = make()
            handle = publish(graph)
        with self._lock:
            self._loaded[handle] = None
        if self._closed:
            with contextlib.suppress(InvalidArgument):  # close() may have had it already
                self.unload(handle)
            raise InvalidArgument("the backend was closed while the model was loaded")
        return handle

    def unload(self, handle: int) -> None:
        graph = self.graphs.remove(handle)
        with self._lock:
            self._loaded.pop(handle, None)
        graph.unload()

    def add_context(self, make: Callable[[], ExecutionContext]) -> int:
        handle = self.contexts.add(make)
        if self._closed:
            with contextlib.suppress(InvalidArgument):  # close() may have had it already
                self.contexts.get(handle).shut_down()
            raise InvalidArgument("the backend was closed while the context was made")
        return handle

    def open_session(self, session_id: str) -> int:
        """The live context of a session; else a new one, on the graph that it was on while a handle to it is open, or
        on the newest."""
        with self._naming:
            last = self.contexts.last_opened(session_id)
            graph = self._newest_graph() if last is None or not last.graph.alive else last.graph
            return self.add_context(lambda: graph.init_execution_context({"session": {"session_id": session_id}}))

    def close(self) -> None:
        """Contexts first: what runs in them is cancelled."""
        self._closed = True
        for context in self.contexts.drain():
            context.shut_down()
        for graph in self.graphs.drain():
            with contextlib.suppress(InvalidArgument):  # at the interpreter's end the backend may have closed before
                graph.unload()
        self._release()

    def _newest_graph(self) -> Graph:
        with self._lock:
            newest = next(reversed(self._loaded), None)
        if newest is None:
            raise NotFound("no graph is loaded for the session: load a model first")
        return self.graphs.get(newest)


@dataclass
class _Shared:
    """A ``Backend`` and how many hosts use it."""

    backend: Backend
    n_hosts: int = 0


class HostTable:
    """All open hosts of one library."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._hosts: HandleTable[Host] = HandleTable(
            "backend", _N_HOSTS_MAX, "deinitialise one", first_handle=_FIRST_BACKEND
        )
        self._lock = threading.Lock()
        self._shared: dict[str, _Shared] = {}

    def open(self, config: bytes, environment: Environment) -> int:
        """Raises what ``parse_layer`` raises, and ``NotFound`` where WASI_NN_CONFIG names no file."""
        layer = _backend_layer(config, environment)
        with self._hosts.reserve() as publish:
            key = repr(sorted((section, sorted(keys.items())) for section, keys in layer.values.items()))
            with self._lock:
                shared = self._shared.get(key)
                if shared is None:
                    shared = self._shared[key] = _Shared(Backend(layer))
                shared.n_hosts += 1
            return publish(Host(shared.backend, self._door, environment, lambda: self._leave(key)))

    def get(self, handle: int) -> Host:
        return self._hosts.get(handle)

    def close(self, handle: int) -> None:
        self._hosts.remove(handle).close()

    def close_all(self) -> None:
        for host in self._hosts.drain():
            host.close()

    def _leave(self, key: str) -> None:
        with self._lock:
            shared = self._shared[key]
            shared.n_hosts -= 1
            is_last = shared.n_hosts == 0
            if is_last:
                del self._shared[key]
        if is_last:
            shared.backend.close()


def _backend_layer(config: bytes, environment: Environment) -> Layer:
    layers = []
    if environment.config_file is not None:
        try:
            text = environment.config_file.read_bytes()
        except OSError as error:
            raise InvalidArgument(
                f"WASI_NN_CONFIG is {environment.config_file}: {error.strerror}; correct or unset it"
            ) from None
        layers.append(parse_layer(text, name="WASI_NN_CONFIG"))
    layers.append(parse_layer(config or None, name="init_backend_with_config"))
    return merge(layers, name="backend")
