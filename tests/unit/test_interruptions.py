"""Calls whose own thread does something else meanwhile: the garbage collector, a signal's handler, a sink, a fork.

Each in a process of its own with a time limit: what goes wrong here waits for ever.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BEGIN = """
import gc, os, signal, sys, threading
from wasi_nn_backend import Backend, Cancelled, RuntimeFailure

CONFIG = {"temperature": 0, "threads": 1, "n_ctx": 4096, "max_tokens": -1, "ignore_eos": True}
SHORT = {"max_tokens": 5}

def open_context(config=CONFIG, **more):
    backend = Backend(config)
    graph = backend.load_by_name(sys.argv[1])
    return backend, graph, graph.init_execution_context(more)
"""

FORGOTTEN = """
backend, graph, context = open_context(CONFIG | {"prompt_mode": "chat", "max_sessions": 2})
expected = context.run_inference("Hello", SHORT)
engine = context.lease.engine
gc.disable()

class Handler:
    def __init__(self, config=None):
        self.me, self.context = self, graph.init_execution_context()
        self.pieces = self.context.stream("Tell me", config)
        self.first = next(self.pieces)

def collect_in(lock):
    with lock:
        gc.collect()

def collect_on_the_engines_thread():
    done = threading.Event()
    engine._inbox.send(lambda: (gc.collect(), done.set()))
    assert done.wait(10)

def run_is_over(context):
    while context._open_run.finish_reason is None:
        os.sched_yield()

for number, collect in enumerate([
    gc.collect,
    collect_on_the_engines_thread,
    lambda: collect_in(backend.tasks._lock),
    lambda: collect_in(engine._inbox._lock),
    lambda: collect_in(graph._lock),
    lambda: collect_in(context._entered),
]):
    for config in (None, SHORT):
        handler = Handler(config)
        other, first = handler.context, handler.first
        if config:
            run_is_over(other)
        del handler
        collect()
        context.reset()
        assert context.run_inference("Hello", SHORT) == expected
        if number % 2:
            assert other.messages[-1].content.startswith(first)
            assert other.run_inference("Go on", SHORT)
            other.close()
        # else the next one takes its place: nobody reads it any more
assert backend.tasks.totals()[0].n_by_reason["cancelled"] == 6
backend.close()
assert not [thread for thread in threading.enumerate() if "engine" in thread.name]
"""

CLOSED_BY_A_SIGNAL = """
def call(context):
    context.run_inference("Hello")

def iterate(context):
    for _ in context.stream("Hello"):
        pass

def one_by_one(context):
    context.set_input(0, "Hello")
    while True:
        context.compute_single()

for work in (call, iterate, one_by_one):
    for what in ("context", "backend"):
        backend, graph, context = open_context()
        beside = graph.init_execution_context()
        next(beside.stream("beside"))
        signal.signal(signal.SIGTERM, lambda *_: (context if what == "context" else backend).close())

        def interrupt():
            while not context.get_output(0):
                os.sched_yield()
            os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=interrupt)
        thread.start()
        try:
            work(context)
        except Cancelled as error:
            assert "clos" in str(error), error
        except Exception as error:
            assert work is one_by_one and "is closed" in str(error), error  # it came between two calls
        else:
            raise SystemExit(f"{work} was not interrupted")
        thread.join()
        assert context._lease is None and context not in graph.contexts()
        if what == "context":
            assert beside.run_inference("and goes on", SHORT)
            backend.close()
        assert threading.active_count() == 1, threading.enumerate()
"""

CLOSED_WITH_A_GRACE_TIME = """
backend, graph, context = open_context(CONFIG | {"max_tokens": 300})
expected = context.run_inference("Hello")
context.reset()
signal.signal(signal.SIGTERM, lambda *_: backend.close(grace_s=60))
main = threading.get_ident()

def interrupt():
    while context.state != "running" or not context.get_output(0):
        os.sched_yield()
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=interrupt).start()
assert context.run_inference("Hello") == expected
assert context._lease is None
"""

CLOSED_BY_A_SINK = """
for what in ("context", "backend", "unload"):
    backend, graph, context = open_context(stream_stdout=True)
    context.set_input(0, "Hello")
    texts = []

    def sink(text):
        texts.append(text)
        if len(texts) == 5:
            {"context": context.close, "backend": backend.close, "unload": graph.unload}[what]()
        if len(texts) == 8 and what == "unload":
            context.cancel()

    try:
        context.compute(sink)
    except Cancelled:
        assert context.get_output(0)
    else:
        raise SystemExit("it was not ended")
    assert context._lease is None
    backend.close()
    assert threading.active_count() == 1, threading.enumerate()
"""

INTERRUPTED_AT_THE_END = """
backend, graph, context = open_context()
now_s = graph.now_s

def interrupt():
    graph.now_s = now_s
    raise KeyboardInterrupt

graph.now_s = interrupt
try:
    context.set_input(0, "Hello")
except KeyboardInterrupt:
    assert not context._entered.locked()
    assert context.run_inference("Hello", SHORT)
    backend.close()
    sys.exit(0)
sys.exit(1)
"""

FORKED = """
backend, graph, context = open_context()
other = graph.init_execution_context()
pieces = context.stream("never ending")
next(pieces)
running = threading.Thread(target=lambda: other.run_inference("never ending either"), daemon=True)
running.start()
while not other.get_output(0):
    os.sched_yield()

def goes_on():
    own = backend.load_by_name_with_config(sys.argv[1], {"n_ctx": 512})
    assert own.init_execution_context().run_inference("in a model of its own", SHORT)
    backend.close()
    assert not own.alive

def ends_like_any_other():
    sys.exit(0)

def in_child(work, refuses=False):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    signal.alarm(20)
    try:
        work()
    except RuntimeFailure as error:
        os._exit(0 if refuses and "forked" in str(error) else 4)
    os._exit(5 if refuses else 0)

for work, refuses in [
    (lambda: next(pieces), True),
    (lambda: context.run_inference("x"), True),
    (lambda: other.run_inference("x"), True),
    (graph.init_execution_context, True),
    (lambda: graph.embed(["x"]), True),
    (context.close, False),
    (other.cancel, False),
    (pieces.close, False),
    (lambda: context.messages, False),
    (backend.close, False),
    (goes_on, False),
    (ends_like_any_other, False),
]:
    status = in_child(work, refuses)
    assert status == 0, (work, status)

third = graph.init_execution_context({"stream_stdout": True})
third.set_input(0, "forked in its sink")
parent, statuses = os.getpid(), []

def sink(_text):
    if not statuses and os.getpid() == parent:
        pid = os.fork()
        statuses.append(None if pid == 0 else os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        if pid == 0:
            signal.alarm(20)
        else:
            third.cancel()

try:
    third.compute(sink)
except Cancelled:
    assert os.getpid() == parent and statuses == [3], statuses
except RuntimeFailure as error:
    assert os.getpid() != parent and "forked" in str(error)
    sys.exit(3)
assert next(pieces)
backend.close()
running.join(30)
assert not running.is_alive()
"""


@pytest.mark.parametrize(
    "program",
    [
        FORGOTTEN,
        CLOSED_BY_A_SIGNAL,
        CLOSED_WITH_A_GRACE_TIME,
        CLOSED_BY_A_SINK,
        INTERRUPTED_AT_THE_END,
        FORKED,
    ],
    ids=["forgotten", "signal", "grace", "sink", "ctrl-c", "fork"],
)
def test_nobody_waits_for_himself(program: str, tiny_model_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BEGIN + program, str(tiny_model_path)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
