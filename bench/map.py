"""`wasi-nn map` against the engine alone: tokens per second over 200 lines, a guest a line, at 8 jobs.

    python -m bench.map --lines 200 --jobs 8

In turns of some lines each: a pool of guests runs the example module once a line, as the command does; then as many
threads call the same engine directly with as many prompts. All generate the same number of tokens. What the command
needs before its first line, to start and to load the model, is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from wasi_nn_backend import Backend, Graph
from wasi_nn_backend.bench.engine import show_progress, timed
from wasi_nn_backend.cli.map_lines import config_of_line
from wasi_nn_backend.host import GuestPool, RunConfig

MODULE = Path(__file__).parents[1] / "examples" / "c" / "ask.wasm"
PROMPT = "Round {}. The story of ship {} and its long way home:"
N_ROUNDS = 5
RATIO_MIN = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a built-in model's name or a GGUF file")
    parser.add_argument("--lines", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48, help="generated tokens a line")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    config = {
        "backend": {"max_concurrent": arguments.jobs, "default_task_timeout_ms": 0},
        "model": {"n_ctx": 512},
        "memory": {"context_shifting": False},
        "sampling": {"temperature": 0, "repeat_penalty": 1.0, "ignore_eos": True},
        "stopping": {"max_tokens": arguments.tokens},
        "session": {"prompt_mode": "raw"},
    }
    with Backend(config) as backend, GuestPool(backend, arguments.jobs) as pool:
        backend.register("default", arguments.model)
        row = measure(backend.load_by_name("default"), pool, arguments.lines, arguments.jobs)
    print(
        f"map {row['map_tokens_per_s']:.1f} t/s, engine {row['engine_tokens_per_s']:.1f} t/s at {arguments.jobs}: "
        f"ratio {row['ratio']:.3f} (rounds {row['ratio_min']:.3f} to {row['ratio_max']:.3f}), at least {RATIO_MIN}"
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(row, indent=2))


def measure(graph: Graph, pool: GuestPool, n_lines: int, n_jobs: int) -> dict[str, float]:
    """Both in turns; the ratio is of the sums. One uncounted round warms both up."""
    n_per_round = max(1, n_lines // N_ROUNDS)
    n_tokens = graph.settings.stopping.max_tokens
    ratios, map_total_s, engine_total_s = [], 0.0, 0.0
    for i in range(N_ROUNDS + 1):
        show_progress(f"round {i} of {N_ROUNDS}")
        prompts = [PROMPT.format(2 * i, n) for n in range(n_per_round)]
        others = [PROMPT.format(2 * i + 1, n) for n in range(n_per_round)]
        _, map_s = timed(partial(run_map, pool, prompts))
        _, engine_s = timed(partial(run_engine, graph, others, n_jobs))
        if i:
            ratios.append(engine_s / map_s)
            map_total_s += map_s
            engine_total_s += engine_s
    show_progress("")
    n_tokens_total = n_per_round * N_ROUNDS * n_tokens
    return {
        "map_tokens_per_s": n_tokens_total / map_total_s,
        "engine_tokens_per_s": n_tokens_total / engine_total_s,
        "ratio": engine_total_s / map_total_s,
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def run_map(pool: GuestPool, prompts: list[str]) -> int:
    base = RunConfig(MODULE.read_bytes(), args=["default"])
    n_done = 0
    for output in pool.map(config_of_line(json.dumps(prompt).encode(), base) for prompt in prompts):
        if output.error is not None:
            raise SystemExit(f"a guest failed: {output.error}")
        n_done += 1
    return n_done


def run_engine(graph: Graph, prompts: list[str], n_jobs: int) -> int:
    source = iter(prompts)
    lock = threading.Lock()

    def take() -> Iterator[str]:
        while True:
            with lock:
                prompt = next(source, None)
            if prompt is None:
                return
            yield prompt

    def work() -> None:
        with graph.init_execution_context() as context:
            for prompt in take():
                context.set_input(0, prompt)
                context.compute()

    threads = [threading.Thread(target=work) for _ in range(n_jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(prompts)


if __name__ == "__main__":
    main()
