"""What holds for every document: no foreign errors, one meaning in every shape, layers that add up."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_config import KEYS
from wasi_nn_backend.config import Layer, Settings, parse_assignments, parse_layer, resolve
from wasi_nn_backend.config.layers import LIMITED_BY, merge
from wasi_nn_backend.config.token_choice import SAMPLER_NAMES
from wasi_nn_backend.errors import InvalidArgument, InvalidEncoding, UnsupportedOperation, WasiNNError

#: A busy machine is no reason to fail.
relaxed = settings(deadline=None)

NAMES = sorted({name for *_, names, _, _ in KEYS for name in names})
SECTIONS = [*Settings.model_fields, "memory_policy", "runtime", "memory-policy"]
UNSUPPORTED = ["reranking", "mmproj"]

#: Values that each key takes as they are.
VALID: dict[tuple[str, str], st.SearchStrategy[Any]] = {
    ("backend", "max_concurrent"): st.integers(1, 256),
    ("model", "n_ctx"): st.just(0) | st.integers(128, 2**31 - 1),
    ("model", "batch_size"): st.integers(1, 2048),
    ("model", "ubatch_size"): st.integers(1, 2048),
    ("model", "threads"): st.integers(1, 64) | st.sampled_from([-1, "auto", None]),
    ("model", "flash_attention"): st.sampled_from(["auto", "on", "off", "enabled", "disabled", True, False]),
    ("model", "cache_type_k"): st.sampled_from(["f16", "q8_0", 8, 1, 30]),
    ("model", "tensor_split"): st.lists(st.floats(0, 10), max_size=4) | st.sampled_from(["", "3,2", "1/1"]),
    ("sampling", "temperature"): st.floats(0, 2) | st.integers(0, 2),
    ("sampling", "top_k"): st.integers(-1, 2**31 - 1),
    ("sampling", "min_p"): st.floats(0, 1),
    ("sampling", "penalty_last_n"): st.integers(-1, 2**20),
    ("sampling", "seed"): st.integers(-1, 2**31),
    ("sampling", "logit_bias"): st.lists(st.tuples(st.integers(0, 2**31 - 1), st.floats(-1e6, 1e6)), max_size=3),
    ("sampling", "samplers"): st.lists(st.sampled_from(SAMPLER_NAMES), unique=True),
    ("sampling", "n_probs"): st.integers(0, 100),
    ("sampling", "json_schema"): st.sampled_from(["", '{"type": "object"}', {"enum": [1]}, True]),
    ("sampling", "dry_sequence_breakers"): st.lists(st.text(min_size=1, max_size=10), max_size=4),
    ("backend", "queue_size"): st.integers(1, 10_000),
    ("backend", "queue_reject_threshold"): st.integers(1, 10_000),
    ("model", "lora"): st.lists(st.sampled_from(["a", "b"]), unique=True) | st.just({"path": "c", "scale": 0.5}),
    ("task", "priority"): st.sampled_from(["low", "urgent", 0, 3]),
    ("task", "timeout_ms"): st.none() | st.integers(0, 600_000),
    ("logging", "level"): st.sampled_from(["debug", "WARN", "fatal"]),
    ("sampling", "ignore_eos"): st.booleans(),
    ("stopping", "max_tokens"): st.integers(1, 2**31 - 1) | st.integers(max_value=-1),
    ("stopping", "stop"): st.text(min_size=1) | st.lists(st.text(min_size=1), max_size=5),
    ("stopping", "max_time_ms"): st.integers(0, 2**31 - 1),
    ("memory", "kv_layout"): st.sampled_from(["auto", "streams", "unified"]),
    ("memory", "max_memory_mb"): st.just(0) | st.integers(64, 2**31 - 1),
    ("session", "system_prompt"): st.none() | st.text(),
    ("session", "special"): st.booleans(),
}

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 200)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(), max_size=8)
    | st.sampled_from(["auto", "on", "3,2", "raw", "f16"])
)
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
written_names = st.sampled_from([*NAMES, *SECTIONS, *UNSUPPORTED]).flatmap(
    lambda name: st.sampled_from([name, name.replace("_", "-")])
) | st.text(max_size=12)
documents = st.dictionaries(
    written_names, json_values | st.dictionaries(written_names, json_values, max_size=5), max_size=8
)
valid_values = st.fixed_dictionaries({}, optional=VALID)
layers = valid_values.map(lambda values: parse_layer(nested(values), name="layer"))


def nested(values: dict[tuple[str, str], Any]) -> dict[str, dict[str, Any]]:
    document: dict[str, dict[str, Any]] = {}
    for (section, key), value in values.items():
        document.setdefault(section, {})[key] = value
    return document


def assert_within_constraints(resolved: Settings) -> None:
    """Pydantic, asked again, finds nothing to change: what was mended or copied unchecked is as good as checked."""
    for section in Settings.model_fields:
        values = getattr(resolved, section)
        again = type(values).model_validate(values.model_dump())
        assert repr(again) == repr(values)


def attempt(read: Callable[[], Layer]) -> Layer | tuple[type[WasiNNError], str]:
    """The layer, or the error of this package in a form that compares. Any other error is the test's failure."""
    try:
        return read()
    except WasiNNError as error:
        return type(error), str(error)


def assert_sound(outcome: Layer | tuple[type[WasiNNError], str]) -> None:
    if isinstance(outcome, Layer):
        assert_within_constraints(resolve([outcome]))
    else:
        assert outcome[0] in (InvalidArgument, InvalidEncoding, UnsupportedOperation)
        assert outcome[1].startswith("c: ")
        assert outcome[1].isprintable()


@relaxed
@given(documents, st.sampled_from(["warn", "ignore", "error"]))
def test_any_document_gives_sound_settings_or_an_own_error(document: dict[str, Any], unknown: Any) -> None:
    outcome = attempt(lambda: parse_layer(json.dumps(document), name="c", unknown=unknown))
    assert_sound(outcome)
    assert outcome == attempt(lambda: parse_layer(document, name="c", unknown=unknown))


@relaxed
@given(st.binary(max_size=200) | st.text(st.sampled_from('{}[]":,/\\ \n\ufeff1eN-at'), max_size=60))
def test_any_text_gives_a_layer_or_an_own_error(source: str | bytes) -> None:
    assert_sound(attempt(lambda: parse_layer(source, name="c", reads_files=False)))


@relaxed
@given(st.lists(st.text(max_size=20) | st.builds(lambda k, v: f"{k}={json.dumps(v)}", written_names, json_values)))
def test_any_assignments_give_a_layer_or_an_own_error(pairs: list[str]) -> None:
    assert_sound(attempt(lambda: parse_assignments(pairs, name="c")))


@relaxed
@given(valid_values, st.randoms(use_true_random=False))
def test_shapes_are_equal(values: dict[tuple[str, str], Any], chance: random.Random) -> None:
    expected = parse_layer(nested(values), name="c", unknown="error")
    names = {(section, key): names for section, key, names, _, _ in KEYS}
    flat: dict[str, Any] = {}
    mixed: dict[str, Any] = {}
    for (section, key), value in values.items():
        written = chance.choice(names[section, key])
        written = written.replace("_", "-") if chance.random() < 0.5 else written
        flat[written] = value
        if chance.random() < 0.5:
            mixed[written] = value
        else:
            mixed.setdefault(section, {})[written] = value
    assert parse_layer(flat, name="c", unknown="error") == expected
    assert parse_layer(mixed, name="c", unknown="error") == expected
    assert {section: set(keys) for section, keys in expected.values.items()} == {
        section: {key for place, key in values if place == section} for section, _ in values
    }


@relaxed
@given(valid_values)
def test_assignments_equal_documents(values: dict[tuple[str, str], Any]) -> None:
    pairs = [f"{section}.{key}={json.dumps(value)}" for (section, key), value in values.items()]
    assert parse_assignments(pairs, name="c") == parse_layer(nested(values), name="c")


@relaxed
@given(valid_values)
def test_canonical_values_are_a_fixed_point(values: dict[tuple[str, str], Any]) -> None:
    layer = parse_layer(nested(values), name="c")
    assert parse_layer(layer.values, name="c", unknown="error") == layer


@relaxed
@given(valid_values, st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), max_size=20))
def test_comments_change_nothing(values: dict[tuple[str, str], Any], comment: str) -> None:
    text = json.dumps(nested(values), indent=1, ensure_ascii=False)
    # json.dumps never leaves a line break inside a string, so the end of a line is outside of strings.
    commented = "\n".join(f"{line} //{comment}" for line in text.split("\n"))
    assert parse_layer(commented, name="c") == parse_layer(text, name="c")


@relaxed
@given(valid_values, st.data())
def test_truncated_text_is_never_accepted(values: dict[tuple[str, str], Any], data: st.DataObject) -> None:
    encoded = json.dumps(nested(values), ensure_ascii=False).encode()
    n_bytes = data.draw(st.integers(1, len(encoded) - 1))
    with pytest.raises(InvalidEncoding, match="line 1 column"):
        parse_layer(encoded[:n_bytes], name="c")


@relaxed
@given(st.lists(layers, max_size=5), st.integers(0, 5), st.integers(0, 5))
def test_layering_is_associative(stack: list[Layer], i: int, j: int) -> None:
    first, last = sorted((i, j))
    grouped = [*stack[:first], merge(stack[first:last], name="group"), *stack[last:]]
    assert resolve(grouped) == resolve(stack)
    one_by_one = functools.reduce(lambda left, right: merge([left, right], name="pair"), stack, Layer("none", {}))
    assert resolve([one_by_one]) == resolve(stack)


@relaxed
@given(st.lists(layers, max_size=5))
def test_the_last_layer_that_gives_a_key_decides_it(stack: list[Layer]) -> None:
    resolved = resolve(stack)
    assert_within_constraints(resolved)
    for section, model in Settings():
        for key in type(model).model_fields:
            given_values = [layer.values[section][key] for layer in stack if key in layer.values.get(section, {})]
            expected = given_values[-1] if given_values else getattr(model, key)
            limit = LIMITED_BY.get(section, {}).get(key)
            if limit is not None:
                expected = min(expected, getattr(getattr(resolved, section), limit))
            assert getattr(getattr(resolved, section), key) == expected
