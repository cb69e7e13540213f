"""The automatic number of threads against fixed ones: quiet, and beside processes that compute all the time.

    python -m wasi_nn_backend.bench.threads --sequences 8 1 --rounds 4

The contestants take turns within a round and are compared round by round, so that they meet the same machine. Whatever
else runs there counts as one more busy process: look at the fixed numbers to see whether "quiet" was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from wasi_nn_backend import Backend, ExecutionContext
from wasi_nn_backend.bench.engine import run_engine, show_progress, timed
from wasi_nn_backend.engine.sizing import n_usable_cores
from wasi_nn_backend.registry import model_path

N_CTX = 512
PROMPT = "Round {}. The story of ship {} and its long way home:"
#: Busy processes end by themselves, should the benchmark be killed.
BUSY_S_MAX = 300.0


@dataclass(frozen=True, slots=True)
class Options:
    """``n_tokens`` are generated a call at 4 sequences; ``threads`` are the fixed numbers."""

    path: Path
    n_tokens: int
    threads: Sequence[int]
    n_rounds: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a built-in model's name or a GGUF file")
    parser.add_argument("--sequences", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2], help="numbers of busy processes")
    parser.add_argument("--tokens", type=int, default=32, help="generated tokens a call, at 4 sequences")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, n_usable_cores()}))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    names = contestant_names(arguments.threads)
    print(f"{'sequences':>9} {'busy':>5}" + "".join(f"{name:>12}" for name in names) + f"{'auto / best':>14}")
    rows = []
    options = Options(model_path(arguments.model), arguments.tokens, arguments.threads, arguments.rounds)
    for n_sequences in arguments.sequences:
        for row in measure_all(options, n_sequences, arguments.busy):
            rows.append(row)
            figures = "".join(f"{each:>8.1f} t/s" for each in row["tokens_per_s"].values())
            print(f"{n_sequences:>9} {row['n_busy']:>5}{figures}{row['auto_to_best']:>14.3f}", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2))


def contestant_names(threads: Sequence[int]) -> list[str]:
    return [f"{n} thread{'s' * (n > 1)}" for n in threads] + ["auto"]


def measure_all(options: Options, n_sequences: int, busy: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row for each number of busy processes; ``tokens_per_s`` has each contestant's median."""
    n_tokens = round(options.n_tokens * 2 / n_sequences**0.5)  # turns of about the same length in seconds
    names = contestant_names(options.threads)
    with contextlib.ExitStack() as stack:
        settings: list[int | str] = [*options.threads, "auto"]
        contestants = [
            stack.enter_context(open_contexts(options.path, n_sequences, n_tokens, threads)) for threads in settings
        ]
        for n_busy in busy:
            with busy_processes(n_busy):
                rates = measure(contestants, options.n_rounds, f"{n_sequences} sequences, {n_busy} busy")
            yield {
                "n_sequences": n_sequences,
                "n_busy": n_busy,
                "auto_to_best": least_ratio(rates[-1], rates[:-1]),
                "tokens_per_s": {name: statistics.median(each) for name, each in zip(names, rates, strict=True)},
            }


@contextlib.contextmanager
def open_contexts(path: Path, n_sequences: int, n_tokens: int, threads: int | str) -> Iterator[list[ExecutionContext]]:
    config = {
        "backend": {"max_concurrent": n_sequences, "default_task_timeout_ms": 0},
        "model": {"n_ctx": N_CTX, "threads": threads},
        "sampling": {"temperature": 0, "repeat_penalty": 1.0, "ignore_eos": True},
        "stopping": {"max_tokens": n_tokens},
        "session": {"prompt_mode": "raw", "special": True},
    }
    with Backend(config) as backend:
        graph = backend.load_by_name(str(path))
        yield [graph.init_execution_context() for _ in range(n_sequences)]


def measure(contestants: list[list[ExecutionContext]], n_rounds: int, title: str) -> list[list[float]]:
    """Tokens per second, of each contestant in each round. Nobody gets a round to warm up: adapting counts."""
    rates: list[list[float]] = [[] for _ in contestants]
    for i in range(n_rounds):
        show_progress(f"{title}, round {i + 1} of {n_rounds}")
        order = list(zip(contestants, rates, strict=True))
        for contexts, mine in order if i % 2 else reversed(order):
            prompts = [PROMPT.format(f"{title} {i}", n) for n in range(len(contexts))]
            n_tokens, duration_s = timed(partial(run_engine, contexts, prompts))
            mine.append(n_tokens / duration_s)
    show_progress("")
    return rates


def least_ratio(mine: list[float], others: list[list[float]]) -> float:
    """The median of the rounds' ratios to the one of ``others`` that it comes out worst against."""
    return min(statistics.median(a / b for a, b in zip(mine, other, strict=True)) for other in others)


@contextlib.contextmanager
def busy_processes(n: int) -> Iterator[None]:
    """``n`` processes that compute, up and running."""
    multiprocess = multiprocessing.get_context("spawn")  # a fork would inherit the engines' locks
    started = multiprocess.Semaphore(0)
    processes = [multiprocess.Process(target=compute_for_nothing, args=(started,), daemon=True) for _ in range(n)]
    for process in processes:
        process.start()
    try:
        for _ in processes:
            if not started.acquire(timeout=60):
                sys.exit("a busy process did not start within a minute: the machine is too busy to measure anything")
        yield
    finally:
        for process in processes:
            process.terminate()
            process.join()


def compute_for_nothing(started: multiprocessing.synchronize.Semaphore) -> None:
    started.release()
    end_s = time.monotonic() + BUSY_S_MAX
    while time.monotonic() < end_s:
        sum(range(10_000))


if __name__ == "__main__":
    main()
