"""Five turns of one context in every dialect, and token-by-token runs that take turns on one graph."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import F32_CACHE
from tests.host.abis import ABIS, Abi, abi_of
from tests.host.conftest import MODEL
from tests.host.guests import OUT, Driver, malloc_wat, memory_wat
from wasi_nn_backend.backend import Backend

QUESTIONS = (
    b"Name the capital city of France.",
    b"And of Italy?",
    b"Which of the two is larger?",
    "Wie heißt die zweite auf Deutsch?".encode(),
    b"Thank you. Goodbye!",
)
CHAT = b'{"prompt_mode": "chat", "n-predict": 12}'
SETTINGS = {"sampling": {"temperature": 0.0, "repeat_penalty": 1.0}, "stopping": {"max_tokens": 12}}

abis = pytest.mark.parametrize("abi", ABIS, ids=str)
single_step = pytest.mark.parametrize("abi", [abi for abi in ABIS if "compute_single" in abi.functions], ids=str)


@pytest.fixture(scope="module")
def backend(tiny_f32_model_path: Path) -> Iterator[Backend]:
    """Random weights, in full precision: where a prompt is cut must not change its text."""
    with Backend({**SETTINGS, "model": F32_CACHE}) as backend:
        backend.register(MODEL.decode(), tiny_f32_model_path)
        yield backend


@pytest.fixture(scope="module")
def answers(backend: Backend) -> list[bytes]:
    return answers_in_python(backend)


def answers_in_python(backend: Backend) -> list[bytes]:
    with backend.load_by_name(MODEL.decode()) as graph, graph.init_execution_context(CHAT.decode()) as context:
        return [context.run_inference(question).encode() for question in QUESTIONS]


def open_guest(backend: Backend, abi: Abi) -> Driver:
    return Driver(backend, abi, memory=memory_wat(abi, 4) + malloc_wat(abi))


@abis
def test_five_turns_of_one_context(backend: Backend, abi: Abi, answers: list[bytes]) -> None:
    assert len(set(answers)) > 1
    check_five_turns(backend, abi, answers)


def check_five_turns(backend: Backend, abi: Abi, answers: list[bytes]) -> None:
    with open_guest(backend, abi) as guest:
        context = guest.open(MODEL)
        assert guest.configure(context, CHAT) == 0
        assert [guest.generate(context, question) for question in QUESTIONS] == answers
        assert len(guest.state.contexts.get(context).messages) == 2 * len(QUESTIONS)
        assert guest.state.last_error is None


@abis
def test_five_turns_that_the_guest_writes_down_itself(backend: Backend, abi: Abi) -> None:
    """As guests in the field do it: each prompt is all that was said so far. It is as if each were asked alone."""
    with open_guest(backend, abi) as guest:
        context, history = guest.open(MODEL), b""
        turns = []
        for question in QUESTIONS:
            history += b"<|im_start|>user\n" + question + b"<|im_end|>\n<|im_start|>assistant\n"
            turns.append((history, guest.generate(context, history)))
            history += turns[-1][1] + b"<|im_end|>\n"
        assert guest.state.contexts.get(context).messages == ()
        for prompt, answer in turns[2:4]:
            assert guest.call("init_execution_context", 0, OUT) == 0
            assert guest.generate(guest.peek_u32(OUT), prompt) == answer


@pytest.mark.parametrize("abi", [abi for abi in ABIS if "run_inference" in abi.functions], ids=str)
def test_five_turns_in_one_call_each(backend: Backend, abi: Abi, answers: list[bytes]) -> None:
    with open_guest(backend, abi) as guest:
        assert guest.configure(guest.open(MODEL), CHAT) == 0
        assert [guest.text_at(guest.run_inference(question)) for question in QUESTIONS] == answers


@single_step
def test_five_turns_token_by_token(backend: Backend, abi: Abi, answers: list[bytes]) -> None:
    with open_guest(backend, abi) as guest:
        context = guest.open(MODEL)
        assert guest.configure(context, CHAT) == 0
        texts = []
        for question in QUESTIONS:
            guest.set_prompt(context, question)
            pieces, errno = guest.single_tokens(context)
            assert errno == 100
            texts.append(b"".join(pieces))
        # What the last token left incomplete of a character is not shown piece by piece.
        assert all(answer.startswith(text) for answer, text in zip(answers, texts, strict=True))
        assert all(len(answer) - len(text) <= 3 for answer, text in zip(answers, texts, strict=True))


@single_step
def test_interleaved_runs_on_one_graph_each_give_their_own_text(backend: Backend, abi: Abi) -> None:
    check_interleaved_runs(backend, abi)


def check_interleaved_runs(backend: Backend, abi: Abi) -> None:
    with open_guest(backend, abi) as guest:
        graph = guest.load(MODEL)
        contexts = []
        for _ in range(2):
            assert guest.call("init_execution_context", graph, OUT) == 0
            contexts.append(guest.peek_u32(OUT))
        prompts = [b"Once upon a time", b"The capital of France is"]
        alone = []
        for context, prompt in zip(contexts, prompts, strict=True):
            guest.set_prompt(context, prompt)
            alone.append(guest.single_tokens(context)[0])
        for context, prompt in zip(contexts, prompts, strict=True):
            guest.set_prompt(context, prompt)
        together: list[list[bytes]] = [[], []]
        for _ in range(max(map(len, alone))):
            for pieces, context, own in zip(together, contexts, alone, strict=True):
                if len(pieces) < len(own):
                    assert guest.call("compute_single", context) == 0
                    pieces.append(guest.output(context, function="get_output_single"))
        assert together == alone
        assert alone[0] != alone[1]


@pytest.mark.real
def test_a_model_that_answers_does_the_same(smollm2_path: Path) -> None:
    with Backend(SETTINGS) as backend:
        backend.register(MODEL.decode(), smollm2_path)
        answers = answers_in_python(backend)
        assert b"Paris" in answers[0]
        assert b"Rome" in answers[1], "which only makes sense after the first question"
        for abi in ABIS:
            if str(abi) in ("witx", "wasmedge", "wamr-legacy", "hyperbeam-64"):
                check_five_turns(backend, abi, answers)
        check_interleaved_runs(backend, abi_of("wasmedge"))
