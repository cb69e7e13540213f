"""``wasi-nn inspect config``, configuration files for the other commands, and ``wasi-nn schema``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.cli.conftest import Command
from wasi_nn_backend.config import Settings

EXAMPLE = '{"model": {"n_ctx": 512}, "temp": 5, "tempature": 1} // mine'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(EXAMPLE)
    return path


def test_rows_with_tabs_for_programs(wasi_nn_here: Command, file: Path) -> None:
    done = wasi_nn_here("inspect", "config", file)
    assert done.returncode == 0
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == [f"{section}.{key}" for section, model in Settings() for key, _ in model]
    assert ["model.n_ctx", "512", str(file)] in rows
    assert ["sampling.top_k", "40", "built-in default"] in rows


def test_warnings_are_on_stderr(wasi_nn_here: Command, file: Path) -> None:
    lines = wasi_nn_here("inspect", "config", file).stderr.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["warn", "warn"]
    assert "temp is the integer 5" in lines[0]
    assert "the nearest is sampling.temperature" in lines[1]


def test_json_has_values_and_layers(wasi_nn_here: Command, file: Path) -> None:
    report = json.loads(wasi_nn_here("inspect", "config", "--json", file).stdout)
    assert report["kind"] == "config"
    assert report["values"]["model.n_ctx"] == {"value": 512, "layer": str(file)}
    assert report["values"]["session.system_prompt"] == {"value": None, "layer": "built-in default"}


def test_graphs_and_guests_take_part(wasi_nn_here: Command, file: Path) -> None:
    options = ["--nn-graph", "default=smollm2,n_ctx=1024,top_k=3", "--dialect", "WasmEdge"]
    values = json.loads(wasi_nn_here("inspect", "config", "--json", file, *options).stdout)["values"]
    assert values["model.n_ctx"] == {"value": 1024, "layer": "--nn-graph default"}
    assert values["sampling.top_k"] == {"value": 3, "layer": "--nn-graph default"}
    assert values["sampling.temperature"]["layer"] == str(file)
    assert values["sampling.top_p"] == {"value": 0.95, "layer": "wasmedge guests"}


def test_a_table_for_people(wasi_nn_here: Command, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wasi_nn_backend.cli.config_report._shows_tables", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    lines = wasi_nn_here("inspect", "config", file).stdout.splitlines()
    assert lines[0].split() == ["key", "value", "from"]
    assert any(line.split()[:2] == ["model.n_ctx", "512"] for line in lines)
    assert all("…" not in line.split()[0] for line in lines if line.strip())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not JSON at line 1 column 2"),
        ('{"n_ctx": "many"}', "n_ctx is the string 'many'"),
        ('{"strict": true, "x": 1}', "x is no known key"),
        ('{"reranking": true}', "cannot do"),
        (None, "there is no configuration file"),
    ],
)
def test_a_bad_file_is_one_line_and_a_failure(
    wasi_nn_here: Command, tmp_path: Path, content: str | None, reason: str
) -> None:
    file = tmp_path / "bad.json"
    if content is not None:
        file.write_text(content)
    done = wasi_nn_here("inspect", "config", file)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("error: ")
    assert reason in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["config"],
        ["config", "a", "b"],
        ["x", "y"],
        ["x.wasm", "--dialect", "witx"],
        ["config", "x", "--dialect", "wamrr"],
    ],
)
def test_wrong_words_are_a_wrong_command_line(wasi_nn_here: Command, words: list[str]) -> None:
    assert wasi_nn_here("inspect", *words).returncode == 2


def test_a_file_may_be_called_config(wasi_nn_here: Command, tmp_path: Path) -> None:
    (tmp_path / "config").write_bytes(b"\0asm\1\0\0\0")
    assert wasi_nn_here("inspect", "config").returncode == 0


def test_a_configuration_without_the_word_says_what_to_write(wasi_nn_here: Command, file: Path) -> None:
    done = wasi_nn_here("inspect", file)
    assert done.returncode == 1
    assert f"inspect config {file}" in done.stderr


def test_a_file_may_be_a_pipe(wasi_nn_here: Command) -> None:
    reading, writing = os.pipe()
    os.write(writing, b'{"top_k": 3}')
    os.close(writing)
    try:
        assert "sampling.top_k\t3\t" in wasi_nn_here("inspect", "config", f"/dev/fd/{reading}").stdout
    finally:
        os.close(reading)


def test_config_options_may_be_files_under_assignments(
    wasi_nn_here: Command, tiny_model_path: Path, tmp_path: Path
) -> None:
    file = tmp_path / "c.json"
    file.write_text('{"max_tokens": 3, "n_ctx": 512, "temperature": 0, "ignore_eos": true} // for all of us')
    generate = ["generate", "--json", "-m", tiny_model_path, "--raw", "a", "--config", "@c.json"]
    assert json.loads(wasi_nn_here(*generate).stdout)["metadata"]["output_tokens"] == 3
    assert json.loads(wasi_nn_here(*generate, "--config", "max_tokens=5").stdout)["metadata"]["output_tokens"] == 5
    for content, reason in (("{", "not JSON"), ('{"tempature": 1}', "no known key"), (None, "no configuration file")):
        file.write_text(content) if content is not None else file.unlink()
        done = wasi_nn_here(*generate)
        assert done.returncode == 2
        assert reason in done.stderr
        assert "--config" in done.stderr
