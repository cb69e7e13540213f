"""Prompt speed with llama.cpp's extra buffer types (AMX where the CPU has it) and without, in one process.

    python -m wasi_nn_backend.bench.amx --rounds 5

The two models are loaded side by side and measured in turn, since a machine's speed drifts. On a CPU with AMX the ratio
is to be 2.5 or more; without it the extra buffers hold repacked weights, and the ratio says what those are worth.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

from wasi_nn_backend.engine.sizing import n_usable_cores
from wasi_nn_backend.llama import load_llama
from wasi_nn_backend.llama.context import NativeContext
from wasi_nn_backend.llama.interface import ContextParams, DecodeBatch, DecodeStatus, ModelParams
from wasi_nn_backend.llama.model import NativeModel
from wasi_nn_backend.registry import model_path

MIN_RATIO = 2.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a built-in model's name or a GGUF file")
    parser.add_argument("--tokens", type=int, default=512, help="length of the prompt")
    parser.add_argument("--threads", type=int, default=n_usable_cores())
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    llama = load_llama()
    has_amx = "AMX_INT8 = 1" in llama.system_info
    print(llama.system_info, flush=True)
    contexts = {
        use: open_context(model_path(arguments.model), arguments.tokens, arguments.threads, use_extra_buffers=use)
        for use in (True, False)
    }
    for context in contexts.values():  # the first decode touches the pages and builds the graph
        prompt_tokens_per_s(context, arguments.tokens)
    rounds = [
        {use: prompt_tokens_per_s(context, arguments.tokens) for use, context in contexts.items()}
        for _ in range(arguments.rounds)
    ]
    ratios = [speeds[True] / speeds[False] for speeds in rounds]
    for use, name in ((True, "with extra buffers"), (False, "without")):
        print(f"{name:<20} {statistics.median(speeds[use] for speeds in rounds):8.1f} tokens/s")
    ratio = statistics.median(ratios)
    print(f"{'ratio':<20} {ratio:8.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")
    return int(has_amx and ratio < MIN_RATIO)


def open_context(path: Path, n_tokens: int, n_threads: int, *, use_extra_buffers: bool) -> NativeContext:
    # Past the library, which decides about the extra buffers by itself.
    model = NativeModel(ModelParams(path), load_llama().log, use_extra_buffers=use_extra_buffers)
    return model.create_context(ContextParams(n_ctx=n_tokens, n_batch=n_tokens, n_threads=n_threads))


def prompt_tokens_per_s(context: NativeContext, n_tokens: int) -> float:
    batch = DecodeBatch()
    batch.add([100 + index % 400 for index in range(n_tokens)], 0, 0, logits_for_last=True)
    context.remove(0, 0)
    start_s = time.perf_counter()
    if context.decode(batch) is not DecodeStatus.DONE:
        raise SystemExit("the prompt was not decoded")
    return n_tokens / (time.perf_counter() - start_s)


if __name__ == "__main__":
    sys.exit(main())
