"""llama.cpp as a whole: loaded once for the process, its log bridged, its build known."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import threading

from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.llama import amx_probe
from wasi_nn_backend.llama.bindings import library_files, native
from wasi_nn_backend.llama.interface import ModelParams, ProgressCallback
from wasi_nn_backend.llama.log_bridge import LogBridge
from wasi_nn_backend.llama.model import NativeModel

__all__ = ["NativeLlama", "load_llama"]

_LOCK = threading.Lock()

_NUMA_STRATEGIES = {"distribute": 1, "isolate": 2, "numactl": 3}  # enum ggml_numa_strategy


def load_llama() -> NativeLlama:
    """The native library. Cached: its log callback, back ends and thread settings are one for the process anyway."""
    with _LOCK:  # functools.cache alone would let two threads load at once
        return _load_once()


@functools.cache
def _load_once() -> NativeLlama:
    return NativeLlama(logging.getLogger(__package__))


class NativeLlama:
    """``Llama`` over the installed llama-cpp-python."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._log = LogBridge(logger)
        self._lock = threading.Lock()
        self._verdict: amx_probe.Verdict | None = None
        self._numa: str | None = None
        native.llama_backend_init()
        self._build_commit = _build_commit()
        self._system_info: str = native.llama_print_system_info().decode("utf-8", "replace").strip(" |")
        self._supports_gpu_offload = bool(native.llama_supports_gpu_offload())

    @property
    def log(self) -> LogBridge:
        """For those who open a ``NativeModel`` themselves."""
        return self._log

    @property
    def build_number(self) -> int:
        """Always 0: llama.cpp counts its commits at build time, in a part that llama-cpp-python does not build."""
        return 0

    @property
    def build_commit(self) -> str:
        """llama.cpp's commit as its build recorded it (``0c1e570-dirty``), else its version."""
        return self._build_commit

    @property
    def system_info(self) -> str:
        """The CPU features in use, such as ``AVX2 = 1``."""
        return self._system_info

    @property
    def supports_gpu_offload(self) -> bool:
        return self._supports_gpu_offload

    def set_numa(self, strategy: str) -> None:
        """See ``Llama.set_numa``. Raises ``InvalidArgument`` for an unknown strategy."""
        number = _NUMA_STRATEGIES.get(strategy)
        if number is None:
            raise InvalidArgument(f"numa is {strategy!r}; it must be one of {', '.join(_NUMA_STRATEGIES)}")
        with self._lock:
            in_force, self._numa = self._numa, self._numa or strategy
            if in_force is None:
                native.llama_numa_init(number)
        if in_force is None:
            self._logger.info("NUMA strategy %s, for this process", strategy)
        elif in_force != strategy:
            self._logger.warning(
                "model.numa is %s, but this process runs with %s, which the first model chose: ignored",
                strategy,
                in_force,
            )

    def load_model(self, params: ModelParams, progress: ProgressCallback | None = None) -> NativeModel:
        return NativeModel(params, self._log, use_extra_buffers=self.amx_verdict().use_extra_buffers, progress=progress)

    def amx_verdict(self) -> amx_probe.Verdict:
        """Whether models may be loaded with llama.cpp's extra buffer types.

        Decided at the first load, not at import: where AMX has to be probed, it takes a second or two.
        """
        with self._lock:
            if self._verdict is None:
                self._verdict = verdict = amx_probe.decide(
                    amx_probe.ProbeEnvironment(
                        system_info=self._system_info,
                        cpu=amx_probe.read_cpu(),
                        override=os.environ.get(amx_probe.OVERRIDE),
                        library_hash=lambda: amx_probe.hash_files(library_files()),
                        cache_path=amx_probe.default_cache_path(),
                        run_child=amx_probe.run_child,
                    )
                )
                self._logger.debug("extra buffers: %s (%s)", verdict.use_extra_buffers, verdict.reason)
                if verdict.warning is not None:
                    self._logger.warning("%s", verdict.warning)
            return self._verdict


def _build_commit() -> str:
    """ggml records the commit that it was built from; the Python binding has no function for it."""
    for path in library_files():
        if not path.name.startswith(("libggml-base", "ggml-base")):
            continue
        try:
            ggml_commit = ctypes.CDLL(str(path)).ggml_commit
        except (OSError, AttributeError):
            continue
        ggml_commit.restype = ctypes.c_char_p
        commit = (ggml_commit() or b"").decode("ascii", "replace")
        if commit and commit != "unknown":
            return commit
    version: bytes = native.llama_version()
    return version.decode("ascii", "replace")
