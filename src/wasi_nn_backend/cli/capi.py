"""``wasi-nn capi``: builds the C libraries and tells makefiles where they are."""

from __future__ import annotations

import hashlib
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from wasi_nn_backend.capi.build import INCLUDE_DIR, LIBRARIES, Library, build_libraries, source_files
from wasi_nn_backend.cli.exit_codes import exits_cleanly
from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.user_cache import user_cache_folder

__all__ = ["libraries_are_built", "register"]

#: Where a wheel that was built with a compiler has them.
_PACKAGED = INCLUDE_DIR.parent / "lib"


def register(app: typer.Typer) -> None:
    app.command("capi")(exits_cleanly(capi))


def capi(
    build: Annotated[
        Path | None, typer.Option("--build", metavar="DIR", help="Compile both libraries into DIR.", file_okay=False)
    ] = None,
    cflags: Annotated[bool, typer.Option("--cflags", help="Print the flags for the compiler.")] = False,
    libs: Annotated[bool, typer.Option("--libs", help="Print the flags for the linker.")] = False,
    libdir: Annotated[bool, typer.Option("--libdir", help="Print the folder of the libraries.")] = False,
    includedir: Annotated[bool, typer.Option("--includedir", help="Print the folder of the header.")] = False,
    wamr: Annotated[
        bool, typer.Option("--wamr", help="The flags for libwasi_nn_llamacpp.so instead of libwasi_nn_backend.so.")
    ] = False,
) -> None:
    """Compile the C libraries for this Python environment, and print what C programs need to use them.

    Example: [bold]cc ask.c -o ask $(wasi-nn capi --cflags --libs)[/]

    With --build DIR the flags are those of DIR, which also holds pkg-config and CMake files. Without it they
    are those of the libraries that came with the package or, where it came without, that this command compiles
    once into the user's cache.
    """
    wants_flags = cflags or libs or libdir
    if build is None and not wants_flags and not includedir:
        raise typer.BadParameter("give --build DIR, or what to print: --cflags, --libs, --libdir, --includedir")
    folder = _build(build.absolute()) if build is not None else _find() if libs or libdir else None
    include = folder / "include" if folder is not None else INCLUDE_DIR
    library = LIBRARIES[1] if wamr else LIBRARIES[0]
    if folder is not None and not (wants_flags or includedir):
        for file_name in (one.file_name for one in LIBRARIES):
            print(folder / file_name)
    if libdir:
        print(folder)
    if includedir:
        print(include)
    flags = _cflags(include, library) if cflags else []
    if libs and folder is not None:
        flags += [f"-L{folder}", f"-Wl,-rpath,{folder}", f"-l{library.name}"]
    if flags:
        print(shlex.join(flags))


def _cflags(include: Path, library: Library) -> list[str]:
    return [f"-I{include}", *(f"-D{macro}" for macro in library.macros)]


def _find() -> Path:
    """The folder with the libraries of this environment; they are compiled if there is none yet."""
    if _are_in(_PACKAGED):
        return _PACKAGED
    folder = _cache_folder()
    return folder if _are_in(folder) else _build(folder)


def libraries_are_built() -> bool:
    """Whether ``wasi-nn capi`` has them already and needs no compiler."""
    if _are_in(_PACKAGED):
        return True
    try:
        return _are_in(_cache_folder())
    except InvalidArgument:  # no folder where they could be
        return False


def _are_in(folder: Path) -> bool:
    return all((folder / library.file_name).is_file() for library in LIBRARIES)


def _build(folder: Path) -> Path:
    from importlib.metadata import version

    print(f"compiling the C libraries into {folder}", file=sys.stderr)
    build_libraries(folder, version("wasi-nn-backend"))
    return folder


def _cache_folder() -> Path:
    """One for each environment and state of the sources."""
    digest = hashlib.sha256(f"{sys.prefix}\0{sys.version}\0{INCLUDE_DIR}\0".encode())
    for source in source_files():
        digest.update(source.read_bytes())
    try:
        return user_cache_folder() / "capi" / digest.hexdigest()[:16]
    except RuntimeError as error:
        raise InvalidArgument(f"no folder for the libraries: {error}; set XDG_CACHE_HOME or use --build") from None
