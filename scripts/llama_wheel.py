"""Builds the wheel of llama-cpp-python once and keeps it outside the checkout.

The package has no wheels on PyPI, and pip's own build takes minutes in every new environment. It also lacks two flags:
GCC's dead-store elimination throws away the tile configuration that the AMX instructions need, and a process on a CPU
with AMX then dies in ``ggml_backend_amx_mul_mat`` (ggml-org/llama.cpp pull request 26954).

A wheel lies under a key of everything that makes it different: version, compiler, flags, Python, and the CPU's
features, since it is compiled for the CPU that it is built on and may die on another one.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from terminal import Progress, duration_text, fail, say

#: Only GCC has the fault and the flags; clang rejects them.
GCC_FLAGS = "-fno-tree-dse -fno-dse"
#: Pairs that belong together, best first.
COMPILER_PAIRS = (("gcc", "g++"), ("cc", "c++"), ("clang", "clang++"))
POLL_S = 1.0
KILL_AFTER_S = 5.0
N_LOG_LINES_SHOWN = 30
#: ``[57/193]`` from ninja, ``[ 29%]`` from make.
STEP_PATTERN = re.compile(r"^\s*\[\s*(\d+/\d+|\d+%)\]")


@dataclass(frozen=True)
class Toolchain:
    """The compilers that CMake is told to use. ``cmake_args`` holds the flags of this project and the caller's own."""

    c_compiler: str
    cxx_compiler: str
    version: str
    cmake_args: str


def cpu_features() -> str:
    """What the kernel says that the CPU can do, one string without order of cores; the model's name elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return f"{platform.machine()} {platform.processor()}"
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return f"{platform.machine()} {match.group(1) if match else platform.processor()}"


def find_toolchain() -> Toolchain:
    """Find a C and a C++ compiler that work. A missing or broken one ends the program with one line."""
    c_compiler, cxx_compiler = _compiler_names()
    try:
        macros = subprocess.run(
            [cxx_compiler, "-dM", "-E", "-x", "c++", "-"], input="", capture_output=True, text=True, check=True
        ).stdout
        version = subprocess.run([cxx_compiler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        fail(f"the C++ compiler {cxx_compiler} does not run ({error}); install one with: apt-get install g++")
    flags = "" if "__clang__" in macros else GCC_FLAGS
    _compile_small_program(cxx_compiler, flags)
    ours = f"-DCMAKE_C_FLAGS='{flags}' -DCMAKE_CXX_FLAGS='{flags}'" if flags else ""
    cmake_args = f"{ours} {os.environ.get('CMAKE_ARGS', '')}".strip()
    return Toolchain(c_compiler, cxx_compiler, version.splitlines()[0], cmake_args)


def _compiler_names() -> tuple[str, str]:
    chosen_c, chosen_cxx = os.environ.get("CC"), os.environ.get("CXX")
    for c_name, cxx_name in COMPILER_PAIRS:
        c_path = shutil.which(chosen_c or c_name)
        cxx_path = shutil.which(chosen_cxx or cxx_name)
        if c_path and cxx_path:
            return c_path, cxx_path
    if chosen_c or chosen_cxx:
        fail(f"CC={chosen_c or ''} CXX={chosen_cxx or ''} name no compilers that exist; unset or correct them")
    fail("no C++ compiler found (g++, c++ or clang++); install one with: apt-get install g++")


def _compile_small_program(cxx_compiler: str, flags: str) -> None:
    source = "#include <vector>\nint main() { return static_cast<int>(std::vector<int>().size()); }\n"
    with tempfile.TemporaryDirectory(prefix="wasi-nn-probe-") as directory:
        command = [cxx_compiler, *flags.split(), "-x", "c++", "-", "-o", str(Path(directory) / "probe")]
        result = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines()
        reason = lines[0] if lines else f"exit status {result.returncode}"
        fail(f"{cxx_compiler} cannot compile a small program ({reason}); install one with: apt-get install g++")


def wheel_key(version: str, toolchain: Toolchain) -> str:
    """The folder name of a wheel: readable at the front, a hash of the rest behind."""
    parts = (
        toolchain.cmake_args,
        toolchain.c_compiler,
        toolchain.cxx_compiler,
        toolchain.version,
        f"{sys.version_info.major}.{sys.version_info.minor}",
        cpu_features(),
    )
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return f"llama-cpp-python-{version}-{digest}"


def cache_root() -> Path:
    """Where wheels are kept: ``WASI_NN_WHEEL_CACHE``, or a folder in the user's cache."""
    chosen = os.environ.get("WASI_NN_WHEEL_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "wasi-nn-backend" / "wheels"


def find_wheel(directory: Path) -> Path | None:
    """The wheel in one key's folder, if a build has put one there."""
    return next(iter(sorted(directory.glob("llama_cpp_python-*.whl"))), None)


def ensure_wheel(python: Path, version: str, toolchain: Toolchain) -> Path:
    """Return the wheel for this machine, building it first if nobody has.

    ``python`` is the interpreter whose pip builds. Safe to interrupt, and safe to run twice at once: the second one
    waits and takes the first one's wheel.
    """
    directory = cache_root() / wheel_key(version, toolchain)
    wheel = find_wheel(directory)
    if wheel:
        return wheel
    directory.mkdir(parents=True, exist_ok=True)
    with exclusive(directory, "another set-up builds llama-cpp-python; waiting for it"):
        return find_wheel(directory) or _build(python, version, toolchain, directory)


@contextmanager
def exclusive(directory: Path, waiting: str) -> Iterator[None]:
    """Hold a lock on a folder. The kernel lets go of it when the process dies, however it dies."""
    handle = os.open(directory, os.O_RDONLY)
    progress = Progress()
    try:
        while not _try_lock(handle):
            if progress.elapsed_s < POLL_S:
                say(waiting)
            progress.show(waiting)
            time.sleep(POLL_S)
        progress.finish()
        yield
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _build(python: Path, version: str, toolchain: Toolchain, directory: Path) -> Path:
    for leftover in directory.glob("building-*"):
        shutil.rmtree(leftover)  # of a build that was killed: we hold the lock, so nobody works in it
    say(f"compiling llama-cpp-python {version} for this CPU, once: 4 to 10 minutes on 2 cores")
    say(f"the wheel is kept in {directory}")
    log_path = directory / "build.log"
    work = Path(tempfile.mkdtemp(prefix="building-", dir=directory))
    try:
        progress = Progress()
        status = _run_pip(_pip_command(python, version, work), _build_environment(toolchain, work), log_path, progress)
        built = find_wheel(work)
        if status != 0 or built is None:
            _show_end_of_log(log_path)
            fail(f"llama-cpp-python did not compile (pip ended with {status}); the whole output is in {log_path}")
        wheel = built.rename(directory / built.name)
        say(f"compiled in {duration_text(progress.elapsed_s)} minutes")
        return wheel
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _pip_command(python: Path, version: str, work: Path) -> list[str]:
    # --no-binary: a wheel found elsewhere would have been compiled with other flags, for another CPU.
    options = ["--no-deps", "--no-cache-dir", "--no-binary", "llama-cpp-python", "--verbose", "--wheel-dir", str(work)]
    return [str(python), "-m", "pip", "wheel", *options, f"llama-cpp-python=={version}"]


def _build_environment(toolchain: Toolchain, work: Path) -> dict[str, str]:
    # pip unpacks and compiles under TMPDIR: inside our own folder it is removed with it, also when pip was killed.
    own = {
        "CC": toolchain.c_compiler,
        "CXX": toolchain.cxx_compiler,
        "CMAKE_ARGS": toolchain.cmake_args,
        "TMPDIR": str(work),
    }
    parallel = {"CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)}
    return {**parallel, **os.environ, **own}


def _run_pip(command: list[str], environment: dict[str, str], log_path: Path, progress: Progress) -> int:
    # A session of its own: Ctrl-C reaches only us, and one signal then ends pip with all its compilers.
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        stdin=subprocess.DEVNULL, start_new_session=True,
    ) as process:  # fmt: skip
        status = {"text": "fetching and preparing the source"}
        reader = threading.Thread(target=_follow_output, args=(process, log_path, status), daemon=True)
        reader.start()
        try:
            while process.poll() is None:
                progress.show(status["text"])
                time.sleep(POLL_S)
        finally:
            progress.finish()
            _end_group(process)
            reader.join()
        return process.returncode


def _follow_output(process: subprocess.Popen[str], log_path: Path, status: dict[str, str]) -> None:
    with log_path.open("w", encoding="utf-8") as log:
        for line in process.stdout or ():
            log.write(line)
            log.flush()
            match = STEP_PATTERN.match(line)
            if match:
                status["text"] = f"compiling, step {match.group(1).replace('/', ' of ')}"


def _end_group(process: subprocess.Popen[str]) -> None:
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=KILL_AFTER_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _show_end_of_log(log_path: Path) -> None:
    lines = log_path.read_text(encoding="utf-8", errors="replace").splitlines()
    print("\n".join(lines[-N_LOG_LINES_SHOWN:]), file=sys.stderr, flush=True)
