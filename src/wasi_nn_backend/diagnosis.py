"""What may be wrong with a machine, an installation and a configuration, and what to do about each.

Every check is a function of a ``Machine``, which is all that they look at; tests put their own in.
"""

from __future__ import annotations

import enum
import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from wasi_nn_backend.config import Settings
from wasi_nn_backend.engine.sizing import n_usable_cores
from wasi_nn_backend.errors import InvalidArgument, WasiNNError
from wasi_nn_backend.llama.amx_probe import Cpu, read_cpu
from wasi_nn_backend.llama.build_report import BuildReport, ask_child
from wasi_nn_backend.llama.gguf_file import read_gguf_summary
from wasi_nn_backend.llama.gguf_header import read_gguf_header
from wasi_nn_backend.llama.host_memory import available_bytes
from wasi_nn_backend.planning import make_plan

__all__ = ["Finding", "Machine", "Status", "Subject", "diagnose"]

_PYTHON_MIN = (3, 11)
_MIB = 1 << 20
#: What makes llama.cpp faster, by the name in its build and the flag of the CPU (/proc/cpuinfo).
_FEATURES = {"AVX2": "avx2", "FMA": "fma", "F16C": "f16c", "AVX512": "avx512f", "AVX512_VNNI": "avx512_vnni"}
_REBUILD = "pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python llama-cpp-python"
#: libgomp's loops; two processes on two cores are four times as slow with so many as with 1,000.
_SPIN_COUNT_LONG = 10_000
_OPENMP_KEYS = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "KMP_BLOCKTIME",
    "OMP_PROC_BIND",
    "GOMP_CPU_AFFINITY",
)


class Status(enum.Enum):
    """A PROBLEM keeps something from working, or from working well; a NOTE is worth knowing."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """``advice`` says what to do; "" where there is nothing to do."""

    name: str
    status: Status
    detail: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is checked beside the machine. ``model`` None: no model file is there to be checked.

    ``has_c_libraries``: they are built already, so that no compiler is needed for them.
    """

    settings: Settings
    model: Path | None
    has_c_libraries: bool = True


def _available_bytes() -> int | None:
    return available_bytes()


@dataclass(frozen=True, slots=True)
class Machine:
    """``build_report`` raises ``WasiNNError`` where llama.cpp does not load."""

    environ: Mapping[str, str]
    find_program: Callable[[str], str | None] = shutil.which
    build_report: Callable[[], BuildReport] = ask_child
    cpu: Callable[[], Cpu] = read_cpu
    n_cores: Callable[[], int] = n_usable_cores
    n_bytes_available: Callable[[], int | None] = _available_bytes

    @classmethod
    def this_one(cls) -> Machine:
        return cls(os.environ)


def diagnose(machine: Machine, subject: Subject) -> list[Finding]:
    """All checks, in the order in which their causes should be removed. Raises nothing for what is wrong."""
    try:
        build: BuildReport | WasiNNError = machine.build_report()
    except WasiNNError as error:
        build = error
    findings = [_python(), _compiler(machine, subject, build)]
    if isinstance(build, WasiNNError):
        findings.append(Finding("llama.cpp", Status.PROBLEM, str(build), f"rebuild it for this machine: {_REBUILD}"))
    else:
        findings += [_llama(machine, build), _amx(machine, build), _gpu(build, subject), _openmp(machine, build)]
    findings.append(_threads(machine, subject))
    findings += _model_and_memory(machine, subject)
    findings += _adapters(subject.settings)
    findings.append(_log_file(subject))
    return findings


def _python() -> Finding:
    text = f"Python {platform.python_version()} in {sys.prefix}"
    if sys.version_info < _PYTHON_MIN:
        return Finding("Python", Status.PROBLEM, text, "install Python 3.11 or newer")
    return Finding("Python", Status.OK, text)


def _compiler(machine: Machine, subject: Subject, build: BuildReport | WasiNNError) -> Finding:
    """Needed by pip for llama-cpp-python, and for the C libraries; not by what is built already."""
    found = [path for name in ("c++", "g++", "clang++") if (path := machine.find_program(name))]
    if found:
        return Finding("compiler", Status.OK, found[0])
    missing = [
        *(["llama.cpp"] if isinstance(build, WasiNNError) else []),
        *([] if subject.has_c_libraries else ["the C libraries (wasi-nn capi)"]),
    ]
    return Finding(
        "compiler",
        Status.PROBLEM if missing else Status.NOTE,
        "no C++ compiler was found: c++, g++ and clang++ are not on the path. "
        + (f"{' and '.join(missing)} cannot be built" if missing else "Nothing needs it now"),
        "install one, on Debian with: apt-get install g++",
    )


def _llama(machine: Machine, build: BuildReport) -> Finding:
    flags = machine.cpu().flags or frozenset()
    text = f"llama-cpp-python {build.version}, llama.cpp {build.commit}; {' '.join(build.features)}"
    unused = [name for name, flag in _FEATURES.items() if flag in flags and not build.has(name)]
    if unused:
        detail = f"{text}. The CPU also has {', '.join(unused)}, which this build does not use"
        return Finding("llama.cpp", Status.NOTE, detail, f"build it on this machine for more speed: {_REBUILD}")
    return Finding("llama.cpp", Status.OK, text)


def _amx(machine: Machine, build: BuildReport) -> Finding:
    has_amx = "amx_int8" in (machine.cpu().flags or ())
    if not has_amx:
        return Finding("AMX", Status.OK, "the CPU has none")
    if build.amx_warning:
        return Finding(
            "AMX", Status.PROBLEM, f"the CPU has AMX, and it is not used: {build.amx_reason}", build.amx_warning
        )
    return Finding("AMX", Status.OK, f"the CPU has AMX: {build.amx_reason}")


def _gpu(build: BuildReport, subject: Subject) -> Finding:
    devices = [f"{device.name} ({device.description})" for device in build.devices if device.name != "CPU"]
    if devices and build.supports_gpu_offload:
        return Finding("GPU", Status.OK, f"can take layers: {', '.join(devices)}")
    n_layers = subject.settings.model.n_gpu_layers
    if "n_gpu_layers" in subject.settings.model.model_fields_set and n_layers > 0:
        return Finding(
            "GPU",
            Status.PROBLEM,
            f"model.n_gpu_layers is {n_layers}, and this llama.cpp cannot offload: it stays on the CPU",
            "install llama-cpp-python with a GPU backend, or leave n_gpu_layers out",
        )
    return Finding("GPU", Status.OK, "none: this llama.cpp computes on the CPU")


def _openmp(machine: Machine, build: BuildReport) -> Finding:
    values = [f"{key}={machine.environ[key]}" for key in _OPENMP_KEYS if key in machine.environ]
    pool = "OpenMP" if build.has("OPENMP") else "a thread pool of its own"
    text = f"{pool}; the environment sets {', '.join(values) or 'nothing'}"
    if _spins_long(machine.environ):
        return Finding(
            "thread pool",
            Status.PROBLEM,
            text,
            "unset OMP_WAIT_POLICY and GOMP_SPINCOUNT: threads that spin for long take the cores from all others, and "
            "a busy machine can become 30 times slower",
        )
    if not build.has("OPENMP"):
        advice = f"its threads spin while they wait; for machines that do other work, rebuild with OpenMP: {_REBUILD}"
        return Finding("thread pool", Status.NOTE, text, advice)
    return Finding("thread pool", Status.OK, text)


def _spins_long(environ: Mapping[str, str]) -> bool:
    """Whether OpenMP's threads wait for each other for much longer than with this package's own settings."""
    count = environ.get("GOMP_SPINCOUNT")
    if count is None:
        return environ.get("OMP_WAIT_POLICY", "").lower() == "active"
    return not count.strip().isdecimal() or int(count) >= _SPIN_COUNT_LONG  # "infinite" is one, too


def _threads(machine: Machine, subject: Subject) -> Finding:
    n_threads, n_cores = subject.settings.model.threads, machine.n_cores()
    if n_threads is None:
        return Finding("threads", Status.OK, f"auto: found out while running, {n_cores} at most")
    if n_threads > n_cores:
        return Finding(
            "threads",
            Status.PROBLEM,
            f"model.threads is {n_threads}, and this process may use {n_cores} cores: threads wait for each other",
            f"set model.threads to {n_cores} or less, or leave it out (auto)",
        )
    return Finding("threads", Status.OK, f"{n_threads} of {n_cores} cores")


def _model_and_memory(machine: Machine, subject: Subject) -> list[Finding]:
    if subject.model is None:
        return [Finding("model", Status.NOTE, "none given", "name one with --model to check it and its memory")]
    try:
        summary = read_gguf_summary(subject.model)
    except WasiNNError as error:
        return [Finding("model", Status.PROBLEM, str(error), "check the path, or download the file again")]
    text = f"{subject.model}: {summary.name}, {summary.architecture}, {summary.n_file_bytes / _MIB:,.0f} MiB"
    findings = [Finding("model", Status.OK, text)]
    if not summary.is_encoder:
        findings.append(_memory(machine, subject, subject.model))
    return findings


def _adapters(settings: Settings) -> list[Finding]:
    """Their headers only: whether they fit the model is checked when both are loaded."""
    findings = []
    for adapter in settings.model.lora:
        try:
            read_gguf_header(Path(adapter.path).expanduser())
        except (WasiNNError, RuntimeError) as error:  # RuntimeError: a user without a home folder
            detail = f"model.lora names {adapter.path}: {error}"
            findings.append(Finding("LoRA", Status.PROBLEM, detail, "correct the path, or leave the adapter out"))
        else:
            findings.append(Finding("LoRA", Status.OK, adapter.path))
    return findings


def _memory(machine: Machine, subject: Subject, model: Path) -> Finding:
    n_bytes_available = machine.n_bytes_available()
    if n_bytes_available is None:
        return Finding("memory", Status.NOTE, "this system does not say how much memory is free")
    try:
        plan = make_plan(model, subject.settings, n_bytes_available)
    except InvalidArgument as error:
        return Finding("memory", Status.PROBLEM, str(error), "change the keys that it names")
    text = (
        f"{plan.n_sessions_at_once} sessions of {plan.n_ctx:,} tokens need {plan.need.total / _MIB:,.0f} MiB, "
        f"{n_bytes_available / _MIB:,.0f} MiB are free"
    )
    if plan.fits:
        return Finding("memory", Status.OK, text)
    better = plan.suggestion
    if better is None:
        advice = "take a smaller model, or a machine with more memory"
    else:
        advice = f"for example n_ctx={better.n_ctx} and max_concurrent={better.max_concurrent}; see wasi-nn plan"
    return Finding("memory", Status.PROBLEM, text, advice)


def _log_file(subject: Subject) -> Finding:
    name = subject.settings.logging.file
    if not name:
        return Finding("log", Status.OK, "standard error")
    try:
        path = Path(name).expanduser()
        existed = path.exists()
        # Opened for real: permissions alone do not tell of read-only file systems, nor of what root may not do.
        # Without waiting, as a pipe nobody reads would make it.
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666))
        if not existed:
            path.unlink()
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return Finding(
            "log",
            Status.PROBLEM,
            f"logging.file is {name}, and it cannot be written: {reason}",
            "name a file in a folder that exists and that this user may write to",
        )
    return Finding("log", Status.OK, f"{path} can be written")
