"""The log: its places, its levels, its users, and what each key of ``logging`` changes."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.effects import changes
from tests.fakes.llama import FakeLlama
from wasi_nn_backend import Backend, Door, ModelNotFound
from wasi_nn_backend.config.logging import LoggingSettings
from wasi_nn_backend.logs import LIBRARY_LOGGER, TRACE, LogOutput, reopen_files

LOGGER = logging.getLogger(LIBRARY_LOGGER)
LEVELS = ("debug", "info", "warn", "error", "fatal")
GUEST = Door("guest", "raw", is_trusted=False)

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def no_output_is_left() -> Iterator[None]:
    handlers, level = list(LOGGER.handlers), LOGGER.level
    yield
    assert (LOGGER.handlers, LOGGER.level) == (handlers, level), "an output was not closed"


def say_everything() -> None:
    LOGGER.log(TRACE, "a trace")
    LOGGER.debug("a debug")
    LOGGER.info("an info")
    LOGGER.warning("a warn")
    LOGGER.error("an error")
    LOGGER.critical("a fatal")


def lines_of(settings: LoggingSettings, capsys: Captured) -> list[str]:
    output = LogOutput(settings)
    try:
        say_everything()
    finally:
        output.close()
    return capsys.readouterr().err.splitlines()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# Each key.


@changes("logging.level")
@pytest.mark.parametrize("level", LEVELS)
def test_a_level_shows_itself_and_what_is_worse(level: str, capsys: Captured) -> None:
    lines = lines_of(LoggingSettings(level=level, timestamps=False), capsys)
    assert [line.partition(":")[0] for line in lines] == list(LEVELS[LEVELS.index(level) :])


@changes("logging.enable_debug")
def test_enable_debug_shows_all_there_is(capsys: Captured) -> None:
    lines = lines_of(LoggingSettings(level="error", enable_debug=True, timestamps=False), capsys)
    assert [line.partition(":")[0] for line in lines] == ["trace", *LEVELS]


@changes("logging.timestamps")
def test_timestamps(capsys: Captured) -> None:
    time = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ")
    assert all(time.match(line) for line in lines_of(LoggingSettings(), capsys))
    assert not any(time.match(line) for line in lines_of(LoggingSettings(timestamps=False), capsys))


@changes("logging.colors")
def test_colours_are_for_terminals_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def written(stream: io.StringIO, **settings: Any) -> str:
        monkeypatch.setattr(sys, "stderr", stream)
        output = LogOutput(LoggingSettings(**settings))
        say_everything()
        output.close()
        return stream.getvalue()

    assert "\x1b[33mwarn:\x1b[0m a warn" in written(Terminal())
    assert "\x1b" not in written(Terminal(), colors=False)
    assert "\x1b" not in written(Terminal(), format="json")
    assert "\x1b" not in written(io.StringIO())
    assert written(Terminal(), file=str(tmp_path / "log")) == ""
    assert "\x1b" not in (tmp_path / "log").read_text()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in written(Terminal())


@changes("logging.file")
def test_a_file_is_appended_to(tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "log"
    file.write_text("before\n")
    assert lines_of(LoggingSettings(file=str(file), timestamps=False), capsys) == []
    assert file.read_text().splitlines()[:3] == ["before", "info: an info", "warn: a warn"]


@changes("logging.format")
def test_json_lines(capsys: Captured) -> None:
    lines = [json.loads(line) for line in lines_of(LoggingSettings(format="json", level="warn"), capsys)]
    assert [line["level"] for line in lines] == ["warn", "error", "fatal"]
    assert lines[0]["message"] == "a warn"
    assert lines[0]["logger"] == "wasi_nn_backend"
    assert lines[0]["time"].endswith("Z")
    (line,) = lines_of(LoggingSettings(format="json", level="fatal", timestamps=False), capsys)
    assert "time" not in json.loads(line)


@changes("logging.enable_log")
def test_enable_log_lifts_the_lines_about_runs_to_info(tiny_model_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger=LIBRARY_LOGGER)
    for config, level in (({}, logging.DEBUG), ({"enable_log": True}, logging.INFO)):
        with Backend({"max_tokens": 4, "n_ctx": 512}, llama=FakeLlama()) as backend:
            graph = backend.load_by_name(tiny_model_path)
            context = graph.init_execution_context(config)
            caplog.clear()
            context.run_inference("a secret")
        (record,) = [record for record in caplog.records if "task finished" in record.getMessage()]
        assert record.levelno == level
        assert "reason=length" in record.getMessage()
        assert not any("secret" in record.getMessage() for record in caplog.records)


# Places.


@pytest.mark.parametrize("make", ["missing folder", "folder", "pipe", "NUL", "no home"])
def test_a_file_that_cannot_be_opened_is_a_warning_and_standard_error_goes_on(
    make: str, tmp_path: Path, capsys: Captured
) -> None:
    path = str(tmp_path / "log")
    if make == "missing folder":
        path += "/x/log"
    elif make == "folder":
        os.mkdir(path)
    elif make == "pipe":
        os.mkfifo(path)
    elif make == "NUL":
        path += "\0"
    else:
        path = "~nobody-of-that-name/log"
    lines = lines_of(LoggingSettings(file=path, level="error", timestamps=False), capsys)
    assert lines[0].startswith("warn: the log file ")
    assert "cannot be opened" in lines[0]
    assert lines[1:] == ["error: an error", "fatal: a fatal"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_a_full_disk_is_a_warning_and_standard_error_goes_on(capsys: Captured) -> None:
    lines = lines_of(LoggingSettings(file="/dev/full", level="error", timestamps=False), capsys)
    assert "cannot be written: No space left on device" in lines[0]
    assert "error: an error" in lines
    assert "fatal: a fatal" in lines


class ClosedPipe(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize("stream", [ClosedPipe(), None])
def test_standard_error_that_nobody_reads_breaks_nothing(
    stream: io.StringIO | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    outputs = [LogOutput(LoggingSettings(file=file)) for file in ("", str(tmp_path))]
    say_everything()
    for output in outputs:
        output.close()


def test_a_rotated_file_is_opened_anew(tmp_path: Path) -> None:
    file = tmp_path / "log"
    output = LogOutput(LoggingSettings(file=str(file), timestamps=False, level="fatal"))
    say_everything()
    file.rename(tmp_path / "log.1")
    say_everything()
    assert reopen_files()
    say_everything()
    output.close()
    assert (tmp_path / "log.1").read_text() == "fatal: a fatal\n" * 2
    assert file.read_text() == "fatal: a fatal\n"
    assert not reopen_files()


def test_the_files_mode_is_left_to_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        LogOutput(LoggingSettings(file=str(tmp_path / "log"))).close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) == 0o600


# Users.


def test_one_place_has_no_line_twice_and_the_last_user_decides(capsys: Captured) -> None:
    first = LogOutput(LoggingSettings(level="error", timestamps=False))
    second = LogOutput(LoggingSettings(level="fatal", timestamps=False))
    say_everything()
    assert capsys.readouterr().err.splitlines() == ["fatal: a fatal"]
    second.close()
    second.close()
    say_everything()
    assert capsys.readouterr().err.splitlines() == ["error: an error", "fatal: a fatal"]
    insisting = LogOutput(LoggingSettings(level="warn", timestamps=False), insists=True)
    third = LogOutput(LoggingSettings(level="fatal", timestamps=False))
    say_everything()
    assert len(capsys.readouterr().err.splitlines()) == 3
    for output in (insisting, third, first):
        output.close()
    say_everything()
    assert capsys.readouterr().err == ""


def test_two_files_both_get_their_level(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    outputs = [
        LogOutput(LoggingSettings(file=str(file), level=level, timestamps=False))
        for file, level in zip(files, ("error", "warn"), strict=True)
    ]
    say_everything()
    outputs[1].close()
    say_everything()
    outputs[0].close()
    assert files[0].read_text() == "error: an error\nfatal: a fatal\n" * 2
    assert files[1].read_text() == "warn: a warn\nerror: an error\nfatal: a fatal\n"


def test_the_programs_own_level_and_handlers_stay(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    root = list(logging.getLogger().handlers)
    before = LOGGER.level
    LOGGER.setLevel(logging.DEBUG)
    try:
        outputs = [LogOutput(LoggingSettings(level="error", file=str(tmp_path / name))) for name in "ab"]
        LOGGER.debug("for the program")
        outputs[0].close()
        assert LOGGER.level == logging.DEBUG
        outputs[1].close()
        assert LOGGER.level == logging.DEBUG
    finally:
        LOGGER.setLevel(before)
    assert "for the program" in caplog.text
    assert logging.getLogger().handlers == root
    assert LOGGER.propagate


def test_tracebacks_are_for_level_debug_and_for_json(capsys: Captured) -> None:
    for settings, shows in (({"level": "info"}, False), ({"level": "debug"}, True), ({"format": "json"}, True)):
        output = LogOutput(LoggingSettings(**settings))
        try:
            raise ValueError("why")
        except ValueError:
            LOGGER.exception("it failed")
        output.close()
        assert ("Traceback" in capsys.readouterr().err) == shows


# Backends.


def test_a_backend_that_is_not_asked_says_nothing(tiny_model_path: Path, capsys: Captured) -> None:
    with Backend({"tempature": 1, "enable_log": True}, llama=FakeLlama()) as backend:
        backend.load_by_name_with_config(tiny_model_path, {"tempature": 1})
    assert capsys.readouterr() == ("", "")


def test_a_backends_file_has_the_warnings_about_its_own_configuration(tiny_model_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "log"
    with Backend({"tempature": 1, "logging": {"file": str(file)}}, llama=FakeLlama()) as backend:
        backend.load_by_name_with_config(tiny_model_path, {"top_q": 1})
        say_everything()
    say_everything()
    text = file.read_text()
    assert "warn: backend: tempature is no known key" in text
    assert "warn: graph: top_q is no known key" in text
    assert "is loaded: fake" in text
    assert text.count("a fatal") == 1


def test_a_graphs_log_lives_as_long_as_the_graph(tiny_model_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "log"
    with Backend(llama=FakeLlama()) as backend:
        graph = backend.load_by_name_with_config(tiny_model_path, {"tempature": 1, "logging": {"file": str(file)}})
        with pytest.raises(ModelNotFound):
            backend.load_by_name_with_config(tmp_path / "gone.gguf", {"file": str(file)})
        graph.unload()
        say_everything()
    text = file.read_text()
    assert text.count("tempature is no known key") == 1
    assert "a fatal" not in text


def test_guests_have_no_say_but_about_their_own_lines(
    tiny_model_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger=LIBRARY_LOGGER)
    config = {"logging": {"file": str(tmp_path / "log"), "level": "fatal"}, "enable-debug-log": True, "max_tokens": 4}
    with Backend({"n_ctx": 512}, llama=FakeLlama()) as backend:
        backend.register("model", tiny_model_path)
        graph = backend.load_by_name_with_config("model", config, door=GUEST)
        graph.init_execution_context().run_inference("hello")
    assert not (tmp_path / "log").exists()
    messages = [record.getMessage() for record in caplog.records]
    assert "graph: logging.file, logging.level: the host's to set, ignored" in messages
    assert any("task finished" in message for message in messages)


def test_a_context_does_not_change_the_log_of_all(tiny_model_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Backend(llama=FakeLlama()) as backend:
        graph = backend.load_by_name(tiny_model_path)
        context = graph.init_execution_context({"logging": {"level": "fatal"}, "enable_log": True})
        assert context.settings.logging.enable_log
        assert context.settings.logging.level == "info"
    assert any("there is one log for all" in record.getMessage() for record in caplog.records)
