"""How much slower a good guest gets beside guests that take all they can get.

    python -m bench.hostile

The good guest asks the model for some tokens, alone and beside a hostile one of each kind, in turns, and at last beside
all kinds together. Hostile guests have the default limits and 64 MiB of memory. They begin again a tenth of a second
after they ended: a host that starts at once what has just failed would be as busy with that as with a guest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import struct
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path

from wasi_nn_backend import Backend, InvalidArgument
from wasi_nn_backend.bench.engine import show_progress
from wasi_nn_backend.cli.guest_options import share_the_interpreter
from wasi_nn_backend.dialects import WASMEDGE
from wasi_nn_backend.host import GuestOutput, GuestPool, RunConfig, run_module

ASK = Path(__file__).parents[1] / "examples" / "c" / "ask.wasm"
PROMPT = "Tell the story of a ship and its long way home."
RATIO_MAX = 1.5
RESTART_S = 0.1
MIB = 1 << 20
OUT = 16


def guest_wat(body: str, memory: str = "2") -> bytes:
    """A module that knows a name (at 100), a prompt as a tensor (at 500), and one of 1 GiB (at 540)."""
    imports = "".join(
        f'(import "{WASMEDGE.import_module}" "{name}" (func ${name} (param {"i32 " * len(parameters)}) (result i32)))'
        for name, parameters in WASMEDGE.functions.items()
    )
    data = {100: b"default", 500: struct.pack("<5I", 0, 0, 3, 600, 11), 600: b"Once upon a", 700: b"x" * 1000}
    data[540] = struct.pack("<5I", 0, 0, 3, 0, 1 << 30)
    segments = "".join(
        f'(data (i32.const {at}) "{"".join(f"{chr(92)}{byte:02x}" for byte in text)}")' for at, text in data.items()
    )
    return f'(module {imports} (memory (export "memory") {memory}) {segments} {body})'.encode()


def start_wat(once: str, forever: str) -> bytes:
    return guest_wat(f'(func (export "_start") (local $n i32) {once} (loop $again {forever} (br $again)))')


def call(name: str, *arguments: int | str) -> str:
    """A call whose number nobody looks at; a text is an expression."""
    words = " ".join(each if isinstance(each, str) else f"(i32.const {each})" for each in arguments)
    return f"(drop (call ${name} {words}))"


LOAD, OPEN = call("load_by_name", 100, 7, OUT), call("init_execution_context", 0, OUT)
LAST = f"(i32.load (i32.const {OUT}))"
HOSTILE = {
    "allocates": start_wat("", "(memory.fill (i32.const 65536) (i32.const 1) (i32.const 65536))"
                           " (if (i32.eq (memory.grow (i32.const 16)) (i32.const -1)) (then unreachable))"),
    "recurses": guest_wat('(func $f (export "_start") (call $f))'),
    "spins": start_wat("", ""),
    "floods the queue": start_wat(LOAD, OPEN + call("set_input", LAST, 0, 500) + call("compute_single", LAST)),
    "opens contexts": start_wat(LOAD, OPEN),
    "1 GiB tensors": start_wat(LOAD + OPEN, call("set_input", 0, 0, 540)),
    "unloads others": start_wat("", call("unload", "(local.get $n)")
                                + "(local.set $n (i32.add (local.get $n) (i32.const 1)))"),
    "loads": start_wat("", LOAD),
}  # fmt: skip


class Attack:
    """Hostile guests, one of each of some kinds at any time, while the block runs."""

    def __init__(self, backend: Backend, kinds: Sequence[str]) -> None:
        self._pool = GuestPool(backend, len(kinds))
        self._is_over = threading.Event()
        self.n_started = 0
        for kind in kinds:
            self._start(RunConfig(HOSTILE[kind], max_memory_bytes=64 * MIB))

    def _start(self, config: RunConfig) -> None:
        def again(_done: Future[GuestOutput]) -> None:
            threading.Thread(target=self._restart, args=(config,)).start()

        self.n_started += 1
        self._pool.submit(config).add_done_callback(again)

    def _restart(self, config: RunConfig) -> None:
        if not self._is_over.wait(RESTART_S):
            with contextlib.suppress(InvalidArgument):  # the pool was closed meanwhile
                self._start(config)

    def close(self) -> None:
        self._is_over.set()
        self._pool.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a built-in model's name or a GGUF file")
    parser.add_argument("--tokens", type=int, default=64, help="generated tokens of the good guest")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=list(HOSTILE), default=list(HOSTILE))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    config = {"sampling": {"temperature": 0, "ignore_eos": True}, "stopping": {"max_tokens": arguments.tokens}}
    share_the_interpreter()
    rows = []
    print(f"{'beside':>18} {'alone':>9} {'beside':>9} {'ratio':>6}, at most {RATIO_MAX}")
    with Backend(config) as backend:
        backend.register("default", arguments.model)
        run_good(backend)
        for kinds in [*([kind] for kind in arguments.kinds), arguments.kinds]:
            row = measure(backend, kinds, arguments.rounds)
            rows.append(row)
            print(f"{row['beside']:>18} {row['alone_s']:>7.2f} s {row['beside_s']:>7.2f} s {row['ratio']:>6.2f}",
                  flush=True)  # fmt: skip
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2))


def measure(backend: Backend, kinds: Sequence[str], n_rounds: int) -> dict[str, float | str]:
    name = kinds[0] if len(kinds) == 1 else "all together"
    alone_s, beside_s = [], []
    for i in range(n_rounds):
        show_progress(f"{name}, round {i + 1} of {n_rounds}")
        alone_s.append(run_good(backend))
        with closing(Attack(backend, kinds)):
            beside_s.append(run_good(backend))
    show_progress("")
    ratios = [beside / alone for alone, beside in zip(alone_s, beside_s, strict=True)]
    medians = {"alone_s": statistics.median(alone_s), "beside_s": statistics.median(beside_s)}
    return {"beside": name, **medians, "ratio": statistics.median(ratios), "ratio_max": max(ratios)}


def run_good(backend: Backend) -> float:
    """Seconds of a guest that asks once."""
    start_s = time.perf_counter()
    result = run_module(
        RunConfig(ASK, args=["default", PROMPT], stdout=lambda _data: None, inherit_stdin=False), backend
    )
    if result.exit_status:
        raise SystemExit(f"the good guest failed: {result.reason or result.last_error or result.exit_status}")
    return time.perf_counter() - start_s


if __name__ == "__main__":
    main()
