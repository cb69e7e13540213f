"""Whether llama.cpp's AMX kernels can be trusted on this machine; asked once, of a child process.

Compiled by GCC with its usual flags, ``ggml_backend_amx_mul_mat`` loses its tile configuration to dead-store
elimination and dies (ggml-org/llama.cpp pull request 26954); an older llama.cpp computed wrong logits instead. Nothing
in the library tells how it was compiled. So a child decodes a tiny model with AMX and without, and where it dies or
the logits differ, models are loaded without the extra buffer types that AMX needs. Without AMX nothing is probed.
"""

from __future__ import annotations

import enum
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.user_cache import user_cache_folder

__all__ = [
    "ChildOutcome",
    "ChildResult",
    "Cpu",
    "ProbeEnvironment",
    "Verdict",
    "decide",
    "default_cache_path",
    "hash_files",
    "read_cpu",
    "run_child",
]

MAX_RELATIVE_ERROR = 0.1
CHILD_TIMEOUT_S = 60.0
CHILD_MODULE = "wasi_nn_backend.llama.amx_probe_child"
OVERRIDE = "WASI_NN_AMX"
_CRASH_SIGNALS = {signal.SIGSEGV, signal.SIGILL, signal.SIGBUS, signal.SIGFPE, signal.SIGABRT}


class ChildOutcome(enum.Enum):
    """How the child ended. CRASHED and FINISHED say something about the library, the others about the moment."""

    FINISHED = "finished"
    CRASHED = "crashed"
    TIMED_OUT = "timed out"
    NOT_RUN = "could not run"


@dataclass(frozen=True, slots=True)
class ChildResult:
    """``relative_error`` is set when FINISHED; ``detail`` is for the log."""

    outcome: ChildOutcome
    relative_error: float | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Cpu:
    """``flags`` is None where the system does not list them."""

    name: str
    flags: frozenset[str] | None


@dataclass(frozen=True, slots=True)
class ProbeEnvironment:
    """All that the decision depends on; tests put their own in."""

    system_info: str
    cpu: Cpu
    override: str | None
    library_hash: Callable[[], str]
    cache_path: Path | None
    run_child: Callable[[], ChildResult]


@dataclass(frozen=True, slots=True)
class Verdict:
    """``warning`` is None when there is nothing that the user should do."""

    use_extra_buffers: bool
    reason: str
    warning: str | None = None


def decide(environment: ProbeEnvironment) -> Verdict:
    """Whether models may be loaded with llama.cpp's extra buffer types.

    Raises ``InvalidArgument`` for an override other than 0 and 1.
    """
    if environment.override is not None:
        if environment.override not in ("0", "1"):
            raise InvalidArgument(
                f"{OVERRIDE} in the environment is {environment.override!r}; set it to 0 or 1, or unset it"
            )
        return Verdict(environment.override == "1", f"{OVERRIDE}={environment.override}")
    if "AMX_INT8 = 1" not in environment.system_info:
        return Verdict(True, "llama.cpp was built without AMX")
    if environment.cpu.flags is not None and "amx_int8" not in environment.cpu.flags:
        return Verdict(True, "the CPU has no AMX")
    key = f"{environment.library_hash()} {environment.cpu.name}"
    works = _read_cache(environment.cache_path, key)
    if works is not None:
        return _verdict(works, "found by an earlier probe")
    result = environment.run_child()
    works = (
        result.outcome is ChildOutcome.FINISHED
        and result.relative_error is not None
        and result.relative_error <= MAX_RELATIVE_ERROR  # false for NaN, too
    )
    if result.outcome in (ChildOutcome.FINISHED, ChildOutcome.CRASHED):
        _write_cache(environment.cache_path, key, works)
    return _verdict(works, _describe(result))


def _describe(result: ChildResult) -> str:
    if result.relative_error is not None:
        return f"logits with and without AMX differ by {result.relative_error:.3g}, relatively"
    return f"the probe {result.outcome.value}: {result.detail}"


def _verdict(works: bool, reason: str) -> Verdict:
    if works:
        return Verdict(True, reason)
    return Verdict(
        False,
        reason,
        warning=(
            f"AMX is switched off, because this build of llama.cpp cannot be trusted with it ({reason}). Prompts take "
            f"several times as long. To rebuild it: {rebuild_line()}"
        ),
    )


def rebuild_line() -> str:
    """The command that compiles llama-cpp-python so that AMX works."""
    flags = "-fno-tree-dse -fno-dse"
    return (
        f"CMAKE_ARGS=\"-DCMAKE_C_FLAGS='{flags}' -DCMAKE_CXX_FLAGS='{flags}'\" pip install --force-reinstall "
        f"--no-cache-dir --no-binary llama-cpp-python llama-cpp-python=={metadata.version('llama-cpp-python')}"
    )


def _read_cache(path: Path | None, key: str) -> bool | None:
    if path is None:
        return None
    try:
        works = json.loads(path.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError):  # none yet, not readable, or not ours: probe again
        return None
    return works if isinstance(works, bool) else None


def _write_cache(path: Path | None, key: str, works: bool) -> None:
    """Only the newest verdict is kept: a library that was replaced does not come back."""
    if path is None:
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({key: works}), encoding="utf-8")
        partial.replace(path)  # at once, for processes that read meanwhile
    except OSError:
        return  # a cache that cannot be written costs another probe next time, nothing else


def default_cache_path(environ: Mapping[str, str] = os.environ, *, file_name: str = "amx.json") -> Path | None:
    """A file in the user's cache folder; None for a user who has none."""
    try:
        return user_cache_folder(environ) / file_name
    except RuntimeError:
        return None


def hash_files(paths: Iterable[Path]) -> str:
    """One hash over the contents of the native libraries; 10 ms."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def read_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> Cpu:
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return Cpu("unknown", None)
    first: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        first.setdefault(name.strip(), value.strip())
    flags = first.get("flags")
    return Cpu(first.get("model name", "unknown"), None if flags is None else frozenset(flags.split()))


def run_child(
    timeout_s: float = CHILD_TIMEOUT_S, *, module: str = CHILD_MODULE, python: Path | None = None
) -> ChildResult:
    """Run the probe in another Python and read what it found."""
    interpreter = python or _find_python()
    if interpreter is None:
        return ChildResult(ChildOutcome.NOT_RUN, detail="this program is no Python and has none beside it")
    with tempfile.TemporaryDirectory(prefix="wasi-nn-amx-") as folder:
        result_path = Path(folder) / "result.json"
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            # A session of its own: Ctrl-C is meant for the parent, and would look like a crash of the child.
            child = subprocess.run(
                [str(interpreter), "-m", module, folder],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=timeout_s,
                check=False,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return ChildResult(ChildOutcome.TIMED_OUT, detail=f"no answer within {timeout_s:g} s")
        except OSError as error:
            return ChildResult(ChildOutcome.NOT_RUN, detail=str(error))
        return _read_result(result_path, child.returncode, child.stderr)


def _read_result(result_path: Path, exit_status: int, stderr: bytes) -> ChildResult:
    if exit_status < 0 and -exit_status in _CRASH_SIGNALS:
        return ChildResult(ChildOutcome.CRASHED, detail=f"it died of {signal.Signals(-exit_status).name}")
    try:
        relative_error = float(json.loads(result_path.read_text(encoding="utf-8"))["relative_error"])
    except (OSError, ValueError, KeyError, TypeError):
        last_line = stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        return ChildResult(ChildOutcome.NOT_RUN, detail=f"it ended with {exit_status}: {last_line or 'no message'}")
    return ChildResult(ChildOutcome.FINISHED, relative_error)


def _find_python() -> Path | None:
    """The interpreter to start; where Python is embedded or frozen, ``sys.executable`` is the host program or empty."""
    if getattr(sys, "frozen", False):
        return None
    candidates = (Path(sys.executable or ""), Path(sys.prefix) / "bin" / "python3", Path(sys.prefix) / "python.exe")
    return next((path for path in candidates if path.name.startswith("python") and path.is_file()), None)
