"""Each function of ``wasi:nn``, called by a component: what it does when all is well, and each error it can give."""

from __future__ import annotations

import gc
import json
import logging
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from wasmtime import WasmtimeError

from tests.host.component_guests import CODES, GGML, VERSIONS, ComponentDriver, NNError
from tests.host.scripted import scripted
from wasi_nn_backend.backend import Backend
from wasi_nn_backend.dialects import WIT
from wasi_nn_backend.dialects.wit import WIT_ENCODINGS, WIT_ERROR_CODES, WIT_TARGETS, WIT_TENSOR_TYPES
from wasi_nn_backend.errors import Busy, Cancelled, DeadlineExceeded, ErrorCode, RuntimeFailure, SecurityViolation
from wasi_nn_backend.host import HostLimits
from wasi_nn_backend.host.pacing import Pacer
from wasi_nn_backend.llama.tiny_model import write_tiny_model

PROMPT = b"once upon"
#: A window that 24 more tokens do not fit in.
SMALL_WINDOW = b'{"n_ctx": 128, "max_tokens": -1, "context_shifting": false}'

backends = pytest.mark.parametrize("backend", ["fake_backend", "tiny_backend"], indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Backend:
    backend: Backend = request.getfixturevalue(request.param)
    return backend


@pytest.fixture
def guest(fake_backend: Backend) -> Iterator[ComponentDriver]:
    with ComponentDriver(fake_backend) as driver:
        yield driver


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(NNError) as raised:
        call()
    assert raised.value.text  # a code without a reason helps nobody
    return raised.value.code


# --- the tables ---


def test_the_names_and_their_order_are_the_wits() -> None:
    assert list(WIT_ERROR_CODES) == CODES
    assert list(WIT_TENSOR_TYPES) == ["FP16", "FP32", "FP64", "BF16", "U8", "I32", "I64"]
    assert list(WIT_ENCODINGS) == ["openvino", "onnx", "tensorflow", "pytorch", "tensorflowlite", "ggml", "autodetect"]
    assert list(WIT_TARGETS) == ["cpu", "gpu", "tpu"]


def test_every_error_has_a_name() -> None:
    names = {code: WIT_ERROR_CODES[WIT.errno(code)] for code in ErrorCode if code is not ErrorCode.SUCCESS}
    own = {code: code.value.replace("_", "-") for code in names if code.value.replace("_", "-") in CODES}
    assert {code: names[code] for code in own} == own
    assert {code.value: name for code, name in names.items() if code not in own} == {
        "busy": "timeout",
        "missing_memory": "runtime-error",
        "prompt_too_long": "too-large",
        "context_full": "too-large",
        "model_not_found": "not-found",
        "end_of_sequence": "unknown",
    }


# --- a whole conversation ---


@backends
@pytest.mark.parametrize("version", VERSIONS)
def test_a_component_generates_text(backend: Backend, version: str) -> None:
    with backend.load_by_name("default") as graph, graph.init_execution_context() as context:
        expected = context.run_inference(PROMPT, {"prompt_mode": "raw"})
    with ComponentDriver(backend, version=version) as guest:
        outputs = guest.compute(guest.open(), prompt=PROMPT)
        assert list(outputs) == ["output", "metadata"]
        assert outputs["output"].decode(errors="replace") == expected
        assert json.loads(outputs["metadata"])["output_tokens"] == 24
        assert (guest.state.last_error, guest.state.fault) == (None, None)


@backends
def test_numbers_name_inputs_and_outputs_as_well(backend: Backend) -> None:
    with ComponentDriver(backend) as guest:
        context = guest.open()
        named = guest.compute(context, prompt=PROMPT, config=b'{"max_tokens": 5}')
        numbered = guest.compute(context, _1=b'{"max_tokens": 5}', _0=PROMPT)
        assert list(numbered) == ["0", "1"]
        assert numbered["0"] == named["output"]
        assert json.loads(numbered["1"])["output_tokens"] == 5


@backends
def test_a_conversation_of_five_turns_on_one_context(backend: Backend) -> None:
    questions = [f"question {i}" for i in range(5)]
    settings = {"prompt_mode": "chat", "max_tokens": 6, "n_ctx": 1024}
    with backend.load_by_name("default") as graph, graph.init_execution_context(settings) as context:
        expected = [context.run_inference(question) for question in questions]
    with ComponentDriver(backend) as guest:
        context_handle = guest.open()
        guest.compute(context_handle, config=json.dumps(settings).encode())
        answers, n_tokens_input = [], []
        for question in questions:
            outputs = guest.compute(context_handle, prompt=question.encode())
            answers.append(outputs["output"].decode(errors="replace"))
            n_tokens_input.append(json.loads(outputs["metadata"])["input_tokens"])
    assert answers == expected
    assert n_tokens_input == sorted(set(n_tokens_input))  # each turn has what was said before it


@backends
def test_two_contexts_of_one_graph_keep_apart(backend: Backend) -> None:
    turns = {"left": [b"the left", b"more left"], "right": [b"a right", b"right again"]}
    config = b'{"prompt_mode": "chat", "max_tokens": 6, "n_ctx": 1024}'

    def talk(guest: ComponentDriver, context: int, turn: bytes) -> bytes:
        return guest.compute(context, prompt=turn, config=config)["output"]

    with ComponentDriver(backend) as guest:
        alone = {}
        for side, texts in turns.items():
            context = guest.open()
            alone[side] = [talk(guest, context, text) for text in texts]
        graph = guest.load()
        contexts = {side: guest.ask("init-execution-context", graph) for side in turns}
        mixed: dict[str, list[bytes]] = {side: [] for side in turns}
        for i in range(2):
            for side, texts in turns.items():
                mixed[side].append(talk(guest, contexts[side], texts[i]))
    assert mixed == alone


# --- tensors ---


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 9], ids=len)
def test_a_tensor_gives_back_what_it_was_made_of(guest: ComponentDriver, data: bytes) -> None:
    for kind in range(7):
        tensor = guest.tensor(data, [1, 2, 0xFFFF_FFFF], kind)
        assert guest.call("tensor-dimensions", tensor) == [1, 2, 0xFFFF_FFFF]
        assert guest.call("tensor-ty", tensor) == kind
        assert guest.take(tensor) == data
    assert guest.tensor(b"", []) is not None


def test_a_tensor_that_is_too_large_is_an_error_once_it_is_used(fake_backend: Backend) -> None:
    limits = HostLimits(max_tensor_bytes=100, max_config_bytes=50, max_dims=3, max_held_bytes=250)
    with ComponentDriver(fake_backend, limits=limits) as guest:
        context = guest.open()
        assert refused(lambda: guest.compute(context, prompt=b"x" * 101)) == "too-large"
        assert refused(lambda: guest.compute(context, config=b" " * 51)) == "too-large"
        wide = guest.tensor(b"x", [1, 1, 1, 1])
        assert guest.call("tensor-data", wide) == b""
        assert refused(lambda: guest.ask("compute", context, [("prompt", wide)])) == "too-large"
        held = [guest.tensor(b"x" * 100) for _ in range(2)]
        assert refused(lambda: guest.compute(context, prompt=b"x" * 51)) == "timeout"
        guest.call("drop-tensor", held[0])
        guest.compute(context, prompt=b"x" * 20, config=b'{"max_tokens": 1, "n_predict": 1}')


def test_tensors_of_a_call_are_gone_whether_it_succeeds_or_not(fake_backend: Backend) -> None:
    with ComponentDriver(fake_backend, limits=HostLimits(max_held_bytes=2000)) as guest:
        context = guest.open()
        for _ in range(50):
            assert refused(lambda: guest.compute(context, prompt=b"x" * 100, nonsense=b"y" * 100)) == "invalid-argument"
            guest.compute(context, prompt=b"x" * 100, config=b'{"max_tokens": 2}')


def test_outputs_that_nobody_drops_have_an_end(fake_backend: Backend) -> None:
    with ComponentDriver(fake_backend, limits=HostLimits(max_held_bytes=3000)) as guest:
        context = guest.open()
        kept = [guest.ask("compute", context, [("prompt", guest.tensor(b"x"))])]

        def keep_asking() -> None:
            while len(kept) < 1000:
                kept.append(guest.ask("compute", context, []))

        assert refused(keep_asking) == "timeout"
        assert 1 < len(kept) < 1000
        for _, tensor in kept.pop():
            guest.call("drop-tensor", tensor)
        assert guest.ask("compute", context, [])


def test_dropped_contexts_give_back_what_they_held(fake_backend: Backend) -> None:
    with ComponentDriver(fake_backend, limits=HostLimits(max_held_bytes=2000)) as guest:
        for _ in range(20):
            context = guest.open()
            guest.compute(context, prompt=b"x" * 300, config=b'{"max_tokens": 2}' + b" " * 300)
            guest.call("drop-context", context)


def test_a_prompt_has_a_limit_of_its_own(fake_backend: Backend) -> None:
    with ComponentDriver(fake_backend, limits=HostLimits(max_prompt_bytes=50)) as guest:
        context = guest.open()
        assert refused(lambda: guest.compute(context, prompt=b"x" * 51)) == "too-large"
        assert guest.compute(context, prompt=b"x" * 50)


def test_calls_are_paced(fake_backend: Backend) -> None:
    with ComponentDriver(fake_backend) as guest:
        begun, ended = [], []
        guest.state.pacer = cast(Pacer, SimpleNamespace(start=lambda: begun.append(1) or 0.0, end=ended.append))
        guest.take(guest.tensor(b"x"))
        assert len(begun) == len(ended) >= 3


# --- load ---


def test_load_takes_no_bytes_unless_the_host_allows_it(guest: ComponentDriver) -> None:
    assert refused(lambda: guest.ask("load", [b"GGUF"], GGML, 0)) == "unsupported-operation"


@pytest.mark.parametrize(
    ("builders", "encoding", "code"),
    [
        ([], GGML, "invalid-argument"),
        ([b"GGUF"], 1, "invalid-encoding"),
        ([b"not a model"], GGML, "invalid-argument"),
        ([b"preload:/etc/passwd"], GGML, "security"),
        ([b"x" * 400, b"y" * 200], GGML, "too-large"),
        ([b"x"] * 17, GGML, "too-large"),
    ],
)
def test_builders_that_are_refused(tiny_backend: Backend, builders: list[bytes], encoding: int, code: str) -> None:
    limits = HostLimits(allow_load_bytes=True, max_model_bytes=500)
    with ComponentDriver(tiny_backend, limits=limits) as guest:
        assert refused(lambda: guest.ask("load", builders, encoding, 0)) == code


def test_a_model_of_bytes_generates(tiny_backend: Backend, tmp_path: Any) -> None:
    write_tiny_model(tmp_path / "tiny.gguf")
    model = (tmp_path / "tiny.gguf").read_bytes()
    with ComponentDriver(tiny_backend, limits=HostLimits(allow_load_bytes=True)) as guest:
        graph = guest.ask("load", [model, b'{"max_tokens": 4}'], GGML, 2)
        named = guest.generate(guest.open(), PROMPT)
        assert named.startswith(guest.generate(guest.ask("init-execution-context", graph), PROMPT))


@backends
@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("nobody", "not-found"),
        ("gone", "not-found"),
        ("", "not-found"),
        ("a\0b", "invalid-argument"),
        ("é" * 2049, "too-large"),
    ],
)
def test_names_that_are_no_graph(backend: Backend, name: str, code: str) -> None:
    with ComponentDriver(backend) as guest:
        assert refused(lambda: guest.load(name)) == code


def test_a_guest_does_not_learn_where_models_lie(fake_backend: Backend) -> None:
    with ComponentDriver(fake_backend) as guest:
        with pytest.raises(NNError) as raised:
            guest.load("gone")
        assert "nowhere.gguf" not in raised.value.text
        assert '"gone"' in raised.value.text
        assert guest.state.last_error is not None
        assert "nowhere.gguf" in guest.state.last_error.message


def test_graphs_and_contexts_have_limits(fake_backend: Backend) -> None:
    with ComponentDriver(fake_backend, limits=HostLimits(max_graphs=2, max_contexts=2)) as guest:
        graph = guest.load()
        contexts = [guest.ask("init-execution-context", graph) for _ in range(2)]
        assert refused(lambda: guest.ask("init-execution-context", graph)) == "timeout"  # no name for busy
        guest.call("drop-context", contexts[0])
        guest.ask("init-execution-context", graph)
        guest.load()
        assert refused(guest.load) == "timeout"


# --- compute ---


@backends
@pytest.mark.parametrize(
    ("inputs", "code"),
    [
        ({}, "invalid-argument"),
        ({"input": b"x"}, "invalid-argument"),
        ({"prompt": b"x", "_0": b"x"}, "invalid-argument"),
        ({"config": b"[1"}, "invalid-encoding"),
        ({"config": b"\xff\xfe"}, "invalid-encoding"),
        ({"config": b'{"temperature": "hot"}'}, "invalid-argument"),
        ({"prompt": b"x" * 5000}, "too-large"),
        ({"prompt": PROMPT, "config": SMALL_WINDOW}, "too-large"),
    ],
    ids=["none", "unknown", "twice", "no JSON", "no UTF-8", "wrong value", "too long", "full"],
)
def test_inputs_that_are_refused(backend: Backend, inputs: dict[str, bytes], code: str) -> None:
    with ComponentDriver(backend) as guest:
        context = guest.open()
        assert refused(lambda: guest.compute(context, **inputs)) == code
        assert len(guest.generate(context, PROMPT) if "n_ctx" not in str(inputs) else b"x" * 24) >= 24


def test_configuration_without_a_prompt_generates_nothing(guest: ComponentDriver) -> None:
    context = guest.open()
    assert guest.compute(context, config=b'{"max_tokens": 3}') == {}
    assert json.loads(guest.compute(context, prompt=PROMPT)["metadata"])["output_tokens"] == 3


@backends
def test_what_there_is_of_a_text_can_be_had_after_an_error(backend: Backend) -> None:
    with ComponentDriver(backend) as guest:
        context = guest.open()
        assert refused(lambda: guest.compute(context, prompt=PROMPT, config=SMALL_WINDOW)) == "too-large"
        outputs = guest.compute(context)
        assert len(outputs["output"]) > 24
        assert json.loads(outputs["metadata"])["finish_reason"] == "context_full"
        assert guest.compute(context) == outputs


def test_text_is_streamed_when_it_is_asked_for(guest: ComponentDriver) -> None:
    text = guest.compute(guest.open(), prompt=PROMPT, config=b'{"stream_stdout": true}')["output"]
    assert guest.streamed == text


def test_a_context_becomes_the_session_that_its_configuration_names(guest: ComponentDriver) -> None:
    config = b'{"session_id": "one", "prompt_mode": "chat", "max_tokens": 4}'
    graph = guest.load()
    first, second = (guest.ask("init-execution-context", graph) for _ in range(2))
    alone = json.loads(guest.compute(first, prompt=PROMPT, config=config)["metadata"])
    together = json.loads(guest.compute(second, prompt=PROMPT, config=config)["metadata"])
    assert together["input_tokens"] > alone["input_tokens"]
    guest.call("drop-context", first)
    guest.compute(second, prompt=PROMPT)


def raises(error: BaseException) -> Callable[[], None]:
    def play() -> None:
        raise error

    return play


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DeadlineExceeded("late"), "timeout"),
        (Busy("busy"), "timeout"),
        (Cancelled("stopped"), "runtime-error"),
        (RuntimeFailure("broken"), "runtime-error"),
        (SecurityViolation("no"), "security"),
    ],
)
@pytest.mark.parametrize("step", ["load_by_name", "init_execution_context", "compute"])
def test_errors_of_the_backend_are_passed_on(step: str, error: Exception, code: str) -> None:
    backend, script = scripted()
    with ComponentDriver(backend) as guest:
        script.script[step] = raises(error)
        with pytest.raises(NNError, match=str(error)) as raised:
            guest.generate(guest.open(), PROMPT)
        assert raised.value.code == code
    assert script.n_open == 0


@pytest.mark.parametrize("error", [ValueError("a defect"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["load_by_name", "init_execution_context", "compute"])
def test_a_defect_of_the_host_is_a_runtime_error_and_remembered(
    step: str, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    backend, script = scripted()
    with caplog.at_level(logging.CRITICAL), ComponentDriver(backend) as guest:
        script.script[step] = raises(error)
        with pytest.raises(NNError) as raised:
            guest.generate(guest.open(), PROMPT)
        assert raised.value.code == "runtime-error"
        assert "defect" not in raised.value.text
        assert guest.state.fault is error
        assert guest.state.is_stopped == isinstance(error, KeyboardInterrupt)


# --- errors as resources ---


@pytest.mark.parametrize("version", VERSIONS[1:])
def test_older_versions_make_errors_of_their_own(fake_backend: Backend, version: str) -> None:
    with ComponentDriver(fake_backend, version=version) as guest:
        for code in range(len(CODES)):
            error = guest.call("error-new", code, "a réason\0")
            assert (guest.call("error-code", error), guest.call("error-data", error)) == (code, "a réason\0")
            guest.call("drop-error", error)
        assert len(guest.call("error-data", guest.call("error-new", 0, "x" * 100_000))) == 1024


# --- what is dropped is freed ---


def test_dropped_contexts_and_graphs_are_closed() -> None:
    backend, script = scripted()
    with ComponentDriver(backend) as guest:
        graph = guest.load()
        contexts = [guest.ask("init-execution-context", graph) for _ in range(3)]
        assert script.n_open == 4
        guest.call("drop-context", contexts[0])
        assert script.n_open == 3
        guest.call("drop-graph", graph)  # bindings drop graphs early: its contexts go on
        assert script.n_open == 3
        guest.generate(contexts[1], PROMPT)
        guest.call("drop-context", contexts[1])
        assert script.n_open == 2
        guest.call("drop-context", contexts[2])
        assert script.n_open == 0
        assert (len(guest.state.graphs), len(guest.state.contexts)) == (0, 0)


def test_what_is_never_dropped_is_freed_with_the_guest() -> None:
    backend, script = scripted()
    with ComponentDriver(backend) as guest:
        graph = guest.load()
        guest.ask("init-execution-context", graph)
        guest.call("drop-graph", graph)
        guest.load()
        guest.tensor(b"x")
        assert script.n_open == 3
    assert script.n_open == 0


def test_nothing_of_a_guest_is_left_when_it_is_closed(fake_backend: Backend) -> None:
    guest = ComponentDriver(fake_backend)
    guest.generate(guest.open(), PROMPT)
    guest.close()
    state = weakref.ref(guest.state)
    del guest
    gc.collect()
    assert state() is None


def test_dropping_is_not_the_guests_fault(caplog: pytest.LogCaptureFixture) -> None:
    backend, script = scripted({"close": raises(RuntimeFailure("no")), "unload": raises(ValueError("a defect"))})
    with caplog.at_level(logging.CRITICAL), ComponentDriver(backend) as guest:
        graph = guest.load()
        guest.call("drop-context", guest.ask("init-execution-context", graph))
        guest.call("drop-graph", graph)
        assert isinstance(guest.state.fault, ValueError)
    assert script.n_open == 0


def test_a_stopped_guest_gets_nothing_more(guest: ComponentDriver) -> None:
    context = guest.open()
    guest.state.stop()
    assert refused(lambda: guest.compute(context, prompt=PROMPT)) == "runtime-error"
    assert refused(guest.load) == "runtime-error"


@pytest.mark.parametrize("call", ["drop-tensor", "drop-graph", "drop-context", "drop-error", "tensor-data"])
def test_numbers_that_were_never_given_out_trap(fake_backend: Backend, call: str) -> None:
    with ComponentDriver(fake_backend) as guest:
        guest.open()
        with pytest.raises(WasmtimeError, match="unknown handle index"):
            guest.call(call, 12345)
    with ComponentDriver(fake_backend) as guest:
        assert len(guest.generate(guest.open(), PROMPT)) >= 24
