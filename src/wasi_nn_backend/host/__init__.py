"""WebAssembly guests on wasmtime: core modules with WASI preview 1, components with preview 2, both with WASI-NN.

    runner.py       one run: its thread, timeout, Ctrl-C, exit status
    guest.py        one store: module, WASI, WASI-NN, entry point
    modules.py      files -> compiled modules            output.py   stdin, stdout and stderr, in order
    pool.py         many guests at once                  module_cache.py  compiled modules kept in memory
    linker.py       which dialect, what is missing, functions that never raise
    signatures.py   the functions' types, for 32-bit and 64-bit memories
    core_abi.py     the calls: look up, delegate, convert           legacy_abi.py   where WAMR's older ones differ
    state.py        a store's graphs, contexts, errors   limits.py   what one guest may take
    memory.py       the only access to a guest's memory             layouts.py      what lies in it
    invoke.py       an export called by name, with numbers and texts
    tenant.py       a guest's account with the backend              pacing.py       a guest's share of the host's time

    component_guest.py    a guest that is a component        component_imports.py   what it imports, and what is missing
    component_linker.py   its functions that never raise     component_abi.py       its calls, over the same state
    component_values.py   its values, without a Python object for each byte
    component_text.py     arguments and results of functions that the command line invokes

A new core dialect is a table in ``dialects/``; its new functions, if any, become methods of ``CoreAbi``.
"""

from __future__ import annotations

from wasi_nn_backend.host.component_imports import ComponentImports, examine_component
from wasi_nn_backend.host.component_linker import define_wasi_nn_component
from wasi_nn_backend.host.guest import RunConfig
from wasi_nn_backend.host.limits import HostLimits
from wasi_nn_backend.host.linker import (
    MissingImport,
    ModuleImports,
    define_wasi_nn,
    detect_dialect,
    examine_imports,
)
from wasi_nn_backend.host.modules import compile_component, compile_module, create_engine, read_binary, read_module
from wasi_nn_backend.host.pool import GuestOutput, GuestPool
from wasi_nn_backend.host.runner import GuestResult, GuestRunner, run_module
from wasi_nn_backend.host.state import GuestError, GuestState

__all__ = [
    "ComponentImports",
    "GuestError",
    "GuestOutput",
    "GuestPool",
    "GuestResult",
    "GuestRunner",
    "GuestState",
    "HostLimits",
    "MissingImport",
    "ModuleImports",
    "RunConfig",
    "compile_component",
    "compile_module",
    "create_engine",
    "define_wasi_nn",
    "define_wasi_nn_component",
    "detect_dialect",
    "examine_component",
    "examine_imports",
    "read_binary",
    "read_module",
    "run_module",
]
