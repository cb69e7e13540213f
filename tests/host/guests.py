"""Small WebAssembly guests for the tests: WAT text, and a driver that lets a test make each call by hand.

Every call of the driver goes test -> exported wrapper in WebAssembly -> imported host function, so the host sees a real
caller with a real memory.
"""

from __future__ import annotations

import struct
from functools import cache
from types import TracebackType
from typing import Self

from wasmtime import Engine, Instance, Linker, Memory, Module, Store

from tests.host.abis import Abi, abi_of
from wasi_nn_backend.backend import Backend
from wasi_nn_backend.dialects import CORE_DIALECTS, WASMEDGE, Dialect
from wasi_nn_backend.host import (
    HostLimits,
    compile_module,
    create_engine,
    define_wasi_nn,
    examine_imports,
    read_module,
)

PAGE = 65536
N_PAGES = 2
ONE_MEMORY = f'(memory (export "memory") {N_PAGES})'
U8 = 3
#: Where the driver puts what it passes; below lie the out-parameters.
HEAP = 1024
OUT = 16


def signature_wat(abi: Abi, function: str) -> str:
    parameters, result = abi.types(function)
    return f"(param {' '.join(parameters)}) (result {result})"


def imports_wat(dialect: Dialect | Abi) -> str:
    """One import for each function of a dialect, named ``$name``."""
    abi = as_abi(dialect)
    return "\n".join(
        f'(import "{abi.import_module}" "{name}" (func ${name} {signature_wat(abi, name)}))' for name in abi.functions
    )


def wrapper_wat(dialect: Dialect | Abi, rest: str | None = None) -> str:
    """A module that exports each imported function as it is, and its memory. ``rest``: what it has instead of that
    memory."""
    abi = as_abi(dialect)
    if rest is None:
        rest = memory_wat(abi)
    wrappers = "\n".join(
        f'(func (export "{name}") {signature_wat(abi, name)} '
        f"{' '.join(f'(local.get {i})' for i in range(len(abi.types(name)[0])))} (call ${name}))"
        for name in abi.functions
    )
    return f"(module {imports_wat(abi)} {rest} {wrappers})"


def as_abi(dialect: Dialect | Abi) -> Abi:
    return dialect if isinstance(dialect, Abi) else abi_of(dialect.name)


def memory_wat(abi: Abi, n_pages: int = N_PAGES) -> str:
    return f'(memory (export "memory") {"i64 " if abi.n_bits == 64 else ""}{n_pages})'


def malloc_wat(abi: Abi, body: str | None = None, *, start: int = PAGE) -> str:
    """A ``malloc`` that hands out what lies behind ``start``, or does what ``body`` says with ``local.get 0``."""
    kind = abi.pointer
    if body is None:
        body = (
            f"(global.get $break) (global.set $break ({kind}.add (global.get $break) ({kind}.and "
            f"({kind}.add (local.get 0) ({kind}.const 7)) ({kind}.const -8))))"
        )
    return (
        f"(global $break (mut {kind}) ({kind}.const {start}))"
        f'(func $malloc (export "malloc") (param {kind}) (result {kind}) {body})'
        f'(func (export "free") (param {kind}))'
    )


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


@cache
def compiled(wat: str) -> tuple[Engine, Module]:
    """A matrix has hundreds of guests whose modules are a few, and nobody raises the epoch of these engines."""
    engine = create_engine(use_cache=False)
    return engine, compile_module(engine, read_module(wat.encode()))


class Driver:
    """A guest whose calls a test makes one by one. ``call`` returns the error number."""

    def __init__(
        self,
        backend: Backend,
        dialect: Dialect | Abi = WASMEDGE,
        *,
        limits: HostLimits | None = None,
        memory: str | None = None,
    ) -> None:
        self.abi = as_abi(dialect)
        engine, module = compiled(wrapper_wat(self.abi, memory))
        self.store = Store(engine)
        self.store.set_epoch_deadline(1)
        self.streamed = bytearray()
        linker = Linker(engine)
        known = next(known for known in CORE_DIALECTS if known.name == self.abi.dialect)
        examined = examine_imports(module, engine, known)
        assert examined.dialect is not None
        assert not examined.missing
        self.state = define_wasi_nn(
            linker,
            self.store,
            backend,
            examined.dialect,
            limits=limits,
            write_stdout=self.streamed.extend,
        )
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
        # wasmtime-py wants signed numbers.
        bits = [int(kind[1:]) for kind in self.abi.types(function)[0]]
        signed = [word - (1 << n) if word >> (n - 1) else word for word, n in zip(words, bits, strict=True)]
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

    def tensor(self, data: bytes, *, dims: tuple[int, ...] | None = None, type_word: int | None = None) -> int:
        """The address of a tensor. ``dims`` None is what modules in the field pass: 1, or the length if that counts."""
        abi = self.abi
        if dims is None:
            dims = (len(data),) if abi.is_legacy else (1,)
        if type_word is None:
            type_word = abi.u8
        placed_dims, placed = self.place(struct.pack(f"<{len(dims)}I", *dims)), self.place(data)
        if abi.is_legacy:
            shape = self.place(abi.span(placed_dims, len(dims)))
            return self.place(abi.legacy_tensor(shape, type_word, placed))
        return self.place(abi.tensor(placed_dims, len(dims), type_word, placed, len(data)))

    def builders(self, *parts: bytes) -> int:
        """The address of an array of builders."""
        return self.place(b"".join(self.abi.span(self.place(part), len(part)) for part in parts))

    def call_load(self, builders: int, n_builders: int, encoding: int, target: int, out: int) -> int:
        if self.abi.is_legacy:
            return self.call("load", self.place(self.abi.span(builders, n_builders)), encoding, target, out)
        return self.call("load", builders, n_builders, encoding, target, out)

    def call_get_output(
        self, context: int, index: int, buffer: int, n_buffer_bytes: int, out: int, *, function: str = "get_output"
    ) -> int:
        if self.abi.is_legacy:
            self.memory.write(self.store, struct.pack("<I", n_buffer_bytes), out)
            return self.call(function, context, index, buffer, out)
        return self.call(function, context, index, buffer, n_buffer_bytes, out)

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
        buffer, n_bytes = self.memory.data_len(self.store) - PAGE, PAGE
        errno = self.call_get_output(context, index, buffer, n_bytes, OUT, function=function)
        assert errno == 0, self.state.last_error
        return self.peek(buffer, self.peek_u32(OUT))

    def generate(self, context: int, prompt: bytes) -> bytes:
        self.set_prompt(context, prompt)
        assert self.call("compute", context) == 0, self.state.last_error
        return self.output(context)

    def run_inference(self, prompt: bytes) -> int:
        """The address of the answer, unsigned; 0 on failure."""
        address = self.call("run_inference", self.place(prompt), len(prompt))
        return address & ((1 << self.abi.n_bits) - 1)

    def text_at(self, address: int) -> bytes:
        """A NUL-terminated text."""
        return self.peek(address, self.memory.data_len(self.store) - address).partition(b"\0")[0]

    def single_tokens(self, context: int) -> tuple[list[bytes], int]:
        """All pieces that compute_single gives, and the number that ended it."""
        pieces = []
        while (errno := self.call("compute_single", context)) == 0:
            pieces.append(self.output(context, function="get_output_single"))
        return pieces, errno
