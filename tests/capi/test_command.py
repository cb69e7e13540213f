"""``wasi-nn capi``, and the ways to find what it builds: flags, pkg-config, CMake."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.capi.conftest import capi, need, run

EXAMPLES = Path(__file__).parents[2] / "examples" / "c" / "native"


def check_program(program: Path) -> None:
    """It finds the library: usage, and a model that is not there."""
    done = subprocess.run([program, "/nowhere.gguf", "hello"], capture_output=True, text=True, check=False, cwd="/")
    assert (done.returncode, done.stdout) == (1, "")
    assert "error 103" in done.stderr


def test_a_build_has_all_that_others_look_for(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    paths = capi("--build", folder).split()
    assert paths == [str(folder / "libwasi_nn_backend.so"), str(folder / "libwasi_nn_llamacpp.so")]
    assert all(Path(path).is_file() for path in paths)
    assert (folder / "include" / "wasi_nn_llama.h").is_file()


@pytest.mark.slow
def test_the_flags_of_a_build_and_of_the_other_library(tmp_path: Path) -> None:
    flags = capi("--build", tmp_path, "--cflags", "--libs", "--wamr").split()
    assert {f"-I{tmp_path / 'include'}", f"-L{tmp_path}", "-DWASI_NN_WAMR"} <= set(flags)
    assert flags[-1] == "-lwasi_nn_llamacpp"
    assert (tmp_path / "libwasi_nn_llamacpp.so").is_file()


@pytest.mark.slow
def test_without_a_folder_the_libraries_are_built_once(cache_dir: Path, tmp_path: Path) -> None:
    """And found by a program that is compiled with their flags."""
    folder = Path(capi("--libdir", cache=cache_dir).strip())
    assert folder.is_relative_to(cache_dir)
    built = (folder / "libwasi_nn_backend.so").stat().st_mtime_ns
    assert capi("--includedir", "--libdir", cache=cache_dir).split() == [str(folder), str(folder / "include")]
    flags = capi("--cflags", "--libs", cache=cache_dir).split()
    assert f"-L{folder}" in flags
    assert (folder / "libwasi_nn_backend.so").stat().st_mtime_ns == built
    run(need("gcc"), EXAMPLES / "ask.c", "-o", tmp_path / "ask", *flags)
    check_program(tmp_path / "ask")


def test_asking_for_nothing_is_a_usage_error() -> None:
    command = [sys.executable, "-m", "wasi_nn_backend.cli", "capi"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--build DIR" in done.stderr


def test_pkg_config_finds_it(library_dir: Path, tmp_path: Path) -> None:
    env = {"PKG_CONFIG_PATH": str(library_dir / "pkgconfig")}
    pkg_config = need("pkg-config")
    for name in ("wasi_nn_backend", "wasi_nn_llamacpp"):
        run(pkg_config, "--exists", "--print-errors", name, env=env)
    flags = shlex.split(run(pkg_config, "--cflags", "--libs", "wasi_nn_backend", env=env))
    run(need("gcc"), EXAMPLES / "ask.c", "-o", tmp_path / "ask", *flags)
    check_program(tmp_path / "ask")


@pytest.mark.slow
def test_cmake_finds_it(library_dir: Path, tmp_path: Path) -> None:
    cmake = need("cmake")
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.13)\n"
        "project(ask C)\n"
        "find_package(wasi_nn_backend REQUIRED)\n"
        f"add_executable(ask {EXAMPLES / 'ask.c'})\n"
        "target_link_libraries(ask wasi_nn_backend::wasi_nn_backend)\n"
    )
    # The makefiles that cmake writes need make, which the project needs anyway.
    run(cmake, "-S", tmp_path, "-B", tmp_path / "build", f"-Dwasi_nn_backend_DIR={library_dir / 'cmake'}")
    run(cmake, "--build", tmp_path / "build")
    check_program(tmp_path / "build" / "ask")


@pytest.mark.parametrize(
    ("name", "compiler"),
    [
        ("ask.c", "gcc"),
        *(
            pytest.param(name, compiler, marks=pytest.mark.slow)
            for name in ("ask.c", "stream.c", "server.c", "ask.cpp")
            for compiler in ("gcc", "clang")
            if (name, compiler) != ("ask.c", "gcc")
        ),
    ],
)
def test_the_examples_build_and_answer(
    name: str, compiler: str, library_dir: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    is_cpp = name.endswith(".cpp")
    command = need({"gcc": "g++", "clang": "clang++"}[compiler] if is_cpp else compiler)
    standard = "-std=c++17" if is_cpp else "-std=c99"
    program = tmp_path / "program"
    flags = [f"-I{library_dir / 'include'}", f"-L{library_dir}", f"-Wl,-rpath,{library_dir}", "-lwasi_nn_backend"]
    warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    run(command, standard, *warnings, "-pthread", EXAMPLES / name, "-o", program, *flags)
    if name == "server.c":
        done = subprocess.run(
            [program, tiny_model_path],
            input="ada hello\nbob hi\nada again\n",
            capture_output=True,
            text=True,
            check=False,
        )
        assert sorted(line.split(":")[0] for line in done.stdout.splitlines() if ": " in line)[:2] == ["ada", "ada"]
    else:
        done = subprocess.run([program, tiny_model_path, "hello"], capture_output=True, text=True, check=False)
        assert done.stdout.strip()
    assert done.returncode == 0, done.stderr
