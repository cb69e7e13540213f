"""The C libraries: many threads and sessions through the C ABI against the same work in Python, and what a call costs.

    python -m bench.capi --json capi.json

Both have the same threads, sessions, prompts and configuration, and take turns within a round; the speed is tokens
per second of all sessions together. Which tokens share a batch depends on the moment, and with it the last bits of the
logits. So texts are held against those of each session alone, computed once: a text is right if it is equal, or parts
from it where the two most probable tokens were almost equally so. Turns after such a parting have another history and
are not compared.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from wasi_nn_backend import Backend, Graph, __version__
from wasi_nn_backend.bench.engine import show_progress
from wasi_nn_backend.capi.build import build_libraries
from wasi_nn_backend.registry import model_path

RATIO_MIN = 0.95
OVERHEAD_MAX_US = 50
#: Two tokens are almost equally probable when the logarithms of their probabilities differ by less: rounding moves the
#: logits of SmolLM2's four-bit weights by up to half of that.
TIE_MAX = 0.3
N_OVERHEAD_CALLS = 5000

#: (session, turn)
Call = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Work:
    n_threads: int
    n_sessions: int
    n_calls: int
    config: Mapping[str, Any]

    def calls(self) -> Iterator[Call]:
        for call in range(self.n_calls):
            yield call % self.n_sessions, call // self.n_sessions


@dataclass(frozen=True, slots=True)
class Round:
    """What one contender made of all calls."""

    texts: dict[Call, str]
    n_tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.n_tokens / self.seconds


def prompt(session: int, turn: int) -> str:
    return f"Session {session}, turn {turn}: tell me something."


class CClient:
    """bench/capi.c as a process, which waits while it has no command."""

    def __init__(self, program: Path, model: Path, work: Work) -> None:
        counts = (work.n_threads, work.n_sessions, work.n_calls)
        self._work = work
        self._process = subprocess.Popen(
            [program, model, json.dumps(work.config), *map(str, counts)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._commands, self._answers = cast("IO[str]", self._process.stdin), cast("IO[str]", self._process.stdout)

    def run(self, name: str) -> Round:
        self._send(f"round {name}")
        texts, n_tokens = {}, 0
        for _ in range(self._work.n_calls):
            session, turn, text, metadata = self._receive().split(" ", 3)
            texts[int(session), int(turn)] = bytes.fromhex(text).decode()
            n_tokens += json.loads(metadata)["output_tokens"]
        return Round(texts, n_tokens, float(self._receive().split()[1]))

    def overhead(self, n_calls: int) -> dict[str, dict[str, float]]:
        self._send(f"overhead {n_calls}")
        figures: dict[str, dict[str, float]] = json.loads(self._receive())
        return figures

    def close(self) -> None:
        self._process.communicate()

    def _send(self, command: str) -> None:
        self._commands.write(command + "\n")
        self._commands.flush()

    def _receive(self) -> str:
        line = self._answers.readline()
        if not line:
            raise SystemExit(f"the C client ended with {self._process.wait()}; its message is above")
        return line


def run_in_python(graph: Graph, work: Work, name: str) -> Round:
    contexts = [graph.init_execution_context({"session_id": f"{name}, {n}"}) for n in range(work.n_sessions)]
    texts: dict[Call, str] = {}
    n_tokens: dict[Call, int] = {}

    def serve(thread: int) -> None:
        for session, turn in work.calls():
            if session % work.n_threads == thread:
                context = contexts[session]
                context.set_input(0, prompt(session, turn))
                context.compute()
                texts[session, turn] = context.get_output().decode()
                n_tokens[session, turn] = json.loads(context.get_output(1))["output_tokens"]

    threads = [threading.Thread(target=serve, args=(n,)) for n in range(work.n_threads)]
    start_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start_s
    for context in contexts:
        context.close()
    return Round(texts, sum(n_tokens.values()), seconds)


@dataclass(frozen=True, slots=True)
class Alone:
    """A call's text when nothing else is computed, and for each token its text and the two best with probabilities."""

    text: str
    tokens: list[dict[str, Any]]


def run_alone(model: Path, work: Work) -> dict[Call, Alone]:
    found = {}
    config = {**work.config, "max_concurrent": 1, "n_probs": 2, "enable_token_cache_reuse": False}
    with Backend() as backend, backend.load_by_name_with_config(model, config) as graph:
        for session in range(work.n_sessions):
            with graph.init_execution_context() as context:
                for one, turn in work.calls():
                    if one == session:
                        show_progress(f"session {session} alone, turn {turn}")
                        text = context.run_inference(prompt(session, turn))
                        found[session, turn] = Alone(text, context.metadata["probabilities"])
    return found


def judge(texts: Mapping[Call, str], alone: Mapping[Call, Alone]) -> Counter[str]:
    """How many texts are ``equal``, ``near`` (they part at a near tie), ``later`` (after one) and ``wrong``."""
    verdicts: Counter[str] = Counter()
    parted: set[int] = set()
    for (session, turn), reference in sorted(alone.items()):
        text = texts[session, turn]
        if session in parted:
            verdicts["later"] += 1
        elif text == reference.text:
            verdicts["equal"] += 1
        else:
            parted.add(session)
            verdicts["near" if parts_at_near_tie(text, reference) else "wrong"] += 1
    return verdicts


def parts_at_near_tie(text: str, alone: Alone) -> bool:
    """Whether ``text`` begins like the other, and goes on with a token that was almost as probable."""
    common = ""
    for token in alone.tokens:
        if not text.startswith(common + token["text"]):
            best, second = token["top"]
            is_second = text.startswith(common + second["text"]) or text == common
            return is_second and math.log(best["probability"] / second["probability"]) < TIE_MAX
        common += token["text"]
    return False


@contextmanager
def c_client(model: Path, work: Work) -> Iterator[CClient]:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise SystemExit("there is no C compiler: install gcc or clang")
    with tempfile.TemporaryDirectory(prefix="wasi-nn-bench-") as name:
        folder = Path(name)
        show_progress("compiling the C library and bench/capi.c")
        build_libraries(folder, __version__)
        flags = ["-O2", "-pthread", f"-I{folder / 'include'}", f"-L{folder}", f"-Wl,-rpath,{folder}"]
        source = Path(__file__).with_suffix(".c")
        subprocess.run([compiler, *flags, str(source), "-o", str(folder / "capi"), "-lwasi_nn_backend"], check=True)
        client = CClient(folder / "capi", model, work)
        try:
            yield client
        finally:
            client.close()


def measure(model: Path, work: Work, n_rounds: int) -> dict[str, Any]:
    """The first round warms up and is not counted."""
    rounds: dict[str, list[Round]] = {"c": [], "python": []}
    with (
        Backend() as backend,
        backend.load_by_name_with_config(model, work.config) as graph,
        c_client(model, work) as client,
    ):
        for n in range(n_rounds + 1):
            for name in ("c", "python") if n % 2 else ("python", "c"):
                show_progress(f"round {n} of {n_rounds}: {name}")
                done = client.run(f"round {n}") if name == "c" else run_in_python(graph, work, f"round {n}")
                if n:
                    rounds[name].append(done)
            if n:
                show_progress("")
                c, python = rounds["c"][-1].tokens_per_s, rounds["python"][-1].tokens_per_s
                print(f"round {n}: {c:.1f} tokens/s in C, {python:.1f} in Python: {c / python:.3f}", flush=True)
        show_progress("measuring single calls")
        overhead = client.overhead(N_OVERHEAD_CALLS)
    alone = run_alone(model, work)
    verdicts = {name: sum((judge(one.texts, alone) for one in each), Counter()) for name, each in rounds.items()}
    ratios = [c.tokens_per_s / python.tokens_per_s for c, python in zip(*rounds.values(), strict=True)]
    return {
        "tokens_per_s": {name: [one.tokens_per_s for one in each] for name, each in rounds.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "texts": {name: dict(counts) for name, counts in verdicts.items()},
        "overhead": overhead,
    }


def report(figures: Mapping[str, Any]) -> None:
    print(f"{'':>8} {'tokens/s':>9}   texts: equal to alone, near ties, after one, wrong")
    for name, speeds in figures["tokens_per_s"].items():
        texts = figures["texts"][name]
        counts = [texts.get(verdict, 0) for verdict in ("equal", "near", "later", "wrong")]
        print(f"{name:>8} {statistics.median(speeds):>9.1f}   {', '.join(map(str, counts))}")
    print(f"C against Python: {figures['ratio']:.3f} (median); to be at least {RATIO_MIN}")
    for name, times in figures["overhead"].items():
        print(f"{name:>15}: {times['median_us']:.1f} us (median), {times['p99_us']:.1f} us (99th percentile)")
    print(f"to be below {OVERHEAD_MAX_US} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a built-in model's name or a GGUF file")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--sessions", type=int, default=32)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=16, help="generated tokens a call, at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    config = {
        "max_tokens": arguments.tokens,
        "temperature": 0,
        "repeat_penalty": 1.0,
        "n_ctx": 1024,
        "max_concurrent": arguments.threads,
        "default_task_timeout_ms": 0,
    }
    work = Work(arguments.threads, arguments.sessions, arguments.calls, config)
    figures = measure(model_path(arguments.model), work, arguments.rounds)
    show_progress("")
    report(figures)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
