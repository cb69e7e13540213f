"""Which dialect a module was built for, and what a host lacks for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from wasmtime import Module

from tests.host.abis import ABIS, Abi
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


@pytest.mark.parametrize("abi", ABIS, ids=str)
def test_a_module_that_imports_a_whole_dialect_is_of_that_dialect_and_lacks_nothing(abi: Abi) -> None:
    found = examined(wrapper_wat(abi))
    assert found.dialect is not None
    # WAMR's newer modules import what some of WasmEdge's do.
    assert found.dialect.name == ("wasmedge" if abi.dialect == "wamr" else abi.dialect)
    assert found.missing == ()
    assert list(found.wasi_nn) == list(abi.functions)


@pytest.mark.parametrize("abi", ABIS, ids=str)
def test_each_dialect_can_be_asked_for(abi: Abi) -> None:
    engine = create_engine(use_cache=False)
    dialect = next(dialect for dialect in CORE_DIALECTS if dialect.name == abi.dialect)
    found = examine_imports(Module(engine, wrapper_wat(abi)), engine, dialect)
    assert found.dialect is not None
    assert (found.dialect.name, found.missing) == (abi.dialect, ())
    assert (found.dialect is dialect) is (abi.n_bits == 32)


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
        (import "wasi_ephemeral_nn" "dream" (func (param i32 i32) (result i32)))
        (import "wasi_nn" "compute" (func (param i32) (result i32)))
        (import "env" "memory" (memory 1)))"""
    )
    reasons = {f"{item.module}.{item.name}": item.reason for item in found.missing}
    assert list(reasons) == [
        "wasi_snapshot_preview1.fd_dream",
        "wasi_ephemeral_nn.compute",
        "wasi_ephemeral_nn.load",
        "wasi_ephemeral_nn.dream",
        "wasi_nn.compute",
        "env.memory",
    ]
    assert reasons["wasi_ephemeral_nn.compute"] == "imported as (i32, i32) -> (i32), this host has (i32) -> (i32)"
    assert "something else than a function" in reasons["wasi_ephemeral_nn.load"]
    assert "no such function" in reasons["wasi_ephemeral_nn.dream"]
    assert "imported from wasi_ephemeral_nn, and a guest has one" in reasons["wasi_nn.compute"]
    assert "neither" in reasons["env.memory"]


@pytest.mark.parametrize(("file", "dialect"), [("ask.wasm", WITX), ("wasmedge_stream.wasm", WASMEDGE)])
def test_the_examples_are_of_their_dialects(file: str, dialect: Dialect) -> None:
    engine = create_engine(use_cache=False)
    found = examine_imports(compile_module(engine, (EXAMPLES / file).read_bytes()), engine)
    assert (found.dialect, found.missing) == (dialect, ())


@pytest.mark.parametrize(
    ("imported", "expected"),
    [
        (
            '(import "wasi_ephemeral_nn" "set_input" (func (param i64 i32 i64) (result i32)))',
            "wasi_ephemeral_nn.set_input: imported as (i64, i32, i64) -> (i32), "
            "this host has (i32, i32, i32) -> (i32), or with a 64-bit memory (i32, i32, i64) -> (i32)",
        ),
        (
            '(import "wasi_ephemeral_nn" "run_inference" (func (param i64 i32) (result i32)))',
            "wasi_ephemeral_nn.run_inference: imported as (i64, i32) -> (i32), this host has (i32, i32) -> (i32), "
            "or with a 64-bit memory (i64, i32) -> (i64) or (i64, i64) -> (i64)",
        ),
        (
            '(import "wasi_nn" "load" (func (param i32 i32 i32 i32 i32) (result i32)))',
            "wasi_nn.load: imported as (i32, i32, i32, i32, i32) -> (i32), "
            "this host has (i32, i32, i32, i32) -> (i32), or with a 64-bit memory (i64, i32, i32, i64) -> (i32)",
        ),
        (
            '(import "wasi_nn" "unload" (func (param i32) (result i32)))',
            "wasi_nn.unload: the wamr-legacy dialect has no such function",
        ),
        (
            '(import "wasi_ephemeral_nn" "run_inference" (func (param i32 i32) (result i32)))'
            '(import "wasi_ephemeral_nn" "unload" (func (param i32) (result i32)))'
            '(import "wasi_ephemeral_nn" "compute_single" (func (param i32) (result i32)))',
            "wasi_ephemeral_nn.run_inference: the wasmedge dialect has no such function (hyperbeam: yes)",
        ),
        (
            '(import "wasi_snapshot_preview1" "fd_close" (func (param i64) (result i32)))',
            "wasi_snapshot_preview1.fd_close: imported as (i64) -> (i32), this host has (i32) -> (i32)",
        ),
    ],
)
def test_what_is_missing_is_said_word_for_word(imported: str, expected: str) -> None:
    assert [str(item) for item in examined(f"(module {imported})").missing] == [expected]


def test_a_given_dialect_overrides_the_detected_one() -> None:
    engine = create_engine(use_cache=False)
    module = Module(engine, command_wat("").decode())
    assert examine_imports(module, engine).dialect is WASMEDGE
    found = examine_imports(module, engine, WITX)
    assert found.dialect is WITX
    assert {item.name for item in found.missing} == set(WASMEDGE_ONLY)
