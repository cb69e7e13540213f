"""Runs a WebAssembly module on a wasmtime engine of one's own, with WASI-NN in two lines.

    python core_module.py ../c/ask.wasm smollm2 default "Name the capital city of France."

The module's name and what follows the model are the guest's arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from wasmtime import Engine, ExitTrap, Linker, Module, Store, WasiConfig

from wasi_nn_backend import Backend
from wasi_nn_backend.host import define_wasi_nn, detect_dialect


def main(arguments: Sequence[str]) -> int:
    module_path, model, *guest_arguments = arguments
    engine = Engine()
    module = Module.from_file(engine, module_path)
    store, linker = Store(engine), Linker(engine)
    linker.define_wasi()
    wasi = WasiConfig()
    wasi.argv = [module_path, *guest_arguments]
    wasi.inherit_stdout()
    wasi.inherit_stderr()
    store.set_wasi(wasi)

    with Backend({"prompt_mode": "chat", "temperature": 0}) as backend:
        backend.register("default", model)
        with define_wasi_nn(linker, store, backend, detect_dialect(module)) as guest:
            try:
                linker.instantiate(store, module).exports(store)["_start"](store)
            except ExitTrap as exit_:
                if exit_.code and guest.last_error is not None:
                    print(guest.last_error, file=sys.stderr)
                return exit_.code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
