"""What is special about asyncio: cancellation, threads, and that the event loop is never held up.

What a call does and raises is tested for both doors together, see tests/doors.py.
"""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.llama import FakeLlama, FakeModel, FakeVocabulary
from tests.unit.test_backend import Gate
from wasi_nn_backend import (
    AsyncBackend,
    AsyncExecutionContext,
    AsyncGraph,
    Backend,
    Cancelled,
    ExecutionContext,
    Graph,
    InvalidArgument,
    RuntimeFailure,
)
from wasi_nn_backend.async_backend.calls import N_THREADS, CallRunner
from wasi_nn_backend.llama.interface import ModelParams, ProgressCallback

CONFIG: dict[str, Any] = {
    "prompt_mode": "raw",
    "temperature": 0,
    "repeat_penalty": 1.0,
    "max_tokens": 20,
    "n_ctx": 512,
    "threads": 1,
    "max_concurrent": 2,
    "idle_timeout_ms": 60_000,
}

Scenario = Callable[[AsyncGraph, Gate], Coroutine[Any, Any, None]]

#: Public members that are for other parts of the package.
NOT_FOR_CALLERS: dict[type, set[str]] = {
    Backend: {"acquire", "check_takes_work", "forget", "next_id", "now_s"},
    Graph: {
        "check_takes_work",
        "contexts",
        "embed_steps",
        "forget",
        "fork_context",
        "layers",
        "lease",
        "limits",
        "llama",
        "new_task",
        "next_id",
        "now_s",
        "open",
        "parse",
        "prepare",
        "release",
        "replace",
        "retained_lease",
        "settings_with",
        "version",
    },
    ExecutionContext: {
        "cancel_run",
        "compute_single_steps",
        "compute_steps",
        "drop_input",
        "has_layer",
        "is_closed",
        "inference_steps",
        "layer",
        "lease",
        "limits",
        "pending_input",
        "release",
        "remove_if_idle",
        "resume",
        "retain",
        "settle",
        "shut_down",
        "stream_steps",
        "take_layer",
        "wait_until_idle",
    },
}
#: What only the asynchronous classes have, as class members; attributes of the others are properties there.
ASYNC_ONLY: dict[type, set[str]] = {
    AsyncBackend: {"aclose"},
    AsyncGraph: {"aclose", "adopt", "wrap", "name", "door"},
    AsyncExecutionContext: {"aclose", "id", "settings"},
}
TWINS = [(Backend, AsyncBackend), (Graph, AsyncGraph), (ExecutionContext, AsyncExecutionContext)]


def members(kind: type) -> set[str]:
    return {name for name, _ in inspect.getmembers(kind) if not name.startswith("_")}


# The two doors stay the same.


@pytest.mark.parametrize(("blocking", "asynchronous"), TWINS)
def test_both_have_the_same_members(blocking: type, asynchronous: type) -> None:
    assert members(asynchronous) - ASYNC_ONLY[asynchronous] == members(blocking) - NOT_FOR_CALLERS[blocking]
    assert NOT_FOR_CALLERS[blocking] <= members(blocking), "one of these is gone"
    assert ASYNC_ONLY[asynchronous] <= members(asynchronous), "one of these is gone"


@pytest.mark.parametrize(("blocking", "asynchronous"), TWINS)
def test_calls_have_the_same_parameters_and_results(blocking: type, asynchronous: type) -> None:
    common = members(blocking) & members(asynchronous)
    calls = {name for name in common if callable(getattr(blocking, name))}
    assert calls
    for name in calls:
        twin = getattr(asynchronous, name)
        assert inspect.iscoroutinefunction(twin) or inspect.isasyncgenfunction(twin), name
        assert twin.__doc__, name
        expected = str(inspect.signature(getattr(blocking, name)))
        assert str(inspect.signature(twin)).replace("Async", "") == expected, name
    assert all(isinstance(getattr(asynchronous, name), property) for name in common - calls)


def test_both_backends_are_made_alike() -> None:
    assert str(inspect.signature(AsyncBackend)) == str(inspect.signature(Backend))


# Cancelling.


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def play(gate: Gate, tiny_model_path: Path) -> Callable[..., None]:
    """Play a scenario on a graph whose decodes the gate holds up, and see that no thread is left."""

    def play(scenario: Scenario, **config: Any) -> None:
        async def whole() -> None:
            async with AsyncBackend(CONFIG | config, llama=FakeLlama(before_decode=gate)) as backend:
                try:
                    await scenario(await backend.load_by_name(tiny_model_path), gate)
                finally:
                    gate.open()
                status = await backend.status()
                assert (status.n_queued, status.n_running) == (0, 0)

        n_threads = threading.active_count()
        asyncio.run(whole())
        assert threading.active_count() == n_threads

    return play


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        # Not 0: a loop that only gives the interpreter's lock away and takes it back can starve all other threads.
        await asyncio.sleep(0.001)


async def turns(n: int = 50) -> None:
    """Let everybody else have so many turns."""
    for _ in range(n):
        await asyncio.sleep(0)


async def is_cancelled(task: asyncio.Task[Any]) -> bool:
    try:
        await task
    except asyncio.CancelledError:
        return True
    return False


def start(call: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    return asyncio.get_running_loop().create_task(call)


def test_a_call_that_waits_for_its_turn_is_cancelled_without_having_computed(play: Callable[..., None]) -> None:
    async def scenario(graph: AsyncGraph, gate: Gate) -> None:
        running, waiting = await graph.init_execution_context(), await graph.init_execution_context()
        first = start(running.run_inference("first"))
        await until(lambda: running.state == "running")
        second = start(waiting.run_inference("second"))
        await until(lambda: waiting.state == "queued")
        second.cancel()
        await turns()
        assert not second.done(), "the engine stands still, so its call has not ended"
        gate.open()
        assert await is_cancelled(second)
        assert waiting.state == "idle"
        assert waiting.metadata["finish_reason"] == "cancelled"
        assert waiting.metadata["output_tokens"] == 0
        text = await first
        assert await waiting.run_inference("first") == text

    play(scenario, max_concurrent=1)


@pytest.mark.parametrize("way", ["run_inference", "compute", "compute_single", "stream"])
def test_a_call_that_computes_is_cancelled_at_its_next_token(play: Callable[..., None], way: str) -> None:
    """Its text so far is there, its place in the batch is free, and its context goes on as if nothing had been."""

    async def scenario(graph: AsyncGraph, gate: Gate) -> None:
        context = await graph.init_execution_context()
        pieces: list[str] = []

        async def call() -> None:
            if way == "run_inference":
                await context.run_inference("cancel me")
            elif way == "stream":
                async with aclosing(context.stream("cancel me")) as stream:
                    async for piece in stream:
                        pieces.append(piece)
            else:
                await context.set_input(0, "cancel me")
                while True:
                    await getattr(context, way)()

        task = start(call())
        gate.let_through(4)
        for _ in range(5):
            await until(lambda: gate.reached.acquire(blocking=False))
        if way == "stream":
            await until(lambda: len(pieces) >= 2)
        task.cancel()
        task.cancel()
        await turns()
        if way != "compute_single":  # which may have found a token that was there already
            assert not task.done(), "the engine stands still, so its call has not ended"
        gate.open()
        assert await is_cancelled(task)
        assert context.state == "idle"
        so_far = (await context.get_output()).decode(errors="ignore")
        if way != "compute_single":  # where the caller takes less than what was generated
            assert 1 <= len(so_far) < 20
        whole = await context.run_inference("cancel me")
        assert whole.startswith(so_far)
        assert "".join(pieces) == whole[: len("".join(pieces))]
        assert (await graph.statistics()).n_running == 0

    play(scenario)


def test_a_time_limit_of_asyncio_ends_a_call(play: Callable[..., None]) -> None:
    async def scenario(graph: AsyncGraph, gate: Gate) -> None:
        gate.open()
        context = await graph.init_execution_context({"max_tokens": -1, "ignore_eos": True, "n_ctx": 4096})
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await context.run_inference("long")
        assert await context.run_inference("short", {"max_tokens": 2})

    play(scenario)


def test_embedding_is_cancelled(tiny_model_path: Path) -> None:
    gate = Gate()

    async def whole() -> None:
        async with AsyncBackend(CONFIG | {"batch_size": 64}, llama=FakeLlama(before_embed=gate)) as backend:
            graph = await backend.load_by_name(tiny_model_path)
            task = start(graph.embed(["some text"] * 500))
            await until(lambda: gate.reached.acquire(blocking=False))
            task.cancel()
            assert await is_cancelled(task)  # at once: its texts leave the batch that still computes
            gate.open()
            assert (await graph.embed(["again"])).shape[0] == 1

    asyncio.run(whole())


def test_a_loop_over_pieces_that_is_left_ends_its_run(play: Callable[..., None]) -> None:
    async def scenario(graph: AsyncGraph, gate: Gate) -> None:
        gate.open()
        context = await graph.init_execution_context({"max_tokens": -1, "ignore_eos": True})
        async for _piece in context.stream("left alone"):
            break
        await until(lambda: context.state == "idle")
        assert await context.run_inference("next", {"max_tokens": 2})

    play(scenario)


@pytest.mark.parametrize("kind", ["fake", "native"])
def test_a_cancelled_load_leaves_nothing(tiny_model_path: Path, kind: str) -> None:
    """The fake does not listen, so that the model is there when nobody wants it any more."""
    reached, goes_on = threading.Event(), threading.Event()

    def hold(_fraction: float) -> None:
        reached.set()
        assert goes_on.wait(30)

    async def whole() -> None:
        llama = FakeLlama() if kind == "fake" else None
        async with AsyncBackend(CONFIG, llama=llama) as backend:
            await backend.register("default", tiny_model_path)
            for load in (
                lambda: backend.load_by_name(tiny_model_path, progress=hold),
                lambda: backend.load([tiny_model_path.read_bytes()], progress=hold),
            ):
                task = start(load())
                await until(reached.is_set)
                task.cancel()
                await turns()
                assert not task.done()
                goes_on.set()
                assert await is_cancelled(task)
                assert (await backend.status()).graphs == ()
                reached.clear()
                goes_on.clear()
            if llama is not None:
                assert all(model.closed for model in llama.models)
            assert (await backend.load_by_name("default")).alive

    asyncio.run(whole())


def test_what_was_made_for_nobody_is_discarded() -> None:
    begun, goes_on = threading.Event(), threading.Event()
    discarded: list[str] = []
    told: list[None] = []

    def make() -> str:
        begun.set()
        assert goes_on.wait(30)
        return "made"

    async def whole() -> None:
        runner = CallRunner()
        tasks = [start(runner.make(make, discarded.append, lambda: told.append(None))) for _ in range(3 * N_THREADS)]
        await until(begun.is_set)
        for task in tasks:
            task.cancel()
        await until(lambda: len(told) == len(tasks))
        goes_on.set()
        assert all([await is_cancelled(task) for task in tasks])
        await runner.close(lambda: None)

    asyncio.run(whole())
    assert 1 <= len(discarded) <= N_THREADS, "those that had not begun were never made"


# Closing.


def test_closing_ends_what_is_awaited_and_every_thread(gate: Gate, tiny_model_path: Path) -> None:
    async def whole() -> None:
        backend = AsyncBackend(CONFIG, llama=FakeLlama(before_decode=gate))
        graph = await backend.load_by_name(tiny_model_path)
        contexts = [await graph.init_execution_context() for _ in range(12)]
        calls = [start(context.run_inference("close me")) for context in contexts]
        await until(lambda: all(context.state == "queued" for context in contexts[2:]))
        closing = [start(backend.close()), start(backend.aclose())]
        await until(lambda: backend._runner.is_closing)
        gate.open()
        await asyncio.gather(*closing)
        errors = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(error) for error in errors} <= {Cancelled, InvalidArgument}
        assert any("the backend is closing" in str(error) for error in errors)
        for late in (backend.load_by_name(tiny_model_path), graph.init_execution_context()):
            with pytest.raises((RuntimeFailure, InvalidArgument), match=r"closed|unloaded"):
                await late
        assert isinstance(await contexts[0].get_output(), bytes)
        assert (await backend.status()).graphs == ()
        await backend.close()

    n_threads = threading.active_count()
    asyncio.run(whole())
    assert threading.active_count() == n_threads


def test_contexts_that_compute_are_all_closed_at_once(play: Callable[..., None]) -> None:
    """More of them than there are threads that wait."""

    async def scenario(graph: AsyncGraph, gate: Gate) -> None:
        contexts = [await graph.init_execution_context() for _ in range(5 * N_THREADS)]
        calls = [start(context.run_inference("close me")) for context in contexts]
        await until(lambda: all(context.state != "idle" for context in contexts))
        closing = [start(context.close()) for context in contexts]
        gate.open()
        await asyncio.gather(*closing)
        for error in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(error, Cancelled | InvalidArgument | str)
        assert (await graph.statistics()).n_cells_used == 0

    play(scenario)


def test_a_backend_that_was_never_used_is_closed_too(tiny_model_path: Path) -> None:
    async def whole() -> None:
        backend = AsyncBackend({"no such key": 1, "strict": True}, llama=FakeLlama())
        with pytest.raises(InvalidArgument, match="no such key"):
            async with backend:
                pass
        unused = AsyncBackend(llama=FakeLlama())
        await unused.close()
        with pytest.raises(RuntimeFailure, match="closed"):
            await unused.load_by_name(tiny_model_path)

    n_threads = threading.active_count()
    asyncio.run(whole())
    assert threading.active_count() == n_threads


# Many calls, few threads.


def test_five_hundred_calls_wait_without_threads(play: Callable[..., None]) -> None:
    n_calls, n_threads = 500, threading.active_count()

    async def scenario(graph: AsyncGraph, gate: Gate) -> None:
        alone = await graph.init_execution_context()
        expected = start(alone.run_inference("prompt 7"))
        await until(lambda: gate.reached.acquire(blocking=False))
        contexts = await asyncio.gather(*(graph.init_execution_context() for _ in range(n_calls)))
        calls = [start(context.run_inference(f"prompt {n % 10}")) for n, context in enumerate(contexts)]
        await until(lambda: all(context.state == "queued" for context in contexts))
        # One of the engine, one that starts such, and one that watches for idle sessions.
        assert threading.active_count() <= n_threads + 2 * N_THREADS + 3
        for call in calls[::5]:
            call.cancel()
        gate.open()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert threading.active_count() <= n_threads + 2 * N_THREADS + 3
        assert all(isinstance(result, asyncio.CancelledError) for result in results[::5])
        texts = {n: result for n, result in enumerate(results) if n % 5}
        assert all(isinstance(text, str) and text for text in texts.values())
        assert {texts[n] for n in texts if n % 10 == 7} == {await expected}
        assert len(set(texts.values())) == 8  # prompts 0 and 5 are those that were cancelled

    queue = {"queue_size": 600, "queue_reject_threshold": 600, "queue_warning_threshold": 600, "max_sessions": 600}
    play(scenario, max_concurrent=16, max_tokens=3, default_task_timeout_ms=0, **queue)


class Meeting:
    """Holds up a thread until the event loop has come by: a loop that waits for that thread never does."""

    def __init__(self) -> None:
        self.is_on = False
        self.n_held = 0
        self._reached = threading.Event()
        self._goes_on = threading.Event()

    def __call__(self, *_: object) -> None:
        if self.is_on:
            self.is_on = False
            self._reached.set()
            assert self._goes_on.wait(30), "the event loop did not come by"
            self.n_held += 1

    async def attend(self) -> None:
        await until(self._reached.is_set)
        await turns()
        self._goes_on.set()


class MeetingLlama(FakeLlama):
    """Stops at everything that takes long in llama.cpp."""

    def __init__(self, at: str, meeting: Meeting) -> None:
        super().__init__(before_decode=meeting if at == "decode" else None)
        self.before_embed = meeting if at == "embed" else None
        self.at, self.meeting = at, meeting

    def load_model(self, params: ModelParams, progress: ProgressCallback | None = None) -> FakeModel:
        if self.at == "load":
            self.meeting()
        model = super().load_model(params, progress)
        if self.at == "tokenize":
            model.vocabulary = MeetingVocabulary(self.meeting)
        return model


class MeetingVocabulary(FakeVocabulary):
    def __init__(self, meeting: Meeting) -> None:
        self.meeting = meeting

    def tokenize(self, text: bytes, *, add_special: bool, parse_special: bool) -> list[int]:
        self.meeting()
        return super().tokenize(text, add_special=add_special, parse_special=parse_special)


Call = Callable[[AsyncBackend, AsyncGraph, AsyncExecutionContext, Path], Awaitable[Any]]


async def pieces(context: AsyncExecutionContext, prompt: str) -> list[str]:
    return [piece async for piece in context.stream(prompt)]


async def beside_a_decode(context: AsyncExecutionContext, call: Callable[[], Awaitable[Any]]) -> None:
    """Start a call while a step computes."""
    run = start(context.run_inference("computes"))
    await until(lambda: context.state == "running")
    await asyncio.gather(call(), run, return_exceptions=True)


CALLS: list[tuple[str, str, Call]] = [
    ("load_by_name", "load", lambda b, g, c, path: b.load_by_name_with_config(path, {"use_mmap": False})),
    ("load", "load", lambda b, g, c, path: b.load([path.read_bytes()])),
    ("reload", "load", lambda b, g, c, path: g.reload(path.with_name("other.gguf"))),
    ("set_input", "tokenize", lambda b, g, c, path: c.set_input(0, "prompt")),
    ("run_inference", "tokenize", lambda b, g, c, path: c.run_inference("prompt")),
    ("run_inference", "decode", lambda b, g, c, path: c.run_inference("prompt")),
    ("stream", "tokenize", lambda b, g, c, path: pieces(c, "prompt")),
    ("stream", "decode", lambda b, g, c, path: pieces(c, "prompt")),
    ("embed", "tokenize", lambda b, g, c, path: g.embed(["text"])),
    ("embed", "embed", lambda b, g, c, path: g.embed(["text"])),
    ("close a context", "decode", lambda b, g, c, path: beside_a_decode(c, c.close)),
    ("close", "decode", lambda b, g, c, path: beside_a_decode(c, lambda: b.close(grace_s=30))),
    ("status", "decode", lambda b, g, c, path: beside_a_decode(c, b.status)),
    ("statistics", "decode", lambda b, g, c, path: beside_a_decode(c, c.statistics)),
    ("unload", "decode", lambda b, g, c, path: beside_a_decode(c, g.unload)),
]


@pytest.mark.parametrize(("at", "call"), [case[1:] for case in CALLS], ids=[f"{name}-{at}" for name, at, _ in CALLS])
def test_no_call_holds_up_the_event_loop(at: str, call: Call, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    path.with_name("other.gguf").write_bytes(b"another")
    meeting = Meeting()

    async def whole() -> None:
        async with AsyncBackend(CONFIG, llama=MeetingLlama(at, meeting)) as backend:
            graph = await backend.load_by_name(path)
            context = await graph.init_execution_context()
            meeting.is_on = True
            await asyncio.gather(call(backend, graph, context, path), meeting.attend())

    asyncio.run(whole())
    assert meeting.n_held == 1


def test_loops_of_several_threads_share_a_backend(tiny_model_path: Path) -> None:
    backend = AsyncBackend(CONFIG, llama=FakeLlama())

    async def ask(prompt: str) -> str:
        graph = await backend.load_by_name(tiny_model_path)
        async with await graph.init_execution_context() as context:
            return "".join(await pieces(context, prompt))

    prompts = [f"prompt {n}" for n in range(6)]
    with ThreadPoolExecutor(6) as threads:
        together = list(threads.map(lambda prompt: asyncio.run(ask(prompt)), prompts))
    assert together == [asyncio.run(ask(prompt)) for prompt in prompts]
    asyncio.run(backend.close())


LEFT_IN_THE_MIDDLE = """
import asyncio, sys
from wasi_nn_backend import AsyncBackend

async def begin():
    backend = AsyncBackend({"n_ctx": 4096, "max_tokens": -1, "ignore_eos": True, "prompt_mode": "raw"})
    graph = await backend.load_by_name(sys.argv[1])
    context = await graph.init_execution_context()
    task = asyncio.create_task(context.run_inference("never ending"))
    while context.state != "running":
        await asyncio.sleep(0)
    return task

loop = asyncio.new_event_loop()
task = loop.run_until_complete(begin())
if sys.argv[2] == "closed":
    loop.close()
print("left", flush=True)
"""


@pytest.mark.parametrize("loop", [pytest.param("stopped", marks=pytest.mark.slow), "closed"])
def test_a_program_ends_whose_loop_was_left_while_a_call_ran(loop: str, tiny_model_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEFT_IN_THE_MIDDLE, str(tiny_model_path), loop],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "left\n"), done.stderr
    assert "Traceback" not in done.stderr
