"""Tables of numbers, one file per family of guests or hosts, and nothing else.

A new dialect is a new file here with one ``Dialect`` value, an entry in ``CORE_DIALECTS`` if core WebAssembly modules
import it, a case in ``tests/unit/test_dialects.py`` with the numbers restated from its specification, and an ABI in
``tests/host/abis.py``, which the tests of all dialects then run with. Functions that no dialect has had so far are
added to ``host/core_abi.py`` under the same name.
"""

from __future__ import annotations

from wasi_nn_backend.dialects.capi import CAPI
from wasi_nn_backend.dialects.hyperbeam import HYPERBEAM
from wasi_nn_backend.dialects.table import ArgumentKind, Dialect, StructForm, argument_kind, frozen
from wasi_nn_backend.dialects.wamr import WAMR, WAMR_EPHEMERAL, WAMR_LEGACY
from wasi_nn_backend.dialects.wasmedge import WASMEDGE
from wasi_nn_backend.dialects.wit import WIT
from wasi_nn_backend.dialects.witx import WITX

__all__ = [
    "CAPI",
    "CORE_DIALECTS",
    "HYPERBEAM",
    "WAMR",
    "WAMR_EPHEMERAL",
    "WAMR_LEGACY",
    "WASMEDGE",
    "WIT",
    "WITX",
    "ArgumentKind",
    "Dialect",
    "StructForm",
    "argument_kind",
    "frozen",
]

#: The dialects of core modules. Detection takes the first of those that have most of what a module imports, so WasmEdge
#: stands before WAMR: all that WAMR's modules import is in both, and there are more modules of WasmEdge's.
CORE_DIALECTS: tuple[Dialect, ...] = (WITX, WASMEDGE, WAMR_EPHEMERAL, HYPERBEAM, WAMR_LEGACY)
