"""Each imported function, called by a guest: what it does when all is well, and each error number that it can give."""

from __future__ import annotations

import json
import logging
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conftest import n_examples
from tests.host.conftest import MODEL
from tests.host.guests import OUT, PAGE, U8, Driver
from tests.host.scripted import scripted
from wasi_nn_backend.backend import Backend
from wasi_nn_backend.dialects import CORE_DIALECTS, WAMR_LEGACY, WASMEDGE, WITX, Dialect
from wasi_nn_backend.errors import (
    Busy,
    Cancelled,
    DeadlineExceeded,
    RuntimeFailure,
    SecurityViolation,
    UnsupportedOperation,
)
from wasi_nn_backend.host import HostLimits

MEMORY_BYTES = 2 * PAGE
#: Addresses at which four bytes do not lie in a memory of two pages.
BAD_POINTERS = (MEMORY_BYTES, MEMORY_BYTES - 3, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF)
#: A window that 24 more tokens do not fit in, and one that they do.
SMALL_WINDOW = b'{"ctx-size": 128, "n-predict": -1, "memory": {"context_shifting": false}}'

#: Those whose tensors have a length of their own.
dialects = pytest.mark.parametrize(
    "dialect", [known for known in CORE_DIALECTS if known is not WAMR_LEGACY], ids=lambda dialect: dialect.name
)


@pytest.fixture
def guest(fake_backend: Backend) -> Iterator[Driver]:
    with Driver(fake_backend) as driver:
        yield driver


# --- a whole conversation ---


@dialects
def test_the_six_official_calls_generate_text(fake_backend: Backend, dialect: Dialect) -> None:
    with Driver(fake_backend, dialect) as guest:
        context = guest.open(MODEL)
        text = guest.generate(context, b"once upon")
        assert len(text) >= 24
        assert guest.generate(context, b"once upon") == text
        assert guest.state.last_error is None


def test_handles_count_from_zero_and_are_not_reused(guest: Driver) -> None:
    assert [guest.load(MODEL) for _ in range(3)] == [0, 1, 2]
    assert guest.call("unload", 1) == 0
    assert guest.load(MODEL) == 3
    for expected in (0, 1):
        assert guest.call("init_execution_context", 0, OUT) == 0
        assert guest.peek_u32(OUT) == expected
    assert guest.call("finalize_execution_context", 0) == 0
    assert guest.call("init_execution_context", 0, OUT) == 0
    assert guest.peek_u32(OUT) == 2


# --- load ---


def builder_array(guest: Driver, *parts: bytes) -> int:
    return guest.place(b"".join(struct.pack("<II", guest.place(part), len(part)) for part in parts))


def test_load_takes_no_bytes_unless_the_host_allows_it(guest: Driver) -> None:
    assert guest.call("load", builder_array(guest, b"GGUF"), 1, 6, 0, OUT) == 6
    assert guest.state.last_error is not None
    assert "load it by name" in guest.state.last_error.message


@dialects
@pytest.mark.parametrize("encoding", [5, 6, 262])
def test_load_passes_bytes_and_configuration_on_when_allowed(dialect: Dialect, encoding: int) -> None:
    backend, script = scripted()
    with Driver(backend, dialect, limits=HostLimits(allow_load_bytes=True)) as guest:
        assert guest.call("load", builder_array(guest, b"GGUF", b"{}"), 2, encoding, 0, OUT) == 0
    assert script.calls == ["load", "unload"]


@pytest.mark.parametrize("allowed", [False, True])
def test_load_never_opens_a_path_of_the_host(allowed: bool) -> None:
    backend, script = scripted()
    with Driver(backend, limits=HostLimits(allow_load_bytes=allowed)) as guest:
        assert guest.call("load", builder_array(guest, b"preload:/etc/passwd"), 1, 6, 0, OUT) == 6
    assert script.calls == []


@pytest.mark.parametrize(
    ("encoding", "target", "errno"),
    [(7, 0, 2), (255, 0, 2), (6, 3, 1), (6, 0xFFFF_FFFF, 1), (6, 256, 1)],
)
def test_load_knows_its_encodings_and_targets(guest: Driver, encoding: int, target: int, errno: int) -> None:
    assert guest.call("load", builder_array(guest, b"GGUF"), 1, encoding, target, OUT) == errno


def test_load_checks_its_builders(fake_backend: Backend) -> None:
    limits = HostLimits(allow_load_bytes=True, max_builders=2, max_model_bytes=100)
    with Driver(fake_backend, limits=limits) as guest:
        part = builder_array(guest, b"x" * 60, b"y" * 60, b"")
        assert guest.call("load", part, 0, 6, 0, OUT) == 1
        assert guest.call("load", part, 2, 6, 0, OUT) == 7
        assert guest.call("load", part, 3, 6, 0, OUT) == 7
        assert guest.call("load", part, 1, 0, 0, OUT) == 2  # openvino is a known encoding, but no GGUF
        assert guest.call("load", guest.place(struct.pack("<II", MEMORY_BYTES - 9, 10)), 1, 6, 0, OUT) == 1
        for pointer in BAD_POINTERS:
            assert guest.call("load", pointer, 1, 6, 0, OUT) == 1
            assert guest.call("load", part, 1, 6, 0, pointer) == 1


def test_load_of_something_else_than_a_model_is_an_error(tiny_backend: Backend) -> None:
    with Driver(tiny_backend, limits=HostLimits(allow_load_bytes=True)) as guest:
        assert guest.call("load", builder_array(guest, b"not a model"), 1, 6, 0, OUT) == 1


# --- load_by_name, load_by_name_with_config ---


@dialects
def test_unknown_names_and_missing_files_have_their_own_numbers(fake_backend: Backend, dialect: Dialect) -> None:
    with Driver(fake_backend, dialect) as guest:
        assert guest.call("load_by_name", guest.place(b"nobody"), 6, OUT) == 8
        assert guest.call("load_by_name", guest.place(b"gone"), 4, OUT) == 103
        assert guest.call("load_by_name", guest.place(b"/etc/passwd"), 11, OUT) == 8
        assert guest.call("load_by_name", 0, 0, OUT) == 8


@pytest.mark.parametrize(("name", "errno"), [(b"de\0fault", 1), (b"\xff\xfe", 2), (b"x" * 4097, 7)])
def test_names_are_text(guest: Driver, name: bytes, errno: int) -> None:
    at = guest.place(name)
    assert guest.call("load_by_name", at, len(name), OUT) == errno
    assert guest.call("load_by_name_with_config", at, len(name), 0, 0, OUT) == errno


def test_bad_pointers_of_load_by_name_load_nothing() -> None:
    backend, script = scripted()
    with Driver(backend) as guest:
        name = guest.place(MODEL)
        for pointer in BAD_POINTERS:
            assert guest.call("load_by_name", name, len(MODEL), pointer) == 1
            assert guest.call("load_by_name", pointer, len(MODEL), OUT) == 1
            assert guest.call("load_by_name_with_config", name, len(MODEL), 0, 0, pointer) == 1
            assert guest.call("load_by_name_with_config", name, len(MODEL), pointer, 4, OUT) == 1
        assert guest.call("load_by_name", name, MEMORY_BYTES, OUT) == 7
    assert script.calls == []


@pytest.mark.parametrize(
    ("config", "errno"),
    [
        (b"", 0),
        (b"{}", 0),
        (b'{"llama3": true, "temp": 0.5}', 0),
        (b"not json", 2),
        (b"\xff", 2),
        (b"[]", 1),
        (b'{"ctx-size": "many"}', 1),
        (b'{"temp": true}', 1),
    ],
)
def test_configuration_is_checked(guest: Driver, config: bytes, errno: int) -> None:
    at = guest.place(config)
    assert guest.call("load_by_name_with_config", guest.place(MODEL), 7, at, len(config), OUT) == errno


def test_configuration_has_a_largest_size(fake_backend: Backend) -> None:
    with Driver(fake_backend, limits=HostLimits(max_config_bytes=10)) as guest:
        config = guest.place(b"{}" + b" " * 20)
        assert guest.call("load_by_name_with_config", guest.place(MODEL), 7, config, 10, OUT) == 0
        assert guest.call("load_by_name_with_config", guest.place(MODEL), 7, config, 11, OUT) == 7
        context = guest.open(MODEL)
        assert guest.configure(context, b"{}" + b" " * 9) == 7
        guest.set_prompt(context, b"a longer prompt is not bounded by it")


def test_unknown_keys_of_wasmedge_guests_are_passed_over_in_silence(
    guest: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        context = guest.open(MODEL, b'{"llama3": true, "reverse-prompt": ""}')
        assert guest.configure(context, b'{"llama4": 1}') == 0
    assert "llama3" not in caplog.text
    assert "llama4" not in caplog.text


def test_the_number_of_graphs_is_bounded(fake_backend: Backend) -> None:
    with Driver(fake_backend, limits=HostLimits(max_graphs=2)) as guest:
        graphs = [guest.load(MODEL), guest.load(MODEL)]
        assert guest.call("load_by_name", guest.place(MODEL), 7, OUT) == 4
        assert guest.call("unload", graphs[0]) == 0
        assert guest.load(MODEL) == 2


# --- init_execution_context, finalize_execution_context, unload ---


def test_contexts_need_a_live_graph_and_a_place_for_the_handle(guest: Driver) -> None:
    graph = guest.load(MODEL)
    for wrong in (graph + 1, 0x8000_0000, 0xFFFF_FFFF):
        assert guest.call("init_execution_context", wrong, OUT) == 1
    for pointer in BAD_POINTERS:
        assert guest.call("init_execution_context", graph, pointer) == 1
    assert len(guest.state.contexts) == 0
    assert guest.call("unload", graph) == 0
    assert guest.call("init_execution_context", graph, OUT) == 1


def test_the_number_of_contexts_is_bounded(fake_backend: Backend) -> None:
    with Driver(fake_backend, limits=HostLimits(max_contexts=2)) as guest:
        graph = guest.load(MODEL)
        assert [guest.call("init_execution_context", graph, OUT) for _ in range(3)] == [0, 0, 4]
        assert guest.call("finalize_execution_context", 0) == 0
        assert guest.call("init_execution_context", graph, OUT) == 0


def test_a_finalized_context_is_gone_for_every_call(guest: Driver) -> None:
    context = guest.open(MODEL)
    assert guest.call("finalize_execution_context", context) == 0
    prompt = guest.tensor(b"x")
    assert guest.call("finalize_execution_context", context) == 1
    assert guest.call("set_input", context, 0, prompt) == 1
    for function in ("compute", "compute_single", "fini_single"):
        assert guest.call(function, context) == 1
    for function in ("get_output", "get_output_single"):
        assert guest.call(function, context, 0, PAGE, PAGE, OUT) == 1


def test_after_unload_contexts_can_be_read_and_finalized_only(guest: Driver) -> None:
    graph = guest.load(MODEL)
    assert guest.call("init_execution_context", graph, OUT) == 0
    context = guest.peek_u32(OUT)
    text = guest.generate(context, b"hello")
    assert guest.call("unload", graph) == 0
    assert guest.call("unload", graph) == 1
    assert guest.output(context) == text
    assert json.loads(guest.output(context, 1))["output_tokens"] > 0
    assert guest.call("compute", context) == 1
    assert guest.call("compute_single", context) == 1
    assert guest.call("set_input", context, 0, guest.tensor(b"x")) == 1
    assert guest.call("fini_single", context) == 0
    assert guest.call("finalize_execution_context", context) == 0
    assert guest.generate(guest.open(MODEL), b"hello") == text


def test_unloading_leaves_other_guests_graphs_of_the_name_alone(fake_backend: Backend) -> None:
    with Driver(fake_backend) as first, Driver(fake_backend) as second:
        graph, context = first.load(MODEL), second.open(MODEL)
        text = second.generate(context, b"hello")
        assert first.call("unload", graph) == 0
        assert second.generate(context, b"hello") == text


# --- set_input ---


def test_a_session_id_makes_handles_of_one_store_one_session(fake_backend: Backend) -> None:
    """A guest names its session when it has a context: its handle moves there. Another guest's "alice" is another."""
    named = b'{"session_id": "alice", "prompt_mode": "chat"}'
    with Driver(fake_backend) as guest, Driver(fake_backend) as stranger:
        first = guest.open(MODEL)
        assert guest.call("init_execution_context", 0, OUT) == 0
        second = guest.peek_u32(OUT)
        foreign = stranger.open(MODEL)
        for driver, handle in ((guest, first), (guest, second), (stranger, foreign)):
            assert driver.call("set_input", handle, 1, driver.tensor(named)) == 0
        assert guest.generate(first, b"My name is Alice.")
        assert guest.call("finalize_execution_context", first) == 0
        assert guest.generate(second, b"Who am I?")
        assert len(guest.state.contexts.get(second).messages) == 4
        assert stranger.state.contexts.get(foreign).messages == ()
        assert guest.call("set_input", second, 1, guest.tensor(b'{"session_id": "bob"}')) == 0
        assert guest.state.contexts.get(second).messages == ()
        assert guest.call("finalize_execution_context", second) == 0
        assert guest.call("compute", second) == 1


@dialects
@pytest.mark.parametrize("dims", [(), (1,), (5,), (9,) * 64])
def test_dimensions_say_nothing_about_the_length(
    fake_backend: Backend, dialect: Dialect, dims: tuple[int, ...]
) -> None:
    with Driver(fake_backend, dialect) as guest:
        context = guest.open(MODEL)
        expected = guest.generate(context, b"hello")
        assert guest.call("set_input", context, 0, guest.tensor(b"hello", dims=dims)) == 0
        assert guest.call("compute", context) == 0
        assert guest.output(context) == expected


@dialects
def test_any_tensor_type_is_bytes_and_its_padding_is_not_looked_at(fake_backend: Backend, dialect: Dialect) -> None:
    with Driver(fake_backend, dialect) as guest:
        context = guest.open(MODEL)
        expected = guest.generate(context, b"hello")
        for number in range(6):
            tensor = guest.tensor(b"hello", type_word=number | 0xDEAD_BE00)
            assert guest.call("set_input", context, 0, tensor) == 0
            assert guest.call("compute", context) == 0
            assert guest.output(context) == expected
        for number in (6, 7, 255, 0xFFFF_FF06):
            assert guest.call("set_input", context, 0, guest.tensor(b"x", type_word=number)) == 1


def test_bad_tensors_change_nothing(guest: Driver) -> None:
    context = guest.open(MODEL)
    expected = guest.generate(context, b"hello")
    dims, data = guest.place(struct.pack("<I", 1)), guest.place(b"x")
    bad = [
        (dims, 65, U8, data, 1, 7),
        (dims, 0xFFFF_FFFF, U8, data, 1, 7),
        (MEMORY_BYTES, 1, U8, data, 1, 1),
        (0xFFFF_FFFF, 1, U8, data, 1, 1),
        (dims, 1, U8, MEMORY_BYTES, 1, 1),
        (dims, 1, U8, 0xFFFF_FFFF, 1, 1),
        (dims, 1, U8, data, MEMORY_BYTES, 1),
        (dims, 1, U8, data, 64 * 2**20 + 1, 7),
    ]
    for *words, errno in bad:
        tensor = guest.place(struct.pack("<5I", *words))
        assert guest.call("set_input", context, 0, tensor) == errno, words
    for pointer in (*BAD_POINTERS, MEMORY_BYTES - 19):
        assert guest.call("set_input", context, 0, pointer) == 1
    assert guest.call("set_input", context + 1, 0, guest.tensor(b"x")) == 1
    assert guest.call("compute", context) == 0
    assert guest.output(context) == expected


@pytest.mark.parametrize("address", [0, MEMORY_BYTES + 1, 0xAAAA_AAAA, 0xFFFF_FFFF])
def test_the_address_of_something_empty_does_not_matter(guest: Driver, address: int) -> None:
    """Compilers leave it undefined, and guests that have no dimensions, configuration or buffer pass it on."""
    context = guest.open(MODEL)
    expected = guest.generate(context, b"hello")
    data = guest.place(b"hello")
    assert guest.call("set_input", context, 0, guest.place(struct.pack("<5I", address, 0, U8, data, 5))) == 0
    assert guest.call("set_input", context, 1, guest.place(struct.pack("<5I", address, 0, U8, address, 0))) == 0
    assert guest.call("compute", context) == 0
    assert guest.call("get_output", context, 0, address, 0, OUT) == 7
    assert guest.peek_u32(OUT) == len(expected)
    assert guest.output(context) == expected
    assert guest.call("load_by_name_with_config", guest.place(MODEL), len(MODEL), address, 0, OUT) == 0


def test_a_guest_that_releases_nothing_can_work_for_long(guest: Driver) -> None:
    """The official witx has no call for it, and WasmEdge's guests load their model for each request."""
    for expected in range(n_examples(300)):
        assert guest.load(MODEL) == expected
        assert guest.call("init_execution_context", expected, OUT) == 0
        guest.generate(guest.peek_u32(OUT), b"hi")
        guest.forget_placed()


def test_a_tensor_at_the_very_end_of_memory_is_fine(guest: Driver) -> None:
    context = guest.open(MODEL)
    expected = guest.generate(context, b"hello")
    data = guest.place(b"hello")
    guest.memory.write(guest.store, struct.pack("<5I", 0, 0, U8, data, 5), MEMORY_BYTES - 20)
    assert guest.call("set_input", context, 0, MEMORY_BYTES - 20) == 0
    assert guest.call("compute", context) == 0
    assert guest.output(context) == expected


def test_every_index_but_one_is_the_prompt(guest: Driver) -> None:
    context = guest.open(MODEL)
    expected = guest.generate(context, b"hello")
    for index in (0, 2, 7, 0xFFFF_FFFF):
        assert guest.call("set_input", context, index, guest.tensor(b"hello")) == 0
        assert guest.call("compute", context) == 0
        assert guest.output(context, index if index != 1 else 0) == expected


def test_an_image_in_the_prompt_is_refused_and_the_prompt_before_it_is_not_answered(guest: Driver) -> None:
    context = guest.open(MODEL)
    text = guest.generate(context, b"hello")
    image = b'What is this? <img src="data:image/png;base64,iVBORw0KGgo=">'
    assert guest.call("compute_single", context) == 0
    assert guest.call("set_input", context, 0, guest.tensor(image)) == 1
    assert guest.call("compute", context) == 1
    assert guest.output(context) == b""
    assert guest.call("compute_single", context) == 1
    assert guest.generate(context, b"hello") == text
    assert guest.generate(context, b'What does <img src="cat.png"> do?')


def test_a_negative_temperature_is_zero_for_wasmedge_guests(fake_backend: Backend) -> None:
    """As in WasmEdge. What is too high becomes what a guest gets that sets nothing."""
    with Driver(fake_backend) as guest, Driver(fake_backend, WITX) as official:
        for driver, value, expected in ((guest, b"-1", 0.0), (guest, b"3", 0.8), (official, b"-1", 0.7)):
            context = driver.open(MODEL)
            assert driver.configure(context, b'{"temp": %s}' % value) == 0
            assert driver.state.contexts.get(context).settings.sampling.temperature == expected
        loaded = guest.open(MODEL, b'{"temp": -0.5}')
        assert guest.state.contexts.get(loaded).settings.sampling.temperature == 0


def test_configuration_at_index_one_counts(guest: Driver) -> None:
    context = guest.open(MODEL)
    whole = guest.generate(context, b"hello")
    assert guest.configure(context, b'{"n-predict": 3}') == 0
    assert len(guest.generate(context, b"hello")) < len(whole)
    assert guest.configure(context, b"nonsense") == 2
    assert guest.configure(context, b'{"n-predict": "x"}') == 1


# --- compute ---


def test_compute_without_a_prompt_is_an_invalid_argument(guest: Driver) -> None:
    context = guest.open(MODEL)
    assert guest.call("compute", context) == 1
    assert guest.call("compute_single", context) == 1
    assert guest.call("compute", 12345) == 1


@dialects
def test_a_prompt_longer_than_the_context_is_102(fake_backend: Backend, dialect: Dialect) -> None:
    with Driver(fake_backend, dialect) as guest:
        context = guest.open(MODEL)
        assert guest.configure(context, SMALL_WINDOW) == 0
        guest.set_prompt(context, b"x" * 200)
        assert guest.call("compute", context) == 102
        assert guest.configure(context, b'{"n-predict": 5}') == 0
        assert guest.generate(context, b"short")


@dialects
def test_a_full_context_is_101_and_its_text_can_be_read(fake_backend: Backend, dialect: Dialect) -> None:
    with Driver(fake_backend, dialect) as guest:
        context = guest.open(MODEL)
        assert guest.configure(context, SMALL_WINDOW) == 0
        guest.set_prompt(context, b"x" * 20)
        assert guest.call("compute", context) == 101
        text = guest.output(context)
        assert 100 <= len(text) <= 128
        assert json.loads(guest.output(context, 1))["output_tokens"] >= 100


def test_stream_stdout_writes_the_text_of_compute(guest: Driver) -> None:
    context = guest.open(MODEL)
    guest.generate(context, b"hello")
    assert guest.streamed == b""
    assert guest.configure(context, b'{"stream-stdout": true}') == 0
    assert guest.generate(context, b"hello") == guest.streamed
    assert guest.streamed


@pytest.mark.parametrize(
    ("error", "errno"),
    [
        (Busy("x"), 4),
        (DeadlineExceeded("x"), 4),
        (RuntimeFailure("x"), 5),
        (Cancelled("x"), 5),
        (UnsupportedOperation("x"), 6),
        (SecurityViolation("x"), 6),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("function", ["compute", "compute_single"])
def test_errors_that_the_backend_raises_have_their_numbers(function: str, error: Exception, errno: int) -> None:
    backend, _ = scripted({function: _raises(error)})
    with Driver(backend) as guest:
        assert guest.call(function, guest.open(MODEL)) == errno
        assert guest.state.last_error is not None
        assert (guest.state.last_error.function, guest.state.last_error.errno) == (function, errno)
        assert guest.state.fault is None


# --- get_output ---


@dialects
@pytest.mark.parametrize("index", [0, 1])
def test_a_buffer_that_is_too_small_stays_untouched_and_learns_the_size(
    fake_backend: Backend, dialect: Dialect, index: int
) -> None:
    with Driver(fake_backend, dialect) as guest:
        context = guest.open(MODEL)
        guest.generate(context, b"hello")
        expected = guest.output(context, index)
        guest.memory.write(guest.store, b"\xaa" * PAGE, PAGE)
        for n_buffer_bytes in (0, 1, len(expected) - 1):
            assert guest.call("get_output", context, index, PAGE, n_buffer_bytes, OUT) == 7
            assert guest.peek_u32(OUT) == len(expected)
            assert guest.peek(PAGE, PAGE) == b"\xaa" * PAGE
        assert guest.call("get_output", context, index, PAGE, len(expected), OUT) == 0
        assert guest.peek(PAGE, len(expected) + 1) == expected + b"\xaa"


@pytest.mark.parametrize("function", ["get_output", "get_output_single"])
def test_output_pointers_are_checked_first(guest: Driver, function: str) -> None:
    context = guest.open(MODEL)
    guest.generate(context, b"hello")
    for pointer in BAD_POINTERS:
        assert guest.call(function, context, 0, pointer, 4, OUT) == 1
        assert guest.call(function, context, 0, PAGE, PAGE, pointer) == 1
    assert guest.call(function, context, 0, PAGE, PAGE + 1, OUT) == 1
    assert guest.call(function, context, 0, PAGE, 0xFFFF_FFFF, OUT) == 1
    assert guest.call(function, context + 1, 0, PAGE, PAGE, OUT) == 1


def test_output_before_any_compute_is_empty(guest: Driver) -> None:
    context = guest.open(MODEL)
    assert guest.output(context) == b""
    assert guest.output(context, function="get_output_single") == b""


@pytest.mark.parametrize("function", ["get_output", "get_output_single"])
def test_wasmedge_metadata_has_exactly_four_keys_in_its_own_spacing(function: str) -> None:
    backend, _ = scripted()
    with Driver(backend) as guest:
        assert guest.output(guest.open(MODEL), 1, function=function) == (
            b'{"input_tokens": 16, "output_tokens": 8, "llama_build_number": 8757, "llama_commit": "a29e4c0b"}'
        )


def test_metadata_counts_the_prompt_as_soon_as_it_is_set(guest: Driver) -> None:
    context = guest.open(MODEL)
    guest.set_prompt(context, b"four")
    before = json.loads(guest.output(context, 1))
    assert before["input_tokens"] >= 4
    assert before["output_tokens"] == 0
    assert guest.call("compute", context) == 0
    after = guest.output(context, 1)
    assert json.loads(after)["output_tokens"] > 0
    assert re.fullmatch(
        rb'\{"input_tokens": \d+, "output_tokens": \d+, "llama_build_number": \d+, "llama_commit": "[^"]*"\}', after
    )


def test_witx_metadata_begins_with_the_same_keys(fake_backend: Backend) -> None:
    with Driver(fake_backend, WITX) as guest:
        context = guest.open(MODEL)
        guest.generate(context, b"hello")
        metadata = json.loads(guest.output(context, 1))
    assert tuple(metadata)[:4] == WASMEDGE.metadata_keys
    assert "finish_reason" in metadata


@dialects
def test_probabilities_are_in_the_metadata_of_those_who_know_them(fake_backend: Backend, dialect: Dialect) -> None:
    with Driver(fake_backend, dialect) as guest:
        context = guest.open(MODEL)
        assert guest.configure(context, b'{"n_probs": 2, "n_predict": 5}') == 0
        guest.generate(context, b"hello")
        metadata = json.loads(guest.output(context, 1))
    if dialect is WASMEDGE:
        assert tuple(metadata) == WASMEDGE.metadata_keys
    else:
        assert [len(position["top"]) for position in metadata["probabilities"]] == [2] * 5


# --- compute_single, get_output_single, fini_single ---


def test_single_tokens_make_up_the_whole_text(guest: Driver) -> None:
    context = guest.open(MODEL)
    whole = guest.generate(context, b"hello")
    guest.set_prompt(context, b"hello")
    pieces, errno = guest.single_tokens(context)
    assert errno == 100
    assert b"".join(pieces) == whole
    assert len(pieces) > 1
    assert guest.state.last_error is None, "the end of a sequence is not a failure to report"


def test_fini_single_clears_the_output_and_keeps_the_prompt(guest: Driver) -> None:
    context = guest.open(MODEL)
    guest.set_prompt(context, b"hello")
    assert guest.call("compute_single", context) == 0
    first = guest.output(context, function="get_output_single")
    assert guest.call("compute_single", context) == 0
    assert guest.call("fini_single", context) == 0
    assert guest.output(context, function="get_output_single") == b""
    assert guest.call("compute_single", context) == 0
    assert guest.output(context, function="get_output_single") == first


def test_a_failing_first_token_leaves_the_context_usable(guest: Driver) -> None:
    context = guest.open(MODEL)
    assert guest.configure(context, SMALL_WINDOW) == 0
    guest.set_prompt(context, b"x" * 200)
    assert [guest.call("compute_single", context) for _ in range(2)] == [102, 102]
    guest.set_prompt(context, b"short")
    assert guest.call("compute_single", context) == 0


def test_single_tokens_end_with_101_when_the_context_is_full(guest: Driver) -> None:
    context = guest.open(MODEL)
    assert guest.configure(context, SMALL_WINDOW) == 0
    guest.set_prompt(context, b"x" * 20)
    pieces, errno = guest.single_tokens(context)
    assert errno == 101
    assert len(b"".join(pieces)) >= 100
    assert guest.output(context) == b"".join(pieces)


def test_interleaved_single_runs_of_one_graph_do_not_disturb_each_other(guest: Driver) -> None:
    graph = guest.load(MODEL)
    contexts = []
    for _ in range(2):
        assert guest.call("init_execution_context", graph, OUT) == 0
        contexts.append(guest.peek_u32(OUT))
    prompts = [b"hello", b"something else"]
    alone = [guest.generate(context, prompt) for context, prompt in zip(contexts, prompts, strict=True)]
    for context, prompt in zip(contexts, prompts, strict=True):
        guest.set_prompt(context, prompt)
    texts = [b"", b""]
    for _ in range(8):
        for i, context in enumerate(contexts):
            assert guest.call("compute_single", context) == 0
            texts[i] += guest.output(context, function="get_output_single")
    assert [whole.startswith(text) and bool(text) for whole, text in zip(alone, texts, strict=True)] == [True, True]


# --- memory, faults, the end ---


@pytest.mark.parametrize("memory", ["", "(memory 2)", '(global (export "memory") i32 (i32.const 1))'])
def test_without_a_memory_of_its_own_a_guest_gets_3(fake_backend: Backend, memory: str) -> None:
    with Driver(fake_backend, memory=memory) as guest:
        for name, parameters in WASMEDGE.functions.items():
            assert guest.call(name, *([0] * len(parameters))) == 3


def test_memory_that_grows_between_calls_is_seen(guest: Driver) -> None:
    context = guest.open(MODEL)
    guest.generate(context, b"hello")
    assert guest.call("get_output", context, 0, 2 * PAGE, PAGE, OUT) == 1
    guest.memory.grow(guest.store, 1)
    assert guest.call("get_output", context, 0, 2 * PAGE, PAGE, OUT) == 0
    assert guest.peek(2 * PAGE, guest.peek_u32(OUT)) == guest.output(context)


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), KeyboardInterrupt(), SystemExit(3), MemoryError()])
@pytest.mark.parametrize("function", ["load_by_name", "init_execution_context", "compute", "get_output", "unload"])
def test_a_defect_of_the_host_is_a_number_to_the_guest_and_a_fault_to_the_host(
    error: BaseException, function: str, caplog: pytest.LogCaptureFixture
) -> None:
    script: dict[str, Callable[[], Any]] = {}
    backend, _ = scripted(script)
    with Driver(backend) as guest:
        context = guest.open(MODEL)
        script[function] = _raises(error)
        words = {
            "load_by_name": (guest.place(MODEL), 7, OUT),
            "init_execution_context": (0, OUT),
            "compute": (context,),
            "get_output": (context, 0, PAGE, PAGE, OUT),
            "unload": (0,),
        }
        assert guest.call(function, *words[function]) == 5
        assert guest.state.fault is error
        assert guest.state.is_stopped is not isinstance(error, Exception)
    assert any(record.levelno == logging.ERROR and record.exc_info for record in caplog.records)


def test_closing_gives_back_everything_whatever_fails(caplog: pytest.LogCaptureFixture) -> None:
    backend, script = scripted({"close": _raises(ZeroDivisionError()), "unload": _raises(RuntimeFailure("no"))})
    with Driver(backend) as guest:
        graph = guest.load(MODEL)
        for _ in range(3):
            assert guest.call("init_execution_context", graph, OUT) == 0
        guest.load(MODEL)
        assert script.n_open == 5
    assert script.n_open == 0
    assert script.calls[-5:] == ["close"] * 3 + ["unload"] * 2
    guest.state.close()
    assert script.n_open == 0


def test_a_guest_that_is_being_stopped_gets_nothing_done() -> None:
    backend, script = scripted()
    with Driver(backend) as guest:
        context = guest.open(MODEL)
        guest.state.stop()
        n_calls = len(script.calls)
        assert guest.call("compute", context) == 5
        assert guest.call("load_by_name", guest.place(MODEL), 7, OUT) == 5
        assert len(script.calls) == n_calls


def test_a_model_that_is_loading_is_given_up_when_the_guest_is_stopped() -> None:
    backend, script = scripted()
    with Driver(backend) as guest:
        guest.load(MODEL)
        assert script.progress is not None
        assert script.progress(0.5) is True
        guest.state.stop()
        assert script.progress(0.6) is False


def _raises(error: BaseException) -> Callable[[], Any]:
    def raise_it() -> Any:
        raise error

    return raise_it


# --- buffers without a length ---


@pytest.mark.parametrize("function", ["get_output", "get_output_single"])
def test_buffers_of_length_zero_get_the_room_that_the_host_gives_them(fake_backend: Backend, function: str) -> None:
    """Programs built with llama-core pass a buffer of 245,888 bytes as one of none."""
    with Driver(fake_backend, limits=HostLimits(unsized_output_bytes=PAGE)) as guest:
        context = guest.open(MODEL)
        guest.set_prompt(context, b"hello")
        assert guest.call("compute_single", context) == 0
        text = guest.output(context, function=function)
        assert guest.call(function, context, 0, PAGE, 0, OUT) == 0
        assert guest.peek(PAGE, guest.peek_u32(OUT)) == text
        assert guest.call(function, context, 1, PAGE, 0, OUT) == 0
        metadata = guest.peek(PAGE, guest.peek_u32(OUT))
        assert json.loads(metadata)["output_tokens"] == 1
        exactly = MEMORY_BYTES - len(metadata)
        assert guest.call(function, context, 1, exactly, 0, OUT) == 0
        before = guest.peek(0, MEMORY_BYTES)
        # Empty slices as compilers make them, and where the memory ends too soon.
        for address in (0, 1, 4, 16, exactly + 1, MEMORY_BYTES, 0xFFFF_FFFF):
            assert guest.call(function, context, 1, address, 0, OUT) == 7
            assert guest.peek_u32(OUT) == len(metadata)
        assert guest.call(function, context, 1, PAGE, 1, OUT) == 7  # a length counts
        assert guest.peek(OUT + 4, MEMORY_BYTES - OUT - 4) == before[OUT + 4 :]


def test_the_room_of_unsized_buffers_is_what_was_set(fake_backend: Backend) -> None:
    with Driver(fake_backend, limits=HostLimits(unsized_output_bytes=10)) as guest:
        context = guest.open(MODEL)
        text = guest.generate(context, b"hello")
        assert len(text) > 10
        assert guest.call("get_output", context, 0, PAGE, 0, OUT) == 7
        assert guest.peek_u32(OUT) == len(text)


def test_unsized_buffers_are_off_with_one_warning(fake_backend: Backend, caplog: pytest.LogCaptureFixture) -> None:
    with Driver(fake_backend) as guest:
        context = guest.open(MODEL)
        for _ in range(2):  # there is no text yet, which fits
            assert guest.call("get_output", context, 0, PAGE, 0, OUT) == 0
        assert guest.call("get_output", context, 1, 0, 0, OUT) == 7  # how programs ask for the size
        assert caplog.messages == []
        for index in (1, 1, 1):
            assert guest.call("get_output", context, index, PAGE, 0, OUT) == 7
        (warning,) = caplog.messages
        assert "--unsized-output-bytes 245888" in warning
        assert guest.peek(PAGE, PAGE) == bytes(PAGE)


def test_only_wasmedge_guests_have_unsized_buffers(fake_backend: Backend, caplog: pytest.LogCaptureFixture) -> None:
    with Driver(fake_backend, WITX, limits=HostLimits(unsized_output_bytes=PAGE)) as guest:
        context = guest.open(MODEL)
        guest.generate(context, b"hello")
        assert guest.call("get_output", context, 0, PAGE, 0, OUT) == 7
    assert caplog.messages == []
