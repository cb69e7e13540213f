"""WebAssembly guests: core modules on wasmtime, with WASI preview 1 and WASI-NN.

    runner.py       one run: its thread, timeout, Ctrl-C, exit status
    guest.py        one store: module, WASI, WASI-NN, entry point
    modules.py      files -> compiled modules            output.py   stdout and stderr, in order
    linker.py       which dialect, what is missing, functions that never raise
    signatures.py   the functions' types, for 32-bit and 64-bit memories
    core_abi.py     the calls: look up, delegate, convert           legacy_abi.py   where WAMR's older ones differ
    state.py        a store's graphs, contexts, errors   limits.py   what one guest may take
    memory.py       the only access to a guest's memory             layouts.py      what lies in it
    invoke.py       an export called by name, with numbers and texts

A new core dialect is a table in ``dialects/``; its new functions, if any, become methods of ``CoreAbi``. Components
get their own ``component_abi.py`` beside ``core_abi.py`` over the same ``GuestState``; pools of guests sit above
``runner.py``.
"""

from __future__ import annotations

from wasi_nn_backend.host.guest import RunConfig
from wasi_nn_backend.host.limits import HostLimits
from wasi_nn_backend.host.linker import (
    MissingImport,
    ModuleImports,
    define_wasi_nn,
    detect_dialect,
    examine_imports,
)
from wasi_nn_backend.host.modules import compile_module, create_engine, read_module
from wasi_nn_backend.host.runner import GuestResult, GuestRunner, run_module
from wasi_nn_backend.host.state import GuestError, GuestState

__all__ = [
    "GuestError",
    "GuestResult",
    "GuestRunner",
    "GuestState",
    "HostLimits",
    "MissingImport",
    "ModuleImports",
    "RunConfig",
    "compile_module",
    "create_engine",
    "define_wasi_nn",
    "detect_dialect",
    "examine_imports",
    "read_module",
    "run_module",
]
