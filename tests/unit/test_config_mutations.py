"""Five hundred configurations that somebody damaged: each a clear error or a warning, in under a second."""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PROFILE
from tests.fakes.llama import FakeLlama
from tests.unit.test_config import KEYS
from wasi_nn_backend import Backend, WasiNNError
from wasi_nn_backend.cli import main
from wasi_nn_backend.config import Layer, jsontext, parse_layer, resolve

EXAMPLES = sorted((Path(__file__).parents[1] / "data" / "configurations").glob("*.json"))
N_CASES = 500
N_SECONDS_MAX = 1.0
NAMES = [name for *_, names, _, _ in KEYS for name in names]

#: Values of every wrong kind, and of every kind at its edge.
STRANGE: list[Any] = [
    None, True, False, 0, -1, 1, 0.5, -0.0, 1e308, -1e308, 5e-324, 2**31, 2**32, 2**63, -(2**63), 10**400,
    "", "x", "\x00", "\ud800", "auto", "-1", "NaN", "../../etc/passwd", "@/etc/passwd", "x" * 100_000, "\u202e\x1b[31m",
    [], {}, [[]], [None], [[1]], [[1, 2, 3]], [[1, "x"]], [1] * 1000, [{}] * 100, {"path": 1}, {"": ""},
    {"a": {"b": {}}},
]  # fmt: skip

Mutation = Callable[[random.Random, dict[str, Any]], str | bytes]


def some_value(chance: random.Random) -> Any:
    return copy.deepcopy(chance.choice(STRANGE))  # a later change may put keys into it


def wrong_value(chance: random.Random, document: dict[str, Any]) -> str:
    """Another value for a key or a section that is there."""
    section = chance.choice(list(document))
    if isinstance(document[section], dict) and chance.random() < 0.8:
        document[section][chance.choice(list(document[section]))] = some_value(chance)
    else:
        document[section] = some_value(chance)
    return json.dumps(document)


def strange_keys(chance: random.Random, document: dict[str, Any]) -> str:
    """Further keys: known ones with strange values, misspelt ones, and names that are none."""
    for _ in range(chance.randrange(1, 8)):
        name = chance.choice([*NAMES, *map(str, STRANGE[:30]), "strict", "runtime", "memory-policy"])
        if chance.random() < 0.3 and name:
            at = chance.randrange(len(name))
            name = name[:at] + chance.choice("xyz_-\n") + name[at + 1 :]
        target = chance.choice([document, *(value for value in document.values() if isinstance(value, dict))])
        target[name[:1000]] = some_value(chance)
    return json.dumps(document)


def literal(chance: random.Random, document: dict[str, Any]) -> str:
    """Numbers that JSON does not have, or not so many digits of."""
    text = chance.choice(["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "0x10", "1_000", "01", "+1", ".5"])
    section = next(iter(document))
    document[section] = {"n_ctx": "\x01"} if chance.random() < 0.5 else "\x01"
    return json.dumps(document).replace('"\\u0001"', text, 1)


def deep_nesting(chance: random.Random, document: dict[str, Any]) -> str:
    n = chance.choice([33, 1000, 100_000])
    opening, closing = chance.choice([("[", "]"), ('{"a":', "}"), ('{"model":', "}")])
    inner = opening * n + ("null" if opening != "[" else "") + closing * n
    return json.dumps({**document, "x": "\x01"}).replace('"\\u0001"', inner)


def ten_megabytes(chance: random.Random, document: dict[str, Any]) -> str | bytes:
    filler = chance.choice(["x", "é", '","', "//\n", "[", "\\u0000"])
    text = json.dumps({**document, "system_prompt": filler * (10 * 2**20 // len(filler.encode()))})
    return text if chance.random() < 0.5 else text.encode()


def one_megabyte(chance: random.Random, document: dict[str, Any]) -> str:
    """Just as much as is read, all of it trouble."""
    pieces: Iterator[str] = (f'"strange_{n}": {n % 7}, ' for n in range(10**6))
    text = "{"
    while len(text) < 2**20 - 200:
        text += "".join(next(pieces) for _ in range(100))
    return text[: 2**20 - 200].rpartition(",")[0] + "}"


def broken_bytes(chance: random.Random, document: dict[str, Any]) -> bytes:
    encoded = bytearray(json.dumps({**document, "system_prompt": "naïve €"}, ensure_ascii=False).encode())
    for _ in range(chance.randrange(1, 6)):
        encoded[chance.randrange(len(encoded))] = chance.randrange(256)
    return bytes(encoded)


def cut_short(chance: random.Random, document: dict[str, Any]) -> str:
    text = json.dumps(document, indent=1)
    return text[: chance.randrange(len(text))]


def shuffled_text(chance: random.Random, document: dict[str, Any]) -> str:
    text = list(json.dumps(document))
    for _ in range(chance.randrange(1, 20)):
        i, j = chance.randrange(len(text)), chance.randrange(len(text))
        text[i], text[j] = text[j], text[i]
    return "".join(text)


def other_encodings(chance: random.Random, document: dict[str, Any]) -> bytes:
    return json.dumps(document).encode(chance.choice(["utf-16", "utf-32", "utf-16-le", "utf-8-sig", "cp037"]))


#: What to do, and how often: the large ones take time to make.
MUTATIONS: list[tuple[Mutation, int]] = [
    (wrong_value, 40), (strange_keys, 40), (literal, 8), (deep_nesting, 5), (ten_megabytes, 1), (one_megabyte, 1),
    (broken_bytes, 15), (cut_short, 8), (shuffled_text, 15), (other_encodings, 3),
]  # fmt: skip


def cases() -> Iterator[tuple[str, str | bytes]]:
    """The same ones each time."""
    chance = random.Random(20)
    kinds, weights = zip(*MUTATIONS, strict=True)
    documents = [jsontext.without_comments(path.read_text(encoding="utf-8")) for path in EXAMPLES]
    for n in range(N_CASES):
        kind = kinds[n] if n < len(kinds) else chance.choices(kinds, weights)[0]
        yield kind.__name__, kind(chance, json.loads(chance.choice(documents)))


def as_bytes(source: str | bytes) -> bytes:
    return source if isinstance(source, bytes) else source.encode(errors="surrogatepass")


def assert_clear(message: str) -> None:
    assert message.isprintable()
    assert 10 < len(message) < 1000


def test_a_damaged_configuration_is_a_clear_error_or_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    slowest = 0.0
    outcomes: dict[str, int] = {}
    for kind, source in cases():
        caplog.clear()
        start_s = time.process_time()
        try:
            layer: Layer | None = parse_layer(source, name="guest", reads_files=False)
        except WasiNNError as error:
            layer = None
            assert_clear(str(error))
        slowest = max(slowest, time.process_time() - start_s)
        for record in caplog.records:
            assert_clear(record.getMessage())
        outcomes[kind] = outcomes.get(kind, 0) + (layer is not None)
        if layer is not None:
            for section, values in resolve([layer]):
                assert repr(type(values).model_validate(values.model_dump())) == repr(values), section
    assert slowest < N_SECONDS_MAX
    assert outcomes["wrong_value"] > 0, "nothing was mended"
    assert outcomes["ten_megabytes"] == outcomes["deep_nesting"] == 0


def test_the_program_says_so_in_one_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n, (_, source) in enumerate(cases()):
        if n % (5 if PROFILE == "thorough" else 15):  # each costs a table of a hundred lines
            continue
        file = tmp_path / f"{n}.json"
        file.write_bytes(as_bytes(source))
        start_s = time.process_time()
        status = main(["inspect", "config", str(file)])
        assert time.process_time() - start_s < N_SECONDS_MAX
        captured = capsys.readouterr()
        assert status in (0, 1)
        assert bool(captured.out) == (status == 0)
        lines = captured.err.splitlines()
        assert all(line.startswith(("error: ", "warn: ")) for line in lines)
        assert sum(line.startswith("error: ") for line in lines) == status


def test_what_was_mended_runs(tiny_model_path: Path) -> None:
    """On the fake: a damaged configuration that is accepted loads a model or is refused, and never breaks a run."""
    n_runs = 0
    for n, (kind, source) in enumerate(cases()):
        if kind not in ("wrong_value", "strange_keys") or n % 3:
            continue
        try:
            with Backend(source, llama=FakeLlama()) as backend:
                context = backend.load_by_name(tiny_model_path).init_execution_context({"max_tokens": 3, "n_ctx": 512})
                context.run_inference("hello")
                n_runs += 1
        except WasiNNError as error:
            assert_clear(str(error))
    assert n_runs > 10
