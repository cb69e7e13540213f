"""Runs the command as people do: as a process with its streams and its exit status, or its main() where that tells as
much."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from wasi_nn_backend.cli import main

Command = Callable[..., subprocess.CompletedProcess[str]]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "c"


def command_line(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "wasi_nn_backend.cli", *map(str, arguments)]


@pytest.fixture
def wasi_nn(tmp_path: Path) -> Command:
    """Runs one command line in an empty directory; ``stdin`` is its standard input's text."""

    def run(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command_line(*arguments),
            input=stdin,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=100,
            check=False,
        )

    return run


@pytest.fixture
def wasi_nn_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """The same inside the test's process, which costs milliseconds. Guests' output is captured, too."""

    def run(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        argv = [*map(str, arguments)]
        status = main(argv)
        captured = capfd.readouterr()
        return subprocess.CompletedProcess(argv, status, captured.out, captured.err)

    return run


@pytest.fixture(autouse=True)
def _the_log_as_it_was() -> Iterator[None]:
    """The command line sets up the library's logger for the process; the next test finds it untouched."""
    logger = logging.getLogger("wasi_nn_backend")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers


@pytest.fixture
def closed_pipe() -> Iterator[int]:
    """The write end of a pipe whose reader has gone, as stdout is in ``wasi-nn ... | true``."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)
