"""What each key of the configuration accepts, by which names, and what happens to values that it does not accept."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
from pydantic import ValidationError

from wasi_nn_backend import config
from wasi_nn_backend.config import Layer, Settings, parse_assignments, parse_layer, resolve
from wasi_nn_backend.config.keys import UNSUPPORTED
from wasi_nn_backend.config.lora import LoraAdapter
from wasi_nn_backend.errors import InvalidArgument, UnsupportedOperation

#: By hand, not derived from the tables under test: section, key, every snake_case name, a value, its meaning.
KEYS: list[tuple[str, str, tuple[str, ...], Any, Any]] = [
    ("backend", "max_sessions", ("max_sessions",), 7, 7),
    ("backend", "idle_timeout_ms", ("idle_timeout_ms",), 60_000, 60_000),
    ("backend", "auto_cleanup", ("auto_cleanup", "auto_cleanup_enabled", "auto_cleanup_sessions"), False, False),
    ("backend", "max_concurrent", ("max_concurrent",), 3, 3),
    ("backend", "queue_size", ("queue_size",), 600, 600),
    ("backend", "default_task_timeout_ms", ("default_task_timeout_ms",), 0, 0),
    ("backend", "priority_scheduling_enabled", ("priority_scheduling_enabled",), False, False),
    ("backend", "fair_scheduling_enabled", ("fair_scheduling_enabled",), False, False),
    ("backend", "auto_queue_cleanup", ("auto_queue_cleanup",), False, False),
    ("backend", "queue_warning_threshold", ("queue_warning_threshold",), 300, 300),
    ("backend", "queue_reject_threshold", ("queue_reject_threshold",), 450, 450),
    ("backend", "save_dir", ("save_dir",), "/tmp/sessions", "/tmp/sessions"),
    ("model", "n_ctx", ("n_ctx", "ctx_size"), 0, 0),
    ("model", "batch_size", ("batch_size", "n_batch"), 700, 700),
    ("model", "ubatch_size", ("ubatch_size",), 100, 100),
    ("model", "n_gpu_layers", ("n_gpu_layers",), -1, 999),
    ("model", "threads", ("threads",), 5, 5),
    ("model", "use_mmap", ("use_mmap",), False, False),
    ("model", "use_mlock", ("use_mlock",), True, True),
    ("model", "check_tensors", ("check_tensors",), True, True),
    ("model", "numa", ("numa",), 2, "isolate"),
    ("model", "lora", ("lora",), "a.gguf", (LoraAdapter(path="a.gguf"),)),
    ("model", "main_gpu", ("main_gpu",), 2, 2),
    ("model", "split_mode", ("split_mode",), "row", "row"),
    ("model", "tensor_split", ("tensor_split",), "3,2", (3.0, 2.0)),
    ("model", "flash_attention", ("flash_attention", "flash_attn"), "enabled", "on"),
    ("model", "cache_type_k", ("cache_type_k",), 8, "q8_0"),
    ("model", "cache_type_v", ("cache_type_v",), "iq4_nl", "iq4_nl"),
    ("model", "offload_kqv", ("offload_kqv",), False, False),
    ("model", "rope_scaling_type", ("rope_scaling_type", "rope_scaling"), "yarn", 2),
    ("model", "rope_freq_base", ("rope_freq_base",), 10000, 10000.0),
    ("model", "rope_freq_scale", ("rope_freq_scale",), 0.5, 0.5),
    ("model", "yarn_ext_factor", ("yarn_ext_factor",), 1, 1.0),
    ("model", "yarn_attn_factor", ("yarn_attn_factor",), 1.5, 1.5),
    ("model", "yarn_beta_fast", ("yarn_beta_fast",), 32, 32.0),
    ("model", "yarn_beta_slow", ("yarn_beta_slow",), 2, 2.0),
    ("model", "yarn_orig_ctx", ("yarn_orig_ctx",), 4096, 4096),
    ("model", "embedding", ("embedding",), True, True),
    ("sampling", "temperature", ("temperature", "temp"), 0, 0.0),
    ("sampling", "top_p", ("top_p",), 0.5, 0.5),
    ("sampling", "top_k", ("top_k",), 7, 7),
    ("sampling", "min_p", ("min_p",), 0.25, 0.25),
    ("sampling", "typical_p", ("typical_p", "typ_p"), 0.75, 0.75),
    ("sampling", "top_n_sigma", ("top_n_sigma",), 1, 1.0),
    ("sampling", "xtc_probability", ("xtc_probability",), 0.5, 0.5),
    ("sampling", "xtc_threshold", ("xtc_threshold",), 0.2, 0.2),
    ("sampling", "dynatemp_range", ("dynatemp_range",), 0.5, 0.5),
    ("sampling", "dynatemp_exponent", ("dynatemp_exponent",), 2, 2.0),
    ("sampling", "min_keep", ("min_keep",), 2, 2),
    ("sampling", "repeat_penalty", ("repeat_penalty",), 1, 1.0),
    ("sampling", "presence_penalty", ("presence_penalty",), -1.5, -1.5),
    ("sampling", "frequency_penalty", ("frequency_penalty",), 1.5, 1.5),
    ("sampling", "penalty_last_n", ("penalty_last_n", "repeat_last_n", "last_n_penalty"), -1, -1),
    ("sampling", "dry_multiplier", ("dry_multiplier", "dry_multipier"), 0.75, 0.75),
    ("sampling", "dry_base", ("dry_base",), 2, 2.0),
    ("sampling", "dry_allowed_length", ("dry_allowed_length",), 3, 3),
    ("sampling", "dry_penalty_last_n", ("dry_penalty_last_n", "dry_last_n_penalty"), 128, 128),
    ("sampling", "dry_sequence_breakers", ("dry_sequence_breakers",), "\n", ("\n",)),
    ("sampling", "mirostat", ("mirostat",), 2, 2),
    ("sampling", "mirostat_tau", ("mirostat_tau",), 4, 4.0),
    ("sampling", "mirostat_eta", ("mirostat_eta",), 0.25, 0.25),
    ("sampling", "samplers", ("samplers",), "kt", ("top_k", "temperature")),
    ("sampling", "n_probs", ("n_probs", "logprobs"), 5, 5),
    ("sampling", "logit_bias", ("logit_bias",), [[198, -1]], ((198, -1.0),)),
    ("sampling", "grammar", ("grammar",), 'root ::= "a"', 'root ::= "a"'),
    ("sampling", "grammar_lazy", ("grammar_lazy",), True, True),
    ("sampling", "grammar_triggers", ("grammar_triggers",), ["/<[a-z]+>/"], ("/<[a-z]+>/",)),
    ("sampling", "json_schema", ("json_schema",), {"type": "object"}, '{"type": "object"}'),
    ("sampling", "seed", ("seed",), 2**31, 2**31),
    ("sampling", "ignore_eos", ("ignore_eos",), True, True),
    ("stopping", "max_tokens", ("max_tokens", "n_predict"), -7, -1),
    ("stopping", "stop", ("stop", "stop_sequences"), "END", ("END",)),
    ("stopping", "reverse_prompt", ("reverse_prompt",), "User:", "User:"),
    ("stopping", "max_time_ms", ("max_time_ms", "max_inference_time_ms"), 250, 250),
    ("memory", "max_memory_mb", ("max_memory_mb",), 64, 64),
    ("memory", "kv_layout", ("kv_layout",), "unified", "unified"),
    ("memory", "context_shifting", ("context_shifting",), False, False),
    ("memory", "n_keep_tokens", ("n_keep_tokens",), 7, 7),
    ("memory", "n_discard_tokens", ("n_discard_tokens",), 0, 0),
    ("memory", "max_cache_tokens", ("max_cache_tokens",), 5000, 5000),
    ("memory", "memory_pressure_threshold", ("memory_pressure_threshold",), 0.6, 0.6),
    ("memory", "cache_strategy", ("cache_strategy",), "smart", "smart"),
    ("memory", "cache_deletion_strategy", ("cache_deletion_strategy",), "fifo", "fifo"),
    ("memory", "enable_partial_cache_deletion", ("enable_partial_cache_deletion",), False, False),
    ("memory", "enable_token_cache_reuse", ("enable_token_cache_reuse",), False, False),
    ("performance", "batch_processing", ("batch_processing",), False, False),
    ("performance", "batch_size", (), 9, 9),
    ("performance", "batch_timeout_ms", ("batch_timeout_ms",), 5, 5),
    ("session", "session_id", ("session_id",), "alice", "alice"),
    ("session", "reasoning", ("reasoning",), "hide", "hide"),
    ("session", "enable_thinking", ("enable_thinking",), False, False),
    ("session", "tools", ("tools",), '[{"type": "function"}]', ({"type": "function"},)),
    ("session", "prompt_mode", ("prompt_mode",), "raw", "raw"),
    ("session", "system_prompt", ("system_prompt",), "Be brief.", "Be brief."),
    ("session", "chat_template", ("chat_template",), "{{ messages }}", "{{ messages }}"),
    ("session", "stream_stdout", ("stream_stdout",), True, True),
    ("session", "keep_control_text", ("keep_control_text",), True, True),
    ("session", "special", ("special",), True, True),
    ("session", "cache_salt", ("cache_salt",), "tenant", "tenant"),
    ("task", "priority", ("priority",), 3, "urgent"),
    ("task", "user_id", ("user_id",), "alice", "alice"),
    ("task", "timeout_ms", ("timeout_ms",), 0, 0),
    ("logging", "level", ("level",), "WARNING", "warn"),
    ("logging", "enable_debug", ("enable_debug", "enable_debug_log"), True, True),
    ("logging", "enable_log", ("enable_log",), True, True),
    ("logging", "timestamps", ("timestamps",), False, False),
    ("logging", "colors", ("colors",), False, False),
    ("logging", "file", ("file",), "x.log", "x.log"),
    ("logging", "format", ("format",), "json", "json"),
]
SPELLINGS = [
    (section, key, written, value, meaning)
    for section, key, names, value, meaning in KEYS
    for name in names
    for written in sorted({name, name.replace("_", "-")})
]

#: Name as written, value, what counts instead.
MENDED: list[tuple[str, Any, Any]] = [
    ("max_sessions", 0, 1),
    ("max_sessions", 10_001, 10_000),
    ("idle_timeout_ms", 0, 1),
    ("idle-timeout-ms", 86_400_001, 86_400_000),
    ("queue_size", 0, 1),
    ("queue_size", 10_001, 10_000),
    ("default_task_timeout_ms", 600_001, 600_000),
    ("default_task_timeout_ms", -1, 0),
    ("queue_warning_threshold", 0, 1),
    ("queue_reject_threshold", 10_001, 10_000),
    ("timeout_ms", -1, 0),
    ("timeout_ms", 600_001, 600_000),
    ("max_concurrent", 0, 1),
    ("max_concurrent", 257, 256),
    ("batch_size", 0, 1),
    ("n_batch", 2049, 2048),
    ("ubatch-size", 2**70, 2048),
    ("n-gpu-layers", 1000, 999),
    ("n_gpu_layers", -2, 0),
    ("threads", 0, None),
    ("threads", -2, None),
    ("threads", 65, None),
    ("main_gpu", -1, 0),
    ("rope_freq_base", -1.0, 0.0),
    ("rope-freq-scale", 1e300, 3.4e38),
    ("yarn_orig_ctx", -1, 0),
    ("temp", -0.1, 0.7),
    ("temperature", 2.1, 0.7),
    ("top_p", 1.5, 1.0),
    ("top-p", -1, 0.0),
    ("top_k", -2, -1),
    ("min_p", 2, 1.0),
    ("typ-p", -0.5, 0.0),
    ("min_keep", 101, 100),
    ("min_keep", 0, 1),
    ("top_n_sigma", -2, -1.0),
    ("xtc_probability", 1.1, 1.0),
    ("xtc_threshold", -0.1, 0.0),
    ("dynatemp_range", -1, 0.0),
    ("dynatemp_exponent", 11, 10.0),
    ("dry_multiplier", -1, 0.0),
    ("dry_base", 0.5, 1.0),
    ("dry_allowed_length", 0, 1),
    ("dry_penalty_last_n", -2, -1),
    ("mirostat", 3, 2),
    ("mirostat_tau", -1, 0.0),
    ("mirostat_eta", 2, 1.0),
    ("n_probs", 101, 100),
    ("logprobs", -1, 0),
    ("repeat_penalty", 0.05, 0.1),
    ("repeat-penalty", 2.5, 2.0),
    ("presence_penalty", -3, -2.0),
    ("frequency_penalty", 3, 2.0),
    ("penalty_last_n", -2, -1),
    ("last-n-penalty", 2**31, 2**20),
    ("seed", -2, -1),
    ("seed", 2**31 + 1, -1),
    ("max_time_ms", -1, 0),
    ("max_memory_mb", 1, 8192),
    ("max_memory_mb", 63, 8192),
    ("max_memory_mb", -5, 8192),
]

#: Name as written, value, a part of what the message must say was expected.
REFUSED: list[tuple[str, Any, str]] = [
    ("n_ctx", 127, "0 or at least 128"),
    ("ctx-size", -1, "0 or at least 128"),
    ("n_ctx", 2**31, "2147483647"),
    ("n_ctx", 2048.0, "integer"),
    ("n_ctx", True, "integer"),
    ("n_ctx", "2048", "integer"),
    ("threads", "many", "integer"),
    ("threads", 1.0, "integer"),
    ("rope_scaling_type", 4, "3"),
    ("split_mode", "rows", "'row'"),
    ("flash-attn", 1, "'auto'"),
    ("flash_attention", "yes", "'auto'"),
    ("cache_type_k", 4, "'q8_0'"),
    ("cache_type_v", True, "'q8_0'"),
    ("cache-type-v", "q2_k", "'q8_0'"),
    ("tensor_split", "3;2", '"3,2"'),
    ("tensor_split", 3, '"3,2"'),
    ("tensor_split", ["3"], "number"),
    ("tensor_split", [1.0, -1.0], "0"),
    ("tensor_split", "nan", "finite"),
    ("tensor_split", [1] * 129, "128"),
    ("no-kv-offload", 1, "boolean"),
    ("use_mmap", 1, "boolean"),
    ("temperature", True, "number"),
    ("temperature", "0.5", "number"),
    ("temperature", None, "number"),
    ("temperature", float("inf"), "finite"),
    ("temperature", 10**400, "number"),
    ("top_k", 40.0, "integer"),
    ("max_tokens", 0, "at least 1"),
    ("n-predict", 2**31, "2147483647"),
    ("stop", 5, "array of strings"),
    ("stop", {"a": 1}, "array of strings"),
    ("stop", ["a", None], "string"),
    ("stop", ["x"] * 65, "64 strings"),
    ("stop", ["\u00e9" * 2049], "4096 bytes"),
    ("reverse_prompt", "x" * 4097, "4096 bytes"),
    ("stop", "\ud800", "surrogates"),
    ("prompt_mode", "Chat", "'chat'"),
    ("system_prompt", 5, "string"),
    ("samplers", ["top_k", "tok_p"], "penalties, dry"),
    ("samplers", ["top_k", "top-k"], "once"),
    ("samplers", "kz", "penalties, dry"),
    ("samplers", [1], "string"),
    ("samplers", 1, "array of sampler names"),
    ("logit_bias", [[1]], "pairs"),
    ("logit_bias", [1], "pairs"),
    ("logit_bias", "x", "pairs"),
    ("logit_bias", [[-1, 0]], "0"),
    ("logit_bias", [[1.0, 0]], "integer"),
    ("logit_bias", [[1, float("nan")]], "finite"),
    ("logit_bias", {"one": 1}, "integer"),
    ("logit_bias", [[1, 0]] * (2**16 + 1), "65536"),
    ("dry_sequence_breakers", ["x" * 41], "40 bytes"),
    ("dry_sequence_breakers", {}, "array of strings"),
    ("grammar_triggers", ["x"] * 65, "64 strings"),
    ("json_schema", 5, "string"),
    ("json_schema", {"a": float("inf")}, "JSON schema"),
    ("json_schema", {"a": b"x"}, "JSON schema"),
    ("grammar", "x" * (2**20 + 1), "1048576 bytes"),
    ("lora", {"path": ""}, "1 character"),
    ("lora", {"scale": 1}, "path is missing"),
    ("lora", [{"path": "a", "scale": "1"}], "number"),
    ("lora", [{"path": "a", "weight": 1}], "no known key"),
    ("lora", ["a", "a"], "once"),
    ("lora", 5, "array of adapters"),
    ("lora", ["a", 5], "object"),
    ("lora", [str(i) for i in range(17)], "16 adapters"),
    ("numa", 4, "'numactl'"),
    ("numa", "mirror", "'numactl'"),
    ("rope_scaling", "su", "integer"),
    ("level", "loud", "'fatal'"),
    ("level", 10, "'fatal'"),
    ("priority", "later", "'urgent'"),
    ("priority", 9, "'urgent'"),
    ("timeout_ms", 1.5, "integer"),
    ("strict", "yes", "true or false"),
    ("chat_template", ["x"], "string"),
]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def values_of(layer: Layer) -> dict[tuple[str, str], Any]:
    return {(section, key): value for section, keys in layer.values.items() for key, value in keys.items()}


def test_public_names() -> None:
    assert config.__all__ == [
        "ConfigSource",
        "Layer",
        "Settings",
        "log_warnings",
        "parse_assignments",
        "parse_layer",
        "resolve",
    ]


def test_key_table_of_this_test_is_complete() -> None:
    fields = {
        (section, key) for section in Settings.model_fields for key in type(getattr(Settings(), section)).model_fields
    }
    assert {(section, key) for section, key, *_ in KEYS} == fields


@pytest.mark.parametrize(("section", "key", "written", "value", "meaning"), SPELLINGS)
def test_every_spelling_reaches_its_key(
    section: str, key: str, written: str, value: Any, meaning: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for document in ({written: value}, {section: {written: value}}):
        layer = parse_layer(document, name="call")
        assert values_of(layer) == {(section, key): meaning}
        resolved = getattr(getattr(resolve([layer]), section), key)
        assert (type(resolved), resolved) == (type(meaning), meaning)
    assert warnings_of(caplog) == []


def test_the_step_s_batch_size_is_known_in_its_section_only() -> None:
    settings = resolve([parse_layer({"batch_size": 7, "performance": {"batch-size": 3}}, name="test")])
    assert (settings.model.batch_size, settings.performance.batch_size) == (7, 3)


@pytest.mark.parametrize(("section", "key"), [(section, key) for section, key, *_ in KEYS])
def test_written_values_differ_from_the_defaults(section: str, key: str) -> None:
    """Otherwise the test of spellings could not see a value that gets lost."""
    meaning = next(entry[4] for entry in KEYS if entry[:2] == (section, key))
    assert getattr(getattr(Settings(), section), key) != meaning


@pytest.mark.parametrize(("written", "value", "meaning"), MENDED)
def test_out_of_range_is_mended_with_one_warning(
    written: str, value: Any, meaning: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (mended,) = values_of(parse_layer({written: value}, name="the call")).values()
    assert (type(mended), mended) == (type(meaning), meaning)
    (warning,) = warnings_of(caplog)
    assert f"the call: {written} is" in warning
    assert caplog.records[0].name == "wasi_nn_backend.config"


@pytest.mark.parametrize(("written", "value", "expected"), REFUSED)
def test_wrong_values_are_refused_with_path_and_expectation(written: str, value: Any, expected: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_layer({written: value}, name="the call")
    message = str(caught.value)
    assert message.startswith(f"the call: {written}")
    assert expected in message
    assert len(message) < 400
    assert message.isprintable()


@pytest.mark.parametrize(
    ("document", "path", "came"),
    [
        ({"sampling": {"top-k": "many"}}, "sampling.top-k", "the string 'many'"),
        ({"memory-policy": {"max_memory_mb": 1.5}}, "memory-policy.max_memory_mb", "the number 1.5"),
        ({"stopping": {"stop": ["a", 5]}}, "stopping.stop[1]", "the integer 5"),
        ({"runtime": {"temp": [1]}}, "runtime.temp", "the array [1]"),
        ({"model": [1]}, "model", "the array [1]"),
        ({"seed": None}, "seed", "null"),
        ({"seed": False}, "seed", "false"),
        ({"seed": {"x": 1}}, "seed", "the object {'x': 1}"),
        ({"temp": 10**5000}, "temp", "an integer of 16610 bits"),
        ({"temp": [10**5000]}, "temp", "the array of 1 elements"),
        ({"temp": "x" * 9999}, "temp", "the string 'xxx"),
        ({"temp": b"1"}, "temp", "a value of type bytes b'1'"),
    ],
)
def test_message_names_path_as_written_and_what_came(document: dict[str, Any], path: str, came: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_layer(document, name="c")
    assert f"c: {path} is {came}" in str(caught.value)
    assert len(str(caught.value)) < 300


class Multiline:
    def __repr__(self) -> str:
        return "[1\n 2]\x1b"


def test_foreign_values_are_shown_on_one_line() -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_layer({"temp": Multiline()}, name="c")
    assert r"temp is a value of type Multiline [1\n 2]\x1b, but" in str(caught.value)


@pytest.mark.parametrize("source", [[], 5, object(), bytearray(b"{}")])
def test_sources_of_another_type_are_refused(source: Any) -> None:
    with pytest.raises(InvalidArgument, match="pass JSON text"):
        parse_layer(source, name="c")


@pytest.mark.parametrize("document", [{1: 2}, {"model": {None: 1}}])
def test_keys_are_strings(document: Any) -> None:
    with pytest.raises(InvalidArgument, match="keys are strings"):
        parse_layer(document, name="c")


@pytest.mark.parametrize("source", [None, "", b"", " \n", b"\t", "{}", {}, "\ufeff", "// nothing here"])
def test_nothing_gives_an_empty_layer(source: Any) -> None:
    assert parse_layer(source, name="c") == Layer("c", {})
    assert resolve([parse_layer(source, name="c")]) == Settings()


def test_layer_passes_through() -> None:
    layer = parse_layer({"top_k": 5}, name="first")
    assert parse_layer(layer, name="second", unknown="error") is layer


@pytest.mark.parametrize("value", [True, "true", "on", "enabled"])
def test_flash_attention_on(value: Any) -> None:
    assert values_of(parse_layer({"flash-attn": value}, name="c")) == {("model", "flash_attention"): "on"}


@pytest.mark.parametrize("value", [False, "false", "off", "disabled"])
def test_flash_attention_off(value: Any) -> None:
    assert values_of(parse_layer({"flash-attn": value}, name="c")) == {("model", "flash_attention"): "off"}


@pytest.mark.parametrize("value", [None, -1, "auto"])
def test_threads_automatic_overrides_a_lower_layer(value: Any) -> None:
    layers = [parse_layer({"threads": 4}, name="graph"), parse_layer({"threads": value}, name="call")]
    assert resolve(layers).model.threads is None


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (0, "f32"),
        (1, "f16"),
        (30, "bf16"),
        (8, "q8_0"),
        (2, "q4_0"),
        (3, "q4_1"),
        (20, "iq4_nl"),
        (6, "q5_0"),
        (7, "q5_1"),
    ],
)
def test_cache_types_by_number_and_name(number: int, name: str) -> None:
    by_number = parse_layer({"cache-type-k": number, "cache-type-v": number}, name="c")
    by_name = parse_layer({"cache_type_k": name, "cache_type_v": name}, name="c")
    assert by_number == by_name
    assert resolve([by_name]).model.cache_type_k == name


@pytest.mark.parametrize("value", [True, False])
def test_no_kv_offload_is_the_negation(value: bool) -> None:
    for name in ("no-kv-offload", "no_kv_offload"):
        assert resolve([parse_layer({name: value}, name="c")]).model.offload_kqv is not value


def test_ignore_eos_may_stand_in_stopping() -> None:
    assert resolve([parse_layer({"stopping": {"ignore-eos": True}}, name="c")]).sampling.ignore_eos


def test_empty_stop_strings_are_dropped_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    layer = parse_layer({"stop": ["", "a", ""]}, name="c")
    assert values_of(layer) == {("stopping", "stop"): ("a",)}
    (warning,) = warnings_of(caplog)
    assert "c: stop: " in warning


def test_runtime_takes_sampling_and_stopping_and_minus_one_inherits(caplog: pytest.LogCaptureFixture) -> None:
    graph = parse_layer({"top_k": 9, "max_tokens": 33, "seed": 4}, name="graph")
    call = parse_layer(
        {"runtime": {"top_k": -1, "n-predict": -1, "seed": -1, "temp": -1.0, "top_p": 0.5, "stop": ["x"]}}, name="call"
    )
    settings = resolve([graph, call])
    assert (settings.sampling.top_k, settings.stopping.max_tokens, settings.sampling.seed) == (9, 33, 4)
    assert (settings.sampling.temperature, settings.sampling.top_p, settings.stopping.stop) == (0.7, 0.5, ("x",))
    assert warnings_of(caplog) == []


def test_runtime_takes_no_model_keys() -> None:
    with pytest.raises(InvalidArgument, match=r"runtime\.n_ctx is no known key"):
        parse_layer({"runtime": {"n_ctx": 512}}, name="c", unknown="error")


@pytest.mark.parametrize(
    ("document", "path", "nearest"),
    [
        ({"tempature": 1}, "tempature", "sampling.temperature"),
        ({"model": {"n-ctxx": 1}}, "model.n-ctxx", "model.n_ctx"),
        ({"model": {"top_k": 1}}, "model.top_k", "sampling.top_k"),
        ({"samplin": {}}, "samplin", "the section sampling"),
        ({"sampling.top-k": 1}, "sampling.top-k", '; write {"sampling": {"top_k": ...}}'),
    ],
)
def test_unknown_key_names_the_nearest(
    document: dict[str, Any], path: str, nearest: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert values_of(parse_layer(document, name="c")) == {}
    (warning,) = warnings_of(caplog)
    assert warning.startswith(f"c: {path} ")
    assert nearest in warning
    with pytest.raises(InvalidArgument, match=re.escape(nearest)):
        parse_layer(document, name="c", unknown="error")


def test_unknown_key_is_a_debug_line_where_they_are_ignored(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    parse_layer({"llama3": True}, name="c", unknown="ignore")
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG
    assert "llama3" in record.getMessage()


def test_strange_names_cannot_forge_log_lines(caplog: pytest.LogCaptureFixture) -> None:
    parse_layer({"x\nERROR all is lost": 1, "\ud800": 2, "y" * 10000: 3}, name="c")
    assert len(warnings_of(caplog)) == 3
    for warning in warnings_of(caplog):
        assert warning.isprintable()
        assert len(warning.encode()) < 200


def test_number_of_warnings_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    parse_layer({f"strange_{i}": i for i in range(5000)}, name="c")
    warnings = warnings_of(caplog)
    assert len(warnings) == 65
    assert "4936 more" in warnings[-1]


@pytest.mark.parametrize("key", UNSUPPORTED)
@pytest.mark.parametrize("section", [None, "sampling", "model", "runtime"])
def test_what_cannot_be_done_is_refused_when_on_and_ignored_when_off(
    key: str, section: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    def document(name: str, value: Any) -> dict[str, Any]:
        return {section: {name: value}} if section else {name: value}

    off, on = {bool: (False, True), str: ("", "something"), int: (-1, 0)}[UNSUPPORTED[key].value_type]
    for written in (key, key.replace("_", "-")):
        for value in (off, None):
            assert values_of(parse_layer(document(written, value), name="c", unknown="error")) == {}
        with pytest.raises(UnsupportedOperation, match=written):
            parse_layer(document(written, on), name="c", unknown="ignore")
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_what_cannot_be_done_has_a_type_all_the_same(key: str) -> None:
    """A schema as an object, say, must not pass as "off" because it is empty."""
    others = {bool: ("", 0), str: (False, 0), int: ("", False)}[UNSUPPORTED[key].value_type]
    for value in (*others, 1.5, {}, {"type": "object"}, []):
        with pytest.raises(InvalidArgument, match=key):
            parse_layer({key: value}, name="c", unknown="ignore")


def test_a_default_without_a_value_is_not_called_null(caplog: pytest.LogCaptureFixture) -> None:
    assert values_of(parse_layer({"threads": 999}, name="c")) == {("model", "threads"): None}
    (warning,) = warnings_of(caplog)
    assert "null" not in warning
    assert "automatic" in warning


def test_spellings_with_different_values_warn_and_the_last_wins(caplog: pytest.LogCaptureFixture) -> None:
    layer = parse_layer({"temp": 0.5, "sampling": {"temperature": 0.6}}, name="c")
    assert values_of(layer) == {("sampling", "temperature"): 0.6}
    (warning,) = warnings_of(caplog)
    assert "temp and sampling.temperature" in warning


def test_spellings_with_equal_values_do_not_warn(caplog: pytest.LogCaptureFixture) -> None:
    parse_layer({"temp": 1, "temperature": 1.0, "no-kv-offload": True, "offload_kqv": False}, name="c")
    assert warnings_of(caplog) == []


def test_sections_are_frozen_and_check_themselves() -> None:
    sampling = Settings().sampling
    with pytest.raises(ValidationError):
        sampling.top_k = 5
    with pytest.raises(ValidationError):
        type(sampling)(temperature=9.0)
    with pytest.raises(ValidationError):
        type(sampling).model_validate({"top_q": 1})


def test_assignments() -> None:
    layer = parse_assignments(
        [
            "temperature=0",
            "sampling.top_k = 5",
            'stop=["a=b"]',
            "flash-attn=on",
            "reverse_prompt=User: x=1",
            "use-mmap=false",
            "system_prompt=// no comment",
            'model={"n_ctx": 512}',
            "runtime.top_p=-1",
        ],
        name="command line",
    )
    assert values_of(layer) == {
        ("sampling", "temperature"): 0.0,
        ("sampling", "top_k"): 5,
        ("stopping", "stop"): ("a=b",),
        ("model", "flash_attention"): "on",
        ("stopping", "reverse_prompt"): "User: x=1",
        ("model", "use_mmap"): False,
        ("session", "system_prompt"): "// no comment",
        ("model", "n_ctx"): 512,
    }


@pytest.mark.parametrize("pair", ["", "=", "=1", " =1", "temperature", ".top_k=1", "sampling.=1"])
def test_no_assignment(pair: str) -> None:
    with pytest.raises(InvalidArgument, match="write key=value"):
        parse_assignments([pair], name="command line")


@pytest.mark.parametrize(
    "pair", ["temperature=warm", "seed=", "top_k=NaN", "top_k=[[[", "sampling.top_k=5.0", "model=5"]
)
def test_assignments_of_a_wrong_type(pair: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"^cli: {pair.partition('=')[0]} is "):
        parse_assignments([pair], name="cli")


def test_later_assignment_wins_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert values_of(parse_assignments(["temp=0.1", "temperature=0.2"], name="cli")) == {
        ("sampling", "temperature"): 0.2
    }
    assert len(warnings_of(caplog)) == 1
