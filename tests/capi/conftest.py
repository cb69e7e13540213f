"""Libraries and programs in C, compiled once a session."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.conftest import made_once, missing
from wasi_nn_backend.capi.build import build_libraries
from wasi_nn_backend.errors import UnsupportedOperation

PROGRAMS = Path(__file__).parent / "programs"
#: Of the library and of programs that use it. Leaks are not looked for: Python keeps most of what it allocates.
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")
STRICT = ("-g", "-Wall", "-Wextra", "-Werror")


def need(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        missing(f"{program} is not installed; apt-get install {program}")
    return path


def run(*command: str | Path, env: Mapping[str, str] | None = None, timeout: float = 110) -> str:
    """What a program that must succeed prints. It starts in another folder, with only ``env`` beside the essentials."""
    clean = {name: os.environ[name] for name in ("PATH", "HOME", "XDG_CACHE_HOME") if name in os.environ}
    clean |= {"LC_ALL": "C.UTF-8", "WASI_NN_ATTENTION_PROBE": "0", **(env or {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout, env=clean, cwd="/")
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def capi(*arguments: str | Path, cache: Path | None = None) -> str:
    command = [sys.executable, "-m", "wasi_nn_backend.cli", "capi", *map(str, arguments)]
    env = {**os.environ, **({"XDG_CACHE_HOME": str(cache)} if cache is not None else {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(folder: Path, *flags: str) -> None:
    from wasi_nn_backend import __version__  # noqa: PLC0415  read from the installed package

    try:
        build_libraries(folder, __version__, flags=flags)
    except UnsupportedOperation as error:
        missing(str(error))


@pytest.fixture(scope="session")
def library_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "capi", lambda folder: build(folder, *STRICT))


@pytest.fixture(scope="session")
def sanitized_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "capi-sanitized", lambda folder: build(folder, *SANITIZERS))


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache into which ``wasi-nn capi`` has built the libraries."""
    return made_once(tmp_path_factory, "capi-cache", lambda folder: capi("--libdir", cache=folder))


Compile = Callable[..., Path]


@pytest.fixture
def compile_program(tmp_path: Path) -> Compile:
    """``compile_program(source, folder, *flags)``: a program linked with the library in ``folder``."""

    def compile_one(source: str | Path, folder: Path, *flags: str, library: str = "wasi_nn_backend") -> Path:
        need("gcc")
        path = PROGRAMS / source
        target = tmp_path / path.stem
        command = ["gcc", "-std=gnu11", *STRICT, f"-I{folder / 'include'}", f"-I{PROGRAMS}", str(path), *flags]
        command += ["-o", str(target), f"-L{folder}", f"-Wl,-rpath,{folder}", "-pthread", "-ldl"]
        run(*command, *([f"-l{library}"] if library else []))
        return target

    return compile_one
