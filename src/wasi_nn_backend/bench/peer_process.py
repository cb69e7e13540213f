"""Another library that generates for several sessions, in a process of its own, with its name as the argument.

Two copies of llama.cpp in one process would get in each other's way. The protocol is a line of JSON each: settings in,
what was loaded out; then prompts in, times out, until the input ends. ``bench/peers.py`` is the other side.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

#: [tokens generated, time of the first, time of the last], of one session.
Times = tuple[int, float, float]
Generate = Callable[[Sequence[list[int]], int], list[Times]]


def main() -> None:
    # Libraries print: the protocol gets a descriptor of its own, and what goes to stdout joins stderr.
    replies = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    settings = json.loads(sys.stdin.readline())
    try:
        generate, facts = OPENERS[sys.argv[1]](settings)
        replies.write(json.dumps(facts) + "\n")
        for line in sys.stdin:
            request = json.loads(line)
            replies.write(json.dumps(generate(request["prompts"], request["n_tokens"])) + "\n")
    except Exception as error:  # the parent reports it
        traceback.print_exc()
        replies.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")


def open_xllamacpp(settings: dict[str, Any]) -> tuple[Generate, dict[str, str]]:
    """llama-server's engine. Without streaming, which is faster: no JSON for each token.

    A slot a session, whose cache holds the session's earlier prompt; nothing that costs time beside it.
    """
    import xllamacpp  # noqa: PLC0415 - only in the process that runs it

    server = xllamacpp.Server(xllamacpp_params(xllamacpp, settings))

    def complete(session: int, prompt: list[int], n_tokens: int) -> Times:
        body = {
            "prompt": prompt,
            "max_tokens": n_tokens,
            "id_slot": session,
            "cache_prompt": True,
            "ignore_eos": True,
            "temperature": 0,
            "samplers": ["top_k"],
            "top_k": 1,
        }
        answer = server.handle_completions(body)
        end_s = time.perf_counter()
        if answer.get("usage", {}).get("completion_tokens") != n_tokens:
            raise RuntimeError(f"asked for {n_tokens} tokens, got {str(answer)[:500]}")
        return n_tokens, end_s - answer["timings"]["predicted_ms"] / 1e3, end_s

    def generate(prompts: Sequence[list[int]], n_tokens: int) -> list[Times]:
        times: dict[int, Times] = {}
        errors: list[Exception] = []

        def run(session: int) -> None:
            try:
                times[session] = complete(session, prompts[session], n_tokens)
            except Exception as error:  # raised again below, on the thread that can report it
                errors.append(error)

        threads = [threading.Thread(target=run, args=(session,)) for session in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return [times[session] for session in range(len(prompts))]

    return generate, {"version": version("xllamacpp"), "system_info": str(xllamacpp.get_system_info()).strip()}


def xllamacpp_params(xllamacpp: Any, settings: dict[str, Any]) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = settings["path"]
    params.n_gpu_layers = 0
    params.n_parallel = settings["n_sessions"]
    params.n_ctx = settings["n_ctx"] * settings["n_sessions"]
    params.kv_unified = settings["kv_unified"]
    flash = xllamacpp.llama_flash_attn_type
    params.flash_attn_type = (
        flash.LLAMA_FLASH_ATTN_TYPE_ENABLED if settings["flash_attention"] else flash.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["n_threads"]
    params.fit_params = False
    params.cache_ram_mib = 0
    params.verbosity = 0
    return params


def open_llama_cpp_python(settings: dict[str, Any]) -> tuple[Generate, dict[str, str]]:
    """The high-level class ``Llama``: one sequence at a time, so it is given one session."""
    import llama_cpp  # noqa: PLC0415

    llama = llama_cpp.Llama(
        settings["path"],
        n_ctx=settings["n_ctx"],
        n_threads=settings["n_threads"],
        n_threads_batch=settings["n_threads"],
        flash_attn=settings["flash_attention"],
        verbose=False,
    )

    def complete(prompt: list[int], n_tokens: int) -> Times:
        tokens = itertools.islice(llama.generate(prompt, temp=0.0), n_tokens)
        next(tokens)
        first_s = time.perf_counter()
        n_generated = 1 + sum(1 for _ in tokens)
        end_s = time.perf_counter()
        if n_generated != n_tokens:
            raise RuntimeError(f"asked for {n_tokens} tokens, got {n_generated}")
        return n_tokens, first_s, end_s

    def generate(prompts: Sequence[list[int]], n_tokens: int) -> list[Times]:
        return [complete(prompt, n_tokens) for prompt in prompts]

    info = llama_cpp.llama_print_system_info().decode()
    return generate, {"version": version("llama-cpp-python"), "system_info": info.strip()}


OPENERS: dict[str, Callable[[dict[str, Any]], tuple[Generate, dict[str, str]]]] = {
    "xllamacpp": open_xllamacpp,
    "llama-cpp-python": open_llama_cpp_python,
}


if __name__ == "__main__":
    main()
