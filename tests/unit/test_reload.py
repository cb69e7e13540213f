"""Another model behind a name, while calls run: none is lost, and a model that does not load changes nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.doors import both_doors
from tests.fakes.llama import FakeLlama
from tests.unit.test_backend import Gate, singles
from wasi_nn_backend import Backend, Door, Graph, InvalidArgument, ModelNotFound, NotFound
from wasi_nn_backend.llama.tiny_model import write_tiny_model

door = both_doors(__name__)
CONFIG: dict[str, Any] = {"temperature": 0, "repeat_penalty": 1.0, "max_tokens": 12, "threads": 1, "n_ctx": 512}
GUEST = Door("guest", "chat", is_trusted=False)


@pytest.fixture
def other_path(tmp_path: Path) -> Path:
    """A model of other weights: it says something else."""
    path = tmp_path / "other.gguf"
    write_tiny_model(path, seed=1)
    return path


@pytest.fixture
def gate() -> Gate:
    return Gate()


def fake_backend(gate: Gate | None = None, **config: Any) -> tuple[Backend, FakeLlama]:
    llama = FakeLlama(before_decode=gate)
    return Backend(CONFIG | config, llama=llama), llama


@pytest.fixture
def graph(tiny_model_path: Path) -> Iterator[Graph]:
    """On real llama.cpp."""
    with Backend(CONFIG) as backend:
        yield backend.load_by_name(tiny_model_path)


def test_a_conversation_goes_on_with_the_new_model(graph: Graph, other_path: Path) -> None:
    """As one would that had been led with the same words on the new model from its start."""
    context, idle = graph.init_execution_context(), graph.init_execution_context()
    context.run_inference("Hello")
    idle.set_input(0, "A prompt that waits")
    history = context.messages
    graph.reload(other_path)
    assert graph.path == other_path
    text = context.run_inference("And now?")
    assert context.messages[:2] == history
    assert context.metadata["reused_tokens"] == 0
    assert context.run_inference("Once more.")
    assert context.metadata["reused_tokens"] > 0
    idle.compute()
    with Backend(CONFIG) as fresh:
        new = fresh.load_by_name(other_path)
        with new.init_execution_context({"session_id": "new"}) as expected:
            expected._session.resume(history, 0)
            assert expected.run_inference("And now?") == text
        assert idle.get_output(0).decode(errors="replace") == new.init_execution_context().run_inference(
            "A prompt that waits"
        )


def test_the_tokens_of_a_pending_prompt_are_the_new_models(tiny_model_path: Path, tmp_path: Path) -> None:
    """Nothing is configured, so that the settings before and after are the same object."""
    path = tmp_path / "other.gguf"
    path.write_bytes(b"other")
    with Backend(llama=FakeLlama()) as backend:
        context = backend.load_by_name(tiny_model_path).init_execution_context()
        context.set_input(0, "Hello")
        before = context._session._prompt
        context.graph.reload(path)  # type: ignore[attr-defined]
        context.compute()
        after = context._session._prompt
        assert before is not None
        assert after is not None
        assert before[0] is not after[0]
        assert before[1] is after[1]


def test_running_calls_finish_on_the_old_model(gate: Gate, tiny_model_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(b"other")
    backend, llama = fake_backend(gate)
    with backend, ThreadPoolExecutor(2) as threads, gate:
        graph = backend.load_by_name(tiny_model_path)
        context, late = graph.init_execution_context(), graph.init_execution_context()
        running = threads.submit(context.run_inference, "Before")
        gate.reached.acquire()
        graph.reload(path)
        old, new = llama.models
        assert not old.closed
        beside = threads.submit(late.run_inference, "After")
        gate.reached.acquire()  # now both engines' threads stand there
        gate.open()
        running.result(timeout=30)
        beside.result(timeout=30)
        assert old.contexts[0].n_decodes > 0
        assert new.contexts[0].n_decodes > 0
        assert old.closed, "nobody needs it any more"
        n_decodes = old.contexts[0].n_decodes
        context.run_inference("After, too")
        assert old.contexts[0].n_decodes == n_decodes


def test_a_token_by_token_run_finishes_where_it_began(tiny_model_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(b"other")
    backend, llama = fake_backend(max_tokens=40)
    with backend:
        graph = backend.load_by_name(tiny_model_path)
        context = graph.init_execution_context()
        whole = context.run_inference("Step by step", {"prompt_mode": "raw"})
        context.reset()
        context.set_input(1, b'{"prompt_mode": "raw"}')
        context.set_input(0, "Step by step")
        context.compute_single()
        first = context.get_output_single()
        graph.reload(path)
        assert not llama.models[0].closed
        assert (first + b"".join(singles(context))).decode(errors="replace") == whole
        assert llama.models[0].closed


def test_a_model_that_does_not_load_changes_nothing(graph: Graph, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF, but not really")
    with graph.init_execution_context({"session_id": "x"}) as context:
        text = context.run_inference("Hello")
        model, path, settings = graph.model, graph.path, graph.settings
        for call, error in (
            (lambda: graph.reload(broken), InvalidArgument),
            (lambda: graph.reload(tmp_path / "gone"), ModelNotFound),
            (lambda: graph.reload(config={"n_ctx": 3}), InvalidArgument),
        ):
            with pytest.raises(error):
                call()
        assert (graph.model, graph.path, graph.settings) == (model, path, settings)
        context.reset()
        assert context.run_inference("Hello") == text


def test_the_same_model_shares_its_weights(tiny_model_path: Path) -> None:
    backend, llama = fake_backend()
    with backend:
        graph = backend.load_by_name(tiny_model_path)
        context = graph.init_execution_context()
        context.run_inference("Hello")
        graph.reload(config={"max_tokens": 3})
        assert context.run_inference("Shorter")
        assert context.metadata["output_tokens"] == 3
        graph.reload(config={"n_ctx": 1024})
        context.run_inference("In a larger window")
        [model] = llama.models
        assert [each.closed for each in model.contexts] == [True, False]


def test_a_name_means_the_new_model_for_all(tiny_model_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(b"other")
    backend, llama = fake_backend()
    with backend:
        backend.register("default", tiny_model_path, {"max_tokens": 5})
        graphs = [backend.load_by_name("default", door=GUEST), backend.load_by_name_with_config("default", {"seed": 3})]
        contexts = [graph.init_execution_context() for graph in graphs]
        for context in contexts:
            context.run_inference("Old")
        with pytest.raises(ModelNotFound):
            backend.reload("default", tmp_path / "gone.gguf")
        assert {graph.path for graph in graphs} == {tiny_model_path}
        backend.reload("default", path, {"max_tokens": 4})
        assert llama.models[0].closed
        for context in (*contexts, backend.load_by_name("default", door=GUEST).init_execution_context()):
            assert context.graph.path == path
            context.run_inference("New")
            assert context.metadata["output_tokens"] <= 4
        assert contexts[1].settings.sampling.seed == 3
        assert len(llama.models) == 2
        with pytest.raises(NotFound, match="nothing"):
            backend.reload("nothing")
        loaded = backend.load_by_name(tiny_model_path)
        backend.reload(tiny_model_path, path, {"max_tokens": 2})
        assert (loaded.path, loaded.settings.stopping.max_tokens) == (path, 2)


def test_reloading_what_was_unloaded_is_an_error(tiny_model_path: Path) -> None:
    backend, llama = fake_backend()
    with backend:
        graph = backend.load_by_name(tiny_model_path)
        graph.unload()
        with pytest.raises(InvalidArgument, match="unloaded"):
            graph.reload()
        assert all(model.closed for model in llama.models)


def test_no_call_is_lost_while_models_come_and_go(tiny_model_path: Path, other_path: Path) -> None:
    """Two graphs of one backend serve interleaved calls on real llama.cpp while one is reloaded again and again."""
    n_threads = threading.active_count()
    with Backend(CONFIG | {"max_tokens": 6}) as backend:
        backend.register("one", tiny_model_path)
        backend.register("two", other_path)
        graphs = [backend.load_by_name("one"), backend.load_by_name("two")]
        done = threading.Event()

        def talk(n: int) -> int:
            n_turns = 0
            with graphs[n % 2].init_execution_context({"system_prompt": f"You are {n}."}) as context:
                while not done.is_set() or n_turns < 3:
                    assert context.run_inference(f"Turn {n_turns}", {"ignore_eos": True}) is not None
                    n_turns += 1
                assert len(context.messages) == 2 * n_turns
            return n_turns

        with ThreadPoolExecutor(6) as threads:
            talking = [threads.submit(talk, n) for n in range(6)]
            try:
                for n in range(12):
                    backend.reload("one", (tiny_model_path, other_path)[n % 2], {"seed": n})
                    with pytest.raises(ModelNotFound):
                        backend.reload("two", other_path.with_name("gone"))
            finally:
                done.set()
            assert all(future.result(timeout=60) >= 3 for future in talking)
    assert threading.active_count() == n_threads
