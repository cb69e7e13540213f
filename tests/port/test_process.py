"""``wasi-nn port`` as a process: its streams and its exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import command_line
from tests.port.conftest import CONFIG, ENDLESS, Node
from wasi_nn_backend.port.terms import Atom

#: Native code that prints, in the middle of everything.
NOISY = """
import os, sys
from wasi_nn_backend.port import server
original = server.PortServer._perform
def perform(self, call):
    os.write(1, b"noise from below")
    print("noise from above", flush=True)
    original(self, call)
server.PortServer._perform = perform
from wasi_nn_backend.cli import main
sys.exit(main(["port"]))
"""


class Port:
    def __init__(self, *argv: str, start_new_session: bool = False) -> None:
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=start_new_session,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.node = Node(self.process.stdin.fileno(), self.process.stdout.fileno())

    def end(self) -> tuple[int, str]:
        """The exit status and stderr, after stdin has ended."""
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors.decode()


@pytest.fixture
def port() -> Iterator[Port]:
    started = Port(*command_line("port"))
    assert started.node.receive()[0] == Atom("ready")
    yield started
    started.process.kill()
    started.process.communicate()


def test_it_ends_with_its_input(port: Port) -> None:
    assert port.node.ask(1, "ping") == (Atom("ok"), Atom("pong"))
    assert port.end() == (0, "")


@pytest.mark.parametrize("data", [b"\x40\0\0\0", pytest.param(b"\0\0\0\x09garbage", marks=pytest.mark.slow)])
def test_something_else_than_packets_ends_it(data: bytes, port: Port) -> None:
    port.node.send_raw(data)
    status, errors = port.end()
    assert status == 1
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1


@pytest.mark.slow
def test_it_ends_in_the_middle_of_a_run(port: Port, tiny_model_path: Path) -> None:
    start_endless_stream(port, tiny_model_path)
    assert port.end()[0] == 0


def test_sigterm_ends_it_in_the_middle_of_a_run(port: Port, tiny_model_path: Path) -> None:
    start_endless_stream(port, tiny_model_path)
    port.process.send_signal(signal.SIGTERM)
    assert port.process.wait(60) == 143


def start_endless_stream(port: Port, model: Path) -> None:
    node = port.node
    node.ask(1, "init_backend", 1, CONFIG)
    node.ask(2, "load_by_name", 1, 2, os.fsencode(model), b"")
    node.ask(3, "init_execution_context", 2, 3, b"")
    node.call(4, "stream", 3, b"hello", ENDLESS)
    assert node.receive()[:2] == (Atom("token"), 4)


def test_what_others_print_does_not_get_between_packets() -> None:
    port = Port(sys.executable, "-c", NOISY)
    assert port.node.receive()[0] == Atom("ready")
    assert port.node.ask(1, "ping") == (Atom("ok"), Atom("pong"))
    status, errors = port.end()
    assert status == 0
    assert "noise from below" in errors
    assert "noise from above" in errors


@pytest.mark.slow
def test_its_precedence_is_lowered_and_nobody_elses() -> None:
    port = Port(*command_line("port", "--nice", "7"), start_new_session=True)
    assert port.node.receive()[0] == Atom("ready")
    assert os.getpriority(os.PRIO_PROCESS, port.process.pid) == os.getpriority(os.PRIO_PROCESS, 0) + 7
    group = Path(f"/proc/{port.process.pid}/autogroup")
    assert not group.exists() or group.read_text().endswith("nice 7\n")
    assert port.end() == (0, "")
