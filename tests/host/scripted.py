"""A backend that does what a test tells it to: raises, blocks, returns. For what the real one does not do on demand."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, ClassVar, cast

from wasi_nn_backend.backend import Backend
from wasi_nn_backend.errors import Cancelled
from wasi_nn_backend.registry import Registry


class ScriptedBackend:
    """``script`` maps a call's name to what happens in it; a call without an entry succeeds.

    ``calls`` lists the names in order, ``n_open`` counts graphs and contexts that nobody has closed, ``progress`` is
    the last load's callback.
    """

    def __init__(self, script: dict[str, Callable[[], Any]] | None = None) -> None:
        self.script = {} if script is None else script
        self.calls: list[str] = []
        self.n_open = 0
        self.progress: Callable[[float], bool] | None = None
        self.registry = Registry()

    def play(self, name: str) -> Any:
        self.calls.append(name)
        action = self.script.get(name)
        return action() if action is not None else None

    def load_by_name(self, name: str, **options: Any) -> ScriptedGraph:
        self.progress = options["progress"]
        self.play("load_by_name")
        return ScriptedGraph(self)

    def load_by_name_with_config(self, name: str, config: object, **options: Any) -> ScriptedGraph:
        self.play("load_by_name_with_config")
        return ScriptedGraph(self)

    def load(self, *arguments: object, **options: Any) -> ScriptedGraph:
        self.play("load")
        return ScriptedGraph(self)


class ScriptedGraph:
    def __init__(self, backend: ScriptedBackend) -> None:
        self.backend = backend
        backend.n_open += 1

    def init_execution_context(self) -> ScriptedContext:
        self.backend.play("init_execution_context")
        return ScriptedContext(self.backend, self)

    def configure(self, context: ScriptedContext, config: bytes) -> ScriptedContext:
        self.backend.play("configure")
        return context

    def unload(self) -> None:
        self.backend.n_open -= 1
        self.backend.play("unload")


class ScriptedContext:
    """``compute`` blocks while the script's "compute" says so; ``cancel`` sets ``cancelled``."""

    metadata: ClassVar[dict[str, object]] = {
        "input_tokens": 16,
        "output_tokens": 8,
        "llama_build_number": 8757,
        "llama_commit": "a29e4c0b",
        "finish_reason": "stop",
    }

    def __init__(self, backend: ScriptedBackend, graph: ScriptedGraph) -> None:
        self.backend = backend
        self.graph = graph
        self.cancelled = threading.Event()
        backend.n_open += 1

    def set_input(self, index: int, tensor: object) -> None:
        self.backend.play("set_input")

    def compute(self, stdout: Callable[[bytes], None] | None = None) -> None:
        if self.backend.play("compute") == "block":
            self.cancelled.wait()
            raise Cancelled("stopped")

    def compute_single(self, stdout: Callable[[bytes], None] | None = None) -> None:
        self.backend.play("compute_single")

    def get_output(self, index: int = 0) -> bytes:
        return self.backend.play("get_output") or b""

    def get_output_single(self, index: int = 0) -> bytes:
        return self.backend.play("get_output_single") or b""

    def fini_single(self) -> None:
        self.backend.play("fini_single")

    def cancel(self) -> None:
        self.cancelled.set()

    def close(self) -> None:
        self.backend.n_open -= 1
        self.backend.play("close")


def scripted(script: dict[str, Callable[[], Any]] | None = None) -> tuple[Backend, ScriptedBackend]:
    """The same object twice: as the host sees it, and as the test does."""
    backend = ScriptedBackend(script)
    return cast(Backend, backend), backend
