"""The documentation and the JSON schema say what the models say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.unit.test_config import KEYS, MENDED, REFUSED, SPELLINGS
from tools.configuration_docs import DOCUMENT, documented_sections, with_tables
from wasi_nn_backend.cli import main
from wasi_nn_backend.config.keys import SECTIONS, TOP_LEVEL, UNSUPPORTED
from wasi_nn_backend.config.reference import json_schema, markdown_table
from wasi_nn_backend.config.section import key_of

SCHEMA = json_schema()
TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """As much of JSON Schema as the configuration's needs; a keyword that is not here is the test's failure."""
    checks = {
        "anyOf": lambda options: any(fits(value, option) for option in options),
        "const": lambda constant: value == constant and type(value) is type(constant),
        "enum": lambda options: any(value == option and type(value) is type(option) for option in options),
        "type": lambda name: isinstance(value, TYPES[name]) and (name == "boolean" or not isinstance(value, bool)),
        "minimum": lambda least: not isinstance(value, int | float) or value >= least,
        "maximum": lambda most: not isinstance(value, int | float) or value <= most,
        "minLength": lambda n: not isinstance(value, str) or len(value) >= n,
        "minItems": lambda n: not isinstance(value, list) or len(value) >= n,
        "maxItems": lambda n: not isinstance(value, list) or len(value) <= n,
        "items": lambda inner: not isinstance(value, list) or all(fits(item, inner) for item in value),
        "prefixItems": lambda inner: not isinstance(value, list) or all(map(fits, value, inner)),
        "required": lambda names: not isinstance(value, dict) or set(names) <= set(value),
        "properties": lambda inner: (
            not isinstance(value, dict) or all(fits(item, inner[name]) for name, item in value.items() if name in inner)
        ),
        "additionalProperties": lambda inner: (
            not isinstance(value, dict)
            or all(
                fits(item, inner) if isinstance(inner, dict) else inner
                for name, item in value.items()
                if name not in schema.get("properties", {})
            )
        ),
    }
    assert set(schema) - set(checks) <= {"description", "default", "$schema", "title"}
    return all(checks[keyword](argument) for keyword, argument in schema.items() if keyword in checks)


def test_the_documentation_is_up_to_date() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run: python tools/configuration_docs.py"
    assert sorted(documented_sections(text)) == sorted(SECTIONS)
    for key in UNSUPPORTED:
        assert f"`{key}`" in text


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_is_described(section: str) -> None:
    table = markdown_table(section)
    for name, field in SECTIONS[section].model_fields.items():
        assert field.description, f"{section}.{name} needs a description"
        assert f"| `{section}.{name}` |" in table if key_of(field).nested_only else f"| `{name}` |" in table
    assert all(line.count(" | ") == 3 for line in table.replace("| |", "| x |").splitlines() if "`" in line)


@pytest.mark.parametrize(("section", "key", "written", "value", "meaning"), SPELLINGS)
def test_the_schema_takes_every_spelling(section: str, key: str, written: str, value: Any, meaning: Any) -> None:
    assert fits({section: {written: value}}, SCHEMA)
    assert fits({written: value}, SCHEMA)


def test_the_schema_takes_defaults_sections_and_shapes() -> None:
    assert fits(
        {section: {key: SCHEMA["properties"][section]["properties"][key]["default"]} for section, key, *_ in KEYS},
        SCHEMA,
    )
    assert fits(
        {"strict": True, "runtime": {"top_k": -1, "stop": ["x"]}, "memory-policy": {"max_memory_mb": 64}}, SCHEMA
    )
    assert set(TOP_LEVEL) <= set(SCHEMA["properties"])


@pytest.mark.parametrize("document", [{"tempature": 1}, {"model": {"top_k": 1}}, {"model": 1}, {"strict": "yes"}, []])
def test_the_schema_refuses_what_is_unknown(document: Any) -> None:
    assert not fits(document, SCHEMA)


def test_the_schema_marks_most_of_what_is_wrong() -> None:
    """Some rules have no words there (a range with a hole, text that must be UTF-8)."""
    wrong = [(written, value) for written, value, _ in (*MENDED, *REFUSED)]
    marked = [case for case in wrong if not fits({case[0]: case[1]}, SCHEMA)]
    assert len(marked) > len(wrong) / 2


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == SCHEMA
