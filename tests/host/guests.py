"""Small WebAssembly guests for the tests: WAT text, and a driver that lets a test make each call by hand.

Every call of the driver goes test -> exported wrapper in WebAssembly -> imported host function, so the host sees a real
caller with a real memory.
"""

from __future__ import annotations

import struct
from types import TracebackType
from typing import Self

from wasmtime import Instance, Linker, Memory, Store

from wasi_nn_backend.backend import Backend
from wasi_nn_backend.dialects import WASMEDGE, Dialect
from wasi_nn_backend.host import HostLimits, compile_module, create_engine, define_wasi_nn, read_module

PAGE = 65536
N_PAGES = 2
ONE_MEMORY = f'(memory (export "memory") {N_PAGES})'
U8 = 3
#: Where the driver puts what it passes; below lie the out-parameters.
HEAP = 1024
OUT = 16


def imports_wat(dialect: Dialect) -> str:
    """One import for each function of a dialect, named ``$name``."""
    return "\n".join(
        f'(import "{dialect.import_module}" "{name}" (func ${name} (param {"i32 " * len(parameters)}) (result i32)))'
        for name, parameters in dialect.functions.items()
    )


def wrapper_wat(dialect: Dialect, memory: str = ONE_MEMORY) -> str:
    """A module that exports each imported function as it is, and its memory."""
    wrappers = "\n".join(
        f'(func (export "{name}") (param {"i32 " * len(parameters)}) (result i32) '
        f"{' '.join(f'(local.get {i})' for i in range(len(parameters)))} (call ${name}))"
        for name, parameters in dialect.functions.items()
    )
    return f"(module {imports_wat(dialect)} {memory} {wrappers})"


def command_wat(body: str, *, dialect: Dialect = WASMEDGE, data: str = "", memory: str = ONE_MEMORY) -> bytes:
    """A module whose ``_start`` is ``body``. WASI's fd_write and proc_exit are imported as ``$fd_write``, ``$exit``."""
    return f"""(module
        {imports_wat(dialect)}
        (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
        (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
        {memory} {data}
        (func (export "_start") {body}))""".encode()


def text_data(address: int, text: bytes) -> str:
    """A data segment."""
    return f'(data (i32.const {address}) "{"".join(f"{chr(92)}{byte:02x}" for byte in text)}")'


def print_wat(iovec: int) -> str:
    """Write the text behind an (address, length) pair at ``iovec`` to standard output."""
    return f"(drop (call $fd_write (i32.const 1) (i32.const {iovec}) (i32.const 1) (i32.const 0)))"


def iovec_data(iovec: int, address: int, text: bytes) -> str:
    return text_data(iovec, struct.pack("<II", address, len(text))) + text_data(address, text)


class Driver:
    """A guest whose calls a test makes one by one. ``call`` returns the error number."""

    def __init__(
        self,
        backend: Backend,
        dialect: Dialect = WASMEDGE,
        *,
        limits: HostLimits | None = None,
        memory: str = ONE_MEMORY,
    ) -> None:
        engine = create_engine(use_cache=False)
        self.store = Store(engine)
        self.store.set_epoch_deadline(1)
        self.streamed = bytearray()
        linker = Linker(engine)
        self.state = define_wasi_nn(
            linker, self.store, backend, dialect, limits=limits, write_stdout=self.streamed.extend
        )
        module = compile_module(engine, read_module(wrapper_wat(dialect, memory).encode()))
        self.instance: Instance = linker.instantiate(self.store, module)
        self._next_free = HEAP

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.state.close()
        self.store.close()

    def call(self, function: str, *words: int) -> int:
        # wasmtime-py wants signed numbers for an i32.
        signed = [word - (1 << 32) if word >= 1 << 31 else word for word in words]
        return int(self.instance.exports(self.store)[function](self.store, *signed))

    @property
    def memory(self) -> Memory:
        memory = self.instance.exports(self.store)["memory"]
        assert isinstance(memory, Memory)
        return memory

    def place(self, data: bytes) -> int:
        """Copy bytes into the guest's memory; returns their address."""
        address = self._next_free
        if data:
            self.memory.write(self.store, data, address)
        self._next_free += (len(data) + 7) // 8 * 8
        return address

    def forget_placed(self) -> None:
        """What was placed is no longer needed: the next ``place`` begins from the bottom again."""
        self._next_free = HEAP

    def peek(self, address: int, n_bytes: int) -> bytes:
        return bytes(self.memory.read(self.store, address, address + n_bytes))

    def peek_u32(self, address: int) -> int:
        return int(struct.unpack("<I", self.peek(address, 4))[0])

    def tensor(self, data: bytes, *, dims: tuple[int, ...] = (1,), type_word: int = U8) -> int:
        words = struct.pack("<II", self.place(struct.pack(f"<{len(dims)}I", *dims)), len(dims))
        return self.place(words + struct.pack("<III", type_word, self.place(data), len(data)))

    # Whole steps that are expected to succeed.

    def load(self, name: bytes, config: bytes | None = None) -> int:
        at = self.place(name)
        if config is None:
            errno = self.call("load_by_name", at, len(name), OUT)
        else:
            errno = self.call("load_by_name_with_config", at, len(name), self.place(config), len(config), OUT)
        assert errno == 0, self.state.last_error
        return self.peek_u32(OUT)

    def open(self, name: bytes, config: bytes | None = None) -> int:
        """Load a graph; returns a context on it."""
        assert self.call("init_execution_context", self.load(name, config), OUT) == 0, self.state.last_error
        return self.peek_u32(OUT)

    def set_prompt(self, context: int, prompt: bytes) -> None:
        assert self.call("set_input", context, 0, self.tensor(prompt)) == 0, self.state.last_error

    def configure(self, context: int, config: bytes) -> int:
        return self.call("set_input", context, 1, self.tensor(config))

    def output(self, context: int, index: int = 0, *, function: str = "get_output") -> bytes:
        buffer = PAGE
        assert self.call(function, context, index, buffer, PAGE, OUT) == 0, self.state.last_error
        return self.peek(buffer, self.peek_u32(OUT))

    def generate(self, context: int, prompt: bytes) -> bytes:
        self.set_prompt(context, prompt)
        assert self.call("compute", context) == 0, self.state.last_error
        return self.output(context)

    def single_tokens(self, context: int) -> tuple[list[bytes], int]:
        """All pieces that compute_single gives, and the number that ended it."""
        pieces = []
        while (errno := self.call("compute_single", context)) == 0:
            pieces.append(self.output(context, function="get_output_single"))
        return pieces, errno
