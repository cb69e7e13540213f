"""Where configuration comes from and how it adds up: files, strictness, layers, doors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.llama import FakeLlama
from wasi_nn_backend import Backend, Door, InvalidArgument, InvalidEncoding, NotFound
from wasi_nn_backend.config import Layer, parse_assignments, parse_layer, resolve
from wasi_nn_backend.config.layers import BUILT_IN, explain
from wasi_nn_backend.doors import parse_at_door
from wasi_nn_backend.types import PYTHON_DOOR

GUEST = Door("guest", "raw", is_trusted=False)
WASMEDGE = Door("wasmedge", "raw", is_trusted=False, unknown_keys="ignore")


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


# Files.


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text('// mine\n{"top_k": 3}')
    return path


def test_a_file_is_a_path_or_its_name_behind_an_at_sign(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(file.parent))
    for source in (file, f"@{file}", f"@{file}".encode(), "@~/config.json"):
        assert parse_layer(source, name="call").values == {"sampling": {"top_k": 3}}


def test_messages_about_a_file_name_it(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.write_text('{"tempature": 1}')
    parse_layer(file, name="backend")
    assert messages(caplog)[0].startswith("backend ")
    assert "config.json" in messages(caplog)[0]
    file.write_text("{")
    with pytest.raises(InvalidEncoding, match=r"config\.json.* line 1 column 2"):
        parse_layer(file, name="backend")


@pytest.mark.parametrize(
    ("path", "error", "reason"),
    [
        ("gone.json", NotFound, "there is no configuration file"),
        ("", InvalidArgument, "regular file"),
        ("pipe", InvalidArgument, "regular file"),
        ("a\0b", InvalidArgument, "cannot be read"),
        ("x" * 300, InvalidArgument, "cannot be read"),
    ],
)
def test_files_that_cannot_be_read(path: str, error: type[Exception], reason: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(error, match=f"^call: .*{reason}"):
        parse_layer(f"@{tmp_path}/{path}", name="call")


def test_a_file_without_permission(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:  # a mode of 0 would not stop root
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InvalidArgument, match="Permission denied"):
        parse_layer(file, name="call")


def test_a_file_that_is_too_long(file: Path) -> None:
    file.write_text('{"system_prompt": "' + "x" * 2**20 + '"}')
    with pytest.raises(InvalidArgument, match="at most 1048576 bytes"):
        parse_layer(file, name="call")


def test_a_guest_never_reads_files(file: Path, tiny_model_path: Path) -> None:
    for source in (f"@{file}", f"@{file}".encode()):
        assert parse_at_door(source, place="graph", door=PYTHON_DOOR).values == {"sampling": {"top_k": 3}}
        for door in (GUEST, WASMEDGE):
            with pytest.raises(InvalidEncoding, match="not JSON at line 1 column 1"):
                parse_at_door(source, place="graph", door=door)
    with pytest.raises(InvalidArgument):
        parse_at_door(file, place="graph", door=GUEST)
    with Backend(llama=FakeLlama()) as backend:
        backend.register("model", tiny_model_path)
        context = backend.load_by_name("model", door=GUEST).init_execution_context()
        with pytest.raises(InvalidEncoding):
            context.set_input(1, f"@{file}")


# Strictness.


@pytest.mark.parametrize("unknown", ["warn", "ignore"])
def test_strict_makes_unknown_keys_an_error_wherever_it_stands(unknown: Any) -> None:
    for document in ('{"strict": true, "tempature": 1}', '{"tempature": 1, "strict": true}'):
        with pytest.raises(InvalidArgument, match=r"tempature is no known key; the nearest is sampling\.temperature"):
            parse_layer(document, name="call", unknown=unknown)
    assert parse_layer({"strict": False, "tempature": 1}, name="call", unknown=unknown).values == {}
    assert parse_layer({"strict": True, "temp": 1}, name="call", unknown=unknown).strict
    assert parse_assignments(["strict=true"], name="cli").strict


def test_strict_stands_at_the_top_level_only(caplog: pytest.LogCaptureFixture) -> None:
    parse_layer({"model": {"strict": True}, "strickt": True}, name="call")
    assert all("the nearest is strict, at the top level" in message for message in messages(caplog))
    assert len(messages(caplog)) == 2


def test_a_strict_backend_is_strict_with_who_is_trusted_and_not_with_guests(tiny_model_path: Path) -> None:
    wrong = {"tempature": 1}
    with Backend({"strict": True}, llama=FakeLlama()) as backend:
        with pytest.raises(InvalidArgument, match="tempature"):
            backend.register("model", tiny_model_path, wrong)
        with pytest.raises(InvalidArgument, match="tempature"):
            backend.load_by_name_with_config(tiny_model_path, wrong)
        context = backend.load_by_name(tiny_model_path).init_execution_context()
        with pytest.raises(InvalidArgument, match="tempature"):
            context.run_inference("hello", wrong)
        backend.register("model", tiny_model_path)
        guest = backend.load_by_name_with_config("model", wrong, door=GUEST).init_execution_context(wrong)
        with pytest.raises(InvalidArgument, match="tempature"):
            guest.set_input(1, '{"strict": true, "tempature": 1}')
    with Backend(llama=FakeLlama()) as backend:
        graph = backend.load_by_name_with_config(tiny_model_path, {"strict": True})
        with pytest.raises(InvalidArgument, match="tempature"):
            graph.init_execution_context(wrong)
        backend.load_by_name_with_config(tiny_model_path, wrong)


# Layers.


def test_every_layer_counts_in_its_order(tiny_model_path: Path) -> None:
    def settings(layers: dict[str, int]) -> int:
        documents = {place: {"top_k": value} for place, value in layers.items()}
        with Backend(documents.get("backend"), llama=FakeLlama()) as backend:
            graph = backend.load_by_name_with_config(tiny_model_path, documents.get("graph"))
            context = graph.init_execution_context(documents.get("context"))
            return context._call_settings(documents.get("call")).sampling.top_k

    layers = {"backend": 1, "graph": 2, "context": 3, "call": 4}
    while layers:
        assert settings(layers) == max(layers.values())
        layers.pop(max(layers, key=layers.__getitem__))
    assert settings({}) == 40


def test_a_call_changes_nothing_for_the_next_one(tiny_model_path: Path) -> None:
    with Backend({"max_tokens": 7, "n_ctx": 512, "ignore_eos": True}, llama=FakeLlama()) as backend:
        context = backend.load_by_name(tiny_model_path).init_execution_context()
        lengths = []
        for config in ({"max_tokens": 3}, None, {"runtime": {"max_tokens": 4}}, {"runtime": {"max_tokens": -1}}):
            context.run_inference("hello", config)
            lengths.append(context.metadata["output_tokens"])
        assert lengths == [3, 7, 4, 7]


def test_minus_one_inherits_in_a_call_where_it_means_nothing_else() -> None:
    under = parse_layer(
        {"temp": 0.5, "min_p": 0.2, "top_k": 9, "seed": 4, "max_tokens": 5, "stop": ["a"]}, name="graph"
    )
    call = {"temp": -1, "min-p": -1.0, "top_k": -1, "seed": -1, "sampling": {"repeat_penalty": -1}, "stop": ["b"]}
    settings = resolve([under, parse_at_door(call, place="call", door=PYTHON_DOOR)])
    assert (settings.sampling.temperature, settings.sampling.min_p) == (0.5, 0.2)
    assert settings.sampling.repeat_penalty == 1.1
    assert (settings.sampling.top_k, settings.sampling.seed, settings.stopping.stop) == (-1, -1, ("b",))
    elsewhere = resolve([under, parse_at_door({"temp": -1, "min_p": -1}, place="context", door=PYTHON_DOOR)])
    assert (elsewhere.sampling.temperature, elsewhere.sampling.min_p) == (0.7, 0.0)


def test_a_limit_lowers_what_it_limits(caplog: pytest.LogCaptureFixture) -> None:
    document = {"queue_size": 50, "queue_warning_threshold": 60, "queue_reject_threshold": 40}
    backend = resolve([parse_layer(document, name="call")]).backend
    assert (backend.queue_size, backend.queue_warning_threshold, backend.queue_reject_threshold) == (50, 50, 40)
    (warning,) = messages(caplog)
    assert "queue_warning_threshold is the integer 60, but it should be at most queue_size" in warning
    caplog.clear()
    layers = [parse_layer({"queue_reject_threshold": 400}, name="one"), parse_layer({"queue_size": 300}, name="two")]
    backend = resolve(layers).backend
    assert (backend.queue_warning_threshold, backend.queue_reject_threshold) == (300, 300)
    assert messages(caplog) == []


def test_explain_names_the_layer_of_every_value() -> None:
    layers = [
        parse_layer({"top_k": 1, "temp": 0.5, "n_batch": 64}, name="first"),
        parse_layer({"top_k": 2, "queue_size": 20}, name="second"),
    ]
    entries = {(entry.section, entry.key): entry for entry in explain(layers)}
    settings = resolve(layers)
    assert {where: entry.value for where, entry in entries.items()} == {
        (section, key): value for section, model in settings for key, value in model
    }
    names = {key: entry.layer for (_, key), entry in entries.items() if entry.layer != BUILT_IN}
    assert names == {
        "top_k": "second",
        "temperature": "first",
        "batch_size": "first",
        "ubatch_size": "first",
        "queue_size": "second",
        "queue_warning_threshold": "second",
        "queue_reject_threshold": "second",
    }
    assert {entry.layer for entry in explain([])} == {BUILT_IN}


def test_a_layer_is_a_document_again() -> None:
    given: dict[str, Any] = {
        "model": {"lora": [{"path": "a.gguf", "scale": 0.5}], "tensor_split": [1, 2]},
        "logit_bias": {"5": -1},
        "samplers": "kt",
        "json_schema": {"type": "object"},
        "stop": "x",
        "tools": [{"type": "function"}],
    }
    layer = parse_layer(given, name="call")
    assert parse_layer(json.dumps(layer.as_document()), name="call", unknown="error") == layer


# Doors.


def test_guests_leave_what_is_the_hosts(caplog: pytest.LogCaptureFixture) -> None:
    document = {
        "backend": {"max_concurrent": 200, "queue_size": 1},
        "model": {"lora": "/etc/passwd", "numa": "distribute", "n_ctx": 512},
        "max_memory_mb": 0,
        "logging": {"file": "/tmp/x", "level": "debug", "enable_log": True},
        "chat_template": "{{ 1 }}",
        "top_k": 3,
    }
    layer = parse_at_door(document, place="graph", door=GUEST)
    assert layer.as_document() == {
        "backend": {},
        "model": {"n_ctx": 512},
        "memory": {},
        "logging": {"enable_log": True},
        "session": {},
        "sampling": {"top_k": 3},
    }
    (message,) = messages(caplog)
    for key in ("backend.max_concurrent", "model.lora", "model.numa", "memory.max_memory_mb", "logging.file"):
        assert key in message
    assert parse_at_door(document, place="graph", door=PYTHON_DOOR) == parse_layer(document, name="graph")


def test_what_wasmedge_modules_send(caplog: pytest.LogCaptureFixture) -> None:
    document = {
        "enable-log": False,
        "enable-debug-log": True,
        "n-predict": -1,
        "numa": 0,
        "cache-type-k": 8,
        "flash-attn": "enabled",
        "min-keep": 1,
        "dry-multipier": 0.5,
        "priority": 2,
        "llama3": True,
        "seed": 2**32 - 1,
        "json-schema": '{"type": "object"}',
        "embedding": False,
        "mmproj": "",
        "pooling-type": -1,
    }
    layer = parse_at_door(document, place="graph", door=WASMEDGE)
    assert layer.values["logging"] == {"enable_log": True}
    assert layer.values["sampling"]["dry_multiplier"] == 0.5
    assert layer.values["sampling"]["seed"] == -1
    assert isinstance(layer, Layer)
    assert messages(caplog) == ["graph: model.numa, task.priority: the host's to set, ignored"]
