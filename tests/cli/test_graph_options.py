"""The texts of --nn-graph, --nn-preload, --nn-config, --dir and --env."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import typer
from hypothesis import assume, given
from hypothesis import strategies as st

from wasi_nn_backend.cli.graph_options import (
    DirectoryMapping,
    GraphOption,
    parse_directory_option,
    parse_environment_option,
    parse_graph_option,
    parse_preload_option,
    read_config_option,
    unique_graphs,
)
from wasi_nn_backend.config.jsontext import N_BYTES_MAX

TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1)
NAME = TEXT.filter(lambda text: "=" not in text)
PRELOAD_NAME = TEXT.filter(lambda text: ":" not in text)
KEY = st.from_regex(r"[a-z][a-z_]*(\.[a-z][a-z_-]*)?", fullmatch=True)


def escaped(text: str) -> str:
    return text.replace(",", "\\,")


@given(NAME, TEXT, st.lists(st.tuples(KEY, TEXT)))
def test_graph_option_round_trip(name: str, model: str, settings: list[tuple[str, str]]) -> None:
    """Whatever is written with its commas escaped comes back."""
    values = [model, *(value for _, value in settings)]
    # A backslash at the end of a part would escape the comma that begins the next one.
    assume(not any(value.endswith("\\") or "\\," in value for value in values))
    assignments = [f"{key}={value}" for key, value in settings]
    text = f"{name}=" + ",".join(map(escaped, [model, *assignments]))
    assert parse_graph_option(text) == GraphOption(name, model, tuple(assignments), "--nn-graph")


@given(NAME, TEXT)
def test_commas_without_a_key_belong_to_the_path(name: str, model: str) -> None:
    assume("=" not in model and "\\," not in model)
    assert parse_graph_option(f"{name}={model}").model == model


@pytest.mark.parametrize(
    ("text", "model", "assignments"),
    [
        ("d=m.gguf", "m.gguf", ()),
        ("d=smollm2,temperature=0,n_ctx=512", "smollm2", ("temperature=0", "n_ctx=512")),
        ('d=m.gguf,stop=["a","b"],sampling.top_k=5', "m.gguf", ('stop=["a","b"]', "sampling.top_k=5")),
        ("d=a=b,c.gguf", "a=b,c.gguf", ()),
        ("d=a\\,b=c.gguf,seed=1", "a,b=c.gguf", ("seed=1",)),
    ],
)
def test_graph_option(text: str, model: str, assignments: tuple[str, ...]) -> None:
    assert parse_graph_option(text) == GraphOption("d", model, assignments, "--nn-graph")


def test_a_file_of_the_whole_name_needs_no_escapes(tmp_path: Path) -> None:
    file = tmp_path / "odd,n_ctx=1.gguf"
    file.touch()
    assert parse_graph_option(f"d={file}") == GraphOption("d", str(file), (), "--nn-graph")
    file.unlink()
    assert parse_graph_option(f"d={file}").assignments == ("n_ctx=1.gguf",)


@pytest.mark.parametrize("text", ["", "smollm2", "=m.gguf", "d=", "d=,n_ctx=4"])
def test_a_wrong_graph_option_names_itself(text: str) -> None:
    with pytest.raises(typer.BadParameter) as caught:
        parse_graph_option(text)
    assert "--nn-graph" in caught.value.format_message()


@given(
    PRELOAD_NAME,
    st.sampled_from(["GGML", "ggml", "Ggml", "AUTODETECT", "autodetect"]),
    st.sampled_from(["CPU", "gpu", "Tpu", "auto", "AUTO"]),
    TEXT,
)
def test_all_behind_the_third_colon_is_the_path(name: str, encoding: str, target: str, path: str) -> None:
    assert parse_preload_option(f"{name}:{encoding}:{target}:{path}") == GraphOption(name, path, (), "--nn-preload")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("d:onnx:cpu:m", "encoding onnx is not served"),
        ("d:BitNet:cpu:m", "encoding BitNet is not served"),
        ("d:gguf:cpu:m", "unknown encoding gguf"),
        ("d:ggml:npu:m", "unknown target npu"),
    ],
)
def test_unserved_preloads_are_logged_and_skipped(text: str, complaint: str, caplog: pytest.LogCaptureFixture) -> None:
    assert parse_preload_option(text) is None
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert complaint in caplog.text


@pytest.mark.parametrize("text", ["", "m.gguf", "d:ggml", "d:ggml:cpu", "d:ggml:cpu:", ":ggml:cpu:m"])
def test_a_malformed_preload_is_a_usage_error(text: str) -> None:
    with pytest.raises(typer.BadParameter) as caught:
        parse_preload_option(text)
    assert "--nn-preload" in caught.value.format_message()


@given(st.lists(st.sampled_from("abc")))
def test_the_first_graph_of_a_name_wins(names: list[str]) -> None:
    options = [GraphOption(name, f"{n}.gguf", (), "--nn-preload") for n, name in enumerate(names)]
    kept = unique_graphs([*options, None])
    assert [graph.name for graph in kept] == list(dict.fromkeys(names))
    assert all(graph.model == f"{names.index(graph.name)}.gguf" for graph in kept)


def test_config_is_json_a_file_or_an_at_file(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_bytes(b'{"top_k": 3}')
    assert read_config_option('{"top_k": 3}') == ("--nn-config", b'{"top_k": 3}')
    name, content = read_config_option(str(file))
    assert read_config_option(f"@{file}") == (name, content)
    assert (name.startswith("--nn-config "), content) == (True, b'{"top_k": 3}')


def test_no_more_of_a_config_file_is_read_than_is_allowed(tmp_path: Path) -> None:
    file = tmp_path / "endless.json"
    with file.open("wb") as sparse:
        sparse.truncate(1 << 34)
    _, content = read_config_option(str(file))
    assert len(content) == N_BYTES_MAX + 1


@pytest.mark.parametrize("name", ["nowhere.json", "@nowhere.json", ".", "", "@", "nul\0byte"])
def test_unreadable_config_names_the_option(name: str) -> None:
    with pytest.raises(typer.BadParameter) as caught:
        read_config_option(name)
    assert "--nn-config" in caught.value.format_message()


def test_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("a:b").mkdir()
    assert parse_directory_option("data") == DirectoryMapping(Path("data"), "data")
    assert parse_directory_option("data::/in") == DirectoryMapping(Path("data"), "/in")
    assert parse_directory_option("/in:data") == DirectoryMapping(Path("data"), "/in")
    assert parse_directory_option(".:.") == DirectoryMapping(Path("."), ".")
    assert parse_directory_option("a:b") == DirectoryMapping(Path("a:b"), "a:b")


def test_directories_to_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("readonly").mkdir()
    read_only = DirectoryMapping(Path("data"), "/in", is_read_only=True)
    assert parse_directory_option("/in:data:readonly") == parse_directory_option("data::/in:readonly") == read_only
    assert parse_directory_option("a:readonly") == DirectoryMapping(Path("readonly"), "a")
    assert parse_directory_option("a:readonly:readonly") == DirectoryMapping(Path("readonly"), "a", is_read_only=True)
    Path("in:data:readonly").mkdir()
    assert not parse_directory_option("in:data:readonly").is_read_only


@pytest.mark.parametrize(
    "text", ["", "::/in", "nowhere", "nowhere::/in", "/in:nowhere", ".::", ".:readonly", ".:.:readwrite"]
)
def test_wrong_directories_name_the_option(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(typer.BadParameter) as caught:
        parse_directory_option(text)
    assert "--dir" in caught.value.format_message()


@given(NAME, st.text())
def test_environment_round_trip(name: str, value: str) -> None:
    assert parse_environment_option(f"{name}={value}") == (name, value)


@pytest.mark.parametrize("text", ["", "NAME", "=value"])
def test_a_wrong_environment_names_the_option(text: str) -> None:
    with pytest.raises(typer.BadParameter) as caught:
        parse_environment_option(text)
    assert "--env" in caught.value.format_message()
