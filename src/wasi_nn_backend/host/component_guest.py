"""A guest that is a component: WASI preview 2, ``wasi:nn``, and functions that take and return more than numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wasmtime import Engine, ExitTrap
from wasmtime.component import Component, ComponentInstanceType, Func, FuncType, Instance, Linker, ResultType, Variant

from wasi_nn_backend.errors import InvalidArgument, UnsupportedOperation
from wasi_nn_backend.host.component_linker import define_wasi_nn_component
from wasi_nn_backend.host.component_text import argument_value, result_text
from wasi_nn_backend.host.guest import Guest, Part, RunConfig
from wasi_nn_backend.host.invoke import InvokeValue
from wasi_nn_backend.host.module_cache import ModuleCache
from wasi_nn_backend.host.modules import is_component

if TYPE_CHECKING:
    from wasi_nn_backend.backend import Backend
    from wasi_nn_backend.host.state import GuestState

__all__ = ["ComponentGuest", "open_guest"]

_RUN_INTERFACE = "wasi:cli/run@0.2."
_RUN = "run"


def open_guest(config: RunConfig, backend: Backend, modules: ModuleCache | None = None) -> Guest:
    """The guest for a module or a component, ready to run. Raises what ``Guest`` raises."""
    modules_read = modules or ModuleCache(use_cache=config.use_cache)
    binary = modules_read.read(config.module)
    program_name = config.program_name
    if program_name is None and not isinstance(config.module, bytes):
        program_name = Path(config.module).name
    kind = ComponentGuest if is_component(binary) else Guest
    return kind(replace(config, module=binary, program_name=program_name), backend, modules)


class ComponentGuest(Guest):
    """A component: a command (it exports ``wasi:cli/run``), or a library whose function ``invoke`` names."""

    def run(self) -> tuple[InvokeValue, ...]:
        path = self._entry_point()
        instance = self._component_linker.instantiate(self._store, self._component)
        function = self._function(instance, path)
        args = self._config.args if self._config.invoke is not None else ()
        try:
            return self._call_component(function, args)
        except ExitTrap as trap:
            self.exit_status = trap.code & 0xFF
            raise

    def _compile(self, modules: ModuleCache) -> Engine:
        config = self._config
        if config.dialect is not None:
            raise InvalidArgument("a component has no dialect, its imports say what it wants: leave the dialect out")
        if config.invoke_returns is not None:
            raise InvalidArgument("a component's functions say what they return: leave that out")
        compiled = modules.get_component(config.module, has_fuel=config.fuel is not None)
        if compiled.imports.missing:
            lines = "; ".join(map(str, compiled.imports.missing))
            raise UnsupportedOperation(f"the component imports what this host does not have: {lines}")
        self._component = compiled.component
        self._exported = _exported_functions(compiled.component, compiled.engine)
        self._entry_point()
        return compiled.engine

    def _link(self, backend: Backend) -> GuestState:
        self._component_linker = Linker(self._engine)
        self._component_linker.add_wasip2()
        return define_wasi_nn_component(
            self._component_linker,
            backend,
            limits=self._config.limits,
            write_stdout=self._stdout.write if self._stdout else None,
        )

    def _parts(self) -> tuple[Part, Part]:
        return self._component_linker, self._component

    def _entry_point(self) -> tuple[str, ...]:
        """Where the function to call stands: the name of an interface, if it is in one, and its own name."""
        exported = self._exported
        wanted = self._config.invoke
        if wanted is None:
            found = [path for path in exported if path[0].startswith(_RUN_INTERFACE) and path[-1] == _RUN]
        else:
            found = [path for path in exported if wanted in ("#".join(path), path[-1])]
        if len(found) == 1:
            return found[0]
        names = ", ".join("#".join(path) for path in exported) or "none"
        if len(found) > 1:
            raise InvalidArgument(f"the component exports several functions {wanted!r}: name one of {names}")
        if wanted is None:
            raise InvalidArgument(f"the component is no command (no {_RUN_INTERFACE}x): invoke one of {names}")
        raise InvalidArgument(f"the component exports no function {wanted!r}; to invoke there are: {names}")

    def _function(self, instance: Instance, path: tuple[str, ...]) -> Func:
        index = None
        for name in path:
            index = instance.get_export_index(self._store, name, index)
        function = None if index is None else instance.get_func(self._store, index)
        if function is None:
            raise InvalidArgument(
                f"the component's function {'#'.join(path)} is not one of its own: it cannot be called"
            )
        return function

    def _call_component(self, function: Func, args: Sequence[str]) -> tuple[InvokeValue, ...]:
        kind = function.type(self._store)
        if len(kind.params) != len(args):
            names = ", ".join(name for name, _ in kind.params)
            raise InvalidArgument(f"the function takes {len(kind.params)} arguments ({names}), not {len(args)}")
        values = [argument_value(parameter, text) for (_, parameter), text in zip(kind.params, args, strict=True)]
        answer = function(self._store, *values)
        if isinstance(kind.result, ResultType):
            answer = self._unwrapped(kind.result, answer)
        return () if answer is None else (result_text(answer),)

    def _unwrapped(self, kind: ResultType, answer: Any) -> Any:
        """What a ``result`` holds if it is ``ok``; ``err`` is a failed run."""
        is_tagged = isinstance(answer, Variant)
        payload = answer.payload if is_tagged else answer
        if is_tagged and answer.tag == "ok":
            return payload
        if not is_tagged and not _is_error(kind, answer):
            return payload
        self.exit_status = 1
        if self._config.invoke is not None:
            self.failure = f"{self._config.invoke} returned an error" + (f": {result_text(payload)}" if payload else "")
        return None


def _exported_functions(component: Component, engine: Engine) -> list[tuple[str, ...]]:
    paths: list[tuple[str, ...]] = []
    for name, item in component.type.exports(engine).items():
        if isinstance(kind := item.ty, FuncType):
            paths.append((name,))
        elif isinstance(kind, ComponentInstanceType):
            functions = kind.exports(engine).items()
            paths += ((name, inner) for inner, exported in functions if isinstance(exported.ty, FuncType))
    return paths


def _is_error(kind: ResultType, answer: Any) -> bool:
    """wasmtime-py tags a result only where the two cases are of one Python type."""
    if kind.err is None:
        return answer is None
    classes: set[type] = set()
    kind.err.add_classes(classes)
    return isinstance(answer, tuple(classes))
