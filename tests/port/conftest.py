"""The node's end of a port."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from wasi_nn_backend.port import PacketChannel, PortServer
from wasi_nn_backend.port.terms import Atom, Term, decode, encode

CONFIG = b'{"max_tokens": 8, "temperature": 0, "n_ctx": 512, "max_concurrent": 4, "default_task_timeout_ms": 0}'
ENDLESS = b'{"max_tokens": 1000000, "ignore_eos": true, "context_shifting": true}'


class Node:
    """Writes requests and reads answers, over the two ends that a node has."""

    def __init__(self, writing_fd: int, reading_fd: int) -> None:
        self._writing_fd = writing_fd
        self.has_hung_up = False
        self._channel = PacketChannel(reading_fd, writing_fd)

    def send(self, term: Any) -> None:
        self._channel.send(encode(term))

    def send_raw(self, data: bytes) -> None:
        os.write(self._writing_fd, data)

    def call(self, number: int, operation: str, *arguments: int | bytes) -> None:
        self.send((Atom("call"), number, Atom(operation), list(arguments)))

    def receive(self) -> Any:
        """The next packet's term; None at the end."""
        packet = self._channel.receive()
        return None if packet is None else decode(packet)

    def reply(self, number: int) -> Term:
        """Reads on until the reply to a call; tokens before it are dropped."""
        while (term := self.receive()) is not None:
            if term[:2] == (Atom("reply"), number):
                return term[2]
        raise AssertionError("the port ended")

    def ask(self, number: int, operation: str, *arguments: int | bytes) -> Term:
        self.call(number, operation, *arguments)
        return self.reply(number)

    def hang_up(self) -> None:
        """Close the pipe to the port; once."""
        os.close(self._writing_fd)
        self.has_hung_up = True

    def close(self) -> None:
        self._channel.close()


class RunningServer:
    """A server on a thread of its own, its node, and what ``run`` raised."""

    def __init__(self, **options: Any) -> None:
        self._fds = [*os.pipe(), *os.pipe()]
        self._channel = PacketChannel(self._fds[0], self._fds[3])
        self.server = PortServer(self._channel, "1.2.3", **options)
        self.node = Node(self._fds[1], self._fds[2])
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.server.run()
        except BaseException as error:
            self.error = error

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()

    def close(self) -> None:
        self.server.stop()
        self.join()
        self._channel.close()
        self.node.close()
        for fd in self._fds:
            if fd != self._fds[1] or not self.node.has_hung_up:
                os.close(fd)


@pytest.fixture
def running() -> Iterator[RunningServer]:
    server = RunningServer()
    assert server.node.receive() == (Atom("ready"), b"1.2.3")
    yield server
    server.close()


@pytest.fixture
def node(running: RunningServer, tiny_model_path: Path) -> Node:
    """With the backend 1, the graph 2 and the context 3."""
    node = running.node
    done = (Atom("ok"), Atom("done"))
    assert node.ask(1, "init_backend", 1, CONFIG) == done
    assert node.ask(2, "load_by_name", 1, 2, os.fsencode(tiny_model_path), b"") == done
    assert node.ask(3, "init_execution_context", 2, 3, b"") == (Atom("ok"), Atom("false"))
    return node
