"""Which dialect a module was built for, and what a host lacks for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from wasmtime import Module

from tests.host.guests import command_wat, wrapper_wat
from wasi_nn_backend.dialects import CORE_DIALECTS, WASMEDGE, WITX, Dialect
from wasi_nn_backend.host import ModuleImports, compile_module, create_engine, detect_dialect, examine_imports

EXAMPLES = Path(__file__).parents[2] / "examples" / "c"
WASMEDGE_ONLY = sorted(WASMEDGE.functions.keys() - WITX.functions.keys())


def module_with(*imports: tuple[str, str, str]) -> Module:
    lines = "".join(f'(import "{module}" "{name}" {item})' for module, name, item in imports)
    return Module(create_engine(use_cache=False), f"(module {lines})")


def examined(wat: str) -> ModuleImports:
    engine = create_engine(use_cache=False)
    return examine_imports(Module(engine, wat), engine)


@pytest.mark.parametrize("dialect", CORE_DIALECTS, ids=lambda dialect: dialect.name)
def test_a_module_that_imports_a_whole_dialect_is_of_that_dialect_and_lacks_nothing(dialect: Dialect) -> None:
    found = examined(wrapper_wat(dialect))
    assert found.dialect is dialect
    assert found.missing == ()
    assert list(found.wasi_nn) == list(dialect.functions)


@pytest.mark.parametrize("name", sorted(WITX.functions))
def test_one_official_function_makes_the_official_dialect(name: str) -> None:
    signature = f"(func (param {'i32 ' * len(WITX.functions[name])}) (result i32))"
    assert detect_dialect(module_with(("wasi_ephemeral_nn", name, signature))) is WITX


@pytest.mark.parametrize("name", WASMEDGE_ONLY)
def test_one_function_of_wasmedge_makes_its_dialect(name: str) -> None:
    signature = f"(func (param {'i32 ' * len(WASMEDGE.functions[name])}) (result i32))"
    compute = ("wasi_ephemeral_nn", "compute", "(func (param i32) (result i32))")
    assert detect_dialect(module_with(compute, ("wasi_ephemeral_nn", name, signature))) is WASMEDGE


def test_a_module_without_wasi_nn_has_no_dialect() -> None:
    found = examined("(module)")
    assert (found.dialect, found.wasi_nn, found.missing) == (None, (), ())


def test_missing_imports_are_named_with_the_reason() -> None:
    found = examined(
        """(module
        (import "wasi_snapshot_preview1" "fd_write" (func (param i32 i32 i32 i32) (result i32)))
        (import "wasi_snapshot_preview1" "fd_dream" (func))
        (import "wasi_ephemeral_nn" "compute" (func (param i32 i32) (result i32)))
        (import "wasi_ephemeral_nn" "load" (global i32))
        (import "wasi_ephemeral_nn" "run_inference" (func (param i32 i32) (result i32)))
        (import "wasi_nn" "compute" (func (param i32) (result i32)))
        (import "env" "memory" (memory 1)))"""
    )
    reasons = {f"{item.module}.{item.name}": item.reason for item in found.missing}
    assert list(reasons) == [
        "wasi_snapshot_preview1.fd_dream",
        "wasi_ephemeral_nn.compute",
        "wasi_ephemeral_nn.load",
        "wasi_ephemeral_nn.run_inference",
        "wasi_nn.compute",
        "env.memory",
    ]
    assert reasons["wasi_ephemeral_nn.compute"] == "imported as (i32, i32) -> (i32), this host has (i32) -> (i32)"
    assert "something else than a function" in reasons["wasi_ephemeral_nn.load"]
    assert "no such function" in reasons["wasi_ephemeral_nn.run_inference"]
    assert "neither" in reasons["env.memory"]


@pytest.mark.parametrize(("file", "dialect"), [("ask.wasm", WITX), ("wasmedge_stream.wasm", WASMEDGE)])
def test_the_examples_are_of_their_dialects(file: str, dialect: Dialect) -> None:
    engine = create_engine(use_cache=False)
    found = examine_imports(compile_module(engine, (EXAMPLES / file).read_bytes()), engine)
    assert (found.dialect, found.missing) == (dialect, ())


def test_a_given_dialect_overrides_the_detected_one() -> None:
    engine = create_engine(use_cache=False)
    module = Module(engine, command_wat("").decode())
    assert examine_imports(module, engine).dialect is WASMEDGE
    found = examine_imports(module, engine, WITX)
    assert found.dialect is WITX
    assert {item.name for item in found.missing} == set(WASMEDGE_ONLY)
