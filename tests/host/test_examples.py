"""The C examples: they build to the bytes that lie beside them, and they do what they say."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.llama import FakeLlama
from tests.host.conftest import MODEL
from wasi_nn_backend.backend import Backend
from wasi_nn_backend.host import GuestResult, RunConfig, run_module

EXAMPLES = Path(__file__).parents[2] / "examples" / "c"
WAT = EXAMPLES.parent / "wat"
#: Those that take a graph and a prompt, and all that are built.
NAMES = ["ask", "wasmedge_stream", "wamr_legacy"]
BUILT = [*NAMES, "chat", "hyperbeam"]
DEFAULT = MODEL.decode()


def build_command(source: Path) -> list[str]:
    """The command that the program states in its first comment."""
    found = re.search(r"Build: (python .*)", source.read_text())
    assert found is not None, f"{source} does not say how it is built"
    return [sys.executable, *shlex.split(found[1])[1:]]


@pytest.mark.parametrize("name", BUILT)
def test_the_stated_command_builds_the_committed_bytes(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("ziglang") is None:
        reason = "ziglang is not installed: pip install 'wasi-nn-backend[dev]'"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    for file in EXAMPLES.glob("*.[ch]"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    command = build_command(tmp_path / f"{name}.c")
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=110)
    assert (built.returncode, built.stderr) == (0, "")
    assert (tmp_path / f"{name}.wasm").read_bytes() == (EXAMPLES / f"{name}.wasm").read_bytes()


@pytest.mark.parametrize("name", BUILT)
def test_the_readme_states_the_same_command(name: str) -> None:
    command = shlex.join(["python", *build_command(EXAMPLES / f"{name}.c")[1:]])
    assert command in (EXAMPLES / "README.md").read_text()


def run(backend: Backend, name: str, *args: str, invoke: str | None = None) -> tuple[GuestResult, bytes, bytes]:
    out, err = bytearray(), bytearray()
    file = WAT / name if name.endswith(".wat") else EXAMPLES / f"{name}.wasm"
    config = RunConfig(file, args=args, stdout=out.extend, stderr=err.extend, invoke=invoke, use_cache=False)
    return run_module(config, backend), bytes(out), bytes(err)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fixture", ["fake_backend", "tiny_backend"])
def test_the_answer_is_the_text_that_the_backend_gives(name: str, fixture: str, request: pytest.FixtureRequest) -> None:
    backend: Backend = request.getfixturevalue(fixture)
    with backend.load_by_name(DEFAULT) as graph, graph.init_execution_context() as context:
        expected = context.run_inference("hello", {"prompt_mode": "raw"}).encode()
    result, out, _ = run(backend, name, DEFAULT, "hello")
    assert (result.outcome, result.exit_status) == ("exited", 0)
    # The token-by-token calls leave a character out that the last token has not finished.
    assert expected.startswith(out.removesuffix(b"\n"))
    assert len(out) >= len(expected) - 2


def test_metadata_of_the_streaming_example_is_on_standard_error(fake_backend: Backend) -> None:
    result, out, err = run(fake_backend, "wasmedge_stream", DEFAULT, "hello", "5")
    assert result.exit_status == 0
    assert out.endswith(b"\n")
    metadata = json.loads(err)
    assert list(metadata) == ["input_tokens", "output_tokens", "llama_build_number", "llama_commit"]
    assert metadata["output_tokens"] == 5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("graph", "errno"), [("nobody", 8), ("gone", 103)])
def test_errors_are_the_exit_status(fake_backend: Backend, name: str, graph: str, errno: int) -> None:
    result, out, err = run(fake_backend, name, graph, "hello")
    assert (result.exit_status, out) == (errno, b"")
    assert f"WASI-NN error {errno}".encode() in err
    assert result.last_error is not None
    assert result.last_error.errno == errno


def test_a_prompt_that_is_too_long_is_102(fake_backend: Backend) -> None:
    result, _, err = run(fake_backend, "ask", DEFAULT, "x" * 5000)
    assert result.exit_status == 102
    assert b"compute failed" in err


@pytest.mark.parametrize("name", NAMES)
def test_usage_is_explained(fake_backend: Backend, name: str) -> None:
    result, _, err = run(fake_backend, name)
    assert result.exit_status == 64
    assert err.startswith(b"usage: ")


# --- the chat header ---


def test_a_chat_remembers_its_turns(tiny_backend: Backend) -> None:
    questions = ["My name is Alice.", "What is my name?", "Thank you."]
    with tiny_backend.load_by_name(DEFAULT) as graph, graph.init_execution_context() as context:
        expected = [context.run_inference(question).encode() for question in questions]
    result, out, err = run(tiny_backend, "chat", DEFAULT, *questions)
    assert (result.exit_status, err) == (0, b"")
    assert out == b"".join(answer.partition(b"\0")[0] + b"\n" for answer in expected)


def test_a_chat_makes_room_for_a_long_answer(tmp_path: Path) -> None:
    """Its first buffer holds 1024 bytes."""
    (tmp_path / "fake.gguf").touch()
    with Backend({"temperature": 0, "max_tokens": 1500, "ignore_eos": True}, llama=FakeLlama()) as backend:
        backend.register(DEFAULT, tmp_path / "fake.gguf")
        with backend.load_by_name(DEFAULT) as graph, graph.init_execution_context() as context:
            expected = context.run_inference("hello").encode()
        result, out, _ = run(backend, "chat", DEFAULT, "hello")
    assert result.exit_status == 0
    assert out == expected + b"\n"
    assert len(expected) > 1024


@pytest.mark.parametrize(("graph", "errno"), [("nobody", 8), ("gone", 103)])
def test_a_chat_that_cannot_be_opened_says_so(fake_backend: Backend, graph: str, errno: int) -> None:
    result, out, err = run(fake_backend, "chat", graph, "hello")
    assert (result.exit_status, out, err) == (errno, b"", f"chat: WASI-NN error {errno}\n".encode())


# --- HyperBEAM's way, and the text format ---


@pytest.mark.parametrize(("name", "config"), [("hyperbeam", ['{"prompt_mode": "chat"}']), ("handle64.wat", [])])
def test_handle_returns_the_answer(tiny_backend: Backend, name: str, config: list[str]) -> None:
    with tiny_backend.load_by_name(DEFAULT) as graph, graph.init_execution_context() as context:
        expected = context.run_inference("hello")
    result, out, _ = run(tiny_backend, name, "hello", *config, invoke="handle")
    assert (result.exit_status, result.returned, out) == (0, (expected,), b"")


def test_the_text_format_asks_its_question(tiny_backend: Backend) -> None:
    with tiny_backend.load_by_name(DEFAULT) as graph, graph.init_execution_context() as context:
        expected = context.run_inference("Name the capital city of France.", {"prompt_mode": "raw"}).encode()
    result, out, _ = run(tiny_backend, "ask.wat")
    assert (result.exit_status, out) == (0, expected + b"\n")


def test_the_text_format_exits_with_the_number() -> None:
    with Backend(llama=FakeLlama()) as backend:
        assert run(backend, "ask.wat")[0].exit_status == 8
