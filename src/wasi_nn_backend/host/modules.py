"""Module files: read, told apart, compiled.

One engine per guest that runs. Incrementing an engine's epoch interrupts every store of that engine, so a shared
engine would need a deadline per store and a ticking thread to stop one guest and spare the others; an engine of one's
own costs some 30 microseconds. Compiled code comes out of wasmtime's cache on disk, which is keyed by the module's
content, wasmtime's version and the engine's settings; in a pool of guests out of memory (``module_cache.py``).
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from wasmtime import Config, Engine, Module, WasmtimeError, wat2wasm
from wasmtime.component import Component

from wasi_nn_backend.errors import InvalidArgument, UnsupportedOperation
from wasi_nn_backend.user_cache import user_cache_folder

__all__ = ["compile_component", "compile_module", "create_engine", "is_component", "read_binary", "read_module"]

_MAGIC = b"\0asm"
_CORE_VERSION = b"\x01\0\0\0"
_GGUF_MAGIC = b"GGUF"
_COMPONENT_LAYER = b"\x01\0"  # bytes 6 and 7 of the header, where a core module has the upper half of its version
#: Above any module (a Python interpreter is 30 MB), below what hurts; devices and pipes have no size to go by.
_N_BYTES_MAX = 512 << 20

_log = logging.getLogger(__name__)


def create_engine(*, has_fuel: bool = False, use_cache: bool = True) -> Engine:
    """An engine whose guests can be interrupted; with ``has_fuel`` its stores must be given fuel."""
    config = Config()
    config.epoch_interruption = True
    if has_fuel:
        config.consume_fuel = True
    if use_cache:
        try:
            config.cache = str(_cache_config())
        except (OSError, RuntimeError, WasmtimeError) as error:
            # A home directory that cannot be written is no reason not to run; compiling again is only slower.
            _log.info("no cache for compiled modules: %s", error)
    return Engine(config)


def _cache_config() -> Path:
    """The file that sends wasmtime's cache to a folder of this user's own.

    What lies there is run as native code: the folder is made for its owner alone, and refused (``OSError``) where
    others could write. wasmtime's own default goes by the umask, and checks nothing.
    """
    folder = user_cache_folder() / "modules"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} can be written by others: delete it, or make it yours with mode 700")
    path = folder / "wasmtime.toml"
    text = f"[cache]\ndirectory = {json.dumps(str(folder / 'code'))}\n"  # a JSON string is a TOML string, too
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)  # at once, for processes that read meanwhile
    return path


def read_module(source: str | Path | bytes) -> bytes:
    """The binary of a core module from a ``.wasm`` or ``.wat`` file, or from either's content.

    Raises ``InvalidArgument`` for what is no readable module and ``UnsupportedOperation`` for a component.
    """
    binary = read_binary(source)
    if is_component(binary):
        raise UnsupportedOperation(f"{_name(source)} is a component, not a core module: build for wasm32-wasip1")
    return binary


def read_binary(source: str | Path | bytes) -> bytes:
    """The binary of a module or a component, from a file or the content of one. Raises ``InvalidArgument`` as above."""
    binary = source if isinstance(source, bytes) else _read_file(Path(source))
    if not binary.startswith(_MAGIC):
        binary = _from_text(binary, _name(source))
    if not is_component(binary) and binary[4:8] != _CORE_VERSION:
        raise InvalidArgument(f"{_name(source)} has WebAssembly version {binary[4:8].hex()}: this host knows version 1")
    return binary


def is_component(binary: bytes) -> bool:
    return binary[6:8] == _COMPONENT_LAYER


def compile_module(engine: Engine, binary: bytes) -> Module:
    """Compile, or fetch from the cache. ``InvalidArgument`` with wasmtime's reason if the module is not valid."""
    try:
        return Module(engine, binary)
    except WasmtimeError as error:
        raise InvalidArgument(
            f"the module does not compile: {error}. Build it again, or check that it is whole"
        ) from None


def compile_component(engine: Engine, binary: bytes) -> Component:
    """The same for a component."""
    try:
        return Component(engine, binary)
    except WasmtimeError as error:
        raise InvalidArgument(
            f"the component does not compile: {error}. Build it again, or check that it is whole"
        ) from None


def _name(source: str | Path | bytes) -> str:
    return "the module" if isinstance(source, bytes) else f"the module {source}"


def _read_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            head = file.read(len(_GGUF_MAGIC))
            if head == _GGUF_MAGIC:
                raise InvalidArgument(
                    f"{path} is a model, not a module: name it with --nn-graph NAME=FILE, and give a module that loads"
                    " NAME"
                )
            content = head + file.read(_N_BYTES_MAX + 1 - len(head))
    except OSError as error:
        raise InvalidArgument(f"cannot read the module {path}: {error.strerror or error}. Check the path") from None
    if len(content) > _N_BYTES_MAX:
        raise InvalidArgument(
            f"the module {path} is larger than the {_N_BYTES_MAX >> 20} MiB that are read: check that it is a module"
        )
    return content


def _from_text(text: bytes, what: str) -> bytes:
    try:
        return bytes(wat2wasm(text.decode()))
    except UnicodeDecodeError:
        reason = ""  # a codec's words would tell nobody more
    except WasmtimeError as error:
        reason = f" ({str(error).splitlines()[0]})"
    raise InvalidArgument(
        f"{what} is neither a WebAssembly binary nor WAT text{reason}: check that it is the file you mean, or build it"
        " again"
    )
