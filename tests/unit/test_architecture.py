"""Holds the rules of docs/architecture.md: who may import whom, who may print, how long things may get.

The rules read the syntax tree, so an import inside a function, under ``TYPE_CHECKING`` or through ``import_module``
counts like any other. Each rule is also run on a small made-up tree that breaks it: a rule that cannot fail holds
nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "wasi_nn_backend"
SOURCE = Path(__file__).resolve().parents[2] / "src" / PACKAGE

#: From top to bottom; imports only go down. ``ROOT`` is the package's own ``__init__``: doors use it, layers do not.
ROOT = "__init__"
LAYERS = (
    "__main__",
    "cli",
    "bench",
    "host",
    "capi",
    "port",
    "dialects",
    ROOT,
    "diagnosis",
    "planning",
    "metrics",
    "async_backend",
    "backend",
    "status",
    "graph",
    "owning_backend",
    "named_sessions",
    "execution_context",
    "context_steps",
    "context_lifetime",
    "owning_graph",
    "session_store",
    "registry",
    "handles",
    "doors",
    "log_setup",
    "session",
    "tasks",
    "engine",
    "scheduler",
    "kvcache",
    "sampling",
    "llama",
    "output",
    "logs",
    # leaves
    "config",
    "grammar",
    "types",
    "home_process",
    "errors",
    "user_cache",
)
#: Libraries that belong to one layer.
OWNERS = {
    "llama_cpp": "llama",
    "wasmtime": "host",
    "cffi": "capi",
    "typer": "cli",
    "click": "cli",
    "rich": "cli",
    "prometheus_client": "metrics",
}
#: Modules that use another layer's library all the same, with the reason: ``{("folder/module.py", library): "why"}``.
LIBRARY_GUESTS = {
    (
        "bench/peer_process.py",
        "llama_cpp",
    ): "its class Llama is what the benchmark compares with, in a process of its own"
}
#: Number tables that every door can read without loading anything else.
TABLES = "dialects"
TABLE_IMPORTS = {"dialects", "errors", "types"}
#: Layers of pure logic: pointers, threads and clocks stay outside and are passed in.
PURE_LAYERS = {"scheduler", "kvcache", "grammar"}
IMPURE_MODULES = {"threading", "_thread", "time", "datetime", "asyncio", "concurrent", "multiprocessing"}
#: Names that say nothing about what is inside.
VAGUE_MODULES = {"utils", "util", "helpers", "misc", "common"}
N_LINES_MODULE_MAX = 400
N_LINES_FUNCTION_MAX = 50
#: Modules that may be longer, with the reason: ``{"folder/module.py": "why"}``.
LONGER_MODULES: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class Module:
    """One parsed file. ``layer`` is the first part of its path below the package."""

    path: str
    layer: str
    package: tuple[str, ...]
    n_lines: int
    tree: ast.Module


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken rule; ``str()`` is ready to be clicked on."""

    path: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}"


def read_modules(root: Path) -> list[Module]:
    modules = []
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        text = file.read_text(encoding="utf-8")
        package = (PACKAGE, *relative.parent.parts)
        layer = relative.parts[0].removesuffix(".py")
        modules.append(Module(relative.as_posix(), layer, package, len(text.splitlines()), ast.parse(text)))
    return modules


def imported_names(module: Module) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute dotted name) of everything imported; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = absolute_origin(module, node)
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and called_name(node) in {"import_module", "__import__"}:
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield node.lineno, argument.value


def absolute_origin(module: Module, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    base = module.package[: len(module.package) - node.level + 1]
    return ".".join((*base, node.module) if node.module else base)


def called_name(node: ast.Call) -> str:
    function = node.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def layer_of(name: str) -> str | None:
    """The layer that an absolute dotted name belongs to; None for other packages and for modules without a layer."""
    package, *parts = name.split(".")
    if package != PACKAGE:
        return None
    if parts and parts[0] in LAYERS:
        return parts[0]
    return ROOT if len(parts) <= 1 else None


def check_layers(module: Module) -> Iterator[Violation]:
    if module.layer not in LAYERS:
        yield Violation(module.path, 1, f"'{module.layer}' has no place in the order of layers: add it to LAYERS")
        return
    for line, name in imported_names(module):
        target = layer_of(name)
        if target is None or target == module.layer:
            continue
        if LAYERS.index(target) < LAYERS.index(module.layer):
            yield Violation(module.path, line, f"{module.layer} imports {target}, which stands above it")
        if module.layer == TABLES and target not in TABLE_IMPORTS:
            yield Violation(module.path, line, f"{TABLES} imports {target}; tables may import only errors and types")
        if module.layer in PURE_LAYERS and target == "llama":
            yield Violation(module.path, line, f"{module.layer} imports llama; it only accounts")


def check_libraries(module: Module) -> Iterator[Violation]:
    for line, name in imported_names(module):
        library = name.split(".")[0]
        if (module.path, library) in LIBRARY_GUESTS:
            continue
        owner = OWNERS.get(library, module.layer)
        if owner != module.layer:
            yield Violation(module.path, line, f"only {owner}/ may import {library}")
        if library == "llama_cpp" and not f"{name}.".startswith("llama_cpp.llama_cpp."):
            yield Violation(module.path, line, "of llama_cpp only the module llama_cpp.llama_cpp is used")
        if module.layer in PURE_LAYERS and library in IMPURE_MODULES:
            yield Violation(module.path, line, f"{module.layer} imports {library}; clocks and threads are passed in")


def check_prints(module: Module) -> Iterator[Violation]:
    if module.layer in {"cli", "bench", "__main__"}:
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield Violation(module.path, node.lineno, "only cli/ and bench/ print; log it, or raise an error")


def check_sizes(module: Module) -> Iterator[Violation]:
    if Path(module.path).stem in VAGUE_MODULES:
        yield Violation(module.path, 1, "the name says nothing about what is inside: name it after what it does")
    if module.n_lines > N_LINES_MODULE_MAX and module.path not in LONGER_MODULES:
        yield Violation(module.path, 1, f"{module.n_lines} lines; at most {N_LINES_MODULE_MAX}: split it")
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            # Without the signature: a command's options are its parameters, one table that cannot be split.
            first = node.body[0].lineno
            n_lines = (node.end_lineno or first) - first + 1
            if n_lines > N_LINES_FUNCTION_MAX:
                message = f"{node.name} has {n_lines} lines; at most {N_LINES_FUNCTION_MAX}: split it"
                yield Violation(module.path, node.lineno, message)


RULES = (check_layers, check_libraries, check_prints, check_sizes)


def check_tree(root: Path) -> list[Violation]:
    """Every violation of every rule below ``root``, the folder of the package."""
    return check(read_modules(root))


def check(modules: Iterable[Module]) -> list[Violation]:
    violations = [violation for module in modules for rule in RULES for violation in rule(module)]
    return list(dict.fromkeys(violations))  # one import of five names is one violation


def test_the_package_keeps_the_rules() -> None:
    modules = list(read_modules(SOURCE))
    layers = {module.layer for module in modules}
    assert {"cli", "host", "dialects", "engine", "llama", "errors"} <= layers, "not all of the package was read"
    violations = check(modules)
    assert not violations, "\n" + "\n".join(map(str, violations))


def test_longer_modules_exist_and_have_a_reason() -> None:
    assert all((SOURCE / path).is_file() and reason for path, reason in LONGER_MODULES.items())


BROKEN = {
    "upward import": ("scheduler/queue.py", "from wasi_nn_backend.engine.loop import Engine", "engine, which stands"),
    "upward import, relative": ("llama/model.py", "from ..session import chat", "session, which stands above"),
    "upward import of the root": (
        "session/session.py",
        "from wasi_nn_backend import Backend",
        "__init__, which stands",
    ),
    "upward import, for types only": (
        "output/stop.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import wasi_nn_backend.llama.model",
        "llama, which stands above",
    ),
    "upward import, in a function": (
        "engine/loop.py",
        "def f() -> None:\n    from wasi_nn_backend import backend",
        "backend, which stands above",
    ),
    "upward import, by name": (
        "errors.py",
        "import importlib\nimportlib.import_module('wasi_nn_backend.types')",
        "types, which stands above",
    ),
    "a leaf that imports a layer": ("config/model.py", "import wasi_nn_backend.llama.interface", "llama, which stands"),
    "the command line used by the host": ("host/linker.py", "from wasi_nn_backend.cli import app", "cli, which stands"),
    "a module without a layer": ("extras.py", "", "no place in the order of layers"),
    "tables with logic": ("dialects/witx.py", "from wasi_nn_backend.backend import Graph", "only errors and types"),
    "llama_cpp elsewhere": ("engine/loop.py", "import llama_cpp.llama_cpp", "only llama/ may import llama_cpp"),
    "llama_cpp by name": ("backend.py", "__import__('llama_cpp.llama_cpp')", "only llama/ may import llama_cpp"),
    "llama_cpp's high level": ("llama/model.py", "from llama_cpp import Llama", "only the module llama_cpp.llama_cpp"),
    "wasmtime elsewhere": ("cli/run.py", "import wasmtime", "only host/ may import wasmtime"),
    "cffi elsewhere": ("backend.py", "import cffi", "only capi/ may import cffi"),
    "typer elsewhere": ("host/runner.py", "from typer import Exit", "only cli/ may import typer"),
    "rich elsewhere": ("backend.py", "import rich.console", "only cli/ may import rich"),
    "a benchmark used by the host": ("host/linker.py", "import wasi_nn_backend.bench.workload", "bench, which stands"),
    "print elsewhere": ("backend.py", "def f() -> None:\n    print('loaded')", "only cli/ and bench/ print"),
    "a scheduler with pointers": ("scheduler/plan.py", "import wasi_nn_backend.llama.interface", "only accounts"),
    "a scheduler with threads": ("scheduler/plan.py", "from threading import Lock", "clocks and threads"),
    "a cache with a clock": ("kvcache/pool.py", "import time", "clocks and threads are passed in"),
    "a vague name": ("engine/utils.py", "", "the name says nothing"),
    "a long module": ("engine/loop.py", "x = 1\n" * (N_LINES_MODULE_MAX + 1), "401 lines"),
    "a long function": (
        "engine/loop.py",
        "def f() -> None:\n" + "    x = 1\n" * (N_LINES_FUNCTION_MAX + 1),
        "f has 51 lines",
    ),
    "a long method": (
        "engine/loop.py",
        "class C:\n    async def g(self) -> None:\n" + "        x = 1\n" * (N_LINES_FUNCTION_MAX + 1),
        "g has 51 lines",
    ),
}


@pytest.mark.parametrize(("path", "code", "expected"), BROKEN.values(), ids=BROKEN.keys())
def test_each_rule_can_fail(tmp_path: Path, path: str, code: str, expected: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(code, encoding="utf-8")
    violations = [str(violation) for violation in check_tree(tmp_path)]
    assert any(expected in violation and violation.startswith(path) for violation in violations), violations


KEPT = {
    "downward": ("engine/loop.py", "from wasi_nn_backend.scheduler import plan\nimport threading, time"),
    "within a layer": (
        "scheduler/plan.py",
        "from wasi_nn_backend.scheduler.request import Request\nfrom . import queue",
    ),
    "doors use the root": ("host/linker.py", "from wasi_nn_backend import Backend\nimport wasmtime"),
    "the low-level module": ("llama/bindings.py", "import llama_cpp.llama_cpp\nfrom llama_cpp import llama_cpp as c"),
    "printing commands": ("cli/run.py", "import typer, rich.console\nprint('done')"),
    "as long as allowed": ("engine/loop.py", "def f() -> None:\n" + "    x = 1\n" * N_LINES_FUNCTION_MAX),
}


@pytest.mark.parametrize(("path", "code"), KEPT.values(), ids=KEPT.keys())
def test_rules_let_pass_what_is_allowed(tmp_path: Path, path: str, code: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(code, encoding="utf-8")
    assert check_tree(tmp_path) == []
