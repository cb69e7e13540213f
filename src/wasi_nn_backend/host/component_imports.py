"""What a component imports, compared with what this host offers, before anything of it runs."""

from __future__ import annotations

from dataclasses import dataclass

from wasmtime import Engine
from wasmtime.component import (
    Component,
    ComponentInstanceType,
    ComponentItem,
    EnumType,
    FuncType,
    ListType,
    ResultType,
    TupleType,
    ValType,
)

from wasi_nn_backend.dialects.wit import WIT_FUNCTIONS, WIT_PACKAGE, WIT_VERSIONS
from wasi_nn_backend.host.linker import MissingImport

__all__ = ["ComponentImports", "examine_component", "missing_interface", "type_text"]

#: The interfaces of WASI preview 2 that wasmtime's library has, in any version of 0.2.
_WASI_VERSION = "0.2."
_WASI_INTERFACES = {
    "wasi:cli": {
        "environment",
        "exit",
        "stderr",
        "stdin",
        "stdout",
        "terminal-input",
        "terminal-output",
        "terminal-stderr",
        "terminal-stdin",
        "terminal-stdout",
    },
    "wasi:clocks": {"monotonic-clock", "wall-clock"},
    "wasi:filesystem": {"preopens", "types"},
    "wasi:io": {"error", "poll", "streams"},
    "wasi:random": {"insecure", "insecure-seed", "random"},
    "wasi:sockets": {
        "instance-network",
        "ip-name-lookup",
        "network",
        "tcp",
        "tcp-create-socket",
        "udp",
        "udp-create-socket",
    },
}


@dataclass(frozen=True, slots=True)
class ComponentImports:
    """What a component imports, seen from this host. ``wasi_nn`` lists the interfaces of ``wasi:nn``."""

    wasi_nn: tuple[str, ...]
    missing: tuple[MissingImport, ...]


def examine_component(component: Component, engine: Engine) -> ComponentImports:
    """Compare all imports of a component with what this host offers it. Nothing is run. ``engine`` is its own."""
    imports = component.type.imports(engine)
    missing: list[MissingImport] = []
    for name, item in imports.items():
        if (found := missing_interface(name)) is not None:
            missing.append(found)
        elif name.startswith(f"{WIT_PACKAGE}/"):
            missing += _mismatches(name, item.ty, engine)
    return ComponentImports(tuple(name for name in imports if name.startswith(f"{WIT_PACKAGE}/")), tuple(missing))


def missing_interface(name: str) -> MissingImport | None:
    """Why this host has no interface of this name, as far as a name can tell; None if it has."""
    package, _, rest = name.partition("/")
    interface, _, version = rest.partition("@")
    reason = None
    if package == WIT_PACKAGE:
        if version not in WIT_VERSIONS:
            reason = f"this host has {WIT_PACKAGE} in the versions {', '.join(WIT_VERSIONS)}"
        elif interface not in WIT_FUNCTIONS:
            reason = f"{WIT_PACKAGE} has the interfaces {', '.join(WIT_FUNCTIONS)}"
    elif package == "wasi:http":
        reason = "this host gives guests no network: build without wasi:http"
    elif interface not in _WASI_INTERFACES.get(package, ()) or not version.startswith(_WASI_VERSION):
        reason = f"this host offers WASI {_WASI_VERSION}x and {WIT_PACKAGE} only, and this is in neither"
    return None if reason is None else MissingImport(name, "", reason)


def _mismatches(name: str, item: ComponentItem, engine: Engine) -> list[MissingImport]:
    """Functions of a ``wasi:nn`` interface that are imported with other types than this host's."""
    if not isinstance(item, ComponentInstanceType):
        return [MissingImport(name, "", "imported as something else than an interface")]
    functions = WIT_FUNCTIONS[name.partition("/")[2].partition("@")[0]]
    mismatches = []
    for function, exported in item.exports(engine).items():
        if not isinstance(found := exported.ty, FuncType):
            continue  # a type; wasmtime compares the resources
        expected = functions.get(function)
        if expected is None:
            mismatches.append(MissingImport(name, function, "this interface has no such function here"))
        elif (text := type_text(found)) != expected:
            mismatches.append(MissingImport(name, function, f"imported as {text}, this host has {expected}"))
    return mismatches


def type_text(item: FuncType | ValType | None) -> str:
    """A type on one line, the way the WIT writes it but without names for resources and parameters."""
    match item:
        case FuncType():
            parameters = ", ".join(type_text(kind) for _, kind in item.params)
            return f"({parameters})" + ("" if item.result is None else f" -> {type_text(item.result)}")
        case EnumType():
            return f"enum{{{' '.join(item.names)}}}"
        case ListType():
            return f"list<{type_text(item.element)}>"
        case TupleType():
            return f"tuple<{', '.join(map(type_text, item.elements))}>"
        case ResultType():
            return f"result<{type_text(item.ok)}, {type_text(item.err)}>"
        case None:
            return "_"
    # No function of wasi:nn has another compound type, so for those the kind is enough.
    return type(item).__name__.removesuffix("Type").lower()
