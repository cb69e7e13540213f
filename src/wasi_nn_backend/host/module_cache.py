"""Compiled modules that stay in memory from one guest to the next.

Machine code is compiled once for a whole pool (``SharedCode``); each worker has an engine of its own and loads the code
into it once (``ModuleCache``), so that one guest's epoch says nothing to the others. Loading a module of 20 kB into an
engine takes 0.1 ms, out of wasmtime's cache on disk 2 ms, compiling it 100 ms.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from wasmtime import Engine, Module
from wasmtime.component import Component

from wasi_nn_backend.dialects import Dialect
from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.host.component_imports import ComponentImports, examine_component
from wasi_nn_backend.host.linker import ModuleImports, examine_imports
from wasi_nn_backend.host.modules import compile_component, compile_module, create_engine, read_binary, read_module

__all__ = ["CompiledComponent", "CompiledModule", "ModuleCache", "SharedCode"]

#: Modules that are kept; those used least recently go.
_N_MODULES_MAX = 16


@dataclass(frozen=True, slots=True)
class CompiledModule:
    """A module, the engine that it was compiled for, and what it imports."""

    engine: Engine
    module: Module
    imports: ModuleImports


@dataclass(frozen=True, slots=True)
class CompiledComponent:
    """The same for a component."""

    engine: Engine
    component: Component
    imports: ComponentImports


class _Serializable(Protocol):
    def serialize(self) -> bytearray: ...


_Compiled = TypeVar("_Compiled", bound=_Serializable)
_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


@dataclass(slots=True)
class _Code:
    lock: threading.Lock = field(default_factory=threading.Lock)
    serialized: bytes | None = None


class SharedCode:
    """Machine code by module. Thread-safe: who comes while a module is compiled waits for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By content: a bytes object keeps its hash, so that looking it up again costs nothing.
        self._codes: OrderedDict[tuple[bytes, bool], _Code] = OrderedDict()

    def module(self, engine: Engine, binary: bytes, *, has_fuel: bool) -> Module:
        """The module for an engine made with ``has_fuel``. Raises what ``compile_module`` raises."""
        code = self._code_of(binary, has_fuel)
        return _load(code, lambda: compile_module(engine, binary), lambda data: Module.deserialize(engine, data))

    def component(self, engine: Engine, binary: bytes, *, has_fuel: bool) -> Component:
        """The same for a component."""
        code = self._code_of(binary, has_fuel)
        return _load(code, lambda: compile_component(engine, binary), lambda data: Component.deserialize(engine, data))

    def _code_of(self, binary: bytes, has_fuel: bool) -> _Code:
        with self._lock:
            code = self._codes.setdefault((binary, has_fuel), _Code())
            self._codes.move_to_end((binary, has_fuel))
            while len(self._codes) > _N_MODULES_MAX:
                self._codes.popitem(last=False)
        return code


def _load(code: _Code, compile_: Callable[[], _Compiled], deserialize: Callable[[bytes], _Compiled]) -> _Compiled:
    with code.lock:
        if code.serialized is None:
            compiled = compile_()
            code.serialized = bytes(compiled.serialize())
            return compiled
    return deserialize(code.serialized)


class ModuleCache:
    """One worker's engines and modules; for one guest at a time. Without ``code`` it compiles for itself."""

    def __init__(self, code: SharedCode | None = None, *, use_cache: bool = True) -> None:
        self._code = code
        self._use_cache = use_cache
        self._engines: dict[bool, Engine] = {}
        self._modules: OrderedDict[tuple[bytes, bool, str | None], CompiledModule] = OrderedDict()
        self._components: OrderedDict[tuple[bytes, bool], CompiledComponent] = OrderedDict()
        self._binaries: dict[tuple[str, int, int], bytes] = {}

    def get(self, source: str | Path | bytes, *, has_fuel: bool, dialect: Dialect | None) -> CompiledModule:
        """Raises what ``read_module`` and ``compile_module`` raise."""
        binary = read_module(self.read(source))
        key = (binary, has_fuel, None if dialect is None else dialect.name)
        found = self._modules.get(key)
        if found is None:
            engine = self._engine(has_fuel)
            if self._code is None:
                module = compile_module(engine, binary)
            else:
                module = self._code.module(engine, binary, has_fuel=has_fuel)
            found = CompiledModule(engine, module, examine_imports(module, engine, dialect))
        _keep(self._modules, key, found)
        return found

    def get_component(self, source: str | Path | bytes, *, has_fuel: bool) -> CompiledComponent:
        """Raises what ``read_binary`` and ``compile_component`` raise."""
        binary = self.read(source)
        key = (binary, has_fuel)
        found = self._components.get(key)
        if found is None:
            engine = self._engine(has_fuel)
            if self._code is None:
                component = compile_component(engine, binary)
            else:
                component = self._code.component(engine, binary, has_fuel=has_fuel)
            found = CompiledComponent(engine, component, examine_component(component, engine))
        _keep(self._components, key, found)
        return found

    def _engine(self, has_fuel: bool) -> Engine:
        if has_fuel not in self._engines:
            self._engines[has_fuel] = create_engine(has_fuel=has_fuel, use_cache=self._use_cache)
        return self._engines[has_fuel]

    def read(self, source: str | Path | bytes) -> bytes:
        """The binary of a module or a component; a file that has not changed is read once. Raises what ``read_binary``
        raises."""
        if isinstance(source, bytes):
            return read_binary(source)
        try:
            status = Path(source).stat()
        except OSError as error:
            raise InvalidArgument(f"cannot read the module {source}: {error.strerror}. Check the path") from None
        stamp = (str(source), status.st_mtime_ns, status.st_size)
        if stamp not in self._binaries:
            while len(self._binaries) >= _N_MODULES_MAX:
                self._binaries.pop(next(iter(self._binaries)))
            self._binaries[stamp] = read_binary(source)
        return self._binaries[stamp]


def _keep(kept: OrderedDict[_Key, _Value], key: _Key, value: _Value) -> None:
    """As the one used last; those used least recently go."""
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > _N_MODULES_MAX:
        kept.popitem(last=False)
