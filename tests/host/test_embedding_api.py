"""WASI-NN on a wasmtime engine of the embedder's own."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from wasmtime import Engine, Linker, Module, Store

from tests.host.conftest import MODEL
from tests.host.guests import OUT, command_wat, text_data, wrapper_wat
from wasi_nn_backend.backend import Backend
from wasi_nn_backend.dialects import WASMEDGE, WITX
from wasi_nn_backend.host import define_wasi_nn, detect_dialect

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
ASK = EXAMPLES / "c" / "ask.wasm"


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / "embedding" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_answers(tiny_model_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert load_example("core_module").main([str(ASK), str(tiny_model_path), "default", "hello"]) == 0
    captured = capfd.readouterr()
    assert (bool(captured.out.strip()), captured.err) == (True, "")


def test_the_example_exits_with_the_guests_status_and_says_why(
    tiny_model_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert load_example("core_module").main([str(ASK), str(tiny_model_path), "nobody", "hello"]) == 8
    assert "not_found (8)" in capfd.readouterr().err


def test_the_readme_states_the_examples_command() -> None:
    (command,) = re.findall(r"python core_module\.py .*", (EXAMPLES / "embedding" / "core_module.py").read_text())
    assert command in (EXAMPLES / "embedding" / "README.md").read_text()


def test_the_two_lines_of_the_documentation(fake_backend: Backend) -> None:
    """They are run as they stand there, for a module that opens a context and does not close it."""
    block = (ROOT / "docs" / "embedding.md").read_text().split("```python\n")[1].split("```")[0]
    body = f"""(drop (call $load_by_name (i32.const 100) (i32.const {len(MODEL)}) (i32.const {OUT})))
               (drop (call $init_execution_context (i32.const 0) (i32.const {OUT})))"""
    engine = Engine()
    module = Module(engine, command_wat(body, data=text_data(100, MODEL)).decode())
    linker = Linker(engine)
    linker.define_wasi()
    names = {"linker": linker, "store": Store(engine), "module": module, "backend": fake_backend}
    open_before = fake_backend.status().graphs
    exec(block.replace('["_start"](store)', '["_start"](store); seen = len(backend.status().graphs)'), names)
    assert names["seen"] == 1
    assert fake_backend.status().graphs == open_before == ()


def test_without_a_dialect_modules_of_both_families_link(fake_backend: Backend) -> None:
    for dialect in (WITX, WASMEDGE):
        engine = Engine()
        module = Module(engine, wrapper_wat(dialect))
        assert detect_dialect(module) is dialect
        store, linker = Store(engine), Linker(engine)
        with define_wasi_nn(linker, store, fake_backend) as state:
            assert linker.instantiate(store, module) is not None
            assert state.dialect is WASMEDGE


def test_leaving_the_block_by_an_exception_frees_what_the_store_held(fake_backend: Backend) -> None:
    engine = Engine()
    store, linker = Store(engine), Linker(engine)

    def fail_with_a_graph_open() -> None:
        with define_wasi_nn(linker, store, fake_backend) as state, state.graphs.reserve() as publish:
            publish(state.backend.load_by_name("default", door=WASMEDGE.door))
            assert len(fake_backend.status().graphs) == 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_with_a_graph_open()
    assert fake_backend.status().graphs == ()
