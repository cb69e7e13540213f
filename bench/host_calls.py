"""What a guest's call costs beyond its work: set_input and get_output of 1 KiB, and a call that is refused.

    python -m bench.host_calls

A loop in WebAssembly makes the calls; the same methods of the same execution context, called from Python with the same
bytes, are the work. Both in turns on the tiny model. Processor time of the calling thread, so that other processes do
not count; of all rounds the least, since what else the machine does only adds to it.
"""

from __future__ import annotations

import argparse
import json
import struct
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from wasmtime import Linker, Memory, Store

from wasi_nn_backend import Backend, ExecutionContext
from wasi_nn_backend.dialects import WASMEDGE
from wasi_nn_backend.host import HostLimits, compile_module, create_engine, define_wasi_nn, read_module
from wasi_nn_backend.llama.tiny_model import write_tiny_model

N_BYTES = 1024
LIMIT_US = 30
NAME, TENSOR, DATA, BUFFER, OUT = 100, 200, 4096, 65536, 16
CONFIG = {"sampling": {"temperature": 0, "ignore_eos": True}, "stopping": {"max_tokens": 1500}, "n_ctx": 2048}


def loop_wat(name: str, call: str) -> str:
    return f"""(func (export "{name}") (param $n i32)
        (loop $again (drop {call}) (br_if $again (local.tee $n (i32.sub (local.get $n) (i32.const 1))))))"""


def module_wat() -> str:
    imports = "".join(
        f'(import "{WASMEDGE.import_module}" "{name}" (func ${name} (param {"i32 " * len(parameters)}) (result i32)))'
        for name, parameters in WASMEDGE.functions.items()
    )
    return f"""(module {imports} (memory (export "memory") 4)
      (func (export "load") (result i32)
        (call $load_by_name (i32.const {NAME}) (i32.const 4) (i32.const {OUT})))
      (func (export "open") (result i32) (call $init_execution_context (i32.const 0) (i32.const {OUT})))
      {loop_wat("set_input", f"(call $set_input (i32.const 0) (i32.const 0) (i32.const {TENSOR}))")}
      {
        loop_wat(
            "get_output",
            f"(call $get_output (i32.const 0) (i32.const 0) (i32.const {BUFFER})"
            f" (i32.const {2 * BUFFER}) (i32.const {OUT}))",
        )
    }
      {loop_wat("refused", "(call $compute (i32.const 77))")})"""


@dataclass(frozen=True, slots=True)
class Case:
    """A loop of the module's, and its work."""

    name: str
    n_calls: int
    work: Callable[[], object]


class Guest:
    """The module, ready for its loops."""

    def __init__(self, backend: Backend) -> None:
        engine = create_engine(use_cache=False)
        self._store = Store(engine)
        self._store.set_epoch_deadline(1)
        linker = Linker(engine)
        # A loop of calls is what is slowed down otherwise.
        limits = HostLimits(max_host_share=1.0)
        self.state = define_wasi_nn(linker, self._store, backend, WASMEDGE, limits=limits)
        module = compile_module(engine, read_module(module_wat().encode()))
        self._exports = linker.instantiate(self._store, module).exports(self._store)
        memory = self._exports["memory"]
        if not isinstance(memory, Memory):
            raise TypeError("the module exports its memory under another name")
        memory.write(self._store, b"tiny", NAME)
        memory.write(self._store, struct.pack("<5I", 0, 0, 3, DATA, N_BYTES), TENSOR)
        memory.write(self._store, b"a" * N_BYTES, DATA)
        if self.call("load") or self.call("open"):
            raise SystemExit(f"the guest cannot begin: {self.state.last_error}")

    @property
    def context(self) -> ExecutionContext:
        return self.state.contexts.get(0)

    def call(self, name: str, *arguments: int) -> object:
        return self._exports[name](self._store, *arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Backend(CONFIG) as backend:
        path = Path(folder, "tiny.gguf")
        write_tiny_model(path)
        backend.register("tiny", path)
        guest = Guest(backend)
        rows = [measure(guest, case, arguments.rounds) for case in cases(guest.context)]
        guest.state.close()
    for row in rows:
        print(f"{row['call']:>12}: {row['call_us']:6.1f} us, its work {row['work_us']:6.1f} us, "
              f"the rest {row['rest_us']:5.1f} us, at most {LIMIT_US}")  # fmt: skip
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2))


def cases(context: ExecutionContext) -> list[Case]:
    """get_output comes first: set_input takes the text away."""
    data = b"a" * N_BYTES
    context.set_input(0, "hello")
    context.compute()
    n_output_bytes = len(context.get_output(0))
    if n_output_bytes < N_BYTES:
        raise SystemExit(f"the tiny model wrote {n_output_bytes} bytes, fewer than {N_BYTES}")
    return [
        Case("get_output", 2000, lambda: context.get_output(0)),
        Case("set_input", 500, lambda: context.set_input(0, data)),
        Case("refused", 2000, lambda: None),
    ]


def measure(guest: Guest, case: Case, n_rounds: int) -> dict[str, float | str]:
    call_s, work_s = float("inf"), float("inf")
    for _ in range(n_rounds):
        start_s = time.thread_time()
        guest.call(case.name, case.n_calls)
        call_s = min(call_s, (time.thread_time() - start_s) / case.n_calls)
        start_s = time.thread_time()
        for _ in range(case.n_calls):
            case.work()
        work_s = min(work_s, (time.thread_time() - start_s) / case.n_calls)
    rest_s = call_s - work_s
    return {"call": case.name, "call_us": call_s * 1e6, "work_us": work_s * 1e6, "rest_us": rest_s * 1e6}


if __name__ == "__main__":
    main()
