"""Gives a module its WASI-NN imports: the dialect, what is missing here, and functions that never raise."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from operator import and_
from typing import TYPE_CHECKING

from wasmtime import Caller, Engine, Func, FuncType, ImportType, Linker, Module, Store, Val, WasmtimeError

from wasi_nn_backend.dialects import CORE_DIALECTS, WASMEDGE, Dialect
from wasi_nn_backend.errors import ErrorCode, InvalidArgument, WasiNNError
from wasi_nn_backend.host.core_abi import CoreAbi
from wasi_nn_backend.host.legacy_abi import LegacyAbi
from wasi_nn_backend.host.limits import HostLimits
from wasi_nn_backend.host.memory import GuestMemory
from wasi_nn_backend.host.output import DescriptorWriter
from wasi_nn_backend.host.signatures import (
    CallSignature,
    call_signature,
    fit_to_module,
    function_text,
    signature_mismatch,
)
from wasi_nn_backend.host.state import GuestState

if TYPE_CHECKING:
    from wasi_nn_backend.backend import Backend

__all__ = ["MissingImport", "ModuleImports", "define_wasi_nn", "detect_dialect", "examine_imports"]

#: Import modules of guests that want WASI-NN in some form, known here or not.
_WASI_NN_MODULES = ("wasi_ephemeral_nn", "wasi_nn")
_STDOUT_DESCRIPTOR = 1

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MissingImport:
    """One import that this host cannot satisfy, and why."""

    module: str
    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.module}{'.' * bool(self.name)}{self.name}: {self.reason}"


@dataclass(frozen=True, slots=True)
class ModuleImports:
    """What a module imports, seen from this host.

    ``dialect`` is None for a module without WASI-NN imports; ``wasi_nn`` lists those, in the module's order.
    """

    dialect: Dialect | None
    wasi_nn: tuple[str, ...]
    missing: tuple[MissingImport, ...]


def detect_dialect(module: Module) -> Dialect | None:
    """The smallest dialect that has every WASI-NN function the module imports; else the one that has most of them.

    A module that imports only the six official functions may have been built for any dialect of that module name, and
    the witx dialect serves all: same numbers, both encodings of ggml, any tensor type, and the metadata begins with
    WasmEdge's keys. One that adds ``load_by_name_with_config`` and nothing else may be WasmEdge's or WAMR's, which no
    import tells apart; it is taken for the one that there are more modules of.
    """
    imports = [(item.module, item.name) for item in module.imports if item.module in _WASI_NN_MODULES]
    if not imports:
        return None

    def fit(dialect: Dialect) -> tuple[int, int]:
        names = [name for origin, name in imports if origin == dialect.import_module]
        return len(dialect.functions.keys() & set(names)), len(names)

    # max() keeps the first of equals, so the order of CORE_DIALECTS decides between dialects that serve equally well.
    return fit_to_module(max(CORE_DIALECTS, key=fit), module)


def examine_imports(module: Module, engine: Engine, dialect: Dialect | None = None) -> ModuleImports:
    """Compare all imports of a module with what this host offers it. Nothing is run. ``engine`` is the module's own.

    ``dialect`` None: the one detected.
    """
    dialect = detect_dialect(module) if dialect is None else fit_to_module(dialect, module)
    with Store(engine) as store, Linker(engine) as linker:
        linker.define_wasi()
        missing = []
        for item in module.imports:
            name = item.name or ""
            if dialect is not None and item.module == dialect.import_module:
                reason = _wasi_nn_mismatch(dialect, name, item.type)
            elif dialect is not None and item.module in _WASI_NN_MODULES:
                reason = f"the {dialect.name} dialect is imported from {dialect.import_module}, and a guest has one"
            else:
                reason = _linker_mismatch(linker, store, item)
            if reason:
                missing.append(MissingImport(item.module, name, reason))
    wasi_nn = tuple(item.name or "" for item in module.imports if item.module in _WASI_NN_MODULES)
    return ModuleImports(dialect, wasi_nn, tuple(missing))


def define_wasi_nn(
    linker: Linker,
    store: Store,
    backend: Backend,
    dialect: Dialect | None = None,
    *,
    limits: HostLimits | None = None,
    write_stdout: Callable[[bytes], None] | None = None,
) -> GuestState:
    """Define a dialect's functions for one store; returns the store's state, which the caller closes after the guest.

    >>> with define_wasi_nn(linker, store, backend, detect_dialect(module)):
    ...     run = linker.instantiate(store, module).exports(store)["_start"]
    ...     run(store)

    ``dialect`` is ``detect_dialect``'s or ``examine_imports``' for a module with a 64-bit memory, which imports other
    types; for all others any of ``CORE_DIALECTS`` does. None is WasmEdge's, which has the official functions, too,
    under the same numbers. The functions belong to ``store``: a linker used for a second store needs another call and
    never shares handles.
    ``write_stdout`` receives the text of guests that ask for ``stream-stdout``, on the guest's thread; by default it
    is written to the process's standard output.

    Raises ``InvalidArgument`` for what is no dialect.
    """
    dialect = WASMEDGE if dialect is None else dialect
    if not isinstance(dialect, Dialect):
        raise InvalidArgument(f"the dialect is one of CORE_DIALECTS or None, got {dialect!r}")
    state = GuestState(
        backend,
        dialect,
        limits=limits or HostLimits(),
        write_stdout=write_stdout or DescriptorWriter(_STDOUT_DESCRIPTOR),
    )
    abi = LegacyAbi(state) if dialect.struct_form == "wamr-legacy" else CoreAbi(state)
    for name in dialect.functions:
        signature = call_signature(dialect, name)
        call = _host_function(state, name, getattr(abi, name), signature)
        function = Func(store, signature.func_type(), call, access_caller=True)
        linker.define(store, dialect.import_module, name, function)
    return state


def _host_function(
    state: GuestState, name: str, method: Callable[..., int | None], signature: CallSignature
) -> Callable[..., int | Val]:
    """Wrap one method of ``CoreAbi`` so that it answers with a number whatever happens.

    An exception must not leave a host function, not even ``KeyboardInterrupt``: wasmtime-py keeps the pending
    exception in a module global, and another thread's guest can pick it up.
    """
    # As a value made before: wasmtime-py takes 3 microseconds longer to make one of a number.
    success = Val.i32(state.dialect.errno(ErrorCode.SUCCESS))
    returns_pointer = name in state.dialect.pointer_results
    fault = 0 if returns_pointer else state.dialect.errno(ErrorCode.RUNTIME_ERROR)
    layout, masks = signature.layout, signature.word_masks

    def answer(caller: Caller, words: tuple[int, ...]) -> int | Val:
        started_s = state.pacer.start()
        try:
            state.check_may_call()
            result = method(GuestMemory(caller, layout), *map(and_, words, masks))
            return success if result is None else signature.signed_result(result)
        except WasiNNError as error:
            errno = state.record_error(name, error)
            return 0 if returns_pointer else errno
        finally:
            state.pacer.end(started_s)

    def call(caller: Caller, *words: int) -> int | Val:
        try:
            try:
                return answer(caller, words)
            except BaseException as error:
                errno = state.record_fault(name, error)
                return 0 if returns_pointer else errno
        except BaseException:  # the second one, out of the recording itself: a signal, or no memory left
            _log.critical("recording an error of %s failed", name, exc_info=True)
            return fault

    return call


def _wasi_nn_mismatch(dialect: Dialect, name: str, imported: object) -> str | None:
    if name not in dialect.functions:
        others = [other.name for other in CORE_DIALECTS if _offers(other, dialect.import_module, name)]
        hint = f" ({', '.join(others)}: yes)" if others else ""
        return f"the {dialect.name} dialect has no such function{hint}"
    if not isinstance(imported, FuncType):
        return "imported as something else than a function"
    return signature_mismatch(dialect, name, imported)


def _offers(dialect: Dialect, import_module: str, name: str) -> bool:
    return dialect.import_module == import_module and name in dialect.functions


def _linker_mismatch(linker: Linker, store: Store, item: ImportType) -> str | None:
    try:
        offered = linker.get(store, item.module, item.name or "")
    except WasmtimeError:
        return "this host offers WASI preview 1 and WASI-NN only, and this is in neither"
    if not isinstance(offered, Func) or not isinstance(item.type, FuncType):
        return "imported as something else than a function"
    expected, found = function_text(offered.type(store)), function_text(item.type)
    return None if found == expected else f"imported as {found}, this host has {expected}"
