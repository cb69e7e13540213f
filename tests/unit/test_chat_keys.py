"""What each key of ``session`` and ``stopping`` changes, on a fake that says what the test wants."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import n_examples
from tests.effects import changes
from tests.fakes.llama import FakeLlama
from tests.fakes.scripted import ScriptedLlama
from wasi_nn_backend import Backend, EndOfSequence, ExecutionContext, InvalidArgument, Message

GREEDY = {"temperature": 0, "repeat_penalty": 1.0, "threads": 1, "max_concurrent": 2}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}
CALL = '{"name": "weather", "arguments": {"city": "Oslo"}}'

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: In the manner of reasoning models: the prompt opens the block, and closes it again if there shall be no reasoning.
REASONING = CHATML + "<think>\n{% if enable_thinking is defined and not enable_thinking %}</think>\n{% endif %}"
TOOLS = "{% if tools %}You may call {{ tools | tojson }}\n{% endif %}" + CHATML


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    path = tmp_path / "fake.gguf"
    path.touch()
    return path


@contextmanager
def context_of(model_path: Path, llama: FakeLlama, **config: Any) -> Iterator[ExecutionContext]:
    with Backend(GREEDY | config, llama=llama) as backend:
        yield backend.load_by_name(model_path).init_execution_context()


def answered(model_path: Path, answer: str, **config: Any) -> str:
    with context_of(model_path, ScriptedLlama(answer), **config) as context:
        return context.run_inference("Hi")


def prompted(model_path: Path, template: str = CHATML, **config: Any) -> str:
    """The prompt that a model with this template gets."""
    llama = ScriptedLlama("Hello", chat_template=template)
    with context_of(model_path, llama, **config) as context:
        context.run_inference("Hi")
    return llama.prompts[0]


# The prompt.


@changes("session.prompt_mode")
def test_prompt_mode(model_path: Path) -> None:
    assert prompted(model_path, prompt_mode="raw") == "<s>Hi"
    assert prompted(model_path, prompt_mode="chat") == "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@changes("session.system_prompt")
def test_system_prompt(model_path: Path) -> None:
    assert prompted(model_path, system_prompt="Be brief.").startswith("<s><|im_start|>system\nBe brief.<|im_end|>\n")
    assert "system" not in prompted(model_path)


@changes("session.chat_template")
@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("[{{ messages[0].content }}]", "<s>[Hi]"),
        ("plain", "<s>User: Hi\nAssistant:"),
        (None, "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_chat_template(model_path: Path, template: str | None, prompt: str) -> None:
    assert prompted(model_path, chat_template=template) == prompt


def test_a_name_that_no_built_in_template_has(model_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"no chat template named 'chatlm'.* chatml, "):
        prompted(model_path, chat_template="chatlm")


@changes("session.enable_thinking")
def test_enable_thinking(model_path: Path) -> None:
    assert prompted(model_path, REASONING).endswith("<think>\n")
    assert prompted(model_path, REASONING, enable_thinking=True).endswith("<think>\n")
    assert prompted(model_path, REASONING, enable_thinking=False).endswith("<think>\n</think>\n")


@changes("session.tools")
@pytest.mark.parametrize("tools", [[WEATHER], json.dumps([WEATHER])], ids=["array", "text"])
def test_tools(model_path: Path, tools: Any) -> None:
    assert prompted(model_path, TOOLS, tools=tools).startswith(f"<s>You may call {json.dumps([WEATHER])}\n")
    assert "You may call" not in prompted(model_path, TOOLS)
    with context_of(model_path, ScriptedLlama(CALL, chat_template=TOOLS), tools=tools) as context:
        assert context.run_inference("Weather in Oslo?") == CALL  # the text stays
        assert context.metadata["tool_calls"] == [{"name": "weather", "arguments": {"city": "Oslo"}}]
        assert context.messages[-1] == Message("assistant", CALL)
        assert context.run_inference("Hi", {"tools": []})
        assert "tool_calls" not in context.metadata  # without tools it is some JSON


@pytest.mark.parametrize(
    "tools", ["[", "{}", 7, ["x"], [{"a": {1}}], [{"a": float("nan")}], "[" * 99, [{}] * 300, [{"a": "b" * 2**21}]]
)
def test_tools_that_are_no_json_are_refused(model_path: Path, tools: Any) -> None:
    with pytest.raises(InvalidArgument, match="tools"):
        prompted(model_path, tools=tools)


def test_a_template_without_a_place_for_tools_is_worth_one_warning(
    model_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), context_of(model_path, ScriptedLlama("Hello"), tools=[WEATHER]) as context:
        context.run_inference("Hi")
        context.run_inference("Hi")
    assert [record.message for record in caplog.records if "session.tools" in record.message] == [
        "the chat template has no place for session.tools: the model will not know of them"
    ]


@changes("session.cache_salt")
def test_cache_salt(model_path: Path) -> None:
    question = "a question that is long enough to share"
    with Backend(GREEDY, llama=ScriptedLlama("Hello")) as backend:
        graph = backend.load_by_name(model_path)
        graph.init_execution_context().run_inference(question)
        for salt, is_shared in (("other", False), ("", True)):
            context = graph.init_execution_context({"cache_salt": salt})
            context.run_inference(question)
            assert (context.metadata["shared_tokens"] > 0) == is_shared


# The answer.


@changes("session.reasoning")
@pytest.mark.parametrize(
    ("mode", "answer", "reasoning"),
    [("keep", "<think>\nhm €\n</think>\n\nYes.", None), ("hide", "Yes.", None), ("separate", "Yes.", "hm €")],
)
def test_reasoning(model_path: Path, mode: str, answer: str, reasoning: str | None) -> None:
    llama = ScriptedLlama("<think>\nhm €\n</think>\n\nYes.")
    with context_of(model_path, llama, reasoning=mode) as context:
        assert context.run_inference("Hi") == answer
        assert context.get_output() == answer.encode()
        assert context.metadata.get("reasoning") == reasoning
        assert context.messages[-1] == Message("assistant", answer)
        assert "".join(context.stream("Hi")) == answer
        assert context.metadata.get("reasoning") == reasoning
        context.set_input(0, "Hi")
        pieces = singles(context)
        assert b"".join(pieces).decode() == answer
        assert context.metadata.get("reasoning") == reasoning


def singles(context: ExecutionContext) -> list[bytes]:
    pieces = []
    while True:
        try:
            context.compute_single()
        except EndOfSequence:
            return pieces
        pieces.append(context.get_output_single())


def test_reasoning_that_the_prompt_opens(model_path: Path) -> None:
    llama = ScriptedLlama("so\n</think>\n\nYes.", chat_template=REASONING)
    with context_of(model_path, llama, reasoning="separate") as context:
        assert context.run_inference("Hi") == "Yes."
        assert context.metadata["reasoning"] == "so"
        assert context.run_inference("Hi", {"max_tokens": 2}) == ""  # cut off while it still thinks
        assert context.metadata["reasoning"] == "so"
        assert context.run_inference("Hi<think>", {"prompt_mode": "raw"}) == "Yes."
    with context_of(model_path, llama, reasoning="separate", enable_thinking=False) as context:
        assert context.run_inference("Hi") == "so\n</think>\n\nYes."  # the prompt closed the block itself
        assert context.metadata["reasoning"] == ""


def test_an_opening_tag_at_the_very_end_of_an_answer_is_not_lost(model_path: Path) -> None:
    with context_of(model_path, ScriptedLlama("so <thi"), reasoning="hide") as context:
        assert "".join(context.stream("Hi")) == context.run_inference("Hi") == "so <thi"
        context.set_input(0, "Hi")
        assert b"".join(singles(context)) == context.get_output() == b"so <thi"


@changes("session.special")
def test_special(model_path: Path) -> None:
    assert answered(model_path, "Hello") == "Hello"
    assert answered(model_path, "Hello", special=True) == "Hello<|im_end|>"


@changes("session.keep_control_text")
def test_keep_control_text(model_path: Path) -> None:
    assert answered(model_path, "so<|im_start|>now") == "sonow"
    assert answered(model_path, "so<|im_start|>now", keep_control_text=True) == "so<|im_start|>now"


def test_a_control_token_ends_a_run_where_its_text_is_kept(model_path: Path) -> None:
    stop = {"reverse_prompt": "<|im_start|>"}
    assert answered(model_path, "so<|im_start|>now", keep_control_text=True, **stop) == "so"
    assert answered(model_path, "so<|im_start|>now", **stop) == "sonow"


@changes("session.stream_stdout")
def test_stream_stdout(model_path: Path) -> None:
    for streams, expected in ((True, b"Hello"), (False, b"")):
        written = bytearray()
        with context_of(model_path, ScriptedLlama("Hello"), stream_stdout=streams) as context:
            context.set_input(0, "Hi")
            context.compute(written.extend)
            assert (bytes(written), context.get_output()) == (expected, b"Hello")


# Where it ends.


@changes("stopping.stop", "stopping.reverse_prompt")
@pytest.mark.parametrize("key", ["stop", "reverse_prompt"])
def test_stop_strings(model_path: Path, key: str) -> None:
    with context_of(model_path, ScriptedLlama("one two three")) as context:
        assert context.run_inference("Hi", {key: " tw"}) == "one"
        assert context.metadata["finish_reason"] == "stop_string"
        assert context.run_inference("Hi", {key: "four"}) == "one two three"
        assert context.metadata["finish_reason"] == "stop"


def test_a_built_in_template_without_markers_stops_before_the_users_next_turn(model_path: Path) -> None:
    llama = ScriptedLlama(" Hello.\nUser: And", chat_template=None)
    with context_of(model_path, llama, chat_template="plain", stop=["never"]) as context:
        assert context.run_inference("Hi") == " Hello."
        assert context.run_inference("Hi", {"prompt_mode": "raw"}) == " Hello.\nUser: And"
        assert llama.prompts[0] == "<s>User: Hi\nAssistant:"


@settings(
    derandomize=True,
    deadline=None,
    max_examples=n_examples(60),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.text("ab€🙂<think>/", max_size=40),
    st.lists(st.text("ab€🙂</", min_size=1, max_size=3), max_size=3),
    st.sampled_from(["keep", "hide"]),
)
def test_however_the_text_is_taken_it_is_the_same(
    model_path: Path, answer: str, stops: list[str], reasoning: str
) -> None:
    """Streamed, token by token and at once; no stop string in it, and without reasoning all that comes before one."""
    config = {"stop": stops, "reasoning": reasoning, "n_ctx": 512}
    with context_of(model_path, ScriptedLlama(answer), **config) as context:
        text = context.run_inference("Hi")
        assert context.get_output().decode() == text
        assert "".join(context.stream("Hi")) == text
        context.set_input(0, "Hi")
        assert b"".join(singles(context)).decode() == text
    assert not any(stop in text for stop in stops)
    if reasoning == "keep":
        assert answer.startswith(text)
        assert text == answer or any(answer[len(text) :].startswith(stop) for stop in stops)


@changes("stopping.max_tokens")
def test_max_tokens(model_path: Path) -> None:
    with context_of(model_path, ScriptedLlama("one two three")) as context:
        assert context.run_inference("Hi", {"max_tokens": 5}) == "one t"
        assert (context.metadata["finish_reason"], context.metadata["output_tokens"]) == ("length", 5)
        assert context.run_inference("Hi") == "one two three"


@changes("stopping.max_time_ms")
def test_max_time_ms(model_path: Path) -> None:
    for limit_ms, reason in ((1000, "time_limit"), (0, "stop")):
        now_s = iter(range(10**6))
        config = GREEDY | {"max_time_ms": limit_ms}
        with Backend(
            config, llama=ScriptedLlama("one two three"), clock=lambda now_s=now_s: next(now_s) / 4
        ) as backend:
            context = backend.load_by_name(model_path).init_execution_context()
            assert "one two three".startswith(context.run_inference("Hi"))
            assert context.metadata["finish_reason"] == reason
