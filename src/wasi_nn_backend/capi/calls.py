"""What each call of the C ABI does, on Python's public objects. Pointers were checked by the shim; handles are here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from wasi_nn_backend.capi.host import Host, HostTable
from wasi_nn_backend.capi.models import Environment
from wasi_nn_backend.dialects import Dialect
from wasi_nn_backend.errors import InvalidArgument, InvalidEncoding, TooLarge
from wasi_nn_backend.graph import Graph
from wasi_nn_backend.types import CONFIG_INDEX, METADATA_INDEX

__all__ = ["Calls"]

_log = logging.getLogger(__name__)

Operation = Callable[[Any], None]


class Calls:
    """The calls of one library. ``call`` is cffi's view of a ``wasi_nn_call``. Any thread may be in any method."""

    def __init__(self, ffi: Any, lib: Any, dialect: Dialect) -> None:
        self.dialect = dialect
        self._ffi = ffi
        self._lib = lib
        self._hosts = HostTable(dialect.door)

    def operations(self) -> Mapping[int, Operation]:
        """Number -> method, by the names of the C enumeration: OP_LOAD_BY_NAME is ``load_by_name``."""
        names = self._ffi.typeof("enum wasi_nn_operation").relements
        return {number: getattr(self, name.removeprefix("OP_").lower()) for name, number in names.items()}

    def init_backend(self, call: Any) -> None:
        call.backend = self._hosts.open(self._bytes(call.config), Environment.read(self._getenv))

    def deinit_backend(self, call: Any) -> None:
        self._hosts.close(call.backend)

    def close_all(self, call: Any = None) -> None:
        """The process or the interpreter ends."""
        self._hosts.close_all()

    def load(self, call: Any) -> None:
        encoding = self.dialect.encodings.get(call.index)
        if encoding is None:
            raise InvalidEncoding(f"graph encoding {call.index} is none of the header's: pass ggml")
        host = self._host(call)
        target = self.dialect.target(call.target)
        host.check_takes_bytes()  # before they are copied
        builders = [self._bytes(call.text), *filter(None, [self._bytes(call.config)])]
        door = self.dialect.door
        call.handle_out = host.add_graph(lambda: host.backend.load(builders, encoding, target, door=door))

    def load_by_name(self, call: Any) -> None:
        host = self._host(call)
        name, config = self._text(call.text, "the model's name"), self._bytes(call.config)
        call.handle_out = host.add_graph(lambda: host.load_by_name(name, config or None))

    def refuse_name(self, call: Any) -> None:
        """A model's name broke a rule of the C side: the log says which, as for the rules of this side."""
        self._host(call)
        rule = self._text(call.text, "the rule")
        _log.warning("a model is refused: %s", rule)
        raise InvalidArgument(rule)

    def unload(self, call: Any) -> None:
        self._host(call).unload(call.handle)

    def init_execution_context(self, call: Any) -> None:
        host = self._host(call)
        graph: Graph = host.graphs.get(call.handle)
        call.handle_out = host.add_context(graph.init_execution_context)

    def init_session(self, call: Any) -> None:
        call.handle_out = self._host(call).open_session(self._text(call.text, "the session's id"))

    def set_input(self, call: Any) -> None:
        data = self._bytes(call.text)
        if call.index == CONFIG_INDEX:
            self._host(call).contexts.configure(call.handle, data)
        else:
            self._context(call).set_input(call.index, data)

    def compute(self, call: Any) -> None:
        self._context(call).compute()

    def get_output(self, call: Any) -> None:
        self._put_out(call, self._context(call).get_output(call.index))

    def run_inference(self, call: Any) -> None:
        if call.index == CONFIG_INDEX:
            raise InvalidArgument("run_inference takes the prompt, index 0; set_input takes configuration, index 1")
        context = self._context(call)
        context.run_inference(self._bytes(call.text), self._bytes(call.config) or None)
        self._put_out(call, context.get_output())

    def compute_single(self, call: Any) -> None:
        self._context(call).compute_single(config=self._bytes(call.config) or None)

    def get_output_single(self, call: Any) -> None:
        self._put_out(call, self._context(call).get_output_single(call.index))

    def fini_single(self, call: Any) -> None:
        self._context(call).fini_single()

    def cancel(self, call: Any) -> None:
        self._context(call).cancel()

    def save_session(self, call: Any) -> None:
        self._context(call).save(self._text(call.text, "the file's path"))

    def restore_session(self, call: Any) -> None:
        host = self._host(call)
        graph: Graph = host.graphs.get(call.handle)
        path = self._text(call.text, "the file's path")
        call.handle_out = host.add_context(lambda: graph.restore(path))

    def close_execution_context(self, call: Any) -> None:
        self._host(call).contexts.close(call.handle)

    def _host(self, call: Any) -> Host:
        return self._hosts.get(call.backend)

    def _context(self, call: Any) -> Any:
        return self._hosts.get(call.backend).contexts.get(call.handle)

    def _bytes(self, span: Any) -> bytes:
        return bytes(self._ffi.buffer(span.data, span.n_bytes)) if span.n_bytes else b""

    def _text(self, span: Any, what: str) -> str:
        try:
            return self._bytes(span).decode()
        except UnicodeDecodeError as error:
            raise InvalidEncoding(f"{what} is not UTF-8 ({error.reason} at byte {error.start})") from None

    def _getenv(self, name: str) -> str | None:
        value = self._lib.getenv(name.encode())
        return self._ffi.string(value).decode(errors="surrogateescape") if value else None

    def _put_out(self, call: Any, data: bytes) -> None:
        capacity = call.capacity
        if call.may_cut and len(data) > capacity and call.index != METADATA_INDEX:
            _log.warning(
                "a text of %d bytes is cut to WASI_NN_LEGACY_OUTPUT_BYTES, %d: the host passes 0 as the size of its "
                "buffer; set the size there",
                len(data),
                capacity,
            )
            data = data[:capacity].decode(errors="ignore").encode()
        call.n_bytes = len(data)
        if len(data) > capacity:
            raise TooLarge(
                f"the output has {len(data)} bytes and the buffer {capacity}: call get_output with a larger one",
                len(data),
            )
        self._ffi.memmove(call.output, data, len(data))
        if len(data) < capacity:
            call.output[len(data)] = 0
