"""Other libraries as contenders: each in a process of its own, which this side starts, asks and ends."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from wasi_nn_backend.bench.workload import Prompt, Span

#: Distribution -> (its module, how to install it). ``bench/peer_process.py`` has a function for each.
PEERS = {
    "xllamacpp": ("xllamacpp", "pip install 'wasi-nn-backend[bench]'"),
    "llama-cpp-python": ("llama_cpp", "make setup"),
}
#: Runs one sequence at a time: sessions would take turns, each at the speed of one, so one stands for all.
ONE_AT_A_TIME = {"llama-cpp-python"}
END_S_MAX = 10.0


@dataclass(frozen=True, slots=True)
class PeerSettings:
    """``n_ctx`` is one session's window in tokens."""

    path: str
    n_sessions: int
    n_ctx: int
    n_threads: int
    kv_unified: bool
    flash_attention: bool


def missing_peers() -> dict[str, str]:
    """Name -> how to install it."""
    return {name: hint for name, (module, hint) in PEERS.items() if importlib.util.find_spec(module) is None}


class Peer:
    """A contender behind a pipe. ``facts`` has its version and what its build uses of the processor."""

    def __init__(self, name: str, process: subprocess.Popen[str], settings: PeerSettings, log: Any) -> None:
        self._name = name
        self._process = process
        self._log = log
        self.facts: dict[str, str] = self._ask(asdict(settings))

    def generate(self, prompts: Sequence[Prompt], n_tokens: int) -> list[Span]:
        if self._name in ONE_AT_A_TIME:
            prompts = prompts[:1]
        times = self._ask({"prompts": [prompt.tokens for prompt in prompts], "n_tokens": n_tokens})
        return [Span(*each) for each in times]

    def _ask(self, request: dict[str, Any]) -> Any:
        reply = None
        if self._process.stdin is not None and self._process.stdout is not None:
            with contextlib.suppress(BrokenPipeError):  # the process is gone, as reading will show
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
            line = self._process.stdout.readline()
            reply = json.loads(line) if line else {"error": f"it ended with status {self._process.wait()}"}
        if isinstance(reply, dict) and "error" in reply:
            self._log.seek(0)
            raise SystemExit(f"{self._name} failed: {reply['error']}\n{self._log.read()[-2000:]}")
        return reply


@contextlib.contextmanager
def open_peer(name: str, settings: PeerSettings) -> Iterator[Peer]:
    """Start a peer and load the model in it. ``SystemExit`` with its last words when it fails, now or later."""
    command = [sys.executable, "-m", "wasi_nn_backend.bench.peer_process", name]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            yield Peer(name, process, settings, log)
        finally:
            end(process)


def end(process: subprocess.Popen[str]) -> None:
    """The end of its input ends it; one that does not listen is killed."""
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    try:
        process.wait(END_S_MAX)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
