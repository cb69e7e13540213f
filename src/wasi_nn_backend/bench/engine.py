"""The engine against a plain llama.cpp loop: tokens per second at 1, 4, 8 and 16 sequences, in one process.

    python -m wasi_nn_backend.bench.engine --rounds 5

Each round runs both, one after the other, and compares them pair by pair, since a machine's speed drifts. Both compute
the same prompts and generate the same number of tokens greedily, with the same threads, streams and attention.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from wasi_nn_backend import Backend, ExecutionContext
from wasi_nn_backend.bench.raw_loop import RawLoop
from wasi_nn_backend.engine.sizing import n_usable_cores
from wasi_nn_backend.registry import model_path

_log = logging.getLogger(__name__)

N_CTX = 512
#: The round comes first: nothing computed in an earlier round may serve a later one.
PROMPT = (
    "<|im_start|>user\nRound {}. Tell the story of ship {} and its long way home.<|im_end|>\n<|im_start|>assistant\n"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a built-in model's name or a GGUF file")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--tokens", type=int, default=64, help="generated tokens a sequence")
    parser.add_argument("--threads", type=int, default=n_usable_cores())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    path = model_path(arguments.model)
    rows = []
    print(f"{'sequences':>9} {'engine':>12} {'plain loop':>12} {'ratio (median, min, max)':>28}")
    for n_sequences in arguments.sequences:
        row = measure(path, n_sequences, arguments.tokens, arguments.threads, arguments.rounds)
        rows.append(row)
        print(
            f"{n_sequences:>9} {row['engine_tokens_per_s']:>8.1f} t/s {row['plain_tokens_per_s']:>8.1f} t/s "
            f"{row['ratio_median']:>12.3f} {row['ratio_min']:>7.3f} {row['ratio_max']:>7.3f}",
            flush=True,
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2))


def measure(path: Path, n_sequences: int, n_tokens: int, n_threads: int, n_rounds: int) -> dict[str, float]:
    """Medians over rounds of engine and loop in turn; one uncounted round warms both up."""
    config = {
        "backend": {"max_concurrent": n_sequences, "default_task_timeout_ms": 0},
        "model": {"n_ctx": N_CTX, "threads": n_threads, "flash_attention": "off"},
        "sampling": {"temperature": 0, "repeat_penalty": 1.0, "ignore_eos": True},
        "stopping": {"max_tokens": n_tokens},
        "session": {"prompt_mode": "raw", "special": True},
    }
    ratios, engine_rates, plain_rates = [], [], []
    with (
        RawLoop(path, n_sequences=n_sequences, n_ctx=N_CTX, n_threads=n_threads) as loop,
        Backend(config) as backend,
    ):
        graph = backend.load_by_name(str(path))
        contexts = [graph.init_execution_context() for _ in range(n_sequences)]
        for i in range(n_rounds + 1):
            show_progress(f"{n_sequences} sequences, round {i} of {n_rounds}")
            prompts = [PROMPT.format(i, n) for n in range(n_sequences)]
            n_engine, engine_s = timed(partial(run_engine, contexts, prompts))
            n_plain, plain_s = timed(partial(run_plain, loop, prompts, n_tokens))
            if i == 0:
                continue
            engine_rates.append(n_engine / engine_s)
            plain_rates.append(n_plain / plain_s)
            ratios.append(engine_rates[-1] / plain_rates[-1])
        show_progress("")
    return {
        "n_sequences": n_sequences,
        "engine_tokens_per_s": statistics.median(engine_rates),
        "plain_tokens_per_s": statistics.median(plain_rates),
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def run_engine(contexts: list[ExecutionContext], prompts: list[str]) -> int:
    """One compute a context, all at once, each on a thread of its own as guests are. Returns tokens generated."""
    threads = [
        threading.Thread(target=compute, args=(context, prompt))
        for context, prompt in zip(contexts, prompts, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(int(context.metadata["output_tokens"]) for context in contexts)


def compute(context: ExecutionContext, prompt: str) -> None:
    context.set_input(0, prompt)
    context.compute()


def run_plain(loop: RawLoop, prompts: list[str], n_tokens: int) -> int:
    tokenized = [loop.tokenize(prompt.encode()) for prompt in prompts]
    return sum(map(len, loop.generate(tokenized, n_tokens)))


def timed(run: Callable[[], int]) -> tuple[int, float]:
    start_s = time.perf_counter()
    n = run()
    return n, time.perf_counter() - start_s


def show_progress(text: str) -> None:
    """What is being measured: a line on a terminal that the next one replaces, and in the log (level info), from which
    ``wasi-nn bench`` takes it. "" removes the line."""
    if text:
        _log.info("%s", text)
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


if __name__ == "__main__":
    main()
