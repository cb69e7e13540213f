"""The contract of WASI-NN in Python, on the fake and, where no step has to be held up, on real llama.cpp too."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import pytest

from tests.doors import both_doors
from tests.fakes.llama import FakeContext, FakeLlama, FakeModel, FakeVocabulary
from wasi_nn_backend import (
    Backend,
    Busy,
    Cancelled,
    ContextFull,
    Door,
    EndOfSequence,
    ExecutionContext,
    Graph,
    GraphEncoding,
    InvalidArgument,
    InvalidEncoding,
    ModelNotFound,
    NotFound,
    PromptTooLong,
    RuntimeFailure,
    Tensor,
    WasiNNError,
)
from wasi_nn_backend.llama.interface import (
    DecodeBatch,
    DecodeStatus,
    ModelParams,
    ProgressCallback,
    SamplerStage,
    TwoStepSampler,
)

door = both_doors(__name__)
#: Programs that import the package themselves.
NOT_ASYNCIO = {
    "test_programs_that_end_or_fork_while_a_model_is_loaded",
    "test_a_load_that_the_backend_closes_meanwhile_is_refused",
}
GREEDY = {"temperature": 0, "repeat_penalty": 1.0}
SEEDED = {"temperature": 0.9, "top_k": 20, "seed": 7}
RAW = Door("guest", "raw", is_trusted=False)


@pytest.fixture(params=["fake", "native"])
def llama(request: pytest.FixtureRequest) -> FakeLlama | None:
    """None is the native library, on the tiny model."""
    return FakeLlama() if request.param == "fake" else None


MakeGraph = Callable[..., Graph]


@pytest.fixture
def make_graph(llama: FakeLlama | None, tiny_model_path: Path) -> Iterator[MakeGraph]:
    backends: list[Backend] = []

    def make(**config: Any) -> Graph:
        settings = {"max_tokens": 24, "n_ctx": 512, "threads": 1, "prompt_mode": "raw"} | GREEDY | config
        backends.append(Backend(settings, llama=llama))
        return backends[-1].load_by_name(str(tiny_model_path))

    yield make
    for backend in backends:
        backend.close()


def singles(context: ExecutionContext, until: type[WasiNNError] = EndOfSequence) -> list[bytes]:
    """compute_single until it ends in that way."""
    pieces = []
    while True:
        try:
            context.compute_single()
        except until:
            return pieces
        pieces.append(context.get_output_single())


# Every way of asking gives the same text.


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_all_ways_of_generating_agree(make_graph: MakeGraph, sampling: dict[str, Any]) -> None:
    graph = make_graph(**sampling)
    with graph.init_execution_context() as context:
        text = context.run_inference("Once upon a time")
        assert text
        assert context.get_output(0).decode(errors="replace") == text
        context.set_input(0, "Once upon a time")
        context.compute()
        assert context.get_output(0).decode(errors="replace") == text
        assert "".join(context.stream("Once upon a time")) == text
        context.set_input(0, Tensor(b"Once upon a time", dimensions=(1,)))
        assert b"".join(singles(context)).decode(errors="replace") == text
        assert context.get_output(0).decode(errors="replace") == text


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_batched_equals_alone(make_graph: MakeGraph, sampling: dict[str, Any]) -> None:
    graph = make_graph(max_concurrent=8, **sampling)
    prompts = [f"{i} is a number and {i * i} is its square" * (1 + i % 3) for i in range(8)]

    def run(prompt: str) -> str:
        with graph.init_execution_context() as context:
            return context.run_inference(prompt)

    alone = [run(prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(run, prompts)) == alone


def test_more_contexts_than_streams_each_keep_their_own_text(make_graph: MakeGraph) -> None:
    graph = make_graph(max_concurrent=2, max_tokens=8)
    contexts = [graph.init_execution_context() for _ in range(12)]
    with ThreadPoolExecutor(12) as threads:
        first = list(threads.map(lambda pair: pair[1].run_inference(f"prompt {pair[0]}"), enumerate(contexts)))
        again = list(threads.map(lambda pair: pair[1].run_inference(f"prompt {pair[0]}"), enumerate(contexts)))
    assert again == first
    with graph.init_execution_context() as fresh:
        assert [fresh.run_inference(f"prompt {i}") for i in range(12)] == first


def test_prefix_hit_equals_miss(make_graph: MakeGraph) -> None:
    graph = make_graph()
    with graph.init_execution_context() as context, graph.init_execution_context({"cache_salt": "x"}) as fresh:
        start = "A long beginning that both prompts share, word for word. "
        answer = context.run_inference(start)
        longer = start + answer + " And then?"
        hit = context.run_inference(longer)
        assert context.metadata["reused_tokens"] > len(start) // 4
        assert hit == fresh.run_inference(longer)
        assert fresh.metadata["reused_tokens"] == 0
        # A prompt that leaves the old path in the middle.
        other = start[: len(start) // 2] + "something else"
        assert context.run_inference(other) == fresh.run_inference(other)


def test_a_prefix_of_another_session_gives_the_same_text(make_graph: MakeGraph) -> None:
    graph = make_graph(max_concurrent=4)
    start = "You are a helpful assistant who answers in few words and never more. "
    questions = [f"{start} Question {i}?" for i in range(6)]
    with graph.init_execution_context({"cache_salt": "alone"}) as context:
        alone = [context.run_inference(question, {"cache_salt": str(i)}) for i, question in enumerate(questions)]
    contexts = [graph.init_execution_context() for _ in questions]
    with ThreadPoolExecutor(6) as threads:
        together = list(threads.map(lambda pair: pair[0].run_inference(pair[1]), zip(contexts, questions, strict=True)))
    assert together == alone
    assert sum(context.metadata["shared_tokens"] > 0 for context in contexts) == len(contexts) - 1
    for context in contexts:
        context.close()


def test_sessions_that_slept_in_host_memory_go_on_as_if_they_had_stayed(make_graph: MakeGraph) -> None:
    results = []
    for max_concurrent in (1, 6):
        graph = make_graph(max_concurrent=max_concurrent, prompt_mode="chat", enable_token_cache_reuse=False)
        contexts = [graph.init_execution_context() for _ in range(6)]
        turns = [
            (context.run_inference(f"turn {turn} of {i}"), context.metadata["reused_tokens"])
            for turn in range(2)
            for i, context in enumerate(contexts)
        ]
        assert all(n_reused > 0 for _, n_reused in turns[6:])
        results.append(turns)
    assert results[0] == results[1]


def test_generation_goes_on_past_the_window(make_graph: MakeGraph) -> None:
    graph = make_graph(n_ctx=128, max_tokens=500, ignore_eos=True, n_keep_tokens=16, n_discard_tokens=32)
    with graph.init_execution_context() as context:
        context.run_inference("on and on")
        assert context.metadata["output_tokens"] == 500
        assert context.metadata["finish_reason"] == "length"
        assert context.metadata["shifted_tokens"] % 32 == 0
        assert context.metadata["shifted_tokens"] > 300
        whole = context.get_output(0)
        context.set_input(0, "on and on")
        assert b"".join(singles(context)) == whole  # paused again and again
        with pytest.raises(ContextFull):
            context.run_inference("on and on", {"context_shifting": False})
        assert whole.startswith(context.get_output(0))
        with pytest.raises(ContextFull):
            context.run_inference("on and on", {"max_tokens": -1})


def test_a_seed_fixes_the_text_whatever_else_runs(make_graph: MakeGraph) -> None:
    graph = make_graph(max_concurrent=4)
    with graph.init_execution_context(SEEDED) as context:
        alone = context.run_inference("seed me")
    with graph.init_execution_context(SEEDED) as context, ThreadPoolExecutor(3) as threads:
        others = [graph.init_execution_context(SEEDED | {"seed": i}) for i in range(3)]
        noise = [threads.submit(other.run_inference, f"noise {i}" * 9) for i, other in enumerate(others)]
        assert context.run_inference("seed me") == alone
        assert all(future.result() is not None for future in noise)


# The conversation.


def test_chat_remembers_and_computing_twice_replaces_the_last_turn(make_graph: MakeGraph) -> None:
    graph = make_graph(prompt_mode="chat")
    with graph.init_execution_context() as context:
        context.run_inference("My name is Ada.")
        n_first = context.metadata["input_tokens"]
        context.set_input(0, "What is my name?")
        context.compute()
        assert context.metadata["input_tokens"] > n_first
        assert [message.role for message in context.messages] == ["user", "assistant"] * 2
        before = context.messages
        context.compute()
        assert context.messages == before
        context.reset()
        assert context.messages == ()
        assert context.get_output(0) == b""


def test_a_system_prompt_comes_first_and_is_no_message(make_graph: MakeGraph) -> None:
    graph = make_graph(prompt_mode="chat")
    with (
        graph.init_execution_context({"system_prompt": "Be brief."}) as context,
        graph.init_execution_context({"prompt_mode": "raw"}) as raw,
    ):
        text = context.run_inference("Hello")
        rendered = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
        assert raw.run_inference(rendered) == text
        assert [message.role for message in context.messages] == ["user", "assistant"]


def test_an_iterator_closed_early_leaves_what_was_said(make_graph: MakeGraph) -> None:
    graph = make_graph(prompt_mode="chat", max_tokens=200)
    with graph.init_execution_context() as context:
        stream = context.stream("Tell me everything")
        first = next(stream)
        stream.close()
        assert context.messages[-1].content.startswith(first)
        assert context.run_inference("Go on") is not None


def test_a_suspended_iterator_blocks_nobody(make_graph: MakeGraph) -> None:
    graph = make_graph(max_tokens=200)
    context = graph.init_execution_context()
    text = context.run_inference("another call")
    stream = context.stream("first")
    next(stream)
    assert context.run_inference("another call") == text
    with pytest.raises(Cancelled, match="another call"):
        next(stream)
    other = context.stream("closed while it is open")
    next(other)
    context.close()
    with pytest.raises(Cancelled, match="closed"):
        next(other)
    with graph.init_execution_context() as third:
        abandoned = third.stream("abandoned")
        next(abandoned)
        del abandoned
        assert third.run_inference("another call") == text


# When it ends.


def test_max_tokens_and_finish_reasons(make_graph: MakeGraph) -> None:
    graph = make_graph()
    with graph.init_execution_context({"max_tokens": 5, "ignore_eos": True}) as context:
        context.run_inference("count")
        assert context.metadata["output_tokens"] == 5
        assert context.metadata["finish_reason"] == "length"


def test_a_stop_string_ends_the_text_before_it(make_graph: MakeGraph) -> None:
    graph = make_graph(max_tokens=40)
    with graph.init_execution_context() as context:
        text = context.run_inference("stop here")
        stop = text[10:13]
        at = text.index(stop)
        cut = context.run_inference("stop here", {"stop": [stop]})
        assert cut == text[:at]
        assert context.metadata["finish_reason"] == "stop_string"
        assert context.run_inference("stop here", {"reverse_prompt": stop}) == text[:at]
        assert context.run_inference("stop here") == text  # a call's configuration ends with the call


def test_a_full_context_is_an_error_with_the_text_so_far(make_graph: MakeGraph) -> None:
    graph = make_graph(n_ctx=128, max_tokens=-1, ignore_eos=True)
    with graph.init_execution_context() as context:
        with pytest.raises(ContextFull, match="128 tokens"):
            context.run_inference("fill it up")
        n_input, n_output = context.metadata["input_tokens"], context.metadata["output_tokens"]
        assert n_input + n_output == 128 + 1  # the last token was sampled but has no cell
        assert len(context.get_output(0)) > 50
        assert context.metadata["finish_reason"] == "context_full"
        context.set_input(0, "fill it up")
        assert b"".join(singles(context, until=ContextFull)) == context.get_output(0)
        assert context.run_inference("fill it up", {"max_tokens": 3}) is not None  # still usable


def test_prompts_that_do_not_fit_are_refused(make_graph: MakeGraph) -> None:
    graph = make_graph(n_ctx=128)
    with graph.init_execution_context() as context:
        with pytest.raises(PromptTooLong, match="tokens and the context window 128"):
            context.run_inference("a1b2" * 200)
        with pytest.raises(PromptTooLong):
            context.compute_single()
        assert context.run_inference("short")


def test_after_a_refused_prompt_there_is_no_output(make_graph: MakeGraph) -> None:
    """A guest that reads on after error 102 must not take the answer before for this one."""
    with make_graph(n_ctx=128).init_execution_context() as context:
        assert context.run_inference("an answer")
        for compute in (context.compute, context.compute_single):
            context.set_input(0, "a1b2" * 200)
            with pytest.raises(PromptTooLong):
                compute()
            assert context.get_output(0) == context.get_output_single(0) == b""
            assert context.metadata["input_tokens"] > 128
            assert context.metadata["output_tokens"] == 0


def test_time_limits_keep_the_text(tiny_model_path: Path) -> None:
    now_s = 0.0

    def clock() -> float:
        nonlocal now_s
        now_s += 0.25
        return now_s

    with Backend({"max_time_ms": 1000, "prompt_mode": "raw"} | GREEDY, llama=FakeLlama(), clock=clock) as backend:
        context = backend.load_by_name(str(tiny_model_path)).init_execution_context()
        assert context.run_inference("slow")
        assert context.metadata["finish_reason"] == "time_limit"
        assert 1 <= context.metadata["output_tokens"] <= 5


def test_control_tokens_are_output_only_when_asked_for(tiny_model_path: Path) -> None:
    with Backend({"prompt_mode": "raw"} | GREEDY, llama=FakeLlama(end_every=3)) as backend:
        context = backend.load_by_name(str(tiny_model_path)).init_execution_context()
        text = context.run_inference("end soon")
        assert context.metadata["finish_reason"] == "stop"
        assert "<|im_end|>" not in text
        assert context.run_inference("end soon", {"special": True}) == text + "<|im_end|>"


# Metadata.


def test_metadata_counts_a_prompt_before_it_is_computed(make_graph: MakeGraph) -> None:
    graph = make_graph()
    with graph.init_execution_context() as context:
        assert json.loads(context.get_output(1))["input_tokens"] == 0
        context.set_input(0, "twelve bytes")
        n_input = json.loads(context.get_output(1))["input_tokens"]
        assert n_input > 0
        context.compute()
        metadata = json.loads(context.get_output(1))
        assert metadata["input_tokens"] == n_input
        assert metadata["output_tokens"] == context.metadata["output_tokens"] > 0
        assert list(metadata)[:4] == ["input_tokens", "output_tokens", "llama_build_number", "llama_commit"]
        text = context.get_output(0)
        context.set_input(0, "another")
        assert context.get_output(0) == text  # the output stays until the next compute


def test_single_steps_count_what_was_taken(make_graph: MakeGraph) -> None:
    graph = make_graph()
    with graph.init_execution_context({"ignore_eos": True}) as context:
        context.set_input(0, "one by one")
        for n in range(1, 6):
            context.compute_single()
            assert json.loads(context.get_output_single(1))["output_tokens"] == n
        context.fini_single()
        assert context.get_output(0) == context.get_output_single(0) == b""
        first = singles(context)
        context.fini_single()
        assert singles(context) == first  # the prompt stays


# Configuration that arrives late.


def test_model_settings_from_a_context_get_an_engine_of_their_own(make_graph: MakeGraph) -> None:
    graph = make_graph(n_ctx=512)
    prompt = "word " * 60
    with graph.init_execution_context() as small, graph.init_execution_context() as other:
        small.set_input(1, b'{"ctx-size": 128, "n-predict": 4}')
        with pytest.raises(PromptTooLong):
            small.run_inference(prompt)
        assert other.run_inference(prompt) is not None
        small.set_input(1, b'{"ctx-size": 1024}')
        assert small.run_inference(prompt) is not None
        assert small.metadata["output_tokens"] <= 4  # what was set before still holds


def test_wrong_configuration_changes_nothing(make_graph: MakeGraph) -> None:
    graph = make_graph()
    with graph.init_execution_context() as context:
        text = context.run_inference("steady")
        for wrong, error in (
            (b"{", InvalidEncoding),
            (b'{"n-predict": "many"}', InvalidArgument),
            (b'{"ctx-size": 3}', InvalidArgument),
            (b'{"ctx-size": 2000000000}', InvalidArgument),
        ):
            with pytest.raises(error):
                context.set_input(1, wrong)
            assert context.run_inference("steady") == text
        context.set_input(1, b"")
        assert context.run_inference("steady") == text


def test_what_is_the_hosts_to_set_is_not_the_guests(tiny_model_path: Path) -> None:
    llama = FakeLlama()
    with Backend({"max_concurrent": 3}, llama=llama) as backend:
        backend.register("default", tiny_model_path, {"max_tokens": 7})
        graph = backend.load_by_name_with_config("default", b'{"max_concurrent": 200, "n_ctx": 256}', door=RAW)
        context = graph.init_execution_context()
        context.set_input(1, b'{"backend": {"max_concurrent": 99}, "memory": {"max_memory_mb": 0}, "n_predict": 5}')
        assert context.settings.backend.max_concurrent == 3
        assert context.settings.memory.max_memory_mb == 8192
        assert context.settings.stopping.max_tokens == 5
        assert all(each.n_sequences == 3 for each in llama.models[0].contexts)
        context.set_input(1, b'{"chat-template": "{% for i in range(99999) %}{% endfor %}", "n_predict": 6}')
        assert context.settings.session.chat_template is None
        assert context.settings.stopping.max_tokens == 6


def test_all_engines_together_stay_within_the_memory_limit(tiny_model_path: Path) -> None:
    """The fake's token costs 64 bytes: 64 MiB hold a million."""
    llama = FakeLlama()
    with Backend({"max_memory_mb": 64, "max_concurrent": 4}, llama=llama) as backend:
        first = backend.load_by_name_with_config(str(tiny_model_path), {"n_ctx": 200_000})
        assert llama.models[0].contexts[0].n_sequences == 4
        backend.load_by_name_with_config(str(tiny_model_path), {"n_ctx": 100_000})
        assert llama.models[0].contexts[1].n_sequences == 1  # two would leave none for sessions that rest
        with pytest.raises(InvalidArgument, match="max_memory_mb"):
            backend.load_by_name_with_config(str(tiny_model_path), {"n_ctx": 300_000})
        first.unload()
        backend.load_by_name_with_config(str(tiny_model_path), {"n_ctx": 300_000})


# Lifetimes.


def test_what_needs_a_prompt_says_so(make_graph: MakeGraph) -> None:
    context = make_graph().init_execution_context()
    with pytest.raises(InvalidArgument, match="set_input"):
        context.compute()
    with pytest.raises(InvalidArgument, match="set_input"):
        context.compute_single()
    assert context.get_output(0) == b""


def test_closing_twice_is_an_error_and_so_is_use_after_it(make_graph: MakeGraph) -> None:
    graph = make_graph()
    context = graph.init_execution_context()
    context.close()
    with pytest.raises(InvalidArgument, match="closed"):
        context.close()
    with pytest.raises(InvalidArgument, match="closed"):
        context.set_input(0, "late")
    graph.unload()
    with pytest.raises(InvalidArgument, match="unloaded"):
        graph.unload()
    with pytest.raises(InvalidArgument, match="unloaded"):
        graph.init_execution_context()


def test_contexts_of_an_unloaded_graph_keep_their_output(make_graph: MakeGraph) -> None:
    graph = make_graph()
    context = graph.init_execution_context()
    text = context.run_inference("remember")
    metadata = context.get_output(1)
    graph.unload()
    assert context.get_output(0).decode(errors="replace") == text
    assert context.get_output(1) == metadata
    context.fini_single()
    for call in (context.compute, context.compute_single, lambda: context.set_input(0, "x")):
        with pytest.raises(InvalidArgument, match="unloaded"):
            call()
    context.close()


def test_equal_settings_share_an_engine_and_the_last_user_frees_it(tiny_model_path: Path) -> None:
    llama = FakeLlama()
    with Backend(llama=llama) as backend:
        first, second = backend.load_by_name(str(tiny_model_path)), backend.load_by_name(str(tiny_model_path))
        wide = backend.load_by_name_with_config(str(tiny_model_path), {"n_ctx": 4096})
        [model] = llama.models
        assert [context.n_ctx for context in model.contexts] == [2048, 4096]
        wide.unload()
        assert [context.closed for context in model.contexts] == [False, True]
        first.unload()
        assert second.init_execution_context().run_inference("still here")
        second.unload()
        assert model.closed


def test_a_registered_model_stays_loaded_between_guests(tiny_model_path: Path) -> None:
    llama = FakeLlama()
    with Backend(llama=llama) as backend:
        backend.register("default", tiny_model_path, {"max_tokens": 3})
        for _ in range(3):
            with backend.load_by_name("default", door=RAW) as graph:
                graph.init_execution_context().run_inference("hello")
        assert len(llama.models) == len(llama.models[0].contexts) == 1
        assert not llama.models[0].closed
    assert llama.models[0].closed


def test_asking_for_a_gpu_that_is_not_there_shares_the_weights(tiny_model_path: Path) -> None:
    llama = FakeLlama()
    with Backend(llama=llama) as backend:
        backend.register("default", tiny_model_path)
        for config in (None, b'{"n-gpu-layers": 100}', b'{"n-gpu-layers": 35, "main-gpu": 0}'):
            with backend.load_by_name_with_config("default", config, door=RAW) as graph:
                assert graph.init_execution_context().run_inference("x") is not None
        assert len(llama.models) == len(llama.models[0].contexts) == 1


def test_only_what_a_name_was_last_loaded_as_stays(tiny_model_path: Path) -> None:
    llama = FakeLlama()
    with Backend(llama=llama) as backend:
        backend.register("default", tiny_model_path)
        for n_ctx in (512, 1024, 1024):
            backend.load_by_name_with_config("default", {"n_ctx": n_ctx}, door=RAW).unload()
        assert [context.closed for context in llama.models[0].contexts] == [True, False]


def test_a_files_new_content_is_loaded_anew(tmp_path: Path) -> None:
    llama = FakeLlama()
    path = tmp_path / "model.gguf"
    path.write_bytes(b"old")
    with Backend(llama=llama) as backend:
        old = backend.load_by_name(str(path))
        path.write_bytes(b"new content")
        backend.load_by_name(str(path))
        assert len(llama.models) == 2
        assert old.init_execution_context().run_inference("x") is not None


def test_names_and_paths(tiny_model_path: Path, tmp_path: Path) -> None:
    with Backend(llama=FakeLlama()) as backend:
        backend.register("gone", tmp_path / "missing.gguf")
        with pytest.raises(ModelNotFound):
            backend.load_by_name("gone")
        with pytest.raises(NotFound, match="gone"):
            backend.load_by_name("unknown")
        with pytest.raises(NotFound):
            backend.load_by_name(str(tiny_model_path), door=RAW)
        with pytest.raises(ModelNotFound):
            backend.load_by_name(str(tmp_path / "missing.gguf"))
        with pytest.raises(InvalidArgument, match="registered already"):
            backend.register("gone", tiny_model_path)


@pytest.mark.parametrize("name", ["a" * 300, "a" * 5000, "a\0b", "a\ud800", "smollm2\0"])
def test_names_that_no_file_can_have_are_unknown(name: str) -> None:
    with Backend(llama=FakeLlama()) as backend:
        with pytest.raises(NotFound, match="no registered graph"):
            backend.load_by_name(name)
        with pytest.raises(ModelNotFound, match="GGUF file"):
            backend.load_by_name(f"./{name}")


def test_load_takes_the_files_bytes(make_graph: MakeGraph, llama: FakeLlama | None, tiny_model_path: Path) -> None:
    text = make_graph().init_execution_context().run_inference("same weights")
    config = {"max_tokens": 24, "prompt_mode": "raw", "threads": 1, "n_ctx": 512} | GREEDY
    with Backend(config, llama=llama) as backend:
        graph = backend.load([tiny_model_path.read_bytes(), b'{"n-predict": 24}'], GraphEncoding.GGML)
        folder = graph.path.parent
        assert graph.init_execution_context().run_inference("same weights") == text
        graph.unload()
        assert not folder.exists()
        with pytest.raises(InvalidEncoding, match="onnx"):
            backend.load([b""], GraphEncoding.ONNX)
        with pytest.raises(InvalidArgument, match="builders"):
            backend.load([])


def test_bytes_that_are_no_model_leave_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with Backend() as backend, pytest.raises(InvalidArgument):
        backend.load([b"this is no GGUF file"])
    assert list(tmp_path.iterdir()) == []


# Other threads.


class Gate:
    """Holds engines' threads at the start of each decode until the test lets them through.

    A context manager that opens: entered after a pool of threads, it has a failing test end instead of waiting for
    them.
    """

    def __init__(self) -> None:
        self.reached = threading.Semaphore(0)
        self._open = threading.Semaphore(0)
        self._is_open = threading.Event()

    def __call__(self, _batch: object) -> None:
        self.reached.release()
        if not self._is_open.is_set():
            self._open.acquire()
            if self._is_open.is_set():
                self._open.release()  # for the next one who stands here

    def let_through(self, n_decodes: int = 1) -> None:
        self._open.release(n_decodes)

    def open(self) -> None:
        self._is_open.set()
        self._open.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.open()


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def gated_graph(gate: Gate, tiny_model_path: Path) -> Iterator[Graph]:
    config = {"prompt_mode": "raw", "max_tokens": 50, "max_concurrent": 2} | GREEDY
    with Backend(config, llama=FakeLlama(before_decode=gate)) as backend, ThreadPoolExecutor(1):
        yield backend.load_by_name(str(tiny_model_path))
        gate.open()


def test_a_cancelled_compute_keeps_its_text_and_its_session(gate: Gate, gated_graph: Graph) -> None:
    context = gated_graph.init_execution_context()
    with ThreadPoolExecutor(1) as threads, gate:
        running = threads.submit(context.run_inference, "cancel me")
        for _ in range(4):
            gate.reached.acquire()
            gate.let_through()
        gate.reached.acquire()
        context.cancel()
        gate.open()
        with pytest.raises(Cancelled):
            running.result(timeout=30)
    assert context.metadata["finish_reason"] == "cancelled"
    so_far = context.get_output(0).decode()
    assert 1 <= len(so_far) < 50
    assert context.run_inference("cancel me").startswith(so_far)


def test_a_prompt_in_the_middle_of_its_decode_can_be_cancelled(gate: Gate, gated_graph: Graph) -> None:
    context, other = gated_graph.init_execution_context(), gated_graph.init_execution_context()
    with ThreadPoolExecutor(2) as threads, gate:
        running = threads.submit(context.run_inference, "a long prompt " * 20)
        gate.reached.acquire()
        beside = threads.submit(other.run_inference, "unharmed")
        context.cancel()
        gate.open()
        with pytest.raises(Cancelled):
            running.result(timeout=30)
        text = beside.result(timeout=30)
    assert other.run_inference("unharmed") == text
    assert context.run_inference("a long prompt " * 20)


_RUNS: dict[str, Callable[[ExecutionContext], object]] = {
    "compute": lambda context: context.compute(),
    "single": lambda context: context.compute_single(),
    "inference": lambda context: context.run_inference("prepare me"),
    "stream": lambda context: "".join(context.stream("prepare me")),
}


@pytest.fixture
def interruptions(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Callable[[], object]]]:
    """What another thread does, once, at which point of preparing a run."""
    actions: dict[str, Callable[[], object]] = {}
    tokenize, create_sampler = FakeVocabulary.tokenize, FakeModel.create_sampler
    with ThreadPoolExecutor(1) as threads:

        def interrupt(point: str) -> None:
            if point in actions:
                threads.submit(actions.pop(point)).result(timeout=30)

        def tokenize_slowly(self: FakeVocabulary, text: bytes, *, add_special: bool, parse_special: bool) -> list[int]:
            interrupt("tokenize")
            return tokenize(self, text, add_special=add_special, parse_special=parse_special)

        def create_sampler_slowly(self: FakeModel, stages: Sequence[SamplerStage]) -> TwoStepSampler:
            interrupt("create_sampler")
            return create_sampler(self, stages)

        monkeypatch.setattr(FakeVocabulary, "tokenize", tokenize_slowly)
        monkeypatch.setattr(FakeModel, "create_sampler", create_sampler_slowly)
        yield actions


#: ``set_input`` has the prompt's tokens already where compute begins.
_POINTS = [*((way, "create_sampler") for way in _RUNS), ("inference", "tokenize"), ("stream", "tokenize")]


@pytest.mark.parametrize("runs_again", [False, True])
@pytest.mark.parametrize(("way", "point"), _POINTS)
def test_a_run_whose_prompt_is_being_prepared_can_be_cancelled(
    gate: Gate,
    gated_graph: Graph,
    interruptions: dict[str, Callable[[], object]],
    way: str,
    point: str,
    runs_again: bool,
) -> None:
    gate.open()
    context, call = gated_graph.init_execution_context({"max_tokens": 5}), _RUNS[way]
    context.set_input(0, "prepare me")
    if runs_again:  # there is a run that is over, which a cancel must not take for this one
        context.compute()
    context.set_input(1, b'{"max_tokens": 2000, "ignore_eos": true}')
    states: list[str] = []

    def look_and_cancel() -> None:
        states.append(context.state)
        context.cancel()

    interruptions[point] = look_and_cancel
    with pytest.raises(Cancelled):
        call(context)
    assert states == ["running"]
    assert context.metadata["finish_reason"] == "cancelled"
    interruptions[point] = lambda: context.cancel_run(Cancelled("the host has no more time"))
    with pytest.raises(Cancelled, match="no more time"):
        call(context)
    context.set_input(1, b'{"max_tokens": 5}')
    call(context)  # cancelled by nobody
    context.cancel()
    assert len(context.run_inference("and now?")) == 5


def test_a_cancel_while_nothing_runs_does_not_reach_the_next_call(
    gate: Gate, gated_graph: Graph, interruptions: dict[str, Callable[[], object]]
) -> None:
    gate.open()
    context = gated_graph.init_execution_context({"max_tokens": 5})
    interruptions["tokenize"] = context.cancel
    context.set_input(0, "prepare me")
    assert not interruptions
    context.compute()
    context.cancel()
    context.compute()
    context.cancel()
    assert len(b"".join(singles(context))) == 5


def test_one_context_serves_one_call_at_a_time(gate: Gate, gated_graph: Graph) -> None:
    context = gated_graph.init_execution_context()
    with ThreadPoolExecutor(1) as threads, gate:
        running = threads.submit(context.run_inference, "first")
        gate.reached.acquire()
        with pytest.raises(Busy):
            context.set_input(0, "second")
        with pytest.raises(Busy):
            context.compute()
        gate.open()
        assert running.result(timeout=30)


def test_closing_a_context_that_computes_cancels_it_first(gate: Gate, gated_graph: Graph) -> None:
    context = gated_graph.init_execution_context()
    with ThreadPoolExecutor(2) as threads, gate:
        running = threads.submit(context.run_inference, "close me", {"max_tokens": 100_000, "ignore_eos": True})
        gate.reached.acquire()
        closing = threads.submit(context.close)
        gate.open()
        with pytest.raises(Cancelled):
            running.result(timeout=30)
        closing.result(timeout=30)
    with pytest.raises(InvalidArgument, match="closed"):
        context.compute()


def test_unloading_lets_running_computes_finish(gate: Gate, gated_graph: Graph) -> None:
    context = gated_graph.init_execution_context()
    with ThreadPoolExecutor(1) as threads, gate:
        running = threads.submit(context.run_inference, "last words")
        gate.reached.acquire()
        gated_graph.unload()
        with pytest.raises(InvalidArgument, match="unloaded"):
            gated_graph.init_execution_context()
        gate.open()
        text = running.result(timeout=30)
    assert context.get_output(0).decode() == text != ""


def test_closing_the_backend_ends_what_runs_and_every_thread(gate: Gate, tiny_model_path: Path) -> None:
    n_threads = threading.active_count()
    llama = FakeLlama(before_decode=gate)
    backend = Backend({"prompt_mode": "raw"} | GREEDY, llama=llama)
    graph = backend.load_by_name(str(tiny_model_path))
    contexts = [graph.init_execution_context() for _ in range(3)]
    with ThreadPoolExecutor(4) as threads, gate:
        running = [threads.submit(context.run_inference, "close all") for context in contexts]
        gate.reached.acquire()
        closing = threads.submit(backend.close)
        gate.open()
        for future in running:
            with pytest.raises((Cancelled, InvalidArgument, RuntimeFailure)):  # the last: one that begins only now
                future.result(timeout=30)
        closing.result(timeout=30)
    backend.close()
    assert threading.active_count() == n_threads
    assert llama.models[0].closed
    with pytest.raises(RuntimeFailure, match="closed"):
        backend.load_by_name(str(tiny_model_path))


def test_a_paused_reader_keeps_nobody_waiting(tiny_model_path: Path) -> None:
    config = {"prompt_mode": "raw", "max_concurrent": 1, "max_tokens": 30} | GREEDY
    with Backend(config, llama=FakeLlama()) as backend:
        graph = backend.load_by_name(str(tiny_model_path))
        slow, other = graph.init_execution_context(), graph.init_execution_context()
        alone = other.run_inference("slow reader")
        slow.set_input(0, "slow reader")
        slow.compute_single()  # and holds the only stream, some tokens ahead
        first = slow.get_output_single()
        assert other.run_inference("in between")
        assert first + b"".join(singles(slow)) == alone.encode()


def test_what_a_sink_raises_ends_the_run(make_graph: MakeGraph) -> None:
    graph = make_graph(stream_stdout=True)
    context = graph.init_execution_context()
    seen: list[bytes] = []
    context.set_input(0, "to a sink")
    context.compute(seen.append)
    assert b"".join(seen) == context.get_output(0)

    def broken(_text: bytes) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        context.compute(broken)
    context.compute(seen.append)  # still usable


# Forking, saving, figures.


def test_a_fork_goes_on_as_its_origin_would(make_graph: MakeGraph) -> None:
    graph = make_graph(prompt_mode="chat", max_concurrent=3)
    with graph.init_execution_context(SEEDED) as context:
        context.run_inference("Remember this long sentence, my friend, for I shall ask.")
        fork = context.fork()
        assert fork.messages == context.messages
        text = context.run_inference("What did I say?")
        assert fork.run_inference("What did I say?") == text
        assert fork.metadata["shared_tokens"] > 16
        assert fork.run_inference("And before?") == context.run_inference("And before?")
        fork.close()
        assert context.run_inference("Still there?")


def test_a_saved_session_goes_on_in_another_backend(
    make_graph: MakeGraph, llama: FakeLlama | None, tiny_model_path: Path, tmp_path: Path
) -> None:
    graph = make_graph(prompt_mode="chat")
    path = tmp_path / "session"
    with graph.init_execution_context(GREEDY | {"max_tokens": 9, "stop": ["never this"]}) as context:
        context.run_inference("Save me, please, with all that was said so far.")
        context.save(path)
        messages, text = context.messages, context.run_inference("Go on.")
        n_reused = context.metadata["reused_tokens"]
    config = {"max_tokens": 24, "n_ctx": 512, "threads": 1} | GREEDY
    with Backend(config, llama=llama) as backend:
        restored = backend.restore(path)
        assert restored.messages == messages
        assert restored.settings.stopping.max_tokens == 9
        assert restored.run_inference("Go on.") == text
        assert restored.metadata["reused_tokens"] == n_reused > 0
        assert restored.graph.name == str(tiny_model_path)


def test_damaged_and_foreign_sessions_are_refused(make_graph: MakeGraph, tmp_path: Path) -> None:
    graph = make_graph(prompt_mode="chat")
    path = tmp_path / "session"
    with graph.init_execution_context() as context:
        context.run_inference("Save me.")
        context.save(path)
        with pytest.raises(RuntimeFailure, match="could not be saved"):
            context.save(tmp_path / "missing folder" / "session")
    content = path.read_bytes()
    with pytest.raises(NotFound):
        graph.restore(tmp_path / "nothing")
    for at in (0, 20, 90, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(InvalidArgument):
            graph.restore(path)
    for n in (0, 10, 100, len(content) - 1):
        path.write_bytes(content[:n])
        with pytest.raises(InvalidArgument):
            graph.restore(path)
    path.write_bytes(content)
    assert graph.restore(path).messages
    assert [file.name for file in tmp_path.iterdir()] == ["session"]


def test_statistics_add_up(make_graph: MakeGraph) -> None:
    graph = make_graph(max_concurrent=2)
    prompt = "A prompt that two contexts share from its first word to its last one."
    with graph.init_execution_context() as first, graph.init_execution_context() as second:
        first.run_inference(prompt)
        second.run_inference(prompt)
        figures = graph.statistics()
        assert figures.n_runs == 2
        assert figures.n_tokens_prompt == 2 * first.metadata["input_tokens"]
        assert figures.n_tokens_shared == figures.n_tokens_reused == second.metadata["shared_tokens"] > 0
        assert figures.n_tokens_cached == figures.n_cells_used > 0
        assert figures.n_steps <= figures.n_tokens_decoded
    assert graph.statistics().n_cells_used == 0


def test_a_conversation_outgrows_its_window(make_graph: MakeGraph) -> None:
    graph = make_graph(prompt_mode="chat", n_ctx=256, max_tokens=8)
    with graph.init_execution_context({"system_prompt": "Be kind."}) as context:
        for turn in range(30):
            context.run_inference(f"This is what I say in turn {turn}.")
            assert context.metadata["input_tokens"] <= 252
        assert len(context.messages) == 60
        fork = context.fork()
        assert fork.run_inference("Last words?") == context.run_inference("Last words?")
        with pytest.raises(PromptTooLong):
            context.run_inference("too much " * 60)
        with pytest.raises(PromptTooLong):
            context.run_inference("a" * 240, {"context_shifting": False})


def test_names_of_other_types_are_refused_and_paths_are_taken(make_graph: MakeGraph, tiny_model_path: Path) -> None:
    backend = Backend(llama=FakeLlama())
    assert backend.load_by_name(tiny_model_path).name == str(tiny_model_path)
    with pytest.raises(InvalidArgument, match="Path"):
        backend.load_by_name(3)  # type: ignore[arg-type]
    for builders in (b"GGUF", ["text"]):
        with pytest.raises(InvalidArgument, match="sequence of bytes"):
            backend.load(builders)  # type: ignore[arg-type]
    backend.close()


def test_a_callback_that_returns_nothing_does_not_cancel_the_load(tiny_model_path: Path) -> None:
    seen: list[float] = []
    with Backend() as backend:
        assert backend.load_by_name(tiny_model_path, progress=seen.append).alive
        assert seen[-1] == 1.0
        with pytest.raises(Cancelled):
            backend.load_by_name_with_config(tiny_model_path, {"use_mmap": False}, progress=lambda _fraction: False)


END_WHILE_COMPUTING = """
import sys, threading
from wasi_nn_backend import Backend
backend = Backend({"n_ctx": 4096, "max_tokens": -1, "ignore_eos": True, "prompt_mode": "raw"})
context = backend.load_by_name(sys.argv[1]).init_execution_context()
stream = context.stream("never ending")
next(stream)
"""

FORK_AFTER_LOAD = """
import os, sys
from wasi_nn_backend import Backend, RuntimeFailure
backend = Backend({"max_tokens": 3, "prompt_mode": "raw"})
graph = backend.load_by_name(sys.argv[1])
context = graph.init_execution_context()
if os.fork() == 0:
    try:
        context.run_inference("in the child")
    except RuntimeFailure as error:
        backend.close()
        with Backend({"max_tokens": 3, "threads": 1}) as another:
            another.load_by_name(sys.argv[1]).init_execution_context().run_inference("in a model of its own")
        os._exit(7 if "forked" in str(error) else 8)
    os._exit(9)
status = os.waitstatus_to_exitcode(os.wait()[1])
assert context.run_inference("in the parent") is not None
sys.exit(status)
"""


OUTLIVES_MAIN = """
import sys, threading
from wasi_nn_backend import Backend

def work():
    threading.main_thread().join()
    with Backend({"max_tokens": 3, "prompt_mode": "raw"}) as backend:
        assert backend.load_by_name(sys.argv[1]).init_execution_context().run_inference("late") is not None

threading.Thread(target=work).start()
"""


@pytest.mark.parametrize(
    ("program", "status"),
    [(END_WHILE_COMPUTING, 0), (FORK_AFTER_LOAD, 7), (OUTLIVES_MAIN, 0)],
    ids=["end", "fork", "outlive"],
)
def test_programs_that_end_or_fork_while_a_model_is_loaded(program: str, status: int, tiny_model_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program, str(tiny_model_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (status, "")


def test_a_load_that_the_backend_closes_meanwhile_is_refused(tmp_path: Path) -> None:
    loads, goes_on = threading.Event(), threading.Event()

    class Slow(FakeLlama):
        def load_model(self, params: ModelParams, progress: ProgressCallback | None = None) -> FakeModel:
            loads.set()
            assert goes_on.wait(30)
            return super().load_model(params, progress)

    (tmp_path / "model.gguf").touch()
    backend = Backend(llama=Slow())
    with ThreadPoolExecutor(1) as thread:
        loading = thread.submit(backend.load_by_name, str(tmp_path / "model.gguf"))
        assert loads.wait(30)
        backend.close()
        goes_on.set()
        with pytest.raises(RuntimeFailure, match="closed"):
            loading.result(timeout=30)


def test_token_by_token_the_engine_is_a_few_tokens_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The further, the more the caller has taken: what it never takes is computed for nothing."""
    n_decodes = 0
    decode = FakeContext.decode

    def counted(self: FakeContext, batch: DecodeBatch) -> DecodeStatus:
        nonlocal n_decodes
        n_decodes += 1
        return decode(self, batch)

    monkeypatch.setattr(FakeContext, "decode", counted)
    (tmp_path / "model.gguf").touch()
    with Backend({"max_tokens": 40, "ignore_eos": True} | GREEDY, llama=FakeLlama()) as backend:
        context = backend.load_by_name(str(tmp_path / "model.gguf")).init_execution_context()
        context.set_input(0, "Once")
        for n_taken in range(1, 41):
            context.compute_single()
            assert n_taken <= n_decodes <= n_taken + min(2 + n_taken, 8)
