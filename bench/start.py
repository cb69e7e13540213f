"""How long a module takes to start, compiled before: plain wasmtime, this host, a pool; and as a process of its own.

    python -m bench.start

In turns: the example module runs to its end without arguments, where it prints how it is used and exits. Plain wasmtime
has the same cache and dummies for the WASI-NN functions. The processes are Python with wasmtime alone, and `wasi-nn
run`. Medians, and what this host adds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from wasmtime import ExitTrap, Linker, Module, Store, WasiConfig

from wasi_nn_backend import Backend
from wasi_nn_backend.host import GuestPool, RunConfig, create_engine, run_module

MODULE = Path(__file__).parents[1] / "examples" / "c" / "ask.wasm"
LIMIT_MS = 50
PLAIN_PROCESS = (
    "import sys; from wasmtime import *; c = Config(); c.cache = True; e = Engine(c); s = Store(e); l = Linker(e);"
    "l.define_wasi(); w = WasiConfig(); w.argv = ['ask.wasm']; s.set_wasi(w); m = Module.from_file(e, sys.argv[1]);"
    "l.define_unknown_imports_as_traps(m)\n"
    "try: l.instantiate(s, m).exports(s)['_start'](s)\n"
    "except ExitTrap: pass"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--processes", type=int, default=5, help="rounds of whole processes")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    config = RunConfig(MODULE, inherit_stdin=False, stdout=discard, stderr=discard)
    with Backend() as backend, GuestPool(backend, 1) as pool:
        inside = measure(
            {
                "plain": run_plain,
                "run": partial(run_module, config, backend),
                "pool": lambda: pool.submit(config).result(),
            },
            arguments.rounds,
        )
    processes = measure(
        {
            "plain": partial(run_process, [sys.executable, "-c", PLAIN_PROCESS, str(MODULE)]),
            "run": partial(run_process, [sys.executable, "-m", "wasi_nn_backend.cli", "run", str(MODULE)]),
        },
        arguments.processes,
    )
    print(f"in a process that runs already: {shown(inside)} ms, at most {LIMIT_MS}")
    print(f"as a process of its own:        {shown(processes)} ms")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"inside_ms": inside, "process_ms": processes}, indent=2))


def measure(runs: dict[str, Callable[[], object]], n_rounds: int) -> dict[str, float]:
    """Median milliseconds of each, in turns; the first round, which fills caches, does not count."""
    times_ms: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(n_rounds + 1):
        for name, run in runs.items():
            start_s = time.perf_counter()
            run()
            if i:
                times_ms[name].append((time.perf_counter() - start_s) * 1000)
    return {name: statistics.median(times) for name, times in times_ms.items()}


def shown(times_ms: dict[str, float]) -> str:
    return ", ".join(f"{name} {time_ms:.1f}" for name, time_ms in times_ms.items())


def run_plain() -> None:
    engine = create_engine()
    store, linker = Store(engine), Linker(engine)
    store.set_epoch_deadline(1)
    linker.define_wasi()
    wasi = WasiConfig()
    wasi.argv = ["ask.wasm"]
    store.set_wasi(wasi)
    module = Module(engine, MODULE.read_bytes())
    linker.define_unknown_imports_as_traps(module)
    try:
        linker.instantiate(store, module).exports(store)["_start"](store)
    except ExitTrap:
        return
    raise SystemExit("the example module did not exit")


def run_process(command: list[str]) -> None:
    subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)


def discard(_data: bytes) -> None:
    """Output that nobody reads."""


if __name__ == "__main__":
    main()
