"""The log of the commands: ``--log-level`` beside what configurations say, and rotation."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.cli.conftest import Command

GENERATE = ["--raw", "a", "--max-tokens", 3, "--temperature", 0, "--config", "n_ctx=512"]


def test_a_configuration_sets_level_and_file(wasi_nn_here: Command, tiny_model_path: Path, tmp_path: Path) -> None:
    log = ["--config", "file=x.log", "--config", "level=debug"]
    done = wasi_nn_here("generate", "-m", tiny_model_path, *GENERATE, *log)
    assert (done.returncode, done.stderr) == (0, "")
    text = (tmp_path / "x.log").read_text()
    assert "debug: " in text
    assert "is loaded" in text
    assert "task finished" in text


def test_a_level_in_the_configuration_counts_unless_the_command_line_says_one(
    wasi_nn_here: Command, tiny_model_path: Path
) -> None:
    generate = ["generate", "-m", tiny_model_path, *GENERATE, "--config", "level=info", "--config", "timestamps=false"]
    assert "info: the graph" in wasi_nn_here(*generate).stderr
    assert wasi_nn_here("--log-level", "warn", *generate).stderr == ""


HANGUP = textwrap.dedent(
    """
    import logging, os, signal, sys
    from pathlib import Path
    from wasi_nn_backend.cli.logs import LogLevel, open_log, reopening_files_on_hangup
    from wasi_nn_backend.config.logging import LoggingSettings
    from wasi_nn_backend.logs import LogOutput

    log = logging.getLogger("wasi_nn_backend")
    if sys.argv[1:] == ["ignored"]:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with reopening_files_on_hangup():
        if sys.argv[1:] and sys.argv[1:] != ["ignored"]:
            LogOutput(LoggingSettings(file=sys.argv[1], timestamps=False))
            log.error("before")
            Path(sys.argv[1]).rename(sys.argv[1] + ".1")
        os.kill(os.getpid(), signal.SIGHUP)
        log.error("after")
    """
)


def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", HANGUP, *arguments]
    return subprocess.run(command, capture_output=True, timeout=60, check=False)


def test_a_hangup_opens_the_file_anew(tmp_path: Path) -> None:
    done = run(str(tmp_path / "log"))
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "log.1").read_text() == "error: before\n"
    assert (tmp_path / "log").read_text() == "error: after\n"


def test_without_a_file_a_hangup_means_what_it_meant() -> None:
    assert run().returncode == -signal.SIGHUP
    assert run("ignored").returncode == 0
