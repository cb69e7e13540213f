"""Runs a component on a wasmtime engine of one's own, with wasi:nn in two lines.

Run: python component.py
"""

from __future__ import annotations

from pathlib import Path

from wasmtime import Engine, Store, WasiConfig
from wasmtime.component import Component, Linker

from wasi_nn_backend import Backend
from wasi_nn_backend.host import define_wasi_nn_component

ASK = Path(__file__).parent.parent / "component" / "ask.wat"


def main() -> None:
    engine = Engine()
    store = Store(engine)
    store.set_wasi(WasiConfig())
    linker = Linker(engine)
    linker.add_wasip2()
    component = Component(engine, ASK.read_text())

    with Backend() as backend:
        backend.register("default", "smollm2")
        with define_wasi_nn_component(linker, backend):
            instance = linker.instantiate(store, component)
            ask = instance.get_func(store, "ask")
            if ask is None:
                raise SystemExit("the component exports no function 'ask'")
            print(ask(store, "default", "Name the capital city of France.").decode())


if __name__ == "__main__":
    main()
