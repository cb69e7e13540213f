"""A light user beside one with 50 long requests: how long until its first token, against what that takes alone.

    python -m wasi_nn_backend.bench.fairness --json fairness.json

alone   nobody else computes: an empty queue, every place in the batch free
beside  another user always has 50 requests in the system, each with a long prompt and a long answer, of which as many
        run as the batch has places. It is measured with and without ``backend.fair_scheduling_enabled``

Medians over many requests (without fair scheduling it is one, which takes minutes), each with a prompt that nothing
in the cache begins with. Rounds of one and the other take turns, and are compared with each other, since a machine's
speed drifts. The light user's requests come when the other user has got so many pieces of text, while prompts are
computed, too.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from wasi_nn_backend import Backend, Cancelled, Graph
from wasi_nn_backend.bench.engine import show_progress
from wasi_nn_backend.bench.raw_loop import RawLoop
from wasi_nn_backend.bench.workload import PromptMaker
from wasi_nn_backend.registry import model_path

N_CTX = 1024
TARGET = "at most 2"


@dataclass(frozen=True, slots=True)
class Options:
    """Lengths in tokens."""

    path: Path
    n_heavy: int
    n_heavy_prompt: int
    n_heavy_answer: int
    n_light_prompt: int
    n_places: int
    n_rounds: int
    n_samples: int  # in a round


class Prompts:
    """Each is another one from its first words on. Thread-safe."""

    def __init__(self, maker: PromptMaker) -> None:
        self._maker = maker
        self._lock = threading.Lock()
        self._n_made = 0

    def make(self, n_tokens: int) -> str:
        with self._lock:
            self._n_made += 1
            return self._maker.make(self._n_made, 0, n_tokens).text


class Load:
    """A user who always has so many requests in the system, from ``start`` to ``stop``."""

    def __init__(self, graph: Graph, options: Options, prompts: Prompts) -> None:
        self._options = options
        self._prompts = prompts
        self._contexts = [graph.init_execution_context({"user_id": "heavy"}) for _ in range(options.n_heavy)]
        self._changed = threading.Condition()
        self._n_pieces = 0
        self._is_over = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within the block, from when somebody of it generates."""
        self._is_over = False
        with ThreadPoolExecutor(len(self._contexts)) as threads:
            runs = [threads.submit(self._ask_on, n) for n in range(len(self._contexts))]
            try:
                self.wait_for_pieces(1)
                yield
            finally:
                self._is_over = True
                for context in self._contexts:
                    context.cancel()
        for run in runs:
            run.result()

    def wait_for_pieces(self, n_pieces: int) -> None:
        """Until so many more pieces of text have come."""
        with self._changed:
            n_then = self._n_pieces + n_pieces
            self._changed.wait_for(lambda: self._n_pieces >= n_then)

    def _has_ended(self) -> bool:
        return self._is_over  # asked by a method: a type checker would think that it stays what it was

    def _ask_on(self, number: int) -> None:
        context, options = self._contexts[number], self._options
        while not self._has_ended():
            config = {"max_tokens": options.n_heavy_answer}
            try:
                for _ in context.stream(self._prompts.make(options.n_heavy_prompt), config):
                    with self._changed:
                        self._n_pieces += 1
                        self._changed.notify_all()
                    if self._has_ended():
                        break
            except Cancelled:
                break


def main() -> None:
    options, json_path = parse_arguments()
    start_s = time.monotonic()
    print(f"{'fair':>5} {'alone':>10} {'beside':>10} {'beside / alone':>22}", flush=True)
    with RawLoop(options.path, n_sequences=1, n_ctx=256, n_threads=1) as tokenizer:
        prompts = Prompts(PromptMaker(tokenizer.tokenize))
        rows = []
        for is_fair in (True, False):
            rows.append(measure(options, prompts, is_fair=is_fair))
            show(rows[-1])
    print(f"with fair scheduling {rows[0]['ratio_median']:.2f} ({TARGET}), without {rows[1]['ratio_median']:.2f}")
    print(f"took {time.monotonic() - start_s:.0f} seconds")
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=2))


def parse_arguments() -> tuple[Options, Path | None]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a built-in model's name or a GGUF file")
    parser.add_argument("--requests", type=int, default=50, help="of the other user")
    parser.add_argument("--prompt", type=int, default=200, help="tokens of each of its prompts")
    parser.add_argument("--answer", type=int, default=100, help="tokens of each of its answers")
    parser.add_argument("--light-prompt", type=int, default=60, help="tokens of the light user's prompts")
    parser.add_argument("--places", type=int, default=10, help="in the batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=8, help="the light user's requests in a round")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    each = parser.parse_args()
    if each.prompt + each.answer > N_CTX - 8 or min(each.prompt, each.light_prompt) < 16 or each.rounds < 1:
        parser.error(f"prompts have 16 tokens or more, with the answer {N_CTX - 8} at most; one round or more")
    options = Options(
        path=model_path(each.model),
        n_heavy=each.requests,
        n_heavy_prompt=each.prompt,
        n_heavy_answer=each.answer,
        n_light_prompt=each.light_prompt,
        n_places=each.places,
        n_rounds=each.rounds,
        n_samples=each.samples,
    )
    return options, each.json


def measure(options: Options, prompts: Prompts, *, is_fair: bool) -> dict[str, Any]:
    """Times to the first token in ms, and medians and extremes of the rounds' ratios."""
    config = {
        "backend": {
            "max_concurrent": options.n_places,
            "max_sessions": options.n_heavy + 2,
            "fair_scheduling_enabled": is_fair,
            "default_task_timeout_ms": 0,
        },
        "model": {"n_ctx": N_CTX},
        "sampling": {"temperature": 0, "repeat_penalty": 1.0, "ignore_eos": True},
        "session": {"prompt_mode": "raw"},
    }
    alone: list[list[float]] = []
    beside: list[list[float]] = []
    chooser = random.Random(1)
    with Backend(config) as backend:
        graph = backend.load_by_name(str(options.path))
        load = Load(graph, options, prompts)
        ask(graph, options, prompts)  # warms up
        n_rounds = options.n_rounds if is_fair else 1
        for n in range(n_rounds):
            show_progress(f"fair {is_fair}: round {n + 1} of {n_rounds}")
            alone.append([ask(graph, options, prompts) for _ in range(options.n_samples)])
            times = []
            with load.running():
                for _ in range(options.n_samples if is_fair else 1):
                    load.wait_for_pieces(chooser.randrange(1, 3 * options.n_places))
                    times.append(ask(graph, options, prompts))
            beside.append(times)
        show_progress("")
    ratios = [statistics.median(b) / statistics.median(a) for a, b in zip(alone, beside, strict=True)]
    return {
        "is_fair": is_fair,
        "alone_ms": statistics.median(chain.from_iterable(alone)),
        "beside_ms": statistics.median(chain.from_iterable(beside)),
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "rounds": {"alone_ms": alone, "beside_ms": beside},
    }


def ask(graph: Graph, options: Options, prompts: Prompts) -> float:
    """One request of the light user, a session of its own; its time to the first token in ms."""
    with graph.init_execution_context({"user_id": "light", "max_tokens": 4}) as context:
        context.run_inference(prompts.make(options.n_light_prompt))
        return float(context.metadata["time_to_first_token_ms"])


def show(row: dict[str, Any]) -> None:
    ratios = f"{row['ratio_median']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
    name = "on" if row["is_fair"] else "off"
    print(f"{name:>5} {row['alone_ms']:>7.0f} ms {row['beside_ms']:>7.0f} ms {ratios:>22}", flush=True)


if __name__ == "__main__":
    main()
