"""What the installed llama.cpp is and sees, asked of a child process: ``python -m wasi_nn_backend.llama.build_report``.

A library that was built for another CPU dies of SIGILL when it is loaded, and a broken GPU driver may crash or hang.
The program that asks must survive to say so.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from wasi_nn_backend.errors import RuntimeFailure

__all__ = ["BuildReport", "Device", "ask_child"]

_TIMEOUT_S = 60.0
_N_REASON_LINES = 3


@dataclass(frozen=True, slots=True)
class Device:
    """One that ggml can compute on; the CPU is one of them."""

    name: str
    description: str


@dataclass(frozen=True, slots=True)
class BuildReport:
    """``amx_warning`` is what has to be done about AMX, "" for nothing; ``amx_reason`` why it is used or not."""

    version: str
    commit: str
    system_info: str
    supports_gpu_offload: bool
    devices: Sequence[Device]
    amx_reason: str
    amx_warning: str

    @property
    def features(self) -> list[str]:
        """What llama.cpp was built with, as ``system_info`` names it, such as ``AVX2`` or ``OPENMP``."""
        return re.findall(r"(\w+) = 1", self.system_info)

    def has(self, feature: str) -> bool:
        return feature in self.features


def ask_child(python: str = sys.executable, timeout_s: float = _TIMEOUT_S) -> BuildReport:
    """Takes half a second; a few where AMX has to be tried. Raises ``RuntimeFailure`` that says how the child died."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        child = subprocess.run(
            [python, "-m", __name__],
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeFailure(f"llama.cpp did not load within {timeout_s:g} s; a GPU driver may hang") from None
    except OSError as error:
        raise RuntimeFailure(f"no child process can be started: {error}") from error
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        hint = "it was built for another CPU" if name == "SIGILL" else "its build or a driver is broken"
        raise RuntimeFailure(f"llama.cpp dies of {name} when it is loaded: {hint}; install llama-cpp-python again")
    if child.returncode:
        lines = child.stderr.decode("utf-8", "replace").strip().splitlines()
        raise RuntimeFailure(f"llama.cpp cannot be loaded: {' '.join(lines[-_N_REASON_LINES:]) or 'no message'}")
    values = json.loads(child.stdout)
    return BuildReport(**{**values, "devices": tuple(Device(**device) for device in values["devices"])})


def _report() -> BuildReport:
    from wasi_nn_backend.llama.bindings import library_files  # noqa: PLC0415  loads llama.cpp: the child's business
    from wasi_nn_backend.llama.library import load_llama  # noqa: PLC0415

    llama = load_llama()
    verdict = llama.amx_verdict()
    return BuildReport(
        version=version("llama-cpp-python"),
        commit=llama.build_commit,
        system_info=llama.system_info,
        supports_gpu_offload=llama.supports_gpu_offload,
        devices=_devices(library_files()),
        amx_reason=verdict.reason,
        amx_warning=verdict.warning or "",
    )


def _devices(files: Sequence[Path]) -> tuple[Device, ...]:
    """llama-cpp-python has no functions for ggml's devices: they are asked of ggml itself."""
    file = next((path for path in files if path.name.startswith(("libggml.", "ggml."))), None)
    if file is None:
        return ()
    ggml = ctypes.CDLL(str(file))
    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    ggml.ggml_backend_dev_get.restype = ctypes.c_void_p
    ggml.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    for function in (ggml.ggml_backend_dev_name, ggml.ggml_backend_dev_description):
        function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    pointers = [ggml.ggml_backend_dev_get(index) for index in range(ggml.ggml_backend_dev_count())]
    return tuple(
        Device(
            ggml.ggml_backend_dev_name(pointer).decode("utf-8", "replace"),
            ggml.ggml_backend_dev_description(pointer).decode("utf-8", "replace"),
        )
        for pointer in pointers
    )


if __name__ == "__main__":
    json.dump(asdict(_report()), sys.stdout)
