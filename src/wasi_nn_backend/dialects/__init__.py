"""Tables of numbers, one file per family of guests or hosts, and nothing else.

A new dialect is a new file here with one ``Dialect`` value, an entry in ``CORE_DIALECTS`` if core WebAssembly modules
import it, and a case in ``tests/unit/test_dialects.py`` with the numbers restated from its specification. Functions
that no dialect has had so far are added to ``host/core_abi.py`` under the same name.
"""

from __future__ import annotations

from wasi_nn_backend.dialects.capi import CAPI
from wasi_nn_backend.dialects.table import Dialect
from wasi_nn_backend.dialects.wamr import WAMR
from wasi_nn_backend.dialects.wasmedge import WASMEDGE
from wasi_nn_backend.dialects.witx import WITX

__all__ = ["CAPI", "CORE_DIALECTS", "WAMR", "WASMEDGE", "WITX", "Dialect"]

#: The dialects of core modules, the smallest first: detection takes the first that has all that a module imports.
CORE_DIALECTS: tuple[Dialect, ...] = (WITX, WASMEDGE)
