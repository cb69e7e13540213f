"""What a benchmark's figures depend on: the processor, what else it does, and the versions of what is compared."""

from __future__ import annotations

import hashlib
import os
import platform
import threading
import time
from importlib.metadata import PackageNotFoundError, version

from wasi_nn_backend.bench.document import Machine
from wasi_nn_backend.bench.peers import PEERS
from wasi_nn_backend.engine.sizing import n_usable_cores
from wasi_nn_backend.llama.amx_probe import read_cpu
from wasi_nn_backend.llama.build_report import BuildReport

__all__ = ["describe_machine", "free_cores", "installed_versions"]

_PACKAGES = ("wasi-nn-backend", "numpy", "wasmtime", *PEERS)
_PROBE_S = 0.5
_CHUNK = bytes(1 << 20)


def describe_machine(build: BuildReport) -> Machine:
    cpu = read_cpu()
    return Machine(
        cpu=cpu.name or "unknown",
        n_cores=n_usable_cores(),
        memory_bytes=_memory_bytes(),
        system=platform.platform(),
        llama_features=build.features,
        has_amx=build.has("AMX_INT8") and not build.amx_warning,
    )


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):  # a system that does not say
        return None


def installed_versions(build: BuildReport) -> dict[str, str]:
    versions = {"python": platform.python_version(), "llama.cpp": build.commit}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def free_cores(n_cores: int, duration_s: float = _PROBE_S) -> float:
    """How many cores a thread per core gets when all compute for ``duration_s``: ``n_cores`` on a quiet machine.

    Asked of the scheduler itself, by processor time: load averages lag, and in containers they are another machine's.
    """
    start_s = time.perf_counter()
    used_s: list[float] = []
    threads = [threading.Thread(target=_compute, args=(start_s + duration_s, used_s)) for _ in range(n_cores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(used_s) / (time.perf_counter() - start_s)


def _compute(end_s: float, used_s: list[float]) -> None:
    while time.perf_counter() < end_s:
        hashlib.sha256(_CHUNK).digest()  # of large data, which releases Python's lock
    used_s.append(time.thread_time())
