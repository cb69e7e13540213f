"""Configuration as text: comments, limits, and errors that say where."""

from __future__ import annotations

import json
import logging

import pytest

from wasi_nn_backend.config import parse_layer, resolve
from wasi_nn_backend.errors import InvalidArgument, InvalidEncoding

#: Every section, comments in awkward places, strings that look like comments, other spellings, both shapes.
DOCUMENT = r"""// A comment before anything else, with a "quote and a { bracket
{
  "backend": {"max_concurrent": 4},
  "model": {            // "model": {"n_ctx": 1}
    "ctx-size": 4096, "n_gpu_layers": 32,
    "batch_size": 256, "threads": "auto", "flash-attn": true
  },
  "sampling": {"temp": 0.25, "top-p": 0.5, "top_k": 20, "seed": 11},//
  "stopping": {
    "n_predict": 99,
    "stop": ["</s>", "http://host//path", "a \" // b", "back\\"], // the end \
    "ignore_eos": true
  },
  "memory_policy": {"max_memory_mb": 0},
  "system_prompt": "// not a comment",
  "stream-stdout": true
} // and after it: }}}"""


def test_complete_document_with_comments(caplog: pytest.LogCaptureFixture) -> None:
    settings = resolve([parse_layer(DOCUMENT.encode(), name="c", unknown="error")])
    assert settings.backend.max_concurrent == 4
    assert (settings.model.n_ctx, settings.model.n_gpu_layers) == (4096, 32)
    assert (settings.model.batch_size, settings.model.ubatch_size) == (256, 256)
    assert (settings.model.threads, settings.model.flash_attention) == (None, "on")
    assert (settings.sampling.temperature, settings.sampling.top_p) == (0.25, 0.5)
    assert (settings.sampling.top_k, settings.sampling.seed, settings.sampling.ignore_eos) == (20, 11, True)
    assert settings.stopping.max_tokens == 99
    assert settings.stopping.stop == ("</s>", "http://host//path", 'a " // b', "back\\")
    assert settings.memory.max_memory_mb == 0
    assert settings.session.system_prompt == "// not a comment"
    assert settings.session.stream_stdout
    assert caplog.records == []


def test_text_bytes_and_mapping_are_the_same() -> None:
    text = '{"temp": 0.5, "stop": ["\u20ac"]}'
    layers = [parse_layer(source, name="c") for source in (text, text.encode(), "\ufeff" + text, json.loads(text))]
    assert all(layer == layers[0] for layer in layers)


@pytest.mark.parametrize(
    ("source", "line", "column"),
    [
        ("{", 1, 2),
        ('{"temp": 1,\n}', 2, 1),
        ('{"temp": tru}', 1, 10),
        ('{ // one\n // two\n "temp" 1}', 3, 9),
        ("{} {}", 1, 4),
        ("temp=1", 1, 1),
        ('{"stop": "unclosed // }', 1, 10),
        ('{"stop": "a\nb"}', 1, 12),
        ("/* no */ {}", 1, 1),
        (b"\xff", 1, 1),
        (b'{"a":\n "\xc3\xa9\xc3"}', 2, 4),
        (b'{}\n\n\x80"', 3, 1),
    ],
)
def test_what_is_not_json_is_told_by_line_and_column(source: str | bytes, line: int, column: int) -> None:
    with pytest.raises(InvalidEncoding, match=rf"^the guest: .* line {line} column {column}: "):
        parse_layer(source, name="the guest")


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("key", ["temperature", "unheard_of"])
def test_literals_that_are_no_json_numbers(literal: str, key: str) -> None:
    with pytest.raises(InvalidArgument, match=literal):
        parse_layer(f'{{"{key}": {literal}}}', name="c")


@pytest.mark.parametrize("text", ["[]", "null", "5", '"top_k"', "true"])
def test_top_level_is_an_object(text: str) -> None:
    with pytest.raises(InvalidArgument, match="write a JSON object"):
        parse_layer(text, name="c")


def nested(depth: int) -> str:
    return '{"x": ' * (depth - 1) + "{}" + "}" * (depth - 1)


@pytest.mark.parametrize("text", [nested(33), nested(100_000), "[" * 500_000, '{"stop": ' + "[" * 32 + "]" * 32 + "}"])
def test_deep_nesting_is_refused_before_parsing(text: str) -> None:
    with pytest.raises(InvalidArgument, match="deeper than 32"):
        parse_layer(text, name="c")


def test_depth_counts_brackets_outside_strings_and_comments_only() -> None:
    text = nested(32).replace("{}", '{"y": "' + "[{" * 50 + '"} // ' + "{[" * 50 + "\n")
    assert parse_layer(text, name="c", unknown="ignore").values == {}


def test_size_limit_counts_bytes() -> None:
    frame = '{"system_prompt": "%s"}'
    n_free = 2**20 - len(frame % "")
    for fits in (frame % ("x" * n_free), frame % ("\u00e9" * (n_free // 2))):
        assert parse_layer(fits, name="c") == parse_layer(fits.encode(), name="c")
    for too_long in (frame % ("x" * (n_free + 1)), frame % ("\u00e9" * (n_free // 2 + 1)), " " * (2**20 + 1)):
        for source in (too_long, too_long.encode()):
            with pytest.raises(InvalidArgument, match="at most 1048576 bytes"):
                parse_layer(source, name="c")


@pytest.mark.parametrize("text", ['"' + '\\"' * 400_000, '"\\' * 300_000, "/" * 999_999, '"/' * 400_001])
def test_scanning_hostile_text_takes_linear_time(text: str) -> None:
    """Quadratic scanning would take hours here and run into the time limit of the test."""
    with pytest.raises(InvalidEncoding):
        parse_layer("{" + text, name="c")


def test_endless_digits() -> None:
    with pytest.raises(InvalidArgument, match="too many digits"):
        parse_layer('{"seed": ' + "9" * 5000 + "}", name="c")


def test_a_key_twice_in_one_object_warns_and_the_last_wins(caplog: pytest.LogCaptureFixture) -> None:
    layer = parse_layer('{"top_k": 1, "top_k": 2, "seed": 3, "seed": 3}', name="c")
    assert layer.values == {"sampling": {"top_k": 2, "seed": 3}}
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "top_k" in record.getMessage()
