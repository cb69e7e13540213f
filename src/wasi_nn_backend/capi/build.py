"""Compiles the shared libraries for this environment, and writes what makefiles, pkg-config and CMake need.

Only the standard library and cffi are imported here: the wheel's build runs this before anything is installed.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wasi_nn_backend.errors import RuntimeFailure, UnsupportedOperation

__all__ = ["HEADER", "INCLUDE_DIR", "LIBRARIES", "Library", "build_libraries", "exported_functions", "source_files"]

_HERE = Path(__file__).resolve().parent
_SHIM = _HERE / "shim"
INCLUDE_DIR = _HERE / "include"
HEADER = INCLUDE_DIR / "wasi_nn_llama.h"
_SOURCES = ("calls.c", "exports.c", "interpreter.c")
_WARNINGS = ("-Wall", "-Wextra", "-Wpedantic")
_CFFI_PART = re.compile(r"/\* cffi: begin \*/(.*)/\* cffi: end \*/", re.DOTALL)
_FUNCTION = re.compile(r"^(?:wasi_nn_error|const char \*) ?(\w+)\(", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Library:
    """One of the libraries: its name without ``lib`` and ``.so``, the dialect that it speaks, and its macros."""

    name: str
    dialect: str
    macros: tuple[str, ...] = ()

    @property
    def file_name(self) -> str:
        return f"lib{self.name}.so"

    @property
    def module(self) -> str:
        """The cffi module inside; both may be in one process."""
        return f"_{self.name}_capi"


LIBRARIES = (Library("wasi_nn_backend", "capi"), Library("wasi_nn_llamacpp", "wamr", ("WASI_NN_WAMR",)))


def build_libraries(
    folder: Path, version: str, *, flags: Sequence[str] = (), is_installed: bool | None = None
) -> list[Path]:
    """Both libraries in ``folder``, with ``include/``, ``pkgconfig/`` and ``cmake/``; the paths of the libraries.

    ``flags`` go to the compiler. ``is_installed`` says that the package is found in the environment's site-packages;
    else the library also looks where this file lies. Raises ``UnsupportedOperation`` where a compiler, Python's headers
    or its shared library are missing, and ``RuntimeFailure`` when the compiler fails.
    """
    compiler = _find_compiler()
    _require_python()
    root = _HERE.parents[1]
    if is_installed is None:
        is_installed = str(root) in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    (folder / "include").mkdir(parents=True, exist_ok=True)
    shutil.copy(HEADER, folder / "include")
    _write_package_files(folder, version)
    with tempfile.TemporaryDirectory(prefix="wasi-nn-capi-") as scratch_name:
        scratch = Path(scratch_name)
        _write_environment(scratch, "" if is_installed else str(root))
        for library in LIBRARIES:
            _compile(compiler, library, folder, scratch, version, flags)
    return [folder / library.file_name for library in LIBRARIES]


def exported_functions() -> list[str]:
    """The functions that the header declares, in its order."""
    return _FUNCTION.findall(HEADER.read_text(encoding="utf-8"))


def source_files() -> list[Path]:
    """What the libraries are made from: where one changes, they are out of date."""
    return [Path(__file__), HEADER, *sorted(_SHIM.iterdir())]


def _find_compiler() -> list[str]:
    for command in (sysconfig.get_config_var("CC"), "cc", "gcc", "clang"):
        words = shlex.split(command or "")
        if words and shutil.which(words[0]):
            return words
    raise UnsupportedOperation("there is no C compiler: install gcc or clang (apt-get install gcc)")


def _require_python() -> None:
    include = Path(sysconfig.get_path("include"))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if not (include / "Python.h").is_file():
        raise UnsupportedOperation(f"Python's headers are missing in {include}: apt-get install python{version}-dev")
    if _libpython() is None:
        raise UnsupportedOperation(
            f"this Python has no shared library libpython{version}.so: apt-get install python{version}-dev, or "
            "configure Python with --enable-shared"
        )


def _libpython() -> Path | None:
    """The shared library to link; Debian keeps it below LIBDIR, in the folder of the architecture."""
    version = sysconfig.get_config_var("LDVERSION")
    folder = Path(sysconfig.get_config_var("LIBDIR") or "")
    for place in (folder, folder / (sysconfig.get_config_var("MULTIARCH") or "")):
        if (place / f"libpython{version}.so").exists():
            return place / f"libpython{version}.so"
    return None


def _write_environment(scratch: Path, root: str) -> None:
    """``environment.h``: what the library knows of the environment that it is built for."""
    libpython = _libpython()
    values = {
        "PREFIX": sys.prefix,
        "PACKAGE_ROOT": root,
        "LIBPYTHON": libpython.resolve().name if libpython is not None else "",
        "PYTHON_VERSION": f"{sys.version_info.major}.{sys.version_info.minor}",
    }
    lines = [f"#define WASI_NN_{name} {_c_string(value)}\n" for name, value in values.items()]
    (scratch / "environment.h").write_text("".join(lines), encoding="utf-8")


def _c_string(text: str) -> str:
    escaped = text.encode().decode("latin-1").replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if " " <= c <= "~" else f"\\{ord(c):03o}" for c in escaped) + '"'


def _write_module(library: Library, scratch: Path, version: str) -> Path:
    """cffi's part: the module that Python sees, and ``wasi_nn_serve`` for the way in."""
    from cffi import FFI  # noqa: PLC0415  a program that only asks for the header's place does not need it

    part = _CFFI_PART.search((_SHIM / "calls.h").read_text(encoding="utf-8"))
    if part is None:
        raise RuntimeFailure(f"{_SHIM / 'calls.h'} has lost its cffi marks: install the package again")
    ffi = FFI()
    ffi.cdef(part[1])
    ffi.embedding_api("int wasi_nn_serve(void);")
    ffi.set_source(library.module, '#include "calls.h"')
    ffi.embedding_init_code(
        f"from {library.module} import ffi, lib\n"
        "from wasi_nn_backend.capi.serving import bind\n"
        f"bind(ffi, lib, {library.dialect!r}, {version!r})\n"
    )
    target = scratch / f"{library.module}.c"
    with contextlib.redirect_stdout(io.StringIO()):  # it reports on stdout, which belongs to the command line
        ffi.emit_c_code(str(target))
    return target


def _compile(
    compiler: list[str], library: Library, folder: Path, scratch: Path, version: str, flags: Sequence[str]
) -> None:
    module = _write_module(library, scratch, version)
    exports = scratch / "exports.map"
    exports.write_text("{ global: " + "; ".join(exported_functions()) + "; local: *; };\n", encoding="utf-8")
    libpython = _libpython()
    link = [str(libpython), f"-Wl,-rpath,{libpython.parent}"] if libpython is not None else []
    macros = (*library.macros, f"WASI_NN_VERSION={_c_string(version)}")
    common = [*compiler, "-O2", "-g", "-fPIC", "-pthread", *(f"-D{macro}" for macro in macros)]
    common += [f"-I{path}" for path in (INCLUDE_DIR, _SHIM, scratch, sysconfig.get_path("include"))]
    objects = []
    for source in (*(_SHIM / name for name in _SOURCES), module):
        objects.append(scratch / f"{source.stem}.o")
        warnings = _WARNINGS if source != module else ("-w",)  # cffi's output is not ours to mend
        # Python's headers are C11 and GNU's in places: no -std here, the public header is held to C99 by the tests.
        _run([*common, *flags, *warnings, "-c", str(source), "-o", str(objects[-1])])
    # Written beside and renamed: a program that has the old one open keeps it.
    partial = folder / f".{library.file_name}.new"
    # -Bsymbolic: exported functions call each other. Else a host's function of the same name, or the other library's,
    # would be called in their place.
    link += [f"-Wl,--version-script={exports}", "-Wl,-Bsymbolic", "-Wl,-z,nodelete", f"-Wl,-soname,{library.file_name}"]
    _run([*common, *flags, "-shared", *map(str, objects), *link, "-ldl", "-o", str(partial)])
    partial.replace(folder / library.file_name)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeFailure(
            f"the compiler ended with {done.returncode}: {shlex.join(command)}\n{done.stderr.strip()}\n"
            "Mend what it complains about and build again"
        )


def _write_package_files(folder: Path, version: str) -> None:
    """pkg-config and CMake, both by paths relative to their own: the folder can be moved."""
    pkgconfig, cmake = folder / "pkgconfig", folder / "cmake"
    pkgconfig.mkdir(exist_ok=True)
    cmake.mkdir(exist_ok=True)
    for library in LIBRARIES:
        cflags = "".join(f" -D{macro}" for macro in library.macros)
        (pkgconfig / f"{library.name}.pc").write_text(
            "libdir=${pcfiledir}/..\n"
            f"Name: {library.name}\n"
            "Description: WASI-NN for language models, for C programs\n"
            f"Version: {version}\n"
            f"Cflags: -I${{libdir}}/include{cflags}\n"
            f"Libs: -L${{libdir}} -Wl,-rpath,${{libdir}} -l{library.name}\n",
            encoding="utf-8",
        )
    (cmake / "wasi_nn_backend-config.cmake").write_text(_cmake_config(), encoding="utf-8")
    (cmake / "wasi_nn_backend-config-version.cmake").write_text(
        f'set(PACKAGE_VERSION "{version}")\n'
        "if(PACKAGE_FIND_VERSION VERSION_GREATER PACKAGE_VERSION)\n  set(PACKAGE_VERSION_COMPATIBLE FALSE)\n"
        "else()\n  set(PACKAGE_VERSION_COMPATIBLE TRUE)\nendif()\n",
        encoding="utf-8",
    )


def _cmake_config() -> str:
    text = 'get_filename_component(_wasi_nn_dir "${CMAKE_CURRENT_LIST_DIR}/.." ABSOLUTE)\n'
    for library in LIBRARIES:
        target = f"wasi_nn_backend::{library.name}"
        text += (
            f"if(NOT TARGET {target})\n"
            f"  add_library({target} SHARED IMPORTED)\n"
            f"  set_target_properties({target} PROPERTIES\n"
            f'    IMPORTED_LOCATION "${{_wasi_nn_dir}}/{library.file_name}"\n'
            f"    IMPORTED_SONAME {library.file_name}\n"
            f'    INTERFACE_COMPILE_DEFINITIONS "{";".join(library.macros)}"\n'
            '    INTERFACE_INCLUDE_DIRECTORIES "${_wasi_nn_dir}/include")\n'
            "endif()\n"
        )
    return text
