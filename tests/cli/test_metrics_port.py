"""``--metrics-port`` of the commands that run models."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Command, command_line

WORLD = Path(__file__).parent / "guests" / "world.wat"
ADDRESS = re.compile(r"metrics: (http://\S+)/metrics\n")
FEW_TOKENS = ["--raw", "a", "--max-tokens", 3, "--temperature", 0, "--config", "n_ctx=512"]


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as response:
        body: bytes = response.read()
    return body


def test_a_chat_can_be_watched_while_it_goes_on(tiny_model_path: Path) -> None:
    command = command_line("chat", "-m", tiny_model_path, "--max-tokens", 4, "--metrics-port", 0)
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, text=True, bufsize=1, **pipes) as chat:
        try:
            found = ADDRESS.fullmatch(chat.stderr.readline())
            assert found
            assert found[1].startswith("http://127.0.0.1:")
            chat.stdin.write("Hello\n")
            answer = chat.stdout.readline()
            assert answer
            (status,) = json.loads(fetch(f"{found[1]}/status.json"))["backends"]
            assert [row["name"] for row in status["graphs"]] == [str(tiny_model_path)]
            assert len(status["sessions"]) == 1
            assert b"wasi_nn_generated_tokens_total" in fetch(f"{found[1]}/metrics")
            rest, errors = chat.communicate(timeout=60)
        finally:
            chat.kill()
    assert (chat.returncode, rest, errors) == (0, "", "")


def test_only_the_answer_is_on_stdout(wasi_nn_here: Command, tiny_model_path: Path) -> None:
    generate = ["generate", "-m", tiny_model_path, *FEW_TOKENS]
    watched, plain = wasi_nn_here(*generate, "--metrics-port", 0), wasi_nn_here(*generate)
    assert watched.returncode == 0
    assert watched.stdout == plain.stdout
    assert ADDRESS.fullmatch(watched.stderr)


def test_a_guest_can_be_watched(wasi_nn_here: Command) -> None:
    done = wasi_nn_here("run", "--metrics-port", 0, "--metrics-address", "localhost", "--invoke", "exit", WORLD, 7)
    assert (done.returncode, done.stdout) == (7, "")
    assert ADDRESS.fullmatch(done.stderr)


def test_a_port_in_use_is_an_error_before_anything_is_loaded(wasi_nn_here: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for command in (["generate", "-m", "missing.gguf", "x"], ["chat", "-m", "missing.gguf"], ["run", WORLD]):
            name, *rest = command
            done = wasi_nn_here(name, "--metrics-port", port, *rest)
            assert done.returncode == 1
            assert f"port {port}: Address already in use; choose another port, or 0" in done.stderr
            assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--metrics-port", 65536], "less than or equal to 65535"),
        (["--metrics-port", "x"], "a valid integer"),
        (["--metrics-address", "0.0.0.0"], "goes with --metrics-port N"),
    ],
)
def test_usage_errors_name_the_option(wasi_nn_here: Command, options: list[Any], complaint: str) -> None:
    for command in (["generate", "-m", "smollm2", "x"], ["chat", "-m", "smollm2"], ["run", WORLD]):
        name, *rest = command
        done = wasi_nn_here(name, *options, *rest)
        assert done.returncode == 2
        assert complaint in done.stderr
        assert str(options[0]) in done.stderr
