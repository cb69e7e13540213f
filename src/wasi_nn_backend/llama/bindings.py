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

__all__ = ["libc", "native"]


@contextlib.contextmanager
def _passive_waiting() -> Iterator[None]:
    """Make OpenMP threads sleep instead of spin where they wait for each other.

    libgomp reads the environment once, while it is loaded. Its default spins: with two threads on two cores and one
    other busy process, decode fell from 400 to 15 tokens a second, against 290 with sleeping threads. A guest that
    computes beside the engine is that other process. A user's own setting wins.
    """
    if "OMP_WAIT_POLICY" in os.environ:
        yield
        return
    os.environ["OMP_WAIT_POLICY"] = "passive"
    try:
        yield
    finally:
        del os.environ["OMP_WAIT_POLICY"]


with _passive_waiting():
    from llama_cpp import llama_cpp as native

#: The C library: some of its functions serve as callbacks into which llama.cpp can call without entering Python.
libc = ctypes.cdll.msvcrt if os.name == "nt" else ctypes.CDLL(None)
