"""Many sessions that generate at the same time: the engine, the plain llama.cpp loop at its best, and other libraries.

    python -m wasi_nn_backend.bench.sessions --json sessions.json

For each number of sessions and length of context: tokens per second of all sessions together, while all of them
generate. Nobody computes a prompt in that time: a first round, not counted, computes the long ones, each later one
changes their last words, and all sessions have one token of the new prompts before they are asked for the many.

engine  with its automatic settings; only n_ctx and max_concurrent are chosen for the point
raw     one llama_decode and an argmax a sequence, in the best of {streams, unified cache} x {flash attention on, off} x
        {one thread, all}, which trials find out for each point
xllamacpp         llama-server's engine, a slot a session, in the cache layout and attention that are best for raw
llama-cpp-python  its class Llama runs one sequence at a time: sessions take turns, so one of them is measured

All generate the same number of tokens a session, greedily and past the model's end. Contenders take turns within a
round and are compared round by round, since a machine's speed drifts. Peers run in processes of their own and wait
while others compute. The plain loop's sessions have copies of one prompt's cells, all others prompts of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from wasi_nn_backend import Backend, ExecutionContext
from wasi_nn_backend.bench.engine import show_progress
from wasi_nn_backend.bench.peers import PEERS, PeerSettings, missing_peers, open_peer
from wasi_nn_backend.bench.raw_loop import RawLoop
from wasi_nn_backend.bench.raw_search import Workload, best_raw
from wasi_nn_backend.bench.workload import Contender, Prompt, PromptMaker, Span, tokens_per_s
from wasi_nn_backend.engine.sizing import n_usable_cores
from wasi_nn_backend.llama import load_llama
from wasi_nn_backend.registry import model_path

#: llama.cpp's windows are multiples of it.
N_CTX_STEP = 256
#: Cells that a run leaves free, and some to spare.
N_CTX_RESERVED = 8
AMX_TARGETS = "at least 2 with short contexts, 1.7 with 1,000 tokens"


@dataclass(frozen=True, slots=True)
class Point:
    """One line of the table. ``n_tokens`` are generated for each session."""

    n_sessions: int
    n_context: int
    n_tokens: int

    @property
    def n_ctx(self) -> int:
        return -(-(self.n_context + self.n_tokens + N_CTX_RESERVED) // N_CTX_STEP) * N_CTX_STEP

    def __str__(self) -> str:
        return f"{self.n_sessions} sessions x {self.n_context} tokens"


@dataclass(frozen=True, slots=True)
class Options:
    path: Path
    n_rounds: int
    n_threads: int
    peers: Sequence[str]


class EngineContender:
    """A backend as its user would set it up for so many sessions of this length; everything else is automatic."""

    def __init__(self, path: Path, point: Point) -> None:
        self._backend = Backend(
            {
                "backend": {"max_concurrent": point.n_sessions, "default_task_timeout_ms": 0},
                "model": {"n_ctx": point.n_ctx},
                "sampling": {"temperature": 0, "repeat_penalty": 1.0, "ignore_eos": True},
                "session": {"prompt_mode": "raw"},
            }
        )
        graph = self._backend.load_by_name(str(path))
        self._contexts = [graph.init_execution_context() for _ in range(point.n_sessions)]

    def generate(self, prompts: Sequence[Prompt], n_tokens: int) -> list[Span]:
        """Each session on a thread of its own, as guests are."""
        spans: dict[int, Span] = {}

        def run(session: int) -> None:
            spans[session] = self._run(self._contexts[session], prompts[session], n_tokens)

        threads = [threading.Thread(target=run, args=(session,)) for session in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if len(spans) < len(prompts):
            raise SystemExit("the engine failed in some sessions: see above")
        return [spans[session] for session in range(len(prompts))]

    def _run(self, context: ExecutionContext, prompt: Prompt, n_tokens: int) -> Span:
        context.run_inference(prompt.text, {"max_tokens": n_tokens})
        end_s = time.perf_counter()
        figures = context.metadata
        if (figures["input_tokens"], figures["output_tokens"]) != (len(prompt.tokens), n_tokens):
            raise RuntimeError(f"{len(prompt.tokens)} tokens in and {n_tokens} out were expected: {figures}")
        generation_s = (figures["duration_ms"] - figures["time_to_first_token_ms"]) / 1e3
        return Span(n_tokens, end_s - generation_s, end_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._backend.close()


def main() -> None:
    arguments = parse_arguments()
    missing = {} if arguments.no_peers else missing_peers()
    for name, hint in missing.items():
        print(f"{name} is left out, it is not installed: {hint}")
    peers = [] if arguments.no_peers else [name for name in PEERS if name not in missing]
    options = Options(model_path(arguments.model), arguments.rounds, arguments.threads, peers)
    start_s = time.monotonic()
    print(f"this build: {load_llama().system_info}", flush=True)
    print_header(peers)
    rows: list[dict[str, Any]] = []
    for row in measure_all(grid(arguments.sessions, arguments.contexts, arguments.tokens), options):
        rows.append(row)
        print_row(row, peers)
    print_summary(rows, peers)
    print(f"took {(time.monotonic() - start_s) / 60:.1f} minutes")
    if arguments.json is not None:
        facts = {"system_info": load_llama().system_info, "n_threads": arguments.threads, "peers_missing": missing}
        arguments.json.write_text(json.dumps(facts | {"points": rows}, indent=2))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a built-in model's name or a GGUF file")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--contexts", type=int, nargs="+", default=[50, 500, 1000], help="tokens of prompt, 16 or more")
    parser.add_argument("--tokens", type=int, default=64, help="generated a session at 4 sessions; fewer with more")
    parser.add_argument("--threads", type=int, default=n_usable_cores(), help="of raw (at most) and the peers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-peers", action="store_true", help="the engine and the plain loop only")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    if min(arguments.contexts) < 16 or min(arguments.sessions) < 1 or arguments.rounds < 1 or arguments.threads < 1:
        parser.error("contexts must be 16 or more; sessions, rounds and threads 1 or more")
    return arguments


def grid(sessions: Sequence[int], contexts: Sequence[int], n_tokens: int) -> list[Point]:
    """``n_tokens`` are generated a session at 4 sessions, and the fewer the more there are."""
    return [
        Point(n_sessions, n_context, max(2, round(n_tokens * 2 / n_sessions**0.5)))
        for n_sessions in sessions
        for n_context in contexts
    ]


def measure_all(points: Sequence[Point], options: Options) -> Iterator[dict[str, Any]]:
    with RawLoop(options.path, n_sequences=1, n_ctx=N_CTX_STEP, n_threads=1) as tokenizer:
        maker = PromptMaker(tokenizer.tokenize)
        for point in points:
            yield measure(point, options, maker)


def measure(point: Point, options: Options, maker: PromptMaker) -> dict[str, Any]:
    """Rates, medians of each round's ratios, and the plain loop's best setting, of one line of the table."""
    show_progress(f"{point}: looking for the plain loop's best setting")
    with contextlib.ExitStack() as stack:
        workload = Workload(options.path, point.n_sessions, point.n_ctx, maker.make(0, 0, point.n_context).tokens)
        raw, trials = stack.enter_context(best_raw(workload, options.n_threads))
        contenders: dict[str, Contender] = {
            "engine": stack.enter_context(EngineContender(options.path, point)),
            "raw": raw,
        }
        settings = PeerSettings(
            path=str(options.path),
            n_sessions=point.n_sessions,
            n_ctx=point.n_ctx,
            n_threads=options.n_threads,
            kv_unified=raw.setting.kv_unified,
            flash_attention=raw.setting.flash_attention,
        )
        facts = {}
        for name in options.peers:
            peer = stack.enter_context(open_peer(name, settings))
            contenders[name], facts[name] = peer, peer.facts
        rates = play_rounds(point, contenders, options.n_rounds, maker)
    return {
        "n_sessions": point.n_sessions,
        "n_context": point.n_context,
        "n_tokens": point.n_tokens,
        "raw_setting": str(raw.setting),
        "raw_trials": trials,
        "tokens_per_s": {name: statistics.median(each) for name, each in rates.items()},
        "ratios": {name: ratios(rates["engine"], each) for name, each in rates.items() if name != "engine"},
        "rounds": rates,
        "peers": facts,
    }


def play_rounds(
    point: Point, contenders: Mapping[str, Contender], n_rounds: int, maker: PromptMaker
) -> dict[str, list[float]]:
    """Tokens per second of each contender in each round, in turn, without the round that computes the prompts."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(n_rounds + 1):
        n_tokens = point.n_tokens if round_ > 0 else max(2, point.n_tokens // 4)
        prompts = [maker.make(session, round_, point.n_context) for session in range(point.n_sessions)]
        names = list(contenders) if round_ % 2 else list(contenders)[::-1]
        for name in names:
            show_progress(f"{point}: {name}, {f'round {round_} of {n_rounds}' if round_ else 'prompts'}")
            contenders[name].generate(prompts, 1)
            rate = tokens_per_s(contenders[name].generate(prompts, n_tokens))
            if round_ > 0:
                rates[name].append(rate)
    show_progress("")
    return rates


def ratios(mine: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    each = [a / b for a, b in zip(mine, others, strict=True)]
    return {"median": statistics.median(each), "min": min(each), "max": max(each)}


def print_header(peers: Sequence[str]) -> None:
    names = ["engine", "raw", *peers]
    rates = "".join(f"{name:>18}" for name in names)
    comparisons = "".join(f"{'/ ' + name:>20}" for name in names[1:])
    print(f"{'sessions':>8} {'context':>7}{rates}{comparisons}   raw's setting", flush=True)


def print_row(row: Mapping[str, Any], peers: Sequence[str]) -> None:
    names = ["engine", "raw", *peers]
    rates = "".join(f"{row['tokens_per_s'][name]:>14.1f} t/s" for name in names)
    medians = "".join(f"{row['ratios'][name]['median']:>20.3f}" for name in names[1:])
    print(f"{row['n_sessions']:>8} {row['n_context']:>7}{rates}{medians}   {row['raw_setting']}", flush=True)


def print_summary(rows: Sequence[Mapping[str, Any]], peers: Sequence[str]) -> None:
    """The points that decide: the least of each comparison."""
    least = min(rows, key=lambda row: row["ratios"]["raw"]["median"])
    print(f"engine / raw is least at {place(least)}: {least['ratios']['raw']['median']:.3f} (at least 0.95)")
    many = [row for row in rows if row["n_sessions"] >= 4]
    if not peers or not many:
        return
    least = min(many, key=lambda row: to_better_peer(row, peers))
    figure = to_better_peer(least, peers)
    print(f"engine / better peer at 4 sessions and more is least at {place(least)}: {figure:.3f} (above 1)")
    for row in rows:
        if row["n_sessions"] == 16:
            print(f"engine / better peer at {place(row)}: {to_better_peer(row, peers):.3f} (AMX: {AMX_TARGETS})")


def to_better_peer(row: Mapping[str, Any], peers: Sequence[str]) -> float:
    return min(float(row["ratios"][name]["median"]) for name in peers)


def place(row: Mapping[str, Any]) -> str:
    return f"{row['n_sessions']} x {row['n_context']}"


if __name__ == "__main__":
    main()
