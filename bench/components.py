"""What a component's tensors cost: against the same bytes from a core module, and against wasmtime-py's own conversion.

    python -m bench.components --bytes 1024 65536 1048576

Guests loop inside WebAssembly, so that only the calls into the host are measured: a tensor made and dropped, a tensor's
data read back, and a core module's ``set_input``. Nothing is computed: the backend takes whatever comes. The clock is
the thread's processor time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from wasmtime import Func, Linker, Module, Store
from wasmtime.component import Component, LinkerInstance, ResourceHost, ResourceType
from wasmtime.component import Linker as ComponentLinker

from wasi_nn_backend import Backend
from wasi_nn_backend.dialects import WITX
from wasi_nn_backend.host import HostLimits, create_engine, define_wasi_nn, define_wasi_nn_component

#: Calls of one measurement: enough for a millisecond or so, few enough for wasmtime-py's two seconds per MiB.
N_BYTES_PER_ROUND = 1 << 20
N_CALLS_MAX = 500
INTERFACE = "wasi:nn/tensor@0.2.0-rc-2024-10-28"
TYPE_ID = 1
#: What calls cost, without the pauses of a guest that makes nothing else.
_UNPACED = HostLimits(max_host_share=1.0)

COMPONENT = f"""
(component
  (import "{INTERFACE}" (instance $nn
    (export "tensor" (type $tensor (sub resource)))
    (type $types (enum "FP16" "FP32" "FP64" "BF16" "U8" "I32" "I64"))
    (export "tensor-type" (type $type (eq $types)))
    (type $dimensions (list u32))
    (type $data (list u8))
    (export "[constructor]tensor"
      (func (param "dimensions" $dimensions) (param "ty" $type) (param "data" $data) (result (own $tensor))))
    (export "[method]tensor.data" (func (param "self" (borrow $tensor)) (result $data)))))
  (alias export $nn "tensor" (type $tensor))
  (core module $Memory
    (memory (export "memory") 128)
    (func (export "realloc") (param i32 i32 i32 i32) (result i32) (i32.const 65536)))
  (core instance $memory (instantiate $Memory))
  (alias core export $memory "memory" (core memory $mem))
  (alias core export $memory "realloc" (core func $realloc))
  (core func $new (canon lower (func $nn "[constructor]tensor") (memory $mem)))
  (core func $read (canon lower (func $nn "[method]tensor.data") (memory $mem) (realloc (core func $realloc))))
  (core func $drop (canon resource.drop $tensor))
  (core module $Main
    (import "nn" "new" (func $new (param i32 i32 i32 i32 i32) (result i32)))
    (import "nn" "read" (func $read (param i32 i32)))
    (import "nn" "drop" (func $drop (param i32)))
    (func $make (param $n_bytes i32) (result i32)
      (call $new (i32.const 0) (i32.const 1) (i32.const 4) (i32.const 65536) (local.get $n_bytes)))
    (func (export "make") (param $n_calls i32) (param $n_bytes i32)
      (loop
        (call $drop (call $make (local.get $n_bytes)))
        (br_if 0 (local.tee $n_calls (i32.sub (local.get $n_calls) (i32.const 1))))))
    (func (export "read") (param $n_calls i32) (param $n_bytes i32)
      (local $tensor i32)
      (local.set $tensor (call $make (local.get $n_bytes)))
      (loop
        (call $read (local.get $tensor) (i32.const 16))
        (br_if 0 (local.tee $n_calls (i32.sub (local.get $n_calls) (i32.const 1)))))
      (call $drop (local.get $tensor))))
  (core instance $main (instantiate $Main (with "nn" (instance
    (export "new" (func $new)) (export "read" (func $read)) (export "drop" (func $drop))))))
  (func (export "make") (param "n-calls" u32) (param "n-bytes" u32) (canon lift (core func $main "make")))
  (func (export "read") (param "n-calls" u32) (param "n-bytes" u32) (canon lift (core func $main "read"))))
"""
MODULE = """
(module
  (import "wasi_ephemeral_nn" "load_by_name" (func $load (param i32 i32 i32) (result i32)))
  (import "wasi_ephemeral_nn" "init_execution_context" (func $init (param i32 i32) (result i32)))
  (import "wasi_ephemeral_nn" "set_input" (func $set_input (param i32 i32 i32) (result i32)))
  (memory (export "memory") 128)
  (func (export "make") (param $n_calls i32) (param $n_bytes i32)
    (drop (call $load (i32.const 0) (i32.const 1) (i32.const 16)))
    (drop (call $init (i32.load (i32.const 16)) (i32.const 20)))
    (i32.store (i32.const 32) (i32.const 0)) (i32.store (i32.const 36) (i32.const 1))
    (i32.store (i32.const 40) (i32.const 3))
    (i32.store (i32.const 44) (i32.const 65536)) (i32.store (i32.const 48) (local.get $n_bytes))
    (loop
      (if (call $set_input (i32.load (i32.const 20)) (i32.const 0) (i32.const 32)) (then (unreachable)))
      (br_if 0 (local.tee $n_calls (i32.sub (local.get $n_calls) (i32.const 1))))))
  (data (i32.const 0) "m"))
"""

#: Makes ``n_calls`` calls with ``n_bytes`` each.
Contender = Callable[[int, int], object]


class EmptyBackend:
    """Backend, graph and context in one, none of which does anything."""

    def load_by_name(self, name: str, **options: Any) -> EmptyBackend:
        return self

    def init_execution_context(self) -> EmptyBackend:
        return self

    def set_input(self, index: int, tensor: object) -> None: ...


def contenders() -> dict[str, Contender]:
    backend = cast(Backend, EmptyBackend())
    linker, store = component_linker()
    define_wasi_nn_component(linker, backend, limits=_UNPACED)
    ours = exports(linker, store)
    linker, store = component_linker()
    with linker.root() as root, root.add_instance(INTERFACE) as instance:
        define_with_wasmtime_py(instance)
    theirs = exports(linker, store)
    return {
        "core set_input": core_module(backend),
        "tensor made": ours["make"],
        "tensor read": ours["read"],
        "made, by wasmtime-py": theirs["make"],
        "read, by wasmtime-py": theirs["read"],
    }


def component_linker() -> tuple[ComponentLinker, Store]:
    engine = create_engine()
    store = Store(engine)
    store.set_epoch_deadline(1)
    return ComponentLinker(engine), store


def exports(linker: ComponentLinker, store: Store) -> dict[str, Contender]:
    instance = linker.instantiate(store, Component(linker.engine, COMPONENT))

    def caller(name: str) -> Contender:
        function = instance.get_func(store, name)
        if function is None:
            raise LookupError(name)
        return lambda n_calls, n_bytes: function(store, n_calls, n_bytes)

    return {name: caller(name) for name in ("make", "read")}


def define_with_wasmtime_py(instance: LinkerInstance) -> None:
    """The same two functions as the library's documentation would write them."""
    tensors: dict[int, bytes] = {}

    def make(store: Any, dimensions: list[int], kind: str, data: bytes) -> ResourceHost:
        tensors[1] = data
        return ResourceHost.own(1, TYPE_ID)

    instance.add_resource("tensor", ResourceType.host(TYPE_ID), lambda store, representation: None)
    instance.add_func("[constructor]tensor", make)
    instance.add_func("[method]tensor.data", lambda store, tensor: tensors[tensor.to_host(store).rep])


def core_module(backend: Backend) -> Contender:
    engine = create_engine()
    store = Store(engine)
    store.set_epoch_deadline(1)
    linker = Linker(engine)
    define_wasi_nn(linker, store, backend, WITX, limits=_UNPACED)
    function = linker.instantiate(store, Module(engine, MODULE)).exports(store)["make"]
    if not isinstance(function, Func):
        raise LookupError("make")
    return lambda n_calls, n_bytes: function(store, n_calls, n_bytes)


def measure(n_bytes: int, n_rounds: int) -> dict[str, float]:
    """Seconds per call, the median over the rounds, by contender."""
    entrants = contenders()
    n_calls = max(1, min(N_CALLS_MAX, N_BYTES_PER_ROUND // n_bytes))
    times: dict[str, list[float]] = {name: [] for name in entrants}
    for _ in range(n_rounds):
        for name, run in entrants.items():
            # What wasmtime-py needs seconds for is measured once.
            is_long = name.endswith("wasmtime-py") and n_bytes * n_calls > N_BYTES_PER_ROUND // 4
            if is_long and times[name]:
                continue
            n = 1 if is_long else n_calls
            start_s = time.thread_time()
            run(n, n_bytes)
            times[name].append((time.thread_time() - start_s) / n)
    return {name: statistics.median(values) for name, values in times.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bytes", type=int, nargs="+", default=[1, 1024, 16384, 262144, 1048576])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    figures = {}
    for n_bytes in options.bytes:
        figures[n_bytes] = measure(n_bytes, options.rounds)
        base_s = figures[n_bytes]["core set_input"]
        print(f"{n_bytes:,} bytes")
        for name, seconds in figures[n_bytes].items():
            print(f"  {name:22} {seconds * 1e6:12,.1f} us a call {seconds / base_s:10,.1f} x core")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
