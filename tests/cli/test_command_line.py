"""What all commands share: help, version, the log's level, failures."""

from __future__ import annotations

import logging
import os
import re
import shlex
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import typer

from tests.cli.conftest import Command, command_line
from wasi_nn_backend.cli import main
from wasi_nn_backend.cli.exit_codes import exits_cleanly
from wasi_nn_backend.cli.logs import LogLevel, open_log
from wasi_nn_backend.config import Settings
from wasi_nn_backend.errors import ContextFull

Captured = pytest.CaptureFixture[str]

WORLD = Path(__file__).parent / "guests" / "world.wat"
COMMANDS = ["run", "generate", "chat", "inspect", "schema"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_and_its_exit_statuses(command: str, capsys: Captured) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"Example: wasi-nn {command}" in text
    assert "Exit status" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text, "an option's name is cut off"


def test_help_lists_the_commands(capsys: Captured) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)


def test_no_command_at_all_is_a_wrong_command_line_that_shows_the_help(capsys: Captured) -> None:
    assert main([]) == 2
    assert "generate" in capsys.readouterr().out


def test_version(capsys: Captured) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("wasi-nn ")


def test_help_imports_nothing_large() -> None:
    """It has to answer at once, and these take a second on a slow machine."""
    large = {"llama_cpp", "wasmtime", "numpy", "gguf", "pydantic", "importlib.metadata"}
    program = (
        "import sys; from wasi_nn_backend.cli import main; main(['--help']);"
        f"sys.exit(' '.join({large} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("arguments", [["rnu"], ["--nonsense"], ["run"], ["generate", "x"], ["inspect"]])
def test_wrong_command_lines_take_two_lines_on_stderr(arguments: list[str], capsys: Captured) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 2


def test_global_options_behind_the_command_are_explained(capsys: Captured) -> None:
    assert main(["run", "--log-level", "debug", "x.wasm"]) == 2
    assert "come before the command" in capsys.readouterr().err


def run_failing(error: BaseException) -> int:
    app = typer.Typer()

    @app.command()
    @exits_cleanly
    def fail() -> None:
        raise error

    return typing.cast(int, app(args=[], standalone_mode=False))


@pytest.mark.parametrize("level", list(LogLevel))
@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ContextFull("the window\nis full"), 1, "error: the window is full (code context_full)"),
        (OSError(28, "No space left on device"), 1, "error: cannot read or write: No space left on device; check"),
        (PermissionError(13, "Permission denied", "a b"), 1, "error: cannot use 'a b': Permission denied; check"),
        (ZeroDivisionError("by zero"), 1, "error: ZeroDivisionError: by zero (a defect in wasi-nn"),
        (KeyboardInterrupt(), 130, None),
        (BrokenPipeError(), 141, None),
    ],
)
def test_failures_are_one_line_and_a_traceback_is_for_debug_only(
    level: LogLevel, error: BaseException, status: int, line: str | None, capsys: Captured
) -> None:
    open_log(level)
    assert run_failing(error) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    if line is None:
        assert captured.err == ""
        return
    assert captured.err.splitlines()[-1].startswith(line)
    assert ("Traceback" in captured.err) == (level is LogLevel.DEBUG)
    assert level is LogLevel.DEBUG or captured.err.count("\n") == 1


def test_a_closed_stdout_is_no_complaint(closed_pipe: int) -> None:
    for arguments in (["--help"], ["--version"], ["inspect", "--help"]):
        done = subprocess.run(
            command_line(*arguments), stdout=closed_pipe, stderr=subprocess.PIPE, timeout=60, check=False
        )
        assert (done.returncode, done.stderr) == (141, b"")


def test_the_log_names_its_level_in_lower_case(wasi_nn_here: Command) -> None:
    arguments = ["run", "--nn-graph", "d=gone.gguf", "gone.wasm"]
    assert wasi_nn_here(*arguments).stderr.startswith("warn: --nn-graph d: there is no file gone.gguf")
    assert wasi_nn_here("--log-level", "error", *arguments).stderr.startswith("error:")


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--help"], marks=pytest.mark.slow),
        ["--version"],
        pytest.param(["run", "--help"], marks=pytest.mark.slow),
        ["inspect", WORLD],
    ],
)
def test_a_full_disk_is_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(command_line(*arguments), stdout=full, stderr=subprocess.PIPE, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: cannot read or write: No space left on device")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("arguments", "status", "closed"),
    [
        pytest.param(["inspect", WORLD], 0, "<&-", marks=pytest.mark.slow),
        pytest.param(["inspect", WORLD], 0, ">&-", marks=pytest.mark.slow),
        pytest.param(["inspect", WORLD], 0, "2>&-", marks=pytest.mark.slow),
        (["inspect", WORLD], 0, "<&- >&- 2>&-"),
        pytest.param(["--version"], 0, ">&-", marks=pytest.mark.slow),
        pytest.param(["--version"], 0, "<&- >&- 2>&-", marks=pytest.mark.slow),
        pytest.param(["inspect", "gone.wasm"], 1, "2>&-", marks=pytest.mark.slow),
        (["inspect", "gone.wasm"], 1, "<&- >&- 2>&-"),
        (["rnu"], 2, "2>&-"),
        pytest.param(["rnu"], 2, "<&- >&- 2>&-", marks=pytest.mark.slow),
    ],
)
def test_closed_streams_change_neither_status_nor_the_other_streams(
    arguments: list[str], status: int, closed: str, wasi_nn_here: Command
) -> None:
    with_all = wasi_nn_here(*arguments)
    without = subprocess.run(
        ["sh", "-c", f"exec {shlex.join(command_line(*arguments))} {closed}"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert with_all.returncode == without.returncode == status
    assert without.stdout == ("" if " >&-" in f" {closed}" else with_all.stdout)
    assert without.stderr == ("" if "2>&-" in closed else with_all.stderr)


def test_a_guest_may_write_where_stdout_is_closed() -> None:
    """The descriptor's number must be taken, or the next file that is opened gets it and the guest's output."""
    command = shlex.join(command_line("run", "--invoke", "must_write", WORLD))
    done = subprocess.run(["sh", "-c", f"exec {command} >&-"], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_what_the_encoding_of_stdout_lacks_is_no_error(tmp_path: Path) -> None:
    file = tmp_path / "日本.wat"
    file.write_bytes(WORLD.read_bytes())
    for encoding, shown in (("ascii", b"??.wat"), ("utf-8", "日本.wat".encode())):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run(
            command_line("inspect", file), capture_output=True, env=environment, timeout=60, check=False
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert shown in done.stdout


@pytest.mark.parametrize("columns", ["40", "0"])
def test_help_on_a_narrow_terminal_is_that_of_80_columns(wasi_nn_here: Command, columns: str) -> None:
    """The width is decided once a process. Narrower than that, typer would cut off the names of options."""
    environment = {**os.environ, "COLUMNS": columns}
    done = subprocess.run(
        command_line("run", "--help"), capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert done.stdout == wasi_nn_here("run", "--help").stdout


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_help_states_the_defaults_in_force(command: str, capsys: Captured) -> None:
    """They are written into the help, which must not wait for the configuration's imports."""
    assert main([command, "--help"]) == 0
    stated = re.findall(r"default: \(([^)]*)\)", capsys.readouterr().out)
    sampling, stopping = Settings().sampling, Settings().stopping
    in_force = (stopping.max_tokens, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    assert sorted(stated) == sorted(map(str, in_force))


@pytest.mark.parametrize("level", list(LogLevel))
def test_a_logged_exception_has_a_traceback_at_debug_only(level: LogLevel, capsys: Captured) -> None:
    open_log(level)
    logging.getLogger("wasi_nn_backend.host").critical("a defect", exc_info=ZeroDivisionError("by zero"))
    shown = capsys.readouterr().err
    assert shown.startswith("fatal: a defect")
    assert ("ZeroDivisionError" in shown) == (level is LogLevel.DEBUG)
