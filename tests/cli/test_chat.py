"""``wasi-nn chat``: piped messages, and a person at a terminal."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.conftest import Command, command_line
from wasi_nn_backend.cli import chat

GREEDY = ["--temperature", 0, "--config", "ignore_eos=true"]


def test_piped_messages(wasi_nn_here: Command, tiny_model_path: Path) -> None:
    chat = ["chat", "-m", tiny_model_path, *GREEDY, "--max-tokens", 6]
    done = wasi_nn_here(*chat, stdin="Hello\n\n/stats\nAnd you?")
    assert done.returncode == 0
    assert "6 answer tokens" in done.stderr
    alone = wasi_nn_here(*chat, stdin="Hello\n")
    assert done.stdout.startswith(alone.stdout)
    assert len(done.stdout) > len(alone.stdout)
    assert alone.stderr == ""


def test_the_model_remembers_until_reset(wasi_nn_here: Command, tiny_model_path: Path) -> None:
    """The second prompt's tokens grow with the history, and are those of a first prompt after /reset."""
    chat = ["chat", "-m", tiny_model_path, *GREEDY, "--max-tokens", 6, "--stats"]

    def n_prompt_tokens(stdin: str) -> list[int]:
        lines = wasi_nn_here(*chat, stdin=stdin).stderr.splitlines()
        return [int(line.split()[0]) for line in lines if "prompt tokens" in line]

    first, second = n_prompt_tokens("Hello\nHello\n")
    assert second > first
    assert n_prompt_tokens("Hello\n/reset\nHello\n") == [first, first]


def test_exit_ends_it(wasi_nn_here: Command, tiny_model_path: Path) -> None:
    done = wasi_nn_here("chat", "-m", tiny_model_path, stdin="/exit\nHello\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_error_ends_a_pipe(wasi_nn_here: Command, tiny_model_path: Path) -> None:
    done = wasi_nn_here("chat", "-m", tiny_model_path, "--config", "n_ctx=128", stdin="word " * 2000 + "\nHello\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert "prompt_too_long" in done.stderr


def test_a_line_has_an_end(wasi_nn_here: Command, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "PROMPT_BYTES_MAX", 12)
    arguments = ["chat", "-m", tiny_model_path, *GREEDY, "--max-tokens", 2]
    assert wasi_nn_here(*arguments, stdin="eleven byte\n" * 2).returncode == 0
    done = wasi_nn_here(*arguments, stdin="twelve bytes\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert "more than 12 bytes" in done.stderr


class Terminal:
    """A chat whose three streams are one terminal."""

    def __init__(self, process: subprocess.Popen[bytes], descriptor: int) -> None:
        self.process = process
        self._descriptor = descriptor
        self._unread = b""

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def read_until(self, text: str) -> str:
        """What is shown up to and with ``text``; the rest stays for the next call."""
        wanted = text.encode()
        while wanted not in self._unread:
            self._unread += os.read(self._descriptor, 4096)
        shown, found, self._unread = self._unread.partition(wanted)
        return (shown + found).decode(errors="replace")

    def read_bytes(self, n_bytes: int) -> None:
        while len(self._unread) < n_bytes:
            self._unread += os.read(self._descriptor, 4096)
        self._unread = self._unread[n_bytes:]

    def wait_until_it_listens(self) -> None:
        """Python's readline shows the prompt before it waits for keys. A Ctrl-C in between has no effect until the next
        key, so nobody presses it before the main thread sleeps."""
        stat = Path(f"/proc/{self.process.pid}/stat")
        while stat.read_bytes().rpartition(b") ")[2][:1] != b"S":
            os.sched_yield()


@contextmanager
def terminal_chat(*arguments: object) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command_line("--log-level", "error", "chat", *arguments),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm"},
    ) as process:
        os.close(theirs)  # or reading from a chat that has ended would wait for ever
        try:
            yield Terminal(process, ours)
        finally:
            process.kill()
    os.close(ours)


def test_ctrl_d_at_the_prompt_ends_with_success(tiny_model_path: Path) -> None:
    with terminal_chat("-m", tiny_model_path, "--max-tokens", 4) as terminal:
        shown = terminal.read_until("> ")
        assert "/help lists the commands" in shown
        terminal.type("Hello\n")
        terminal.read_until("> ")
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0


def test_ctrl_c_stops_the_answer_and_then_the_chat(tiny_model_path: Path) -> None:
    arguments = ["-m", tiny_model_path, *GREEDY, "--config", "n_ctx=30000", "--max-tokens", 29000]
    with terminal_chat(*arguments) as terminal:
        terminal.read_until("> ")
        terminal.type("Hello\n")
        terminal.read_until("Hello\r\n")
        # More than a terminal's control sequences: the answer has begun.
        terminal.read_bytes(300)
        terminal.process.send_signal(signal.SIGINT)
        terminal.read_until("(stopped)")
        terminal.read_until("> ")
        terminal.wait_until_it_listens()
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.process.wait(60) == 130


@pytest.mark.real
def test_smollm2_remembers_a_name(wasi_nn: Command, smollm2_path: Path) -> None:
    done = wasi_nn("chat", "-m", smollm2_path, "--temperature", 0, stdin="My name is Ada.\nWhat is my name?\n")
    assert done.returncode == 0
    assert "Ada" in done.stdout.splitlines()[-1]
