"""What each operation does, on Python's public objects. The node's numbers stand for objects here."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from wasi_nn_backend.backend import Backend
from wasi_nn_backend.errors import Busy, Cancelled, InvalidArgument, InvalidEncoding
from wasi_nn_backend.execution_context import ExecutionContext
from wasi_nn_backend.graph import Graph
from wasi_nn_backend.port.requests import CallRequest
from wasi_nn_backend.port.terms import Atom, Term
from wasi_nn_backend.types import METADATA_INDEX, Door

__all__ = ["ERLANG_DOOR", "Call", "Calls"]

ERLANG_DOOR = Door(name="erlang", prompt_mode="chat", is_trusted=True)

_DONE = Atom("done")

T = TypeVar("T")


class Call:
    """One call under way. ``cancel`` may come at any time, also before the work has begun."""

    def __init__(self, request: CallRequest, send_token: Callable[[bytes], None]) -> None:
        self.request = request
        self.send_token = send_token
        self._lock = threading.Lock()
        self._is_cancelled = False
        self._context: ExecutionContext | None = None

    @property
    def is_cancelled(self) -> bool:
        return self._is_cancelled

    def cancel(self) -> None:
        """A run that is about to start may not hear it: whoever cancels repeats it until the reply is there."""
        with self._lock:
            self._is_cancelled = True
            if self._context is not None:
                self._context.cancel()

    @contextmanager
    def working_on(self, context: ExecutionContext) -> Iterator[None]:
        """For the block a cancel reaches this context. Raises ``Cancelled`` when it came before."""
        self.check()
        with self._lock:
            self._context = context
        try:
            yield
        finally:
            with self._lock:  # the context's next run is another call's
                self._context = None

    def check(self) -> None:
        if self._is_cancelled:
            raise Cancelled("the call was cancelled, or its caller has died")


class _Table(Generic[T]):
    """Objects by the node's numbers, each with the number of what it belongs to. Thread-safe."""

    def __init__(self, noun: str) -> None:
        self._noun = noun
        self._lock = threading.Lock()
        self._items: dict[int, tuple[int, T]] = {}

    def add(self, number: int, parent: int, item: T) -> None:
        with self._lock:
            if number in self._items:
                raise InvalidArgument(f"{self._noun} {number} exists: choose a new number")
            self._items[number] = (parent, item)

    def get(self, number: int) -> T:
        return self._entry(number)[1]

    def remove(self, number: int) -> T:
        with self._lock:
            _, item = self._entry(number)
            del self._items[number]
            return item

    def remove_children(self, parent: int) -> list[int]:
        """Forget all that belong to ``parent``; their numbers."""
        with self._lock:
            numbers = [number for number, (owner, _) in self._items.items() if owner == parent]
            for number in numbers:
                del self._items[number]
            return numbers

    def drain(self) -> list[T]:
        with self._lock:
            items = [item for _, item in self._items.values()]
            self._items.clear()
            return items

    def _entry(self, number: int) -> tuple[int, T]:
        try:
            return self._items[number]
        except KeyError:
            raise InvalidArgument(f"there is no {self._noun} {number}, or it is closed") from None


class Calls:
    """The operations. Any thread may be in any of them."""

    def __init__(self, open_backend: Callable[[bytes | None], Backend] = Backend) -> None:
        self._open_backend = open_backend
        self._backends: _Table[Backend] = _Table("backend")
        self._graphs: _Table[Graph] = _Table("graph")
        self._contexts: _Table[ExecutionContext] = _Table("execution context")
        self._claiming = threading.Lock()
        self._claimed: set[ExecutionContext] = set()
        self._is_closed = False

    def perform(self, call: Call) -> Term:
        """The call's result. Raises what its operation raises, and ``Cancelled``."""
        if call.request.error is not None:
            raise call.request.error
        call.check()
        method: Callable[..., Term] = getattr(self, f"_{call.request.operation}")
        return method(call, *call.request.arguments)

    def close(self) -> None:
        """Cancel what runs, and give everything back."""
        self._is_closed = True
        for backend in self._backends.drain():
            backend.close()

    def _ping(self, _call: Call) -> Term:
        return Atom("pong")

    def _init_backend(self, _call: Call, number: int, config: bytes) -> Term:
        backend = self._open_backend(config or None)
        try:
            self._backends.add(number, 0, backend)
        except InvalidArgument:
            backend.close()
            raise
        if self._is_closed:
            backend.close()
        return _DONE

    def _deinit_backend(self, _call: Call, number: int) -> Term:
        backend = self._backends.remove(number)
        for graph in self._graphs.remove_children(number):
            self._contexts.remove_children(graph)
        backend.close()
        return _DONE

    def _status(self, _call: Call, number: int) -> Term:
        """JSON, since OTP has no name for most of it."""
        return json.dumps(dataclasses.asdict(self._backends.get(number).status())).encode()

    def _load_by_name(self, call: Call, backend_number: int, number: int, name: bytes, config: bytes) -> Term:
        backend = self._backends.get(backend_number)
        graph = backend.load_by_name_with_config(
            _text(name, "the model's name"),
            config or None,
            door=ERLANG_DOOR,
            progress=lambda _fraction: not (call.is_cancelled or self._is_closed),
        )
        try:
            self._backends.get(backend_number)  # closed meanwhile?
            self._graphs.add(number, backend_number, graph)
        except InvalidArgument:
            graph.release()
            raise
        return _DONE

    def _unload(self, _call: Call, number: int) -> Term:
        self._graphs.remove(number).unload()
        return _DONE

    def _init_execution_context(self, _call: Call, graph_number: int, number: int, session_id: bytes) -> Term:
        """True where the conversation is kept on disk."""
        graph = self._graphs.get(graph_number)
        name = _text(session_id, "the session's id")
        context = graph.init_execution_context({"session": {"session_id": name}} if name else None)
        try:
            self._graphs.get(graph_number)
            self._contexts.add(number, graph_number, context)
        except InvalidArgument:
            context.release()
            raise
        return context.file is not None

    def _set_input(self, call: Call, number: int, index: int, data: bytes) -> Term:
        context = self._contexts.get(number)
        with self._claim(context), call.working_on(context):
            context.set_input(index, data)
        return _DONE

    def _compute(self, call: Call, number: int) -> Term:
        context = self._contexts.get(number)
        with self._claim(context), call.working_on(context):
            context.compute()
        return _DONE

    def _get_output(self, _call: Call, number: int, index: int) -> Term:
        return self._contexts.get(number).get_output(index)

    def _run_inference(self, call: Call, number: int, prompt: bytes, config: bytes) -> Term:
        context = self._contexts.get(number)
        with self._claim(context), call.working_on(context):
            return context.run_inference(prompt, config or None).encode()

    def _stream(self, call: Call, number: int, prompt: bytes, config: bytes) -> Term:
        """The metadata as JSON, after the tokens."""
        context = self._contexts.get(number)
        with self._claim(context), call.working_on(context):
            pieces: Any = context.stream(prompt, config or None)
            try:
                for piece in pieces:
                    call.check()
                    call.send_token(piece.encode())
            finally:
                pieces.close()
            return context.get_output(METADATA_INDEX)

    @contextmanager
    def _claim(self, context: ExecutionContext) -> Iterator[None]:
        """One call at a time, for its whole length: between two pieces of a stream a context would let others in."""
        with self._claiming:
            if context in self._claimed:
                raise Busy(f"execution context {context.id} is working on another call: wait for it or cancel it")
            self._claimed.add(context)
        try:
            yield
        finally:
            with self._claiming:
                self._claimed.discard(context)

    def _close_execution_context(self, _call: Call, number: int) -> Term:
        self._contexts.remove(number).release()
        return _DONE


def _text(data: bytes, what: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidEncoding(f"{what} is not UTF-8 ({error.reason} at byte {error.start})") from None
