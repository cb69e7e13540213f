"""What is no argument at all, at the doors that Python programs use: a code and a text, not Python's own exceptions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from wasmtime import Engine, Linker, Store

from tests.fakes.llama import FakeLlama
from wasi_nn_backend import Backend, ExecutionContext, Graph, GraphEncoding, Tensor
from wasi_nn_backend.errors import InvalidArgument, NotFound, WasiNNError
from wasi_nn_backend.host import GuestPool, RunConfig, define_wasi_nn

ANSWERS = b'(module (memory (export "memory") 1) (func (export "_start")))'


@pytest.fixture
def backend() -> Iterator[Backend]:
    with Backend({"max_tokens": 4}, llama=FakeLlama()) as backend:
        yield backend


@pytest.fixture
def graph(backend: Backend, tmp_path: Path) -> Graph:
    path = tmp_path / "model.gguf"
    path.touch()
    return backend.load_by_name(path)


@pytest.fixture
def context(graph: Graph) -> ExecutionContext:
    return graph.init_execution_context()


@pytest.mark.parametrize(
    "call",
    [
        lambda backend: backend.register("name", None),
        lambda backend: backend.register("name", 6),
        lambda backend: backend.load([b"GGUF"], "ggml"),
        lambda backend: backend.load(None),
        lambda backend: backend.restore(None),
        lambda backend: backend.restore("a\0"),
        lambda backend: backend.restore("\ud800"),
    ],
)
def test_a_backend_s_arguments(backend: Backend, call: Callable[[Any], object]) -> None:
    with pytest.raises(InvalidArgument):
        call(backend)


@pytest.mark.parametrize("path", [None, 5, "a\0", "\ud800"])
def test_paths_of_sessions(context: ExecutionContext, path: Any) -> None:
    context.run_inference("a prompt")
    with pytest.raises(InvalidArgument):
        context.save(path)


@pytest.mark.parametrize("data", [(1, 2, 3), "text", None])
def test_a_tensor_without_bytes_changes_nothing(context: ExecutionContext, data: Any) -> None:
    context.set_input(0, "the prompt")
    with pytest.raises(InvalidArgument, match="bytes"):
        context.set_input(0, Tensor(data))
    context.compute()
    assert context.get_output(0)


@pytest.mark.parametrize("texts", [None, 5, "text", b"text"])
def test_texts_to_embed(graph: Graph, texts: Any) -> None:
    with pytest.raises(WasiNNError):
        graph.embed(texts)


@pytest.mark.parametrize("argument", ["a\0b", "\ud800", 5])
@pytest.mark.parametrize("place", ["args", "env"])
def test_what_wasi_cannot_pass_is_refused_and_not_cut(backend: Backend, place: str, argument: Any) -> None:
    values: Any = {"args": [argument]} if place == "args" else {"env": {"NAME": argument}}
    with GuestPool(backend, 1) as pool:
        output = pool.submit(RunConfig(ANSWERS, **values)).result(30)
    assert output.error is not None
    assert "UTF-8" in output.error


def test_what_is_no_guest_fails_alone(backend: Backend) -> None:
    with GuestPool(backend, 1) as pool:
        outputs = list(pool.map([5, RunConfig(ANSWERS)]))  # type: ignore[list-item]
    assert ["RunConfig" in (output.error or "") for output in outputs] == [True, False]
    assert outputs[1].error is None


def test_functions_are_defined_for_dialects(backend: Backend) -> None:
    engine = Engine()
    with Store(engine) as store, Linker(engine) as linker, pytest.raises(InvalidArgument, match="CORE_DIALECTS"):
        define_wasi_nn(linker, store, backend, "witx")  # type: ignore[arg-type]


def test_an_encoding_that_is_one_and_not_ours_keeps_its_code(backend: Backend) -> None:
    with pytest.raises(WasiNNError, match="ggml"):
        backend.load([b"GGUF"], GraphEncoding.ONNX)
    with pytest.raises(NotFound):
        backend.restore("no such file")
