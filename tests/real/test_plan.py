"""Whether a plan holds: the memory of a process that fills all its sessions, against what was said before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from wasi_nn_backend.config import parse_layer, resolve
from wasi_nn_backend.planning import make_plan

pytestmark = pytest.mark.real

#: Runs full windows in all sessions at once, then prints the process's resident bytes without idle sessions' states.
PROGRAM = """
import json, re, sys, threading
from pathlib import Path
from wasi_nn_backend import Backend
config = json.loads(sys.argv[2])
extra = {"sampling": {"temperature": 0, "ignore_eos": True}, "session": {"prompt_mode": "raw"}}
with Backend({**config, **extra}) as backend:
    graph = backend.load_by_name(sys.argv[1])
    contexts = [graph.init_execution_context() for _ in range(config["backend"]["max_concurrent"])]
    n_tokens = config["model"]["n_ctx"] - 30
    threads = [
        threading.Thread(target=context.run_inference, args=(f"{n}" + " the" * n_tokens, {"max_tokens": 8}))
        for n, context in enumerate(contexts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    figures = graph.statistics()
    kib = int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
    print(json.dumps({"n_bytes": kib * 1024 - figures.n_host_bytes, "n_runs": figures.n_runs}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system has no /proc to measure memory with")
@pytest.mark.parametrize("model", ["smollm2_path", "gemma_path"])
@pytest.mark.parametrize(("n_ctx", "n_sequences", "batch_size"), [(512, 2, 512), (256, 8, 128), (768, 3, 512)], ids=str)
def test_a_plan_is_within_a_tenth_of_what_is_measured(
    request: pytest.FixtureRequest, model: str, n_ctx: int, n_sequences: int, batch_size: int
) -> None:
    path: Path = request.getfixturevalue(model)
    config: dict[str, Any] = {
        "model": {"n_ctx": n_ctx, "batch_size": batch_size, "ubatch_size": batch_size},
        "backend": {"max_concurrent": n_sequences, "default_task_timeout_ms": 0},
    }
    planned = make_plan(path, resolve([parse_layer(config, name="test")]), 1 << 40).need.total
    command = [sys.executable, "-c", PROGRAM, str(path), json.dumps(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=110)
    measured = json.loads(done.stdout)
    assert measured["n_runs"] == n_sequences
    assert planned == pytest.approx(measured["n_bytes"], rel=0.1), f"{planned / 2**20:.0f} MiB planned"
