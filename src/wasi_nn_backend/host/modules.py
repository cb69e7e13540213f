"""Module files: read, told apart, compiled.

One engine per guest run. Incrementing an engine's epoch interrupts every store of that engine, so a shared engine
would need a deadline per store and a ticking thread to stop one guest and spare the others; an engine of one's own
costs some 30 microseconds, and the compiled code comes out of wasmtime's cache on disk either way.
"""

from __future__ import annotations

import logging
from pathlib import Path

from wasmtime import Config, Engine, Module, WasmtimeError, wat2wasm

from wasi_nn_backend.errors import InvalidArgument, UnsupportedOperation

__all__ = ["compile_module", "create_engine", "read_module"]

_MAGIC = b"\0asm"
_CORE_VERSION = b"\x01\0\0\0"
_COMPONENT_LAYER = b"\x01\0"  # bytes 6 and 7 of the header, where a core module has the upper half of its version

_log = logging.getLogger(__name__)


def create_engine(*, has_fuel: bool = False, use_cache: bool = True) -> Engine:
    """An engine whose guests can be interrupted; with ``has_fuel`` its stores must be given fuel."""
    config = Config()
    config.epoch_interruption = True
    if has_fuel:
        config.consume_fuel = True
    if use_cache:
        try:
            config.cache = True
        except WasmtimeError as error:
            # A home directory that cannot be written is no reason not to run; compiling again is only slower.
            _log.info("no cache for compiled modules: %s", error)
    return Engine(config)


def read_module(source: str | Path | bytes) -> bytes:
    """The binary of a core module from a ``.wasm`` or ``.wat`` file, or from either's content.

    Raises ``InvalidArgument`` for what is no readable module and ``UnsupportedOperation`` for a component.
    """
    what = "the module" if isinstance(source, bytes) else f"the module {source}"
    binary = source if isinstance(source, bytes) else _read_file(Path(source))
    if not binary.startswith(_MAGIC):
        binary = _from_text(binary, what)
    if binary[6:8] == _COMPONENT_LAYER:
        raise UnsupportedOperation(f"{what} is a component; this host runs core modules: build for wasm32-wasip1")
    if binary[4:8] != _CORE_VERSION:
        raise InvalidArgument(f"{what} has WebAssembly version {binary[4:8].hex()}: this host knows version 1")
    return binary


def compile_module(engine: Engine, binary: bytes) -> Module:
    """Compile, or fetch from the cache. ``InvalidArgument`` with wasmtime's reason if the module is not valid."""
    try:
        return Module(engine, binary)
    except WasmtimeError as error:
        raise InvalidArgument(
            f"the module does not compile: {error}. Build it again, or check that it is whole"
        ) from None


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidArgument(f"cannot read the module {path}: {error.strerror or error}. Check the path") from None


def _from_text(text: bytes, what: str) -> bytes:
    try:
        return bytes(wat2wasm(text.decode()))
    except (UnicodeDecodeError, WasmtimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidArgument(f"{what} is neither a WebAssembly binary nor WAT text ({reason})") from None
