"""One guest: a compiled module in a store of its own, with WASI preview 1 and WASI-NN.

Components are guests of their own kind (``component_guest.py``): the same store, limits and outputs, other linking.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from wasmtime import (
    Engine,
    Func,
    FuncType,
    Instance,
    Linker,
    Module,
    Store,
    ValType,
    WasiConfig,
    WasmtimeError,
    wat2wasm,
)

from wasi_nn_backend.dialects import WITX, Dialect
from wasi_nn_backend.errors import InvalidArgument, RuntimeFailure, UnsupportedOperation
from wasi_nn_backend.host.invoke import Invoker, InvokeReturns, InvokeValue
from wasi_nn_backend.host.limits import HostLimits
from wasi_nn_backend.host.linker import ModuleImports, define_wasi_nn
from wasi_nn_backend.host.module_cache import ModuleCache
from wasi_nn_backend.host.output import CapturedOutput, OutputCallback, configure_input, configure_output

if TYPE_CHECKING:
    from wasi_nn_backend.backend import Backend
    from wasi_nn_backend.host.state import GuestState

__all__ = ["Guest", "Part", "RunConfig"]

_START = "_start"
_INITIALIZE = "_initialize"
_WASI_MODULE = "wasi_snapshot_preview1"
_PROC_EXIT = "proc_exit"

#: wasmtime refuses exit statuses from 126 on and forgets the number; C's exit(-1) is 255. So proc_exit notes the
#: status with the host first and then leaves the guest with a status that wasmtime accepts.
_PROC_EXIT_SHIM = """
(module
  (import "host" "note_exit" (func $note_exit (param i32)))
  (import "wasi" "proc_exit" (func $proc_exit (param i32)))
  (func (export "proc_exit") (param i32)
    (call $note_exit (local.get 0))
    (call $proc_exit (i32.const 0))))
"""

#: What a module needs beside its memory is small; a table's element takes 8 bytes of the host.
_MEMORY_BYTES_MAX = 1 << 32
_N_MEMORIES_MAX = 4
_N_TABLES_MAX = 16
_N_TABLE_ELEMENTS_MAX = 1_000_000

_log = logging.getLogger(__name__)


class Part(Protocol):
    """An object of wasmtime's, which owns native memory."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class RunConfig:
    """One run of one module or component.

    ``module`` is a path or the module itself, binary or WAT. ``args`` follow the program's name in argv, or are the
    arguments of ``invoke``, the export to call instead of ``_start``; ``invoke_returns`` says what its integers are,
    None what the dialect makes likely; components say it themselves. ``dirs`` are (host path, guest path) pairs; in
    ``read_only_dirs`` the guest can only read.
    ``stdout`` and ``stderr`` capture what the guest writes; None is the process's own. ``dialect`` None: detected.
    ``timeout_s`` counts from the start of the run, compiling included. ``stdin`` is what the guest reads there; None
    is the process's own if ``inherit_stdin``, else nothing. With ``max_memory_bytes`` a module may have one memory, of
    that size at most; else four of 4 GiB.
    """

    module: str | Path | bytes
    args: Sequence[str] = ()
    program_name: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    dirs: Sequence[tuple[str | Path, str]] = ()
    read_only_dirs: Sequence[tuple[str | Path, str]] = ()
    invoke: str | None = None
    invoke_returns: InvokeReturns | None = None
    inherit_stdin: bool = True
    stdin: bytes | None = None
    stdout: OutputCallback | None = None
    stderr: OutputCallback | None = None
    timeout_s: float | None = None
    fuel: int | None = None
    max_memory_bytes: int | None = None
    dialect: Dialect | None = None
    limits: HostLimits = field(default_factory=HostLimits)
    use_cache: bool = True


class Guest:
    """A module ready to run. Built, run and closed on one thread; ``interrupt`` may come from any.

    Building raises ``InvalidArgument`` (not a module, no such export, bad directory) or ``UnsupportedOperation``
    (imports that this host lacks) before any of the guest's code has run.
    """

    def __init__(self, config: RunConfig, backend: Backend, modules: ModuleCache | None = None) -> None:
        self._config = config
        self._modules = modules
        self._lock = threading.Lock()
        self._is_closed = False
        self.exit_status: int | None = None
        self.failure: str | None = None
        self._stdout = CapturedOutput(config.stdout) if config.stdout else None
        self._stderr = CapturedOutput(config.stderr) if config.stderr else None
        try:
            self._engine = self._compile(modules or ModuleCache(use_cache=config.use_cache))
            self._store = self._create_store()
            self.state = self._link(backend)
        except BaseException:
            # Not waiting for the last byte: what failed may still hold the guest's end of the pipe.
            self._close_outputs(timeout_s=0.0)
            raise

    def run(self) -> tuple[InvokeValue, ...]:
        """Instantiate and call the entry point; returns its results. Ends by a wasmtime exception if the guest traps
        or exits; ``exit_status`` is then the status given to proc_exit, None after a trap. ``failure`` is the error
        that an invoked function of a component returned."""
        config = self._config
        instance = self._linker.instantiate(self._store, self._module)
        exports = Invoker(self._store, instance, self._module, max_text_bytes=config.limits.max_tensor_bytes)
        if config.invoke is None:
            return exports.call(exports.find(_START))
        function = exports.find(config.invoke)
        if config.invoke != _INITIALIZE and exports.has(_INITIALIZE):
            exports.call(exports.find(_INITIALIZE))
        usual: InvokeReturns = "text" if self._dialect.exports_return_text else "number"
        try:
            return exports.call(function, config.args, config.invoke_returns or usual)
        except RuntimeFailure as error:
            if self.state.last_error is None:
                raise
            raise RuntimeFailure(f"{error}; the guest's last failed call: {self.state.last_error}") from None

    def interrupt(self) -> None:
        """Make the guest's code trap at its next loop or call, and cancel what the host does for it. Repeatable."""
        self.state.stop()
        with self._lock:
            if not self._is_closed:
                self._engine.increment_epoch()

    def close(self) -> None:
        """Close the guest's graphs and contexts, then its store; returns when its output has been delivered."""
        self.state.close()
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        linker, compiled = self._parts()
        linker.close()
        self._store.close()
        if self._modules is None:
            compiled.close()
            self._engine.close()
        self._close_outputs()

    @property
    def output_error(self) -> Exception | None:
        """What the first failing output callback raised."""
        for capture in (self._stdout, self._stderr):
            if capture is not None and capture.error is not None:
                return capture.error
        return None

    def _compile(self, modules: ModuleCache) -> Engine:
        """Take what is to run from ``modules``; returns the engine that it was compiled for."""
        config = self._config
        compiled = modules.get(config.module, has_fuel=config.fuel is not None, dialect=config.dialect)
        self._module = compiled.module
        self._dialect = _choose_dialect(compiled.imports)
        return compiled.engine

    def _link(self, backend: Backend) -> GuestState:
        self._linker = Linker(self._engine)
        self._linker.define_wasi()
        self._note_exit_status()
        return define_wasi_nn(
            self._linker,
            self._store,
            backend,
            self._dialect,
            limits=self._config.limits,
            write_stdout=self._stdout.write if self._stdout else None,
        )

    def _parts(self) -> tuple[Part, Part]:
        """The linker, and what was compiled."""
        return self._linker, self._module

    def _create_store(self) -> Store:
        config = self._config
        store = Store(self._engine)
        if config.max_memory_bytes is None:
            store.set_limits(_MEMORY_BYTES_MAX, _N_TABLE_ELEMENTS_MAX, tables=_N_TABLES_MAX, memories=_N_MEMORIES_MAX)
        else:  # wasmtime's limit is for each memory
            store.set_limits(config.max_memory_bytes, _N_TABLE_ELEMENTS_MAX, tables=_N_TABLES_MAX, memories=1)
        if config.fuel is not None:
            store.set_fuel(config.fuel)
        store.set_wasi(self._wasi_config())
        # The epoch moves only when this guest is to be stopped, so one tick is the right distance.
        store.set_epoch_deadline(1)
        return store

    def _wasi_config(self) -> WasiConfig:
        config, wasi = self._config, WasiConfig()
        arguments = [self._program_name(), *(config.args if config.invoke is None else ())]
        _check_passable(arguments, "an argument")
        _check_passable((text for item in config.env.items() for text in item), "an environment variable")
        wasi.argv = arguments
        wasi.env = list(config.env.items())
        if config.stdin is not None:
            configure_input(wasi, config.stdin)
        elif config.inherit_stdin:
            wasi.inherit_stdin()
        _open_directories(wasi, config.dirs, may_write=True)
        _open_directories(wasi, config.read_only_dirs, may_write=False)
        configure_output(wasi, "stdout", self._stdout)
        configure_output(wasi, "stderr", self._stderr)
        return wasi

    def _program_name(self) -> str:
        if self._config.program_name is not None:
            return self._config.program_name
        return "module.wasm" if isinstance(self._config.module, bytes) else Path(self._config.module).name

    def _note_exit_status(self) -> None:
        if not any(item.module == _WASI_MODULE and item.name == _PROC_EXIT for item in self._module.imports):
            return

        def note_exit(status: int) -> None:
            self.exit_status = status & 0xFF

        note = Func(self._store, FuncType([ValType.i32()], []), note_exit)
        original = self._linker.get(self._store, _WASI_MODULE, _PROC_EXIT)
        with Module(self._engine, bytes(wat2wasm(_PROC_EXIT_SHIM))) as shim:
            exports = Instance(self._store, shim, [note, original]).exports(self._store)
        self._linker.allow_shadowing = True
        self._linker.define(self._store, _WASI_MODULE, _PROC_EXIT, exports[_PROC_EXIT])
        self._linker.allow_shadowing = False

    def _close_outputs(self, timeout_s: float | None = None) -> None:
        for capture in (self._stdout, self._stderr):
            if capture is not None:
                capture.close(timeout_s)


def _open_directories(wasi: WasiConfig, directories: Sequence[tuple[str | Path, str]], *, may_write: bool) -> None:
    for host_path, guest_path in directories:
        try:
            wasi.preopen_dir(str(host_path), guest_path, may_write)
        except WasmtimeError:
            raise InvalidArgument(f"cannot open the directory {host_path} for the guest: check the path") from None


def _choose_dialect(imports: ModuleImports) -> Dialect:
    if imports.missing:
        lines = "; ".join(map(str, imports.missing))
        raise UnsupportedOperation(f"the module imports what this host does not have: {lines}")
    return imports.dialect or WITX


def _check_passable(texts: Iterable[object], what: str) -> None:
    """WASI takes UTF-8 that ends with a NUL; wasmtime would cut a text there without a word."""
    for text in texts:
        if not isinstance(text, str) or "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
            raise InvalidArgument(f"{what} of the guest is {text!r}: it must be UTF-8 text without NUL")
