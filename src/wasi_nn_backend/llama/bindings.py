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

__all__ = ["libc", "library_files", "native"]


#: How long an OpenMP thread spins where it waits for the others before it sleeps, in libgomp's loop counts.
_SPIN_COUNT = 300


@contextlib.contextmanager
def _short_spinning() -> Iterator[None]:
    """Make OpenMP threads spin briefly, then sleep, where they wait for each other.

    libgomp reads the environment once, while it is loaded. Decode threads meet some thousand times a token, so sleeping
    at once costs the wake-ups, and spinning long costs a core that another process needs: a guest that computes beside
    the engine is that process. Measured with SmolLM2 on 2 cores, 2 threads, tokens/s at 1 and 8 sequences:

        waiting                   quiet        beside one busy process
        passive (sleep at once)   36    97     47    79
        spin count 300            99   147     42    76
        spin count 1000           90   158     28    62
        active (spin for ever)    97   150     32    58

    A user's own setting wins.
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = str(_SPIN_COUNT)
    try:
        yield
    finally:
        del os.environ["GOMP_SPINCOUNT"]


with _short_spinning():
    from llama_cpp import llama_cpp as native

#: The C library: some of its functions serve as callbacks into which llama.cpp can call without entering Python.
libc = ctypes.cdll.msvcrt if os.name == "nt" else ctypes.CDLL(None)


def library_files() -> list[Path]:
    """The shared libraries of this llama.cpp, sorted."""
    folder = Path(native._lib._name).parent
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.is_symlink())
