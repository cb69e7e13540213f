"""The engine's own time: what a step takes outside of llama_decode and the samplers, as a share of the step.

    python -m wasi_nn_backend.bench.overhead --sequences 1 4 16 32

A step is measured from one llama_decode to the next, while all sequences generate and nothing else happens. The timers
are put around llama_decode itself and around the samplers' ``sample`` from outside, and count as the engine's time.
Sampling is greedy, the shortest there is, so the shares are at their largest.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from wasi_nn_backend import Backend, ExecutionContext
from wasi_nn_backend.bench.engine import show_progress
from wasi_nn_backend.llama.bindings import native
from wasi_nn_backend.llama.interface import Context, Sampler, SamplerStage
from wasi_nn_backend.llama.model import NativeModel
from wasi_nn_backend.registry import model_path

N_CTX = 512
PROMPT = "Round {}. The story of ship {} and its long way home:"
SHARE_MAX = 0.03
N_SEQUENCES_JUDGED = 16


@dataclass(frozen=True, slots=True)
class Interval:
    """Time spent in llama.cpp or a sampler. ``n_tokens`` is a decode's batch, 0 for sampling."""

    start_s: float
    end_s: float
    n_tokens: int = 0


class TimedSampler:
    """A sampler whose ``sample`` leaves its times behind."""

    def __init__(self, sampler: Sampler, intervals: list[Interval]) -> None:
        self._sampler = sampler
        self._intervals = intervals

    def sample(self, context: Context, row: int) -> int:
        start_s = time.perf_counter()
        token = self._sampler.sample(context, row)
        self._intervals.append(Interval(start_s, time.perf_counter()))
        return token

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)


@contextlib.contextmanager
def timers() -> Iterator[list[Interval]]:
    """Every decode and every sampling within, in the order in which they ended."""
    intervals: list[Interval] = []
    decode, create_sampler = native.llama_decode, NativeModel.create_sampler

    def timed_decode(context: Any, batch: Any) -> Any:
        start_s = time.perf_counter()
        result = decode(context, batch)
        intervals.append(Interval(start_s, time.perf_counter(), batch.n_tokens))
        return result

    def timed_sampler(self: NativeModel, stages: tuple[SamplerStage, ...]) -> TimedSampler:
        return TimedSampler(create_sampler(self, stages), intervals)

    with patch.object(native, "llama_decode", timed_decode), patch.object(NativeModel, "create_sampler", timed_sampler):
        yield intervals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a built-in model's name or a GGUF file")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--tokens", type=int, default=64, help="generated tokens a sequence")
    parser.add_argument("--rounds", type=int, default=4, help="the first is not counted")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    path = model_path(arguments.model)
    rows = []
    print(f"{'sequences':>9} {'step':>10} {'llama_decode':>14} {'samplers':>10} {'engine':>10} {'share (median)':>15}")
    for n_sequences in arguments.sequences:
        row = measure(path, n_sequences, arguments.tokens, arguments.rounds)
        rows.append(row)
        print(
            f"{n_sequences:>9} {row['step_ms']:>7.2f} ms {row['decode_ms']:>11.2f} ms {row['sampling_ms']:>7.2f} ms "
            f"{row['engine_ms']:>7.2f} ms {row['share']:>14.2%}",
            flush=True,
        )
    print(f"to be below {SHARE_MAX:.0%} at {N_SEQUENCES_JUDGED} sequences")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2))


def measure(path: Path, n_sequences: int, n_tokens: int, n_rounds: int) -> dict[str, float]:
    config = {
        "backend": {"max_concurrent": n_sequences, "default_task_timeout_ms": 0},
        "model": {"n_ctx": N_CTX},
        "sampling": {"temperature": 0, "repeat_penalty": 1.0, "ignore_eos": True},
        "stopping": {"max_tokens": n_tokens},
        "session": {"prompt_mode": "raw", "special": True},
    }
    steps: list[dict[str, float]] = []
    with timers() as intervals, Backend(config) as backend:
        graph = backend.load_by_name(str(path))
        contexts = [graph.init_execution_context() for _ in range(n_sequences)]
        for i in range(n_rounds):
            show_progress(f"{n_sequences} sequences, round {i + 1} of {n_rounds}")
            intervals.clear()
            run_all(contexts, [PROMPT.format(i, n) for n in range(n_sequences)])
            if i > 0 or n_rounds == 1:
                steps += full_steps(intervals, n_sequences)
    show_progress("")
    if not steps:
        raise SystemExit("no step had all sequences in it: raise --tokens")
    medians = {name: statistics.median(step[name] for step in steps) for name in steps[0]}
    return {"n_sequences": n_sequences, "n_steps": len(steps), **medians}


def run_all(contexts: list[ExecutionContext], prompts: list[str]) -> None:
    """One compute a context, all at once, each on a thread of its own as guests are."""
    threads = [
        threading.Thread(target=context.run_inference, args=(prompt,))
        for context, prompt in zip(contexts, prompts, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def full_steps(intervals: list[Interval], n_sequences: int) -> list[dict[str, float]]:
    """Milliseconds, and the engine's share, of each step that generated for all sequences and was followed by one."""
    decodes = [i for i, interval in enumerate(intervals) if interval.n_tokens]
    steps = []
    for this, following in itertools.pairwise(decodes):
        decode = intervals[this]
        if not decode.n_tokens == intervals[following].n_tokens == n_sequences:
            continue
        step_s = intervals[following].start_s - decode.start_s
        decode_s = decode.end_s - decode.start_s
        sampling_s = covered_s(intervals[this + 1 : following])
        engine_s = step_s - decode_s - sampling_s
        steps.append(
            {
                "step_ms": step_s * 1e3,
                "decode_ms": decode_s * 1e3,
                "sampling_ms": sampling_s * 1e3,
                "engine_ms": engine_s * 1e3,
                "share": engine_s / step_s,
            }
        )
    return steps


def covered_s(intervals: list[Interval]) -> float:
    """The time in at least one of them: samplers may work side by side."""
    total_s, until_s = 0.0, 0.0
    for interval in sorted(intervals, key=lambda each: each.start_s):
        total_s += max(0.0, interval.end_s - max(interval.start_s, until_s))
        until_s = max(until_s, interval.end_s)
    return total_s


if __name__ == "__main__":
    main()
