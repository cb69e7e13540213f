"""Sessions on disk: who restores one goes on as if it had never been away, or is told why not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import F32_CACHE
from tests.doors import both_doors
from tests.fakes.llama import FakeLlama
from tests.new_process import continue_here, continue_in_a_new_process
from wasi_nn_backend import Backend, ExecutionContext, Graph, InvalidArgument, ModelNotFound, NotFound
from wasi_nn_backend.llama.tiny_model import write_tiny_model

door = both_doors(__name__)
#: Another process has its own door.
NOT_ASYNCIO = {"test_restored_in_a_new_process_equals_never_left"}
#: Small enough that one stream's sessions push each other out. The layout and the kind of attention are given, since a
#: new process might measure others to be faster, whose cells look different.
CONFIG: dict[str, Any] = {
    "temperature": 0,
    "repeat_penalty": 1.0,
    "prompt_mode": "chat",
    "n_ctx": 256,
    "max_tokens": 8,
    "threads": 1,
    "max_concurrent": 1,
    "flash_attention": "off",
    "kv_layout": "streams",
} | F32_CACHE


@pytest.fixture(params=["fake", "native"])
def graph(request: pytest.FixtureRequest, tiny_f32_model_path: Path) -> Iterator[Graph]:
    with Backend(CONFIG, llama=FakeLlama() if request.param == "fake" else None) as backend:
        yield backend.load_by_name(tiny_f32_model_path)


def short_conversation(graph: Graph) -> ExecutionContext:
    context = graph.init_execution_context()
    context.run_inference("Remember this sentence, please, since somebody will ask you for it.")
    return context


def outgrown_conversation(graph: Graph) -> ExecutionContext:
    """Its first turns are no longer in the prompts."""
    context = graph.init_execution_context({"system_prompt": "Be kind."})
    for turn in range(14):
        context.run_inference(f"This is what I have to say in turn {turn}.")
    assert context.metadata["input_tokens"] < 252
    return context


def shifted_conversation(graph: Graph) -> ExecutionContext:
    """Its last answer was longer than the window, of which only the head is in the next prompt."""
    config = {"system_prompt": "Be as kind as you can be.", "ignore_eos": True, "n_keep_tokens": 40}
    context = graph.init_execution_context(config)
    context.run_inference("On and on", {"max_tokens": 300})
    assert context.metadata["shifted_tokens"] > 0
    return context


CONVERSATIONS = [short_conversation, outgrown_conversation, shifted_conversation]


def test_restored_in_a_new_process_equals_never_left(tiny_f32_model_path: Path, tmp_path: Path) -> None:
    """Real llama.cpp with the tiny model. The first sessions sleep in host memory when they are saved. The same cells
    and the same batches give the same logits, so the texts are equal, and so is what had to be computed."""
    paths = [tmp_path / make.__name__ for make in CONVERSATIONS]
    with Backend(CONFIG) as backend:
        graph = backend.load_by_name(tiny_f32_model_path)
        contexts = [make(graph) for make in CONVERSATIONS]
        assert graph.statistics().n_sessions_in_host == len(contexts) - 1
        for context, path in zip(contexts, paths, strict=True):
            context.save(path)
        expected = [continue_here(context, "Go on, and tell me more of it.") for context in contexts]
    restored = continue_in_a_new_process(CONFIG, paths, "Go on, and tell me more of it.")
    assert restored == expected
    assert all(each.n_tokens_reused > 16 for each in restored)
    assert restored[0].n_tokens_reused > restored[0].n_tokens_input // 2


@pytest.mark.parametrize("make", CONVERSATIONS)
def test_restored_equals_never_left_turn_after_turn(graph: Graph, make: Any, tmp_path: Path) -> None:
    """Beside the origin, in one backend. Each time both have computed the same or shared what the other computed."""
    path = tmp_path / "session"
    with make(graph) as context:
        for turn in range(6):
            context.save(path)
            with graph.restore(path) as restored:
                assert restored.messages == context.messages
                assert continue_here(restored, f"Turn {turn}.").text == continue_here(context, f"Turn {turn}.").text


def test_nobody_shares_what_a_shift_has_left_behind(graph: Graph, tmp_path: Path) -> None:
    """Cells that were shifted are not what computing their tokens gives. After a restore they are still known."""
    window = "The head of it. " + "And so it goes, on and on, word after word, till the end of all days comes. " * 4
    config = {"prompt_mode": "raw", "n_keep_tokens": 16, "n_discard_tokens": 64, "ignore_eos": True}
    with graph.init_execution_context(config | {"cache_salt": "never shared"}) as alone:
        path = tmp_path / "session"
        with graph.init_execution_context(config) as context:
            context.run_inference(window[:180], {"max_tokens": 300})
            assert context.metadata["shifted_tokens"] > 0
            context.save(path)
        tail = json.loads(path.read_bytes().split(b"\n", 3)[2])["tokens"]
        prompt = b"".join(graph.model.vocabulary.piece(token, special=False) for token in tail)
        with graph.restore(path) as restored, graph.init_execution_context(config) as other:
            assert restored.messages == ()
            assert other.run_inference(prompt) == alone.run_inference(prompt)
            assert 0 < other.metadata["shared_tokens"] <= 16 < len(tail)


def test_a_restore_without_room_for_the_cells_computes_them_again(tiny_f32_model_path: Path, tmp_path: Path) -> None:
    for llama in (FakeLlama(), None):
        with Backend(CONFIG, llama=llama) as backend:
            context = short_conversation(backend.load_by_name(tiny_f32_model_path))
            context.save(tmp_path / "session")
            expected = continue_here(context, "Go on.")
        with Backend(CONFIG | {"max_cache_tokens": 1}, llama=llama) as backend:
            computed = continue_here(backend.restore(tmp_path / "session"), "Go on.")
        assert (computed.messages, computed.text) == (expected.messages, expected.text)
        assert computed.n_tokens_reused == 0


# What cannot be restored.


def rewrite(path: Path, **changes: object) -> None:
    """Change a saved session's header as its writer would have: with the right checksum."""
    magic, _checksum, header, state = path.read_bytes().split(b"\n", 3)
    header = json.dumps(json.loads(header) | changes).encode()
    checksum = hashlib.sha256(header + state).hexdigest().encode()
    path.write_bytes(b"\n".join([magic, checksum, header, state]))


def test_another_version_of_the_format_is_named(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "session"
    short_conversation(graph).save(path)
    rewrite(path)
    assert graph.restore(path).messages
    for version in (0, 1, 99):
        rewrite(path, version=version)
        with pytest.raises(InvalidArgument, match=rf"session has format {version}; this version reads format \d"):
            graph.restore(path)


def test_a_session_of_another_model_is_refused(tmp_path: Path) -> None:
    """Also of one that differs in nothing but the values of its weights: its cells would give wrong answers."""
    names = ["one", "other weights", "other types"]
    write_tiny_model(tmp_path / names[0])
    write_tiny_model(tmp_path / names[1], seed=1)
    write_tiny_model(tmp_path / names[2], quantization="q8_0")
    with Backend(CONFIG) as backend:
        graphs = [backend.load_by_name(tmp_path / name) for name in names]
        for graph in graphs:
            short_conversation(graph).save(tmp_path / f"session of {graph.path.name}")
        for graph in graphs:
            for name in names:
                path = tmp_path / f"session of {name}"
                if graph.path.name == name:
                    assert graph.restore(path).messages
                    continue
                with pytest.raises(InvalidArgument, match=r"was saved with another model .*load that one"):
                    graph.restore(path)
        (tmp_path / names[0]).write_bytes((tmp_path / names[1]).read_bytes())
        with pytest.raises(InvalidArgument, match="another model"):
            backend.restore(tmp_path / f"session of {names[0]}")


def test_files_that_are_no_sessions_say_so(graph: Graph, tmp_path: Path, tiny_f32_model_path: Path) -> None:
    (tmp_path / "empty").touch()
    for path, message in (
        (tmp_path / "empty", "is no saved session"),
        (tiny_f32_model_path, "is no saved session"),
        (tmp_path, "cannot be read: Is a directory"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            graph.restore(path)
    with pytest.raises(NotFound, match="there is no saved session"):
        graph.restore(tmp_path / "gone")


def test_a_session_whose_model_is_gone_names_it(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model.gguf")
    with Backend(CONFIG) as backend:
        short_conversation(backend.load_by_name(tmp_path / "model.gguf")).save(tmp_path / "session")
    (tmp_path / "model.gguf").unlink()
    with Backend(CONFIG) as backend, pytest.raises(ModelNotFound, match=r"model\.gguf"):
        backend.restore(tmp_path / "session")
