"""The one import of the native library.

Importing this module loads llama.cpp into the process, so the package's other modules are imported through
``library.load_llama`` and not at start-up. Only the low-level module of llama-cpp-python is used: its high-level class
runs one sequence at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["libc", "library_files", "logits_address", "native"]


#: How OpenMP's threads wait for each other: they spin for some 20 microseconds (libgomp's loop counts), then sleep.
#: Without the policy the count would fall to 100 as soon as a second thread of the process computes with OpenMP, as
#: when two models are in use; with it the count stays. The last one is for LLVM's OpenMP, which would spin for ever.
_OPENMP_SETTINGS = {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}


@contextlib.contextmanager
def _openmp_settings() -> Iterator[None]:
    """Make OpenMP threads spin briefly, then sleep, where they wait for each other.

    libgomp reads the environment once, while it is loaded. Decode threads meet some thousand times a token, so sleeping
    at once costs the wake-ups, and spinning long costs a core that another process needs: the longer, the worse, until
    two processes with two threads each on two cores need 3 seconds for a step. Measured with SmolLM2 on 2 cores; tokens
    per second of 1 and 8 sequences on a quiet machine, where rounds differ by a tenth, and milliseconds of a step of 4
    sequences in each of two processes that compute side by side:

        spin count      quiet        two processes
        100             50
        300             82   153      55
        1,000           91   158      65
        3,000                        105
        10,000                       230
        200,000         85   168    3000

    A user's own setting wins.
    """
    if not _OPENMP_SETTINGS.keys().isdisjoint(os.environ):
        yield
        return
    os.environ.update(_OPENMP_SETTINGS)
    try:
        yield
    finally:
        for name in _OPENMP_SETTINGS:
            del os.environ[name]


with _openmp_settings():
    from llama_cpp import llama_cpp as native

#: ``llama_get_logits`` with its pointer as a number, or None: casting a typed one takes longer than the call.
logits_address = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(("llama_get_logits", native._lib))

#: The C library: some of its functions serve as callbacks into which llama.cpp can call without entering Python.
libc = ctypes.cdll.msvcrt if os.name == "nt" else ctypes.CDLL(None)


def library_files() -> list[Path]:
    """The shared libraries of this llama.cpp, sorted."""
    folder = Path(native._lib._name).parent
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.is_symlink())
