"""Which names a C host's callers may load."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from wasi_nn_backend.capi.models import Environment
from wasi_nn_backend.errors import InvalidArgument, ModelNotFound, NotFound, SecurityViolation, WasiNNError


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    (folder / "inner").mkdir(parents=True)
    (tmp_path / "outside.gguf").write_bytes(b"GGUF")
    (folder / "a.gguf").write_bytes(b"GGUF")
    (folder / "inner" / "b.gguf").write_bytes(b"GGUF")
    (folder / "inside-link").symlink_to("inner/b.gguf")
    (folder / "outside-link").symlink_to("../outside.gguf")
    (folder / "folder-link").symlink_to(tmp_path)
    (folder / "circle").symlink_to("circle")
    return folder


def read(**variables: str) -> Environment:
    return Environment.read(variables.get)


@pytest.mark.parametrize("is_trusted", [False, True])
def test_files_below_the_folder_are_found(models: Path, is_trusted: bool) -> None:
    environment = read(WASI_NN_MODEL_DIR=f"/nowhere:{models}")
    for name, path in (("a.gguf", "a.gguf"), ("inner/b.gguf", "inner/b.gguf"), ("inside-link", "inner/b.gguf")):
        assert environment.find(name, is_trusted=is_trusted) == (models / path).resolve()


@pytest.mark.parametrize("is_trusted", [False, True])
@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("/etc/passwd", "absolute paths are not allowed"),
        ("../outside.gguf", '".." is not allowed'),
        ("inner/../a.gguf", '".." is not allowed'),
        ("outside-link", "symbolic link that leads out"),
        ("folder-link/outside.gguf", "symbolic link that leads out"),
    ],
)
def test_what_leads_out_of_the_folder_is_refused(
    models: Path, name: str, rule: str, is_trusted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    environment = read(WASI_NN_MODEL_DIR=str(models))
    with caplog.at_level(logging.WARNING), pytest.raises(SecurityViolation, match=rule):
        environment.find(name, is_trusted=is_trusted)
    assert rule in caplog.text
    assert name in caplog.text


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("c.gguf", NotFound),
        ("inner", NotFound),
        ("circle", NotFound),
        ("x" * 300, InvalidArgument),
        ("a.gguf\0b", InvalidArgument),
    ],
)
def test_what_is_no_file_is_refused(models: Path, name: str, error: type[WasiNNError]) -> None:
    with pytest.raises(error):
        read(WASI_NN_MODEL_DIR=str(models)).find(name, is_trusted=True)


def test_names_of_the_list_are_found_wherever_they_lie(models: Path) -> None:
    environment = read(WASI_NN_MODELS=f"one={models / 'a.gguf'}:two={models.parent / 'outside.gguf'}")
    assert environment.find("two", is_trusted=False) == models.parent / "outside.gguf"
    with pytest.raises(NotFound):
        environment.find("three", is_trusted=True)
    with pytest.raises(SecurityViolation):
        environment.find(str(models / "a.gguf"), is_trusted=True)


@pytest.mark.parametrize("entry", ["one", "=path", "one="])
def test_a_list_with_a_wrong_entry_is_refused(entry: str) -> None:
    with pytest.raises(InvalidArgument, match="name=path"):
        read(WASI_NN_MODELS=f"ok=/x:{entry}")


def test_plain_paths_are_for_trusted_callers_or_where_they_are_allowed(
    models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(models / "a.gguf")
    assert read().find(path, is_trusted=True) == Path(path)
    assert read(WASI_NN_ALLOW_ANY_PATH="1").find(path, is_trusted=False) == Path(path)
    for environment in (read(), read(WASI_NN_ALLOW_ANY_PATH="0"), read(WASI_NN_ALLOW_ANY_PATH="yes")):
        with pytest.raises(SecurityViolation):
            environment.find(path, is_trusted=False)
    assert "paths are not allowed here" in caplog.text
    with pytest.raises(SecurityViolation):
        read().find("smollm2", is_trusted=False)


def test_bytes_are_for_trusted_callers_or_where_they_are_allowed(caplog: pytest.LogCaptureFixture) -> None:
    read().check_bytes(is_trusted=True)
    read(WASI_NN_MODELS="a=/a.gguf").check_bytes(is_trusted=True)
    for allowed in ("WASI_NN_ALLOW_LOAD_BYTES", "WASI_NN_ALLOW_ANY_PATH"):
        read(**{allowed: "1"}).check_bytes(is_trusted=False)
        with pytest.raises(SecurityViolation, match="WASI_NN_ALLOW_LOAD_BYTES=1"):
            read(**{allowed: "yes"}).check_bytes(is_trusted=False)
    assert caplog.text.count("a model's bytes are refused: only names are allowed here") == 2


def test_any_path_goes_beside_a_folder_where_it_is_allowed(models: Path) -> None:
    environment = read(WASI_NN_MODEL_DIR=str(models), WASI_NN_ALLOW_ANY_PATH="1")
    outside = models.parent / "outside.gguf"
    assert environment.find(str(outside), is_trusted=False) == outside
    assert environment.find("a.gguf", is_trusted=False) == (models / "a.gguf").resolve()


def test_a_plain_path_has_to_be_a_file(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        read().find(str(tmp_path / "missing.gguf"), is_trusted=True)
    with pytest.raises(ModelNotFound):  # too long once the home folder is before it
        read().find("~/" + "a/" * 2046, is_trusted=True)
    with pytest.raises(InvalidArgument, match="no regular file"):
        read().find(str(tmp_path), is_trusted=True)
