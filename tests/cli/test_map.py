"""``wasi-nn map``: a guest a line, results in order, and the options that it shares with ``run``."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cli.conftest import EXAMPLES, Command, command_line
from tests.host.component_guests import command_component
from wasi_nn_backend.cli.map_lines import config_of_line, read_lines
from wasi_nn_backend.errors import WasiNNError
from wasi_nn_backend.host import RunConfig

WORLD = Path(__file__).parent / "guests" / "world.wat"
ASK = EXAMPLES / "ask.wasm"
BASE = RunConfig(b"", args=["first"], env={"A": "1"})


def results(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["index"] for line in lines] == list(range(len(lines)))
    return lines


def test_each_line_is_a_run_of_its_own(wasi_nn_here: Command) -> None:
    lines = ['"a b"', '{"args": ["c", "d"], "env": {"X": "y"}}', "{}", '"é"']
    done = wasi_nn_here("map", "--env", "A=1", WORLD, "--jobs", "7", stdin="\n".join(lines))
    assert (done.returncode, done.stderr) == (0, "")
    start = "world.wat\0--jobs\x007\0"
    texts = [f"{start}a b\0A=1\0", f"{start}c\0d\0A=1\0X=y\0", f"{start}A=1\0", f"{start}é\0A=1\0"]
    assert [line["stdout"] for line in results(done)] == texts
    assert {line.keys() == {"index", "stdout", "exit_status"} for line in results(done)} == {True}


def test_what_fails_has_an_error_and_stops_nothing(wasi_nn_here: Command, tiny_model_path: Path) -> None:
    lines = ['"hello"', "{", '{"args": ["a", "b", "c"]}', "[]", '{"stdin": 3}', '"hello"']
    options = ["--nn-graph", f"default={tiny_model_path},max_tokens=3,temperature=0", "--jobs", 2]
    done = wasi_nn_here("map", *options, ASK, "default", stdin="\n".join(lines) + "\n")
    assert done.returncode == 1
    assert done.stderr == "error: 4 of 6 lines failed; their output lines say why\n"
    first, no_json, usage, no_object, no_text, last = results(done)
    assert first == {**last, "index": 0}
    assert first["exit_status"] == 0
    assert "no JSON" in no_json["error"]
    assert (usage["exit_status"], usage["stderr"]) == (64, "usage: ask.wasm GRAPH PROMPT\n")
    assert "JSON list" in no_object["error"]
    assert "stdin is no string" in no_text["error"]


def test_a_component_takes_lines_as_well(wasi_nn_here: Command, tmp_path: Path) -> None:
    component = tmp_path / "say.wat"
    component.write_bytes(command_component("(call $say (i32.const 256) (i32.const 7)) (i32.const 0)"))
    done = wasi_nn_here("map", component, stdin="{}\n" * 3)
    assert [line["stdout"] for line in results(done)] == ["before "] * 3


def test_limits_hold_for_each_line(wasi_nn_here: Command, tiny_model_path: Path) -> None:
    graph = ["--nn-graph", f"default={tiny_model_path},max_tokens=3"]
    done = wasi_nn_here("map", *graph, "--limit", "max_prompt_bytes=5", ASK, "default", stdin='"short"\n"longer"\n')
    assert [line["exit_status"] for line in results(done)] == [0, 7]
    fuel = wasi_nn_here("map", "--fuel", 10, ASK, stdin="{}\n")
    assert "all fuel consumed" in results(fuel)[0]["error"]


def test_no_input_is_no_output(wasi_nn_here: Command) -> None:
    done = wasi_nn_here("map", WORLD)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--limit", "max_contexts"], "--limit"),
        (["--limit", "max_contexts=0"], "--limit"),
        (["--limit", "max_contexts=many"], "--limit"),
        (["--limit", "allow_load_bytes=1"], "--limit"),
        (["--jobs", "0"], "--jobs"),
    ],
)
def test_usage_errors_name_the_option(wasi_nn_here: Command, arguments: list[str], complaint: str) -> None:
    done = wasi_nn_here("map", *arguments, WORLD)
    assert (done.returncode, done.stdout) == (2, "")
    assert complaint in done.stderr


def test_a_module_that_cannot_be_read_is_one_error(wasi_nn_here: Command) -> None:
    done = wasi_nn_here("map", "nowhere.wasm", stdin='"a"\n"b"\n')
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: cannot read the module nowhere.wasm")


def test_a_line_is_answered_before_the_next_one_comes_and_ctrl_c_ends_the_wait() -> None:
    with subprocess.Popen(
        command_line("map", WORLD), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for text in ("one", "two"):
            process.stdin.write(f'"{text}"\n')
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["stdout"] == f"world.wat\0{text}\0"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr is not None
        assert (process.stdout.read(), process.stderr.read()) == ("", "")


def test_a_bar_shows_on_a_terminal(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text('"a"\n' * 3)
    terminal, terminal_end = os.openpty()
    with lines.open() as stdin:
        done = subprocess.run(
            command_line("map", WORLD),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=terminal_end,
            timeout=60,
            check=False,
        )
    os.close(terminal_end)
    shown = os.read(terminal, 65536)
    os.close(terminal)
    assert (done.returncode, done.stdout.count(b"\n")) == (0, 3)
    assert b"lines" in shown


def test_the_documented_example_is_in_the_help(wasi_nn_here: Command) -> None:
    done = wasi_nn_here("map", "--help")
    assert "wasi-nn map --nn-graph default=smollm2,prompt_mode=chat" in " ".join(done.stdout.split())


# --- lines ---


class Trickle(io.RawIOBase):
    """Gives a stream's bytes in given pieces."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = [piece for piece in pieces if piece]

    def read(self, size: int = -1) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""


@given(st.lists(st.binary(max_size=20)))
def test_lines_are_the_same_however_they_arrive(pieces: list[bytes]) -> None:
    whole = b"".join(pieces)
    expected = whole.split(b"\n")
    if not expected[-1]:
        expected.pop()
    assert list(read_lines(Trickle(pieces), lambda: False)) == expected  # type: ignore[arg-type]


def test_reading_ends_when_it_is_over() -> None:
    is_over = iter([False, False, True])
    assert list(read_lines(Trickle([b"a\n", b"b\n", b"c\n"]), lambda: next(is_over))) == [b"a", b"b"]  # type: ignore[arg-type]


def test_a_line_without_end_takes_no_more_memory_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wasi_nn_backend.cli.map_lines._LINE_BYTES_MAX", 100)

    def pieces() -> Iterator[bytes]:
        for _ in range(50):
            yield b'"' + b"x" * 29
        yield b'\n"fine"\n'

    first, second = read_lines(Trickle(list(pieces())), lambda: False)  # type: ignore[arg-type]
    assert 100 < len(first) < 200
    assert isinstance(config_of_line(first, BASE), WasiNNError)
    assert isinstance(config_of_line(second, BASE), RunConfig)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(
    json_values | st.fixed_dictionaries({}, optional={"args": json_values, "stdin": json_values, "env": json_values})
)
def test_any_json_is_a_run_or_an_error(value: Any) -> None:
    config = config_of_line(json.dumps(value).encode(), BASE)
    if isinstance(config, WasiNNError):
        assert "string" in str(config)
        return
    assert list(config.args)[:1] == ["first"]
    assert all("\0" not in text and text.encode() for text in (*config.args, *config.env) if text)
    assert config.stdin is not None


@given(st.binary())
def test_any_bytes_are_a_run_or_an_error(line: bytes) -> None:
    assert isinstance(config_of_line(line, BASE), RunConfig | WasiNNError)


def test_half_a_surrogate_pair_is_no_argument() -> None:
    assert isinstance(config_of_line(b'"\\ud800"', BASE), WasiNNError)
    config = config_of_line(b'{"stdin": "\\ud800"}', BASE)
    assert isinstance(config, RunConfig)
    assert config.stdin == b"?"
