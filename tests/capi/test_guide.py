"""Operators' configurations and a server's life, through the C library: what is configured counts there as well."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.capi.conftest import run
from tests.unit.test_config_examples import EXAMPLES
from tests.unit.test_sampling_keys import EFFECTS, PLAIN, PROMPT
from wasi_nn_backend.config import jsontext
from wasi_nn_backend.config.keys import SECTIONS

Compile = Callable[..., Path]
COMPLETE = next(path for path in EXAMPLES if path.stem == "complete")
VOLATILE = ("time_to_first_token_ms", "duration_ms")
END = 258  # the tiny model's token at the end of a message
#: Key -> what it needs to matter, two values of it. Those of ``sampling`` beside.
OTHER_EFFECTS: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "model.n_ctx": ({"prompt_mode": "raw", "context_shifting": False, "max_tokens": 300}, 256, 512),
    "stopping.max_tokens": ({}, 4, 8),
    "stopping.stop": ({}, [], ["a", "e", "t", "o", "s"]),
    "sampling.ignore_eos": ({"logit_bias": [[END, 1000.0]]}, True, False),
    "sampling.logit_bias": ({}, [], [[65, 1000.0]]),
    "sampling.n_probs": ({}, 0, 2),
    "sampling.grammar": ({}, "", 'root ::= "ab" root'),
    "sampling.grammar_lazy": ({"grammar": 'root ::= "a" "b"', "grammar_triggers": ["never to be seen"]}, False, True),
    "memory.context_shifting": ({"prompt_mode": "raw", "n_ctx": 256, "max_tokens": 300}, True, False),
    "memory.n_keep_tokens": ({"prompt_mode": "raw", "n_ctx": 256, "max_tokens": 300}, 0, 100),
    "memory.n_discard_tokens": ({"prompt_mode": "raw", "n_ctx": 256, "max_tokens": 300}, 16, 100),
    "backend.default_task_timeout_ms": ({"n_ctx": 512, "max_tokens": 400}, 0, 1),
    "session.prompt_mode": ({}, "chat", "raw"),
    "session.system_prompt": ({}, "Be brief.", "Take your time."),
}


def answers(program: Path, model: Path, configs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    text = "".join(json.dumps(config) + "\n" for config in configs)
    done = subprocess.run([program, model, PROMPT], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        answer = json.loads(line)
        answer["error"] = bytes.fromhex(answer.get("error", "")).decode()
        for name in VOLATILE:
            answer.get("metadata", {}).pop(name, None)
        yield answer


@pytest.fixture
def keys(compile_program: Compile, library_dir: Path) -> Path:
    return compile_program("keys.c", library_dir)


@pytest.mark.slow
def test_each_key_changes_what_a_c_program_gets(keys: Path, tiny_model_path: Path) -> None:
    plain = PLAIN | {"max_tokens": 120, "n_ctx": 512}
    effects = {f"sampling.{name}": effect for name, effect in EFFECTS.items()} | OTHER_EFFECTS
    configs = [plain, plain]
    for name, (base, *values) in effects.items():
        section, key = name.split(".")
        configs += [plain | base | {section: {key: value}} for value in values]
    found = list(answers(keys, tiny_model_path, configs))
    assert [answer["load"] for answer in found] == [0] * len(configs)
    assert found[0] == found[1]  # the seed is given: what differs, differs by the key
    pairs = zip(effects, found[2::2], found[3::2], strict=True)
    assert {name for name, first, second in pairs if first == second} == set()


def test_each_key_of_an_operators_file_is_read(keys: Path, tiny_model_path: Path) -> None:
    """A value that no key takes is refused in the key's name."""
    document = json.loads(jsontext.without_comments(COMPLETE.read_text(encoding="utf-8")))
    wrong = {}
    for name, value in document.items():
        for key in value if name in SECTIONS else [name]:
            wrong[key] = {name: {key: {"a": 1}}} if name in SECTIONS else {name: {"a": 1}}
    assert len(wrong) > 50
    for key, answer in zip(wrong, answers(keys, tiny_model_path, list(wrong.values())), strict=True):
        assert answer["load"] == 1, key
        assert key in answer["error"]


def test_an_operators_log_is_as_configured(keys: Path, tiny_model_path: Path, tmp_path: Path) -> None:
    variants: dict[str, dict[str, Any]] = {
        "error": {"level": "error"},
        "info": {"level": "info"},
        "debug": {"level": "debug"},
        "enabled": {"level": "info", "enable_debug": True},
        "undated": {"level": "info", "timestamps": False},
    }
    configs = [
        {"n_ctx": 256, "max_tokens": 4, "logging": {"file": str(tmp_path / name), **variant}}
        for name, variant in variants.items()
    ]
    assert [answer["load"] for answer in answers(keys, tiny_model_path, configs)] == [0] * len(configs)
    logs = {name: (tmp_path / name).read_text() if (tmp_path / name).exists() else "" for name in variants}
    n_lines = {name: len(text.splitlines()) for name, text in logs.items()}
    assert n_lines["error"] == 0 < n_lines["info"] == n_lines["undated"]
    assert min(n_lines["debug"], n_lines["enabled"]) > n_lines["info"]
    assert logs["info"][:4].isdecimal()  # the year
    assert not logs["undated"][:4].isdecimal()


@pytest.mark.slow
def test_a_servers_life(compile_program: Compile, library_dir: Path, tiny_model_path: Path, tmp_path: Path) -> None:
    text = COMPLETE.read_text(encoding="utf-8").replace("/var/log", str(tmp_path)).replace("[628,", "[62,")
    config = tmp_path / "config.json"
    config.write_text(text.replace('"max_tokens": 512', '"max_tokens": 12'))
    lines = run(compile_program("guide.c", library_dir), tiny_model_path, config).splitlines()
    turns = {(user, turn) for user, turn, _ in (line.split() for line in lines)}
    assert turns == {(f"user-{user}", str(turn)) for user in range(12) for turn in range(3)}
    log = (tmp_path / "wasi_nn_backend.log").read_text()
    assert "is loaded" in log
    assert "\x1b[" not in log  # colours are for terminals


def test_a_configuration_file_is_the_default_of_a_host_that_has_none(
    compile_program: Compile, library_dir: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text(COMPLETE.read_text(encoding="utf-8").replace("/var/log", str(tmp_path)).replace("[628,", "[62,"))
    program = compile_program("careless.c", library_dir)
    env = {"WASI_NN_CONFIG": str(config), "WASI_NN_LEGACY_OUTPUT_BYTES": "8192"}
    assert run(program, tiny_model_path, env=env).startswith("0 ")
    assert (tmp_path / "wasi_nn_backend.log").is_file()
    config.write_text('{"max_tokens": ')
    done = subprocess.run(
        [program, tiny_model_path], capture_output=True, text=True, check=False, env={**os.environ, **env}
    )
    assert done.returncode == 1
    assert "WASI_NN_CONFIG" in done.stderr
