"""Configurations as programs in the field send them: they load without a word about an unknown key, and mean it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.llama import FakeLlama
from wasi_nn_backend import Backend
from wasi_nn_backend.cli import main
from wasi_nn_backend.config import jsontext, parse_layer, resolve
from wasi_nn_backend.config.keys import SECTIONS

EXAMPLES = sorted((Path(__file__).parents[1] / "data" / "configurations").glob("*.json"))

example = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)


def written_keys(document: dict[str, Any]) -> set[str]:
    return {key for name, value in document.items() for key in (value if name in SECTIONS else [name])}


def test_all_examples_are_there() -> None:
    assert [path.stem for path in EXAMPLES] == ["complete", "flat", "loading", "logging"]


@example
def test_an_example_loads_without_a_warning_and_every_key_counts(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    layer = parse_layer(path, name="example", unknown="error")
    assert layer.warnings == ()
    assert caplog.records == []
    document = json.loads(jsontext.without_comments(path.read_text(encoding="utf-8")))
    n_keys = sum(map(len, layer.values.values()))
    assert n_keys >= len(written_keys(document)) > 0
    settings = resolve([layer])
    for section, keys in layer.values.items():
        assert {key: getattr(getattr(settings, section), key) for key in keys} == keys


@example
def test_every_place_takes_an_example(
    path: Path, tiny_model_path: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    text = path.read_text(encoding="utf-8").replace("/var/log", str(tmp_path)).replace("[628,", "[62,")  # it has 260
    with Backend(text, llama=FakeLlama()) as backend:
        graph = backend.load_by_name_with_config(tiny_model_path, text.encode())
        context = graph.init_execution_context(text)
        context.set_input(1, text)
        assert context.run_inference("hello", text)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert not any("no known key" in warning for warning in warnings)


@example
def test_inspect_config_prints_every_value(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "config", "--json", str(path)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    values = json.loads(captured.out)["values"]
    assert list(values) == [f"{section}.{key}" for section, model in SECTIONS.items() for key in model.model_fields]
    given = {f"{s}.{key}" for s, keys in parse_layer(path, name="x").values.items() for key in keys}
    assert {key for key, entry in values.items() if entry["layer"] == str(path)} == given
    assert {entry["layer"] for key, entry in values.items() if key not in given} == {"built-in default"}
