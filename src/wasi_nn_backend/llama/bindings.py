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


#: How OpenMP's threads wait for each other: they spin for some 4 ms (libgomp's loop counts), then sleep. Without the
#: policy libgomp would spin for a hundredth of a step as soon as a second thread of the process computes with OpenMP,
#: as when two models are in use; with it the count is 1,000 then.
_OPENMP_SETTINGS = {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "200000"}


@contextlib.contextmanager
def _openmp_settings() -> Iterator[None]:
    """Make OpenMP threads spin from one decode to the next, and sleep where nothing is to be done.

    libgomp reads the environment once, while it is loaded. Decode threads meet some thousand times a token, so sleeping
    at once costs the wake-ups. Spinning costs a core that another process needs, but beside a busy one the engine goes
    over to fewer threads by itself (``engine/threads.py``). Measured with SmolLM2 on 2 cores, automatic threads,
    tokens/s at 1 and 8 sequences:

        spin count      quiet        beside one busy process
        300             75   153     60   102
        3,000           77   163     53    99
        30,000          92   179     50    90
        200,000         96   181     60    97

    With ``model.threads`` fixed at 2, beside one busy process, 300 is the better one (42 and 76 to 32 and 58, spinning
    for ever). A user's own setting wins.
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
