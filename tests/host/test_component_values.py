"""Components that were built with other types than wasi:nn's, on a linker of an embedder who has not looked first.

wasmtime compares resources only, so the host sees values of any kind, and must not read them as what they are not.
"""

from __future__ import annotations

import pytest
from wasmtime import Store, WasmtimeError
from wasmtime.component import Component, Linker

from tests.host.component_guests import LOWER, MEMORY, NEWEST
from wasi_nn_backend.backend import Backend
from wasi_nn_backend.host import create_engine, define_wasi_nn_component

OTHER_TYPES = "other types than wasi:nn's"
#: Interface, its resource, function, parameters, result, and the flat arguments of one call.
CASES = {
    "a number for a name": ("graph", "graph", "load-by-name", '(param "n" u32)', "u32", "(i32.const 5)"),
    "bytes for a name": ("graph", "graph", "load-by-name", '(param "n" $bytes)', "u32", "(i32.const 0) (i32.const 9)"),
    "a number for bytes": (
        "tensor",
        "tensor",
        "[constructor]tensor",
        '(param "d" $words) (param "t" string) (param "b" u32)',
        "(own $resource)",
        "(i32.const 0) (i32.const 1) (i32.const 0) (i32.const 2) (i32.const 1234567)",
    ),
    "words for bytes": (
        "tensor",
        "tensor",
        "[constructor]tensor",
        '(param "d" $words) (param "t" $kind) (param "b" $words)',
        "(own $resource)",
        "(i32.const 0) (i32.const 1) (i32.const 4) (i32.const 0) (i32.const 9)",
    ),
    "bytes for words": (
        "tensor",
        "tensor",
        "[constructor]tensor",
        '(param "d" $bytes) (param "t" $kind) (param "b" $bytes)',
        "(own $resource)",
        "(i32.const 0) (i32.const 1) (i32.const 4) (i32.const 0) (i32.const 9)",
    ),
    "another enum": (
        "tensor",
        "tensor",
        "[constructor]tensor",
        '(param "d" $words) (param "t" $other) (param "b" $bytes)',
        "(own $resource)",
        "(i32.const 0) (i32.const 1) (i32.const 0) (i32.const 0) (i32.const 9)",
    ),
    "fewer parameters": (
        "tensor",
        "tensor",
        "[constructor]tensor",
        '(param "d" $words)',
        "(own $resource)",
        "(i32.const 0) (i32.const 1)",
    ),
    "another result": ("graph", "graph", "load-by-name", '(param "n" string)', "f64", "(i32.const 0) (i32.const 2)"),
}


@pytest.mark.parametrize("case", CASES)
def test_values_of_another_kind_end_in_a_trap(fake_backend: Backend, case: str) -> None:
    interface, resource, function, parameters, result, arguments = CASES[case]
    flat = {"u32": "i32", "f64": "f64"}.get(result, "i32")
    words = " ".join(["i32"] * arguments.count("const"))
    wat = f"""(component
      (import "wasi:nn/{interface}@{NEWEST}" (instance $nn
        (export "{resource}" (type $resource (sub resource)))
        (type $bytes (list u8)) (type $words (list u32))
        (type $kinds (enum "FP16" "FP32" "FP64" "BF16" "U8")) (export "kind" (type $kind (eq $kinds)))
        (type $others (enum "U9")) (export "other" (type $other (eq $others)))
        (export "{function}" (func {parameters} (result {result})))))
      {MEMORY}
      (core func $f (canon lower (func $nn "{function}") {LOWER}))
      (core module $Main
        (import "nn" "f" (func $f (param {words}) (result {flat})))
        (func (export "call") (drop (call $f {arguments}))))
      (core instance $main (instantiate $Main (with "nn" (instance (export "f" (func $f))))))
      (func (export "call") (canon lift (core func $main "call"))))"""
    engine = create_engine(use_cache=False)
    with Store(engine) as store, Linker(engine) as linker:
        store.set_epoch_deadline(1)
        state = define_wasi_nn_component(linker, fake_backend)
        call = linker.instantiate(store, Component(engine, wat)).get_func(store, "call")
        assert call is not None
        with pytest.raises(WasmtimeError):
            call(store)
        assert state.fault is None
        if interface == "tensor" and case != "fewer parameters":
            assert (OTHER_TYPES in str(state.last_error)) != (case == "another enum")
        state.close()


def test_interfaces_are_defined_once(fake_backend: Backend) -> None:
    with Linker(create_engine(use_cache=False)) as linker:
        define_wasi_nn_component(linker, fake_backend).close()
        with pytest.raises(WasmtimeError, match="defined twice"):
            define_wasi_nn_component(linker, fake_backend)
