"""``wasi-nn inspect``: modules, components, models, and what is none of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wasmtime import wat2wasm

from tests.cli.conftest import EXAMPLES
from tests.tiny_encoder import write_tiny_encoder
from wasi_nn_backend.cli import main
from wasi_nn_backend.cli.component_file import component_imports, is_component
from wasi_nn_backend.errors import InvalidArgument

Captured = pytest.CaptureFixture[str]

GUESTS = Path(__file__).parent / "guests"
NN = "wasi:nn/graph@0.2.0-rc-2024-10-28"
COMPONENT = bytes(
    wat2wasm(
        f"""
        (component
          (type $t (resource (rep i32)))
          (import "{NN}" (instance $graph (export "graph" (type (sub resource)))))
          (alias export $graph "graph" (type $g))
          (import "same" (type (eq $g)))
          (import "own" (type (sub resource)))
          (import "code" (core module))
          (import "call" (func (param "n" u32)))
          (core module (func (export "f")))
          (import "wasi:io/streams@0.2.0" (instance)))
        """
    )
)
IMPORTS = [NN, "same", "own", "code", "call", "wasi:io/streams@0.2.0"]


def inspect_json(file: Path, capsys: Captured, *, status: int = 0) -> dict[str, object]:
    assert main(["inspect", "--json", str(file)]) == status
    captured = capsys.readouterr()
    assert captured.err == ""
    report = json.loads(captured.out)
    assert isinstance(report, dict)
    return report


def test_a_module(capsys: Captured) -> None:
    report = inspect_json(GUESTS / "wasmedge.wat", capsys)
    assert report["kind"] == "module"
    assert report["dialect"] == "wasmedge"
    assert report["lacking"] == []
    assert report["is_command"] is True
    assert report["other_imports"] == {"wasi_snapshot_preview1": 3}
    assert report["wasi_nn_imports"] == [
        "load_by_name_with_config (i32, i32, i32, i32, i32) -> i32",
        "init_execution_context (i32, i32) -> i32",
        "set_input (i32, i32, i32) -> i32",
        "compute (i32) -> i32",
        "get_output (i32, i32, i32, i32, i32) -> i32",
    ]
    assert report["memories"] == [
        {
            "name": "memory",
            "imported_from": None,
            "is_64_bit": False,
            "is_shared": False,
            "min_bytes": 4 * 65536,
            "max_bytes": None,
        }
    ]


def test_the_examples_dialects(capsys: Captured) -> None:
    assert inspect_json(EXAMPLES / "ask.wasm", capsys)["dialect"] == "witx"
    assert inspect_json(EXAMPLES / "wasmedge_stream.wasm", capsys)["dialect"] == "wasmedge"


def test_what_this_host_lacks_is_named_and_is_a_failure(tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "alien.wat"
    file.write_text(
        '(module (import "alien" "call" (func)) (import "wasi_ephemeral_nn" "compute" (func (param i64) (result i32))))'
    )
    report = inspect_json(file, capsys, status=1)
    lacking = report["lacking"]
    assert isinstance(lacking, list)
    assert [item.split(":")[0] for item in lacking] == ["alien.call", "wasi_ephemeral_nn.compute"]
    assert report["dialect"] == "witx"


def test_an_imported_memory_is_a_memory(tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "m.wat"
    file.write_text('(module (import "env" "memory" (memory 1 2)))')
    memories = inspect_json(file, capsys, status=1)["memories"]
    assert isinstance(memories, list)
    assert (memories[0]["imported_from"], memories[0]["max_bytes"]) == ("env", 2 * 65536)


def test_a_component(tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "component.wasm"
    file.write_bytes(COMPONENT)
    report = inspect_json(file, capsys, status=1)
    assert report["kind"] == "component"
    assert report["wasi_nn_imports"] == [NN]
    assert report["other_imports"] == IMPORTS[1:]
    lacking = report["lacking"]
    assert isinstance(lacking, list)
    assert [line.partition(":")[0] for line in lacking] == ["same", "own", "code", "call"]


def test_a_component_that_lacks_nothing(tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "component.wasm"
    file.write_bytes(
        bytes(wat2wasm(f'(component (import "{NN}" (instance)) (import "wasi:io/streams@0.2.0" (instance)))'))
    )
    assert inspect_json(file, capsys)["lacking"] == []


def test_a_component_in_the_text_format(capsys: Captured) -> None:
    report = inspect_json(EXAMPLES.parent / "component" / "ask.wat", capsys)
    assert (report["kind"], report["lacking"]) == ("component", [])


def test_component_imports_in_their_order() -> None:
    assert is_component(COMPONENT)
    assert component_imports(COMPONENT) == IMPORTS


@given(st.integers(min_value=8, max_value=len(COMPONENT)))
def test_a_component_cut_short_loses_imports_or_is_an_error(n_bytes: int) -> None:
    try:
        found = component_imports(COMPONENT[:n_bytes])
    except InvalidArgument:
        return
    assert found == IMPORTS[: len(found)]


@given(st.binary())
def test_rubbish_behind_a_components_header_never_fails_otherwise(body: bytes) -> None:
    try:
        component_imports(COMPONENT[:8] + body)
    except InvalidArgument:
        return


def test_a_model(tiny_model_path: Path, capsys: Captured) -> None:
    report = inspect_json(tiny_model_path, capsys)
    assert report["kind"] == "gguf"
    assert report["architecture"] == "llama"
    assert report["n_bytes"] == tiny_model_path.stat().st_size
    for key in ("n_params", "n_ctx_train", "n_vocab", "kv_bytes_per_token", "n_layers"):
        value = report[key]
        assert isinstance(value, int)
        assert value > 0
    assert isinstance(report["chat_template"], str)


@pytest.mark.real
def test_smollm2(smollm2_path: Path, capsys: Captured) -> None:
    report = inspect_json(smollm2_path, capsys)
    assert (report["n_vocab"], report["n_layers"], report["n_ctx_train"]) == (49152, 30, 8192)
    assert report["quantisation"] == "Q4_1"
    # 30 layers with 3 key-value heads of 64 values each, keys and values, 2 bytes a value.
    assert report["kv_bytes_per_token"] == 30 * 3 * 64 * 2 * 2


def test_an_encoder(tmp_path: Path, capsys: Captured) -> None:
    write_tiny_encoder(tmp_path / "encoder.gguf")
    report = inspect_json(tmp_path / "encoder.gguf", capsys)
    assert report["is_encoder"] is True
    assert report["kv_bytes_per_token"] == 0
    assert main(["inspect", str(tmp_path / "encoder.gguf")]) == 0
    assert "embeddings" in capsys.readouterr().out


def test_rows_fit_the_terminal(tiny_model_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for file in (GUESTS / "world.wat", tiny_model_path):
        assert main(["inspect", str(file)]) == 0
        lines = capsys.readouterr().out.splitlines()
        # Paths are not broken: somebody wants to copy them.
        assert all(len(line) <= 80 for line in lines if str(file) not in line)


def test_damaged_and_foreign_files(tmp_path: Path, tiny_model_path: Path, capsys: Captured) -> None:
    whole = tiny_model_path.read_bytes()
    cases = {
        "gone.gguf": None,
        "empty.gguf": b"",
        "cut.gguf": whole[: len(whole) // 2],
        "header.gguf": whole[:10],
        "text.gguf": b"hello there",
        "cut.wasm": b"\0asm\1\0\0\0\1",
        "wrong.wat": b"(module (nonsense))",
        "cut-component.wasm": COMPONENT[:-1],
    }
    for name, content in cases.items():
        file = tmp_path / name
        if content is not None:
            file.write_bytes(content)
        assert main(["inspect", str(file)]) == 1, name
        captured = capsys.readouterr()
        assert captured.out == "", name
        assert captured.err.startswith("error: "), name
        assert captured.err.count("\n") == 1, name
        assert ("is empty" in captured.err) == (content == b""), name
    assert main(["inspect", str(tmp_path)]) == 1
    assert "directory" in capsys.readouterr().err
