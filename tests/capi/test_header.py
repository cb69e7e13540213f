"""The header and the libraries' exports: clean in every language and compiler, with the numbers of the tables."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.capi.conftest import need, run
from tests.conftest import missing
from wasi_nn_backend.capi.build import HEADER, INCLUDE_DIR, LIBRARIES, Library, exported_functions
from wasi_nn_backend.dialects import CAPI, WAMR, Dialect
from wasi_nn_backend.errors import ErrorCode

ROOT = Path(__file__).parents[2]
FUNCTIONS = {
    "init_backend",
    "init_backend_with_config",
    "deinit_backend",
    "load",
    "load_by_name",
    "load_by_name_with_config",
    "init_execution_context",
    "init_execution_context_with_session_id",
    "set_input",
    "compute",
    "get_output",
    "run_inference",
    "close_execution_context",
    "unload",
    "compute_single",
    "compute_single_with_config",
    "get_output_single",
    "fini_single",
    "run_inference_with_config",
    "cancel",
    "save_session",
    "restore_session",
    "wasi_nn_last_error",
    "wasi_nn_version",
}
MACROS = [(), ("WASI_NN_WAMR",), ("WASM_ENABLE_WASI_EPHEMERAL_NN",), ("WASI_NN_WAMR", "WASM_ENABLE_WASI_EPHEMERAL_NN")]


def clang(language: str) -> list[str]:
    """clang, or zig's, which is one."""
    program = "clang" if language == "c" else "clang++"
    if shutil.which(program):
        return [program]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc" if language == "c" else "c++"]
    missing("there is neither clang nor ziglang; pip install ziglang")


@pytest.mark.parametrize("macros", MACROS, ids=lambda macros: "+".join(macros) or "plain")
@pytest.mark.parametrize("standard", ["c99", "c11", "c17", "c++17", "c++20"])
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_the_header_is_clean(compiler: str, standard: str, macros: tuple[str, ...], tmp_path: Path) -> None:
    language = "c++" if "++" in standard else "c"
    command = clang(language) if compiler == "clang" else [need("g++" if language == "c++" else "gcc")]
    source = tmp_path / ("program.cpp" if language == "c++" else "program.c")
    source.write_text('#include "wasi_nn_llama.h"\nint main(void) { return (int)success; }\n')
    defines = [f"-D{macro}" for macro in macros]
    warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    target = ["-c", "-o", str(tmp_path / "program.o")]
    done = subprocess.run(
        [*command, f"-std={standard}", *warnings, *defines, f"-I{INCLUDE_DIR}", str(source), *target],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("dialect", "flags"), [(CAPI, ()), (WAMR, ("-DWASI_NN_WAMR",))])
def test_the_error_numbers_are_those_of_the_tables(dialect: Dialect, flags: tuple[str, ...]) -> None:
    text = run(need("gcc"), "-E", *flags, HEADER)
    found = re.search(r"typedef enum \{([^}]*)\} wasi_nn_error;", text)
    assert found is not None
    numbers = {name: int(number) for name, number in re.findall(r"(\w+) = (\d+)", found[1])}
    assert numbers == {code.value: dialect.errnos[code] for code in ErrorCode if code.value in numbers}
    assert set(dialect.errnos.values()) == set(numbers.values())


def test_every_function_of_the_contract_is_declared() -> None:
    assert set(exported_functions()) == FUNCTIONS


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_the_libraries_export_these_and_nothing_else(library_dir: Path, library: Library) -> None:
    lines = run(need("nm"), "-D", "--defined-only", library_dir / library.file_name).splitlines()
    assert {line.split()[-1].split("@")[0] for line in lines} == FUNCTIONS


def test_every_function_is_documented() -> None:
    described = re.findall(r"\*/\n(?:wasi_nn_error |const char \*)(\w+)\(", HEADER.read_text())
    assert set(described) == FUNCTIONS


def test_the_header_lies_where_people_look_for_it() -> None:
    assert (ROOT / "include" / "wasi_nn_llama.h").read_text() == HEADER.read_text()
