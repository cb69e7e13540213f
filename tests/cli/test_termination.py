"""SIGTERM: the process ends soon, with status 143, and what was open is closed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.cli.conftest import command_line

#: Its log goes to a file; what handlers are left at the end is its last line of output.
EIGHT_COMPUTES = """
import logging, os, sys
from concurrent.futures import ThreadPoolExecutor
import typer
from wasi_nn_backend import Backend
from wasi_nn_backend.cli import app, main

def serve(path: str, log: str) -> None:
    from wasi_nn_backend.cli.interrupts import run_interruptibly
    run_interruptibly(lambda cancellation: compute(path, log, cancellation))

def compute(path, log, cancellation):
    config = {"max_tokens": 10_000_000, "ignore_eos": True, "n_ctx": 512, "max_concurrent": 8, "prompt_mode": "raw"}
    config |= {"logging": {"file": log, "level": "info", "enable_log": True}}
    with Backend(config) as backend, ThreadPoolExecutor(8) as threads:
        graph = backend.load_by_name(path)
        contexts = [graph.init_execution_context() for _ in range(8)]
        with cancellation.calling(backend.close):
            runs = [threads.submit(context.run_inference, "On and on") for context in contexts]
            while any(context.state != "running" for context in contexts):
                os.sched_yield()
            print("computing", flush=True)
            errors = [type(run.exception()).__name__ for run in runs]
    print(*errors, flush=True)

from wasi_nn_backend.cli.app import app
from wasi_nn_backend.cli.exit_codes import exits_cleanly
app.command("serve")(exits_cleanly(serve))
status = main(["serve", *sys.argv[1:]])
print(*(type(handler).__name__ for handler in logging.getLogger("wasi_nn_backend").handlers))
sys.exit(status)
"""

DEAF_WORK = """
import logging
logging.basicConfig()
import sys, threading
from wasi_nn_backend.cli.interrupts import run_interruptibly
def work(cancellation):
    print("deaf", flush=True)
    threading.Event().wait()
run_interruptibly(work)
"""


def terminate(*argv: str) -> tuple[int, str, str, float]:
    """Status, the output after the first line, stderr, and how long it took after SIGTERM."""
    child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline()
    start_s = time.monotonic()
    child.send_signal(signal.SIGTERM)
    rest, errors = child.communicate(timeout=60)
    return child.returncode, rest, errors, time.monotonic() - start_s


def test_sigterm_during_eight_computes(tiny_model_path: Path, tmp_path: Path) -> None:
    """Soon, and with a log that is closed: it tells of each of them, its last line is whole and says that this is the
    end, and nobody has the file open any more."""
    log = tmp_path / "log"
    argv = (sys.executable, "-c", EIGHT_COMPUTES, str(tiny_model_path), str(log))
    status, rest, errors, duration_s = terminate(*argv)
    assert (status, rest.split(), errors) == (143, [*["Cancelled"] * 8, "NullHandler"], "")
    assert duration_s < 3
    lines = log.read_text().splitlines(keepends=True)
    assert sum(" reason=cancelled " in line for line in lines) == 8
    assert lines[-1].endswith("info: the backend is closed: nothing runs any more\n")


def test_sigterm_does_not_wait_for_work_that_does_not_hear_it() -> None:
    status, _, errors, duration_s = terminate(sys.executable, "-c", DEAF_WORK)
    assert status == 143
    assert "the work does not end" in errors
    assert duration_s < 4


def test_sigterm_between_two_messages_ends_a_chat(tiny_model_path: Path) -> None:
    """Nothing computes then: the main thread waits for its next line."""
    argv = command_line("chat", "--model", tiny_model_path, "--max-tokens", "2")
    child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(b"Hello\n")
    child.stdin.flush()
    assert child.stdout.readline()
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (143, b"")
