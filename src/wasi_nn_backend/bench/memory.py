"""What the KV memory's promises cost: conversations, shared prompts, idle sessions, sessions that come back.

    python -m wasi_nn_backend.bench.memory

Each figure is a ratio of two things measured in this run, on the built-in model unless told otherwise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wasi_nn_backend import Backend, ExecutionContext, Graph
from wasi_nn_backend.bench.engine import show_progress

#: What is printed, and the same by name for the JSON file.
Figures = tuple[str, dict[str, float]]
FILLER = "The committee met on the third day and read the report of the second, which was long and had many parts. "


@contextmanager
def graph_of(model: str, **config: object) -> Iterator[Graph]:
    settings = {"temperature": 0, "repeat_penalty": 1.0, "ignore_eos": True, "max_tokens": 16, "prompt_mode": "raw"}
    with Backend(settings | config | {"default_task_timeout_ms": 0}) as backend:
        yield backend.load_by_name(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a built-in model's name or a GGUF file")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    figures: dict[str, float] = {}
    for measure in (conversation, shared_prompt, idle_sessions, returning_session):
        show_progress(f"measuring: {measure.__name__}")
        text, measured = measure(arguments.model)
        figures |= measured
        show_progress("")
        print(text, flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2))


def conversation(model: str) -> Figures:
    """Time to first token of turn 10 against turn 2: the history must not be computed again."""
    ratios = []
    for _ in range(3):
        with graph_of(model, prompt_mode="chat", n_ctx=4096, max_tokens=32) as graph:
            context = graph.init_execution_context()
            times = []
            for turn in range(10):
                context.run_inference(f"Tell me fact number {turn} about the sea, please, in a few words.")
                times.append(context.metadata["time_to_first_token_ms"])
            ratios.append(times[9] / times[1])
    ratio = statistics.median(ratios)
    return f"conversation: first token of turn 10 / of turn 2: {ratio:.2f} (at most 1.5)", {"conversation": ratio}


def shared_prompt(model: str) -> Figures:
    """16 sessions arrive together with one system prompt of some 1,000 tokens."""
    n_sessions = 16
    with graph_of(model, max_concurrent=n_sessions, n_ctx=1536, max_tokens=1) as graph:
        system = FILLER * 45
        alone = graph.init_execution_context({"cache_salt": "alone"})
        start_s = time.perf_counter()
        alone.run_inference(f"{system}Question: who?")
        alone_s = time.perf_counter() - start_s
        n_prompt = alone.metadata["input_tokens"]
        alone.run_inference(f"Question {n_sessions - 1}: who?")
        n_own = alone.metadata["input_tokens"]
        alone.close()
        contexts = [graph.init_execution_context() for _ in range(n_sessions)]
        start_s = time.perf_counter()
        run_all(contexts, [f"{system}Question {i}: who?" for i in range(n_sessions)])
        together_s = time.perf_counter() - start_s
        n_computed = sum(c.metadata["input_tokens"] - c.metadata["reused_tokens"] for c in contexts)
    ratio = together_s / (n_sessions * alone_s)
    return (
        f"shared prompt of {n_prompt} tokens, {n_sessions} sessions: {n_computed} tokens computed; all first tokens "
        f"after {ratio:.3f} of computing it {n_sessions} times (at most 0.2)",
        {
            "shared_prompt": ratio,
            "shared_prompt_tokens_computed": n_computed,
            "shared_prompt_tokens": n_prompt,
            "shared_prompt_tokens_own": n_own,
        },
    )


def idle_sessions(model: str) -> Figures:
    """Four sessions generate beside 0, 10 and 100 that rest with 500 tokens each."""
    rates = []
    for n_idle in (0, 10, 100):
        with graph_of(model, max_concurrent=8, n_ctx=1024, max_tokens=48) as graph:
            rest = [graph.init_execution_context({"max_tokens": 1}) for _ in range(n_idle)]
            shared = FILLER * 22
            for i, context in enumerate(rest):
                context.run_inference(f"{shared} Number {i}.")
            contexts = [graph.init_execution_context() for _ in range(4)]
            seconds = []
            for turn in range(4):
                start_s = time.perf_counter()
                run_all(contexts, [f"Round {turn}, story {i}: once upon a time" for i in range(4)])
                seconds.append(time.perf_counter() - start_s)
            rates.append(statistics.median(seconds[1:]))
    beside_10, beside_100 = rates[1] / rates[0], rates[2] / rates[0]
    return (
        f"idle sessions: time beside 10 / 0: {beside_10:.3f}, beside 100 / 0: {beside_100:.3f} (at most 1.05)",
        {"beside_10_idle": beside_10, "beside_100_idle": beside_100},
    )


def returning_session(model: str) -> Figures:
    """A session that had to leave for host memory, against one that is computed again."""
    with graph_of(model, max_concurrent=1, n_ctx=2048, max_tokens=1, enable_token_cache_reuse=False) as graph:
        first, other = graph.init_execution_context(), graph.init_execution_context()
        prompt = FILLER * 40
        back_s, anew_s = [], []
        for turn in range(4):
            first.run_inference(f"{turn} {prompt}")
            anew_s.append(first.metadata["time_to_first_token_ms"])
            other.run_inference("Somebody else.")
            first.run_inference(f"{turn} {prompt} And then")
            back_s.append(first.metadata["time_to_first_token_ms"])
    ratio = statistics.median(back_s) / statistics.median(anew_s)
    return f"back from host memory / computed again: {ratio:.3f} (at most 0.1)", {"back_from_host_memory": ratio}


def run_all(contexts: list[ExecutionContext], prompts: list[str]) -> None:
    threads = [
        threading.Thread(target=context.run_inference, args=(prompt,))
        for context, prompt in zip(contexts, prompts, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
