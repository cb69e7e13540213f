"""Sessions: one live context a name, at most so many at a time, none for longer than it is used."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.doors import both_doors
from tests.effects import changes
from tests.fakes.llama import FakeLlama
from tests.unit.test_backend import Gate
from wasi_nn_backend import Backend, Busy, Cancelled, Door, ExecutionContext, Graph, InvalidArgument
from wasi_nn_backend.config.backend import BackendSettings
from wasi_nn_backend.session_store import SessionStore

door = both_doors(__name__)
#: A program that imports the package itself, and the store without a backend.
NOT_ASYNCIO = {"test_a_killed_process_loses_no_finished_turn", "test_the_order_of_leaving"}
GREEDY = {"temperature": 0, "repeat_penalty": 1.0, "max_tokens": 8, "threads": 1}
GUEST = Door("guest", "chat", is_trusted=False)


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
def gate() -> Gate:
    return Gate()


def make_backend(clock: Clock | None = None, gate: Gate | None = None, **config: Any) -> Backend:
    llama = FakeLlama(before_decode=gate)
    return Backend(GREEDY | config, llama=llama, clock=clock or Clock())


@pytest.fixture
def graph(tiny_model_path: Path) -> Iterator[Graph]:
    with make_backend() as backend:
        yield backend.load_by_name(tiny_model_path)


# The same id is the same context.


@changes("session.session_id")
def test_one_id_is_one_context_until_its_last_holder_closes_it(graph: Graph) -> None:
    first = graph.init_execution_context({"session_id": "alice"})
    first.run_inference("My name is Alice.")
    second = graph.init_execution_context({"session_id": "alice"})
    assert second is first
    first.close()
    assert second.run_inference("Who am I?")
    assert len(second.messages) == 4
    second.close()
    with pytest.raises(InvalidArgument, match="closed"):
        second.run_inference("Still there?")
    with pytest.raises(InvalidArgument, match="closed already"):
        second.close()
    assert graph.init_execution_context({"session_id": "alice"}).messages == ()


def test_ids_are_a_graphs_own(tiny_model_path: Path) -> None:
    """Two guests that load one model never meet, whatever they call themselves."""
    with make_backend() as backend:
        backend.register("default", tiny_model_path)
        graphs = [backend.load_by_name("default", door=GUEST) for _ in range(2)]
        one, other = (each.init_execution_context({"session_id": "alice"}) for each in graphs)
        assert one is not other
        one.run_inference("This is a secret.")
        assert other.messages == ()
        assert graphs[0].init_execution_context({"session_id": "bob"}) is not one
        assert graphs[0].init_execution_context() is not graphs[0].init_execution_context()


def test_an_id_in_the_graphs_configuration_is_that_of_all_its_contexts(tiny_model_path: Path) -> None:
    with make_backend() as backend:
        graph = backend.load_by_name_with_config(tiny_model_path, {"session_id": "everyone"})
        context = graph.init_execution_context()
        assert graph.init_execution_context() is context
        assert context.fork() is not context
        assert context.fork().session_id == ""


def test_configuration_of_a_session_is_taken_over_what_it_has(gate: Gate, tiny_model_path: Path) -> None:
    with make_backend(gate=gate) as backend, ThreadPoolExecutor(1) as threads, gate:
        graph = backend.load_by_name(tiny_model_path)
        context = graph.init_execution_context({"session_id": "alice", "seed": 3})
        running = threads.submit(context.run_inference, "Hello")
        gate.reached.acquire()
        assert graph.init_execution_context({"session_id": "alice", "seed": 3}) is context, "nothing changes"
        with pytest.raises(Busy, match="working"):
            graph.init_execution_context({"session_id": "alice", "seed": 4})
        gate.open()
        running.result(timeout=30)
        context.close()
        graph.init_execution_context({"session_id": "alice", "max_tokens": 2})
        assert (context.settings.sampling.seed, context.settings.stopping.max_tokens) == (3, 2)
        context.close()
        context.close()
        with pytest.raises(InvalidArgument, match="closed already"):  # the refused caller holds nothing
            context.close()


def test_contexts_that_are_made_at_once_are_one(graph: Graph) -> None:
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: graph.init_execution_context({"session_id": "alice"}), range(8)))
    assert len(set(made)) == 1


def test_a_context_does_not_become_another_session(graph: Graph) -> None:
    context = graph.init_execution_context()
    for call in (lambda: context.set_input(1, b'{"session_id": "bob"}'), lambda: context.run_inference("x", BOB)):
        with pytest.raises(InvalidArgument, match="init_execution_context"):
            call()
    assert context.run_inference("Hello")


BOB = {"session_id": "bob"}


def test_a_guests_handle_moves_to_the_session_that_it_names(graph: Graph) -> None:
    """As ``set_input`` with index 1 does for guests, who have a context before they can name it."""
    context = graph.init_execution_context({"max_tokens": 3})
    context.set_input(0, "Before the name.")
    alice = graph.configure(context, b'{"session_id": "alice"}')
    alice.compute()
    assert [message.content for message in alice.messages][:1] == ["Before the name."]
    assert alice.settings.stopping.max_tokens == 3
    with pytest.raises(InvalidArgument, match="closed"):
        context.compute()
    again = graph.configure(graph.init_execution_context(), b'{"session_id": "alice"}')
    assert again is alice
    bob = graph.configure(again, BOB)
    assert bob is not alice
    assert alice.run_inference("The other holder goes on.")
    assert graph.configure(bob, b'{"temperature": 1}') is bob


# How many there may be.


@changes("backend.max_sessions")
def test_the_least_recently_used_idle_context_goes(tiny_model_path: Path, clock: Clock) -> None:
    with make_backend(clock, max_sessions=3) as backend:
        graph = backend.load_by_name(tiny_model_path)
        contexts = []
        for name in "abc":
            clock.now_s += 1
            contexts.append(graph.init_execution_context({"session_id": name}))
        clock.now_s += 1
        contexts[0].run_inference("I am used again.")
        text = contexts[1].run_inference("And I, but before that.")
        contexts[1].last_used_s -= 2
        newest = graph.init_execution_context()
        assert contexts[1].get_output(0).decode(errors="replace") == text, "what was computed can still be read"
        with pytest.raises(InvalidArgument, match=r"max_sessions.*make a new context"):
            contexts[1].run_inference("gone")
        contexts[1].close()  # its holder need not know
        for context in (contexts[0], contexts[2], newest):
            assert context.run_inference("here")
        assert len(backend.sessions) == 3


def test_who_works_does_not_go(tiny_model_path: Path, clock: Clock, gate: Gate) -> None:
    with (
        make_backend(clock, gate, max_sessions=3, max_concurrent=1, default_task_timeout_ms=0) as backend,
        ThreadPoolExecutor(2) as threads,
        gate,
    ):
        graph = backend.load_by_name(tiny_model_path)
        contexts = [graph.init_execution_context() for _ in range(3)]
        running = [threads.submit(context.run_inference, "Work.") for context in contexts[:2]]  # the second one waits
        gate.reached.acquire()
        while {context.state for context in contexts[:2]} != {"queued", "running"}:
            os.sched_yield()
        clock.now_s += 10_000
        backend.sessions.remove_expired()
        assert len(backend.sessions) == 2
        graph.init_execution_context().set_input(0, "a pending prompt is no work")
        contexts[2] = graph.init_execution_context()
        gate.open()
        for future in running:
            assert future.result(timeout=30)


def test_a_run_that_is_read_token_by_token_goes_only_when_nobody_reads_it(tiny_model_path: Path, clock: Clock) -> None:
    with make_backend(clock, max_sessions=2, idle_timeout_ms=60_000) as backend:
        graph = backend.load_by_name(tiny_model_path)
        reader, iterating = graph.init_execution_context(), graph.init_execution_context()
        reader.set_input(0, "one by one")
        reader.compute_single()
        pieces = iterating.stream("piece by piece")
        next(pieces)
        clock.now_s += 59
        with pytest.raises(Busy, match="all are in use"):
            graph.init_execution_context()
        reader.compute_single()
        clock.now_s += 59
        while iterating.state == "running":  # its run ends though nobody reads it
            os.sched_yield()
        graph.init_execution_context()
        assert reader.run_inference("still there")
        with pytest.raises(InvalidArgument, match="max_sessions"):
            next(pieces)


def test_a_run_that_nobody_reads_any_more_keeps_no_place(tiny_model_path: Path, clock: Clock) -> None:
    with make_backend(clock, max_sessions=1, idle_timeout_ms=60_000) as backend:
        graph = backend.load_by_name(tiny_model_path)
        context = graph.init_execution_context()
        pieces = context.stream("left early", {"max_tokens": 400, "ignore_eos": True})
        next(pieces)
        with pytest.raises(Busy, match="all are in use"):
            graph.init_execution_context()
        del pieces
        context = graph.init_execution_context()
        pieces = context.stream("cancelled", {"max_tokens": 400, "ignore_eos": True})
        next(pieces)
        context.cancel()
        assert context.wait_until_idle(30)
        while context.state == "running":
            os.sched_yield()
        graph.init_execution_context()
        with pytest.raises(InvalidArgument, match="max_sessions"):
            next(pieces)


def test_what_an_iterator_that_was_left_early_has_put_out_is_final(tiny_model_path: Path, clock: Clock) -> None:
    with make_backend(clock) as backend, backend.load_by_name(tiny_model_path).init_execution_context() as context:
        for _piece in context.stream("left early", {"max_tokens": 400, "ignore_eos": True}):
            break
        text, metadata = context.get_output(), context.metadata
        assert metadata["finish_reason"] == "cancelled"
        assert 0 < metadata["output_tokens"] < 400
        assert (context.get_output(), context.metadata) == (text, metadata)


@changes("backend.auto_cleanup")
def test_without_cleanup_too_many_are_refused(tiny_model_path: Path, clock: Clock) -> None:
    with make_backend(clock, max_sessions=2, auto_cleanup=False) as backend:
        graph = backend.load_by_name(tiny_model_path)
        first, _second = graph.init_execution_context(), graph.init_execution_context()
        clock.now_s += 1e6
        assert backend.sessions.remove_expired() is None
        with pytest.raises(Busy, match="auto_cleanup is off"):
            graph.init_execution_context()
        first.close()
        assert graph.init_execution_context().run_inference("room again")


# For how long.


@changes("backend.idle_timeout_ms")
def test_idle_sessions_go_when_their_time_is_over(tiny_model_path: Path, clock: Clock) -> None:
    with make_backend(clock, idle_timeout_ms=10_000) as backend:
        graph = backend.load_by_name(tiny_model_path)
        early = graph.init_execution_context()
        early.run_inference("Some cells")
        clock.now_s += 4
        late = graph.init_execution_context()
        assert backend.sessions.remove_expired() == pytest.approx(6)
        clock.now_s += 6
        assert backend.sessions.remove_expired() == pytest.approx(4)
        with pytest.raises(InvalidArgument, match=r"10 seconds.*idle_timeout_ms"):
            early.run_inference("too late")
        assert graph.statistics().n_cells_used == 0
        late.set_input(0, "in time")
        clock.now_s += 6
        assert backend.sessions.remove_expired() == pytest.approx(4)
        late.compute()


def test_the_timer_removes_them_by_itself(tiny_model_path: Path) -> None:
    with Backend(GREEDY | {"idle_timeout_ms": 1}, llama=FakeLlama()) as backend:
        graph = backend.load_by_name(tiny_model_path)
        gone = threading.Event()
        forget = graph.forget

        def tell(context: ExecutionContext) -> None:
            forget(context)
            gone.set()

        graph.forget = tell  # type: ignore[method-assign]
        graph.init_execution_context()
        assert gone.wait(30)
        assert len(backend.sessions) == 0


class PlainContext:
    """As much of a context as the store looks at."""

    def __init__(self, store: SessionStore, limits: BackendSettings, now_s: float) -> None:
        self.limits = limits
        self.last_used_s = now_s
        self.is_busy = False
        self.reason = ""
        self._store = store

    def remove_if_idle(self, reason: str, *, now_s: float, expired_only: bool) -> bool:
        if self.is_busy or (expired_only and now_s - self.last_used_s < self.limits.idle_timeout_ms / 1000):
            return False
        self.reason = reason
        self._store.discard(self)
        return True


@given(
    n_max=st.integers(1, 4),
    moves=st.lists(
        st.tuples(st.sampled_from(["open", "use", "busy", "idle", "later"]), st.integers(0, 9)), max_size=40
    ),
)
def test_the_order_of_leaving(n_max: int, moves: list[tuple[str, int]]) -> None:
    """Never more than allowed, never one that is busy, and of the idle ones always the one used longest ago."""
    clock = Clock()
    store = SessionStore(clock)
    limits = BackendSettings(max_sessions=n_max, idle_timeout_ms=5000)
    alive: list[PlainContext] = []
    try:
        for move, n in moves:
            clock.now_s += 0.5
            chosen = alive[n % len(alive)] if alive else None
            if move == "open":
                idle = sorted((each for each in alive if not each.is_busy), key=lambda each: each.last_used_s)
                context = PlainContext(store, limits, clock())
                if len(alive) == n_max and not idle:
                    with pytest.raises(Busy), store.place(limits) as take:
                        take(context)
                    continue
                with store.place(limits) as take:
                    take(context)
                if len(alive) == n_max:
                    assert "max_sessions" in idle[0].reason or "idle_timeout" in idle[0].reason
                alive.append(context)
            elif move == "later":
                clock.now_s += n
                store.remove_expired()
            elif chosen is not None:
                chosen.is_busy = move == "busy" or (move == "use" and chosen.is_busy)
                chosen.last_used_s = clock()
            alive = [each for each in alive if not each.reason]
            assert len(store) == len(alive) <= n_max
            assert not any(each.is_busy and each.reason for each in alive)
    finally:
        store.close()


def test_who_only_looks_at_a_context_is_no_reason_to_refuse_a_call(tiny_model_path: Path) -> None:
    """The timer and a reload hold it for a moment; another call is refused."""
    with make_backend() as backend, ThreadPoolExecutor(1) as threads:
        context = backend.load_by_name(tiny_model_path).init_execution_context()
        with context._entered:
            running = threads.submit(context.run_inference, "Hello")
            while not context._calling.locked():
                os.sched_yield()
            with pytest.raises(Busy, match="another call"):
                context.run_inference("And hello")
        assert running.result(timeout=30)


# Closing.


def test_closing_while_it_computes_frees_its_cells_before_it_returns(tiny_model_path: Path, gate: Gate) -> None:
    with make_backend(gate=gate) as backend, ThreadPoolExecutor(2) as threads, gate:
        graph = backend.load_by_name(tiny_model_path)
        context = graph.init_execution_context({"max_tokens": 500, "ignore_eos": True})
        running = threads.submit(context.run_inference, "On and on")
        for _ in range(3):
            gate.reached.acquire()
            gate.let_through()
        gate.reached.acquire()
        closing = threads.submit(lambda: (context.close(), graph.statistics().n_cells_used))
        gate.open()
        assert closing.result(timeout=30)[1] == 0
        with pytest.raises(Cancelled):
            running.result(timeout=30)


# On disk.


@changes("backend.save_dir")
def test_a_session_goes_on_where_its_last_turn_ended(tiny_model_path: Path, tmp_path: Path) -> None:
    config = {"save_dir": str(tmp_path / "sessions"), "max_tokens": 6}
    with make_backend(**config) as backend:
        context = backend.load_by_name(tiny_model_path).init_execution_context({"session_id": "../alice", "seed": 5})
        context.run_inference("First.")
        context.run_inference("Second.")
        messages = context.messages
        assert [path.parent.name for path in tmp_path.rglob("*.session")] == ["sessions"]
    with make_backend(**config) as backend:
        graph = backend.load_by_name(tiny_model_path)
        context = graph.init_execution_context({"session_id": "../alice"})
        assert context.messages == messages
        assert context.settings.sampling.seed == 5
        assert graph.init_execution_context({"session_id": "bob"}).messages == ()
        with pytest.raises(Busy, match="another graph"):
            backend.load_by_name(tiny_model_path).init_execution_context({"session_id": "../alice"})
        context.run_inference("Third.")
        context.close()
        context = graph.init_execution_context({"session_id": "../alice"})
        assert len(context.messages) == 6
        context.reset()
        context.close()
        assert graph.init_execution_context({"session_id": "../alice"}).messages == ()


def test_guests_sessions_are_not_kept(tiny_model_path: Path, tmp_path: Path) -> None:
    """An id says nothing about who a guest is, and the next one might choose the same."""
    with make_backend(save_dir=str(tmp_path)) as backend:
        backend.register("default", tiny_model_path)
        graph = backend.load_by_name_with_config("default", b'{"save_dir": "/tmp/theirs"}', door=GUEST)
        graph.init_execution_context({"session_id": "alice"}).run_inference("Hello")
    assert list(tmp_path.iterdir()) == []


def test_a_turn_that_cannot_be_saved_is_answered(
    tiny_model_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with make_backend(save_dir=str(tmp_path / "sessions")) as backend:
        context = backend.load_by_name(tiny_model_path).init_execution_context({"session_id": "alice"})
        (tmp_path / "sessions").rmdir()
        assert context.run_inference("Hello")
        assert "could not be saved" in caplog.text


ROUNDS_OF_TWENTY = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from wasi_nn_backend import Backend
def tell(what):
    sys.stdout.write(json.dumps(what) + "\\n")
    sys.stdout.flush()
model, save_dir = sys.argv[1:]
config = {"save_dir": save_dir, "max_tokens": 4, "n_ctx": 512, "temperature": 0, "threads": 1, "max_concurrent": 20}
with Backend(config) as backend, ThreadPoolExecutor(20) as threads:
    graph = backend.load_by_name(model)
    contexts = [graph.init_execution_context({"session_id": f"user {i}"}) for i in range(20)]
    tell([[message.content for message in context.messages] for context in contexts])
    def talk(i):
        while True:
            prompt = f"turn {len(contexts[i].messages) // 2} of {i}"
            tell([i, prompt, contexts[i].run_inference(prompt)])
    list(threads.map(talk, range(20)))
"""


def talk_until_killed(model_path: Path, save_dir: Path, n_turns: int) -> tuple[list[list[str]], list[list[str]]]:
    """Sessions as the process finds them, and with the turns whose calls returned in it until it was killed."""
    child = subprocess.Popen(
        [sys.executable, "-c", ROUNDS_OF_TWENTY, str(model_path), str(save_dir)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    found = json.loads(child.stdout.readline())
    finished = [list(texts) for texts in found]
    for n_lines, line in enumerate(child.stdout, 1):
        if n_lines == n_turns:
            child.send_signal(signal.SIGKILL)  # what is in the pipe by now was finished before
        i, prompt, answer = json.loads(line)
        finished[i] += [prompt, answer]
    child.stdout.close()
    assert child.wait(30) == -signal.SIGKILL
    return found, finished


def test_a_killed_process_loses_no_finished_turn(tiny_model_path: Path, tmp_path: Path) -> None:
    """Real llama.cpp with the tiny model, 20 sessions that are saved every turn, killed again and again. The next
    process has each turn whose call had returned, and of a session one more at most: saved, but not returned yet."""
    chooser = random.Random(5)
    finished: list[list[str]] = [[]] * 20
    for _ in range(3):
        found, then_finished = talk_until_killed(tiny_model_path, tmp_path, chooser.randrange(1, 80))
        check_nothing_lost(found, finished)
        finished = then_finished
    for path in list(tmp_path.glob("*.session")):
        path.with_suffix(".part").write_bytes(b"half a ses")  # as one that was killed while it wrote leaves it
    with Backend({"save_dir": str(tmp_path)}, llama=FakeLlama()) as backend:
        graph = backend.load_by_name(tiny_model_path)
        contexts = [graph.init_execution_context({"session_id": f"user {i}"}) for i in range(20)]
        check_nothing_lost([[message.content for message in context.messages] for context in contexts], finished)
    assert sum(map(len, finished)) > 0
    assert all(path.suffix == ".session" for path in tmp_path.iterdir()), "a part of a file was left"


def check_nothing_lost(found: list[list[str]], finished: list[list[str]]) -> None:
    for now, before in zip(found, finished, strict=True):
        assert now[: len(before)] == before
        assert len(now) in (len(before), len(before) + 2)
