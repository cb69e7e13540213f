"""``wasi-nn top``: figures of another process, on a terminal, as text and as JSON."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import socket
import struct
import subprocess
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from tests.cli.conftest import Command, command_line
from tests.fakes.llama import FakeLlama
from wasi_nn_backend import Backend
from wasi_nn_backend.cli.load_table import Load, LoadRow, measure_load, render_load
from wasi_nn_backend.cli.status_client import StatusSample, server_url
from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.metrics import MetricsServer, serve_metrics

CONFIG: dict[str, Any] = {
    "sampling": {"temperature": 0, "ignore_eos": True},
    "session": {"prompt_mode": "raw"},
    "stopping": {"max_tokens": 6},
    "model": {"n_ctx": 512},
    "backend": {"max_concurrent": 4},
}
N_COLUMNS = 80


class Clock:
    """Stands still unless a test moves it."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def backend(clock: Clock, tiny_model_path: Path) -> Iterator[Backend]:
    with Backend(CONFIG, llama=FakeLlama(), clock=clock) as backend:
        backend.register("assistant", tiny_model_path)
        backend.register("other", tiny_model_path)
        yield backend


@pytest.fixture
def server(backend: Backend) -> Iterator[MetricsServer]:
    with serve_metrics(backend, 0) as server:
        yield server


@pytest.fixture
def between_samples(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """What happens while the command waits, which it then does not."""

    def do(action: Callable[[], object]) -> None:
        monkeypatch.setattr("wasi_nn_backend.cli.top.sleep", lambda _duration_s: action())

    return do


# Figures.


def test_speeds_are_differences_of_counters(
    backend: Backend,
    server: MetricsServer,
    clock: Clock,
    wasi_nn_here: Command,
    between_samples: Callable[[Callable[[], object]], None],
) -> None:
    context = backend.load_by_name("assistant").init_execution_context()
    backend.load_by_name("other")
    context.run_inference("before")

    def work() -> None:
        context.reset()
        context.run_inference("twelve bytes")
        clock.now_s += 2.0

    between_samples(work)
    done = wasi_nn_here("top", server.port, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    load = json.loads(done.stdout)
    assert [row["name"] for row in load["graphs"]] == ["assistant", "other"]
    first, second = load["graphs"]
    assert first["tokens_per_s"] == load["total"]["tokens_per_s"] == 6 / 2.0
    n_computed = context.metadata["input_tokens"] - context.metadata["reused_tokens"]
    assert first["prompt_tokens_per_s"] == (n_computed + 6 - 1 - 6) / 2.0
    assert second["tokens_per_s"] == 0
    assert first["n_sequences_per_step"] == 1.0
    assert (first["n_sequences"], first["n_cells"]) == (4, 4 * 512)
    assert load["total"]["n_cells"] == 4 * 512, "both graphs have the same engine, which counts once"
    assert (first["n_sessions"], second["n_sessions"], load["total"]["n_sessions"]) == (1, 0, 1)
    assert load["finished"] == {"length": 2}
    assert load["pid"] == os.getpid()


def sample(pid: int = 1, now_s: float = 0.0, **tasks: int) -> StatusSample:
    engine = {"id": 1, "n_steps": 10, "n_sequence_steps": 25, "n_sequences": 8, "n_running": 3}
    engine |= {"n_cells": 100, "n_cells_used": 10, "n_host_bytes": 0}
    graph = {"name": "g", "n_sessions": 1, "n_queued": 0, "n_running": 1, "engine": engine}
    counts = {"graph": "g", "n_by_reason": {}, "n_tokens_computed": 0, "n_tokens_generated": 0} | tasks
    backend = {"name": "", "graphs": [graph], "engines": [engine], "tasks": [counts], "now_s": now_s}
    return StatusSample.model_validate({"pid": pid, "backends": [backend]})


def test_what_began_anew_has_no_speed_and_none_is_negative() -> None:
    now = sample(now_s=1.0, n_tokens_generated=5, n_tokens_computed=9)
    assert measure_load(now, None).total.tokens_per_s is None
    assert measure_load(now, sample(pid=2)).total.tokens_per_s is None
    assert measure_load(now, now).total.tokens_per_s is None
    load = measure_load(now, sample(n_tokens_generated=50, n_tokens_computed=90))
    assert (load.total.tokens_per_s, load.total.prompt_tokens_per_s) == (0.0, 0.0)
    assert measure_load(now, sample()).rows[0].prompt_tokens_per_s == 4.0
    assert measure_load(now, sample()).rows[0].n_sequences_per_step == 3.0, "without a step in between: what runs now"


# What is shown.


def rendered(load: Load, n_columns: int = N_COLUMNS, problem: str | None = None) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=n_columns).print(render_load(load, "http://127.0.0.1:9100", problem))
    return text.getvalue().splitlines()


COUNTS = st.integers(0, 10**40)
SPEEDS = st.none() | st.floats(0, 1e40)
ROWS = st.builds(
    LoadRow,
    name=st.text(max_size=200) | st.just("语" * 90) | st.just("\x1b[31m\n\t"),
    n_sessions=COUNTS,
    n_queued=COUNTS,
    n_running=COUNTS,
    n_sequences_per_step=st.floats(0, 1e40),
    n_sequences=COUNTS,
    n_cells_used=COUNTS,
    n_cells=COUNTS,
    tokens_per_s=SPEEDS,
    prompt_tokens_per_s=SPEEDS,
)


@settings(max_examples=30)
@given(
    st.builds(
        Load,
        pid=st.integers(1, 2**31),
        rows=st.lists(ROWS, max_size=4).map(tuple),
        total=ROWS,
        n_by_reason=st.dictionaries(st.text(max_size=100), COUNTS, max_size=9),
        n_host_bytes=COUNTS,
    ),
    st.none() | st.text(max_size=300),
)
def test_nothing_is_wider_than_80_columns_or_steers_the_terminal(load: Load, problem: str | None) -> None:
    lines = rendered(load, problem=problem)
    assert max(map(cell_len, lines)) <= N_COLUMNS
    assert all(line.isprintable() for line in lines)
    for title in ("Graph", "Sessions", "Queued", "Batch", "KV cells", "Tokens/s", "Prompt/s"):
        assert title in lines[2]
    assert len([line for line in lines if "─" not in line]) >= len(load.rows)


def test_numbers_are_whole_at_80_columns_and_long_names_are_cut() -> None:
    row = LoadRow(
        name="/models/a-directory/a-model-with-a-name-that-is-long.gguf",
        n_sessions=9999,
        n_queued=500,
        n_running=256,
        n_sequences_per_step=255.9,
        n_sequences=256,
        n_cells_used=9_994_000,
        n_cells=10_000_000,
        tokens_per_s=12_345.6,
        prompt_tokens_per_s=99.94,
    )
    load = Load(pid=1, rows=(row,), total=row, n_by_reason={"stop": 7}, n_host_bytes=1 << 20)
    (line,) = [line for line in rendered(load) if "a-model" in line]
    assert line.split() == ["a-model-with…", "10.0k", "500", "256/256", "9.99M/10.0M", "100%", "12.3k", "100"]
    assert "7 requests are over (7 stop); 1 MiB of sessions in host memory" in rendered(load)


class Terminal:
    """``wasi-nn top`` on a terminal of 80 columns."""

    def __init__(self, process: subprocess.Popen[bytes], ours: int) -> None:
        self.process = process
        self._ours = ours
        self.shown = ""

    def read_until(self, *texts: str) -> str:
        """What appears from here on until all texts have."""
        start = len(self.shown)
        while not all(text in self.shown[start:] for text in texts):
            try:
                data = os.read(self._ours, 4096)
            except OSError:  # the other end is closed
                raise AssertionError(f"it ended; shown: {self.shown}") from None
            self.shown += data.decode(errors="replace")
        return self.shown[start:]


@contextmanager
def terminal_top(*arguments: object) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, N_COLUMNS, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    with subprocess.Popen(
        command_line("top", *arguments), stdin=theirs, stdout=theirs, stderr=theirs, env=environment | {"TERM": "xterm"}
    ) as process:
        os.close(theirs)
        try:
            yield Terminal(process, ours)
        finally:
            process.kill()
    os.close(ours)


def test_it_lives_on_a_terminal_through_a_lost_connection_until_ctrl_c(
    backend: Backend, server: MetricsServer, clock: Clock
) -> None:
    context = backend.load_by_name("assistant").init_execution_context()
    with terminal_top(server.port, "--interval", 0.1) as terminal:
        terminal.read_until("assistant", "0 requests are over")
        context.run_inference("hello")
        clock.now_s += 1.0
        terminal.read_until("1 requests are over")
        port = server.port
        server.close()
        terminal.read_until("Connection refused", "Trying again")
        with serve_metrics(backend, port):
            context.run_inference("hello")
            terminal.read_until("2 requests are over")
        terminal.process.send_signal(2)
        assert terminal.process.wait(60) == 0
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", terminal.shown).splitlines()
    assert max(map(cell_len, lines)) <= N_COLUMNS
    assert "Traceback" not in terminal.shown


def test_without_a_terminal_one_table_is_printed(
    backend: Backend,
    server: MetricsServer,
    wasi_nn_here: Command,
    between_samples: Callable[[Callable[[], object]], None],
) -> None:
    backend.load_by_name("assistant")
    between_samples(lambda: None)
    for options in ([], ["--once"]):
        done = wasi_nn_here("top", server.url, *options)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.count("assistant") == 1
        assert "\x1b" not in done.stdout


# Who answers.


@pytest.mark.parametrize(
    ("place", "url"),
    [
        ("9100", "http://127.0.0.1:9100"),
        (":9100", "http://127.0.0.1:9100"),
        ("host:9100", "http://host:9100"),
        ("[::1]:9100", "http://[::1]:9100"),
        ("http://host:9100/", "http://host:9100"),
        ("http://host:9100/metrics", "http://host:9100"),
        ("https://host:9100/status.json?x", "https://host:9100"),
    ],
)
def test_places(place: str, url: str) -> None:
    assert server_url(place) == url


@given(st.text() | st.sampled_from(["", "host", "http://", "http://host", "99999", "http://host:x", "file:///etc:1"]))
def test_a_place_is_a_url_or_a_usage_error(place: str) -> None:
    try:
        url = server_url(place)
    except InvalidArgument:
        return
    assert re.match(r"https?://[^/]+:\d+$", url)


def test_a_place_that_is_none_is_a_usage_error(wasi_nn_here: Command) -> None:
    done = wasi_nn_here("top", "host")
    assert done.returncode == 2
    assert "'host' is no address of figures" in done.stderr


def test_nobody_there_is_an_error(wasi_nn_here: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as place:
        port = place.getsockname()[1]
    done = wasi_nn_here("top", port, "--once")
    assert done.returncode == 1
    assert f"no answer from http://127.0.0.1:{port}: Connection refused; is it running" in done.stderr


@pytest.mark.parametrize(
    "answer", [b"", b"{", b"[]", b'{"pid": 1}', b'{"pid": 1, "backends": [{}]}', b"\xff", None], ids=repr
)
def test_a_server_of_something_else_is_an_error(answer: bytes | None, wasi_nn_here: Command) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if answer is None:
                self.send_error(403)
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as other:
        thread = threading.Thread(target=other.handle_request)
        thread.start()
        done = wasi_nn_here("top", other.server_port, "--once")
        thread.join()
    assert done.returncode == 1
    assert "give the port that --metrics-port printed" in done.stderr
    assert done.stderr.count("\n") == 1
