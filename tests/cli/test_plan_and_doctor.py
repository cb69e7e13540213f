"""``wasi-nn plan`` and ``wasi-nn doctor``: what they print, and their exit statuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Command


def test_a_plan_as_text_and_as_json(tiny_model_path: Path, tmp_path: Path, wasi_nn_here: Command) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"model": {"n_ctx": 512}, "backend": {"max_concurrent": 3}}')
    shown = wasi_nn_here("plan", config, "--model", tiny_model_path, "--memory", "1GiB")
    assert shown.returncode == 0, shown.stderr
    assert "3 at once, each in a window of 512 tokens" in shown.stdout
    assert "fits" in shown.stdout
    plan = json.loads(wasi_nn_here("plan", config, "-m", tiny_model_path, "--memory", "1GiB", "--json").stdout)
    assert plan["fits"] is True
    assert plan["n_bytes_needed"]["total"] == sum(v for k, v in plan["n_bytes_needed"].items() if k != "total")
    assert {"n_ctx", "max_cache_tokens", "batch_size", "threads"} <= set(plan["suggestion"])


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--memory", "16MiB"], 1, ""),
        (["--memory", "much"], 2, "no size"),
        (["--memory", "-1GiB"], 2, "no size"),
        (["--config", "n_ctx=nonsense"], 2, "n_ctx"),
        (["--model", "/missing.gguf"], 1, "no such file"),
        (["missing.json"], 2, "CONFIG: there is no configuration file 'missing.json'"),
    ],
)
def test_a_plan_that_fails(
    tiny_model_path: Path, wasi_nn_here: Command, arguments: list[str], status: int, words: str
) -> None:
    done = wasi_nn_here("plan", "--model", tiny_model_path, *arguments)
    assert done.returncode == status
    assert words in done.stderr


def test_doctor_finds_what_is_wrong(tiny_model_path: Path, wasi_nn: Command, wasi_nn_here: Command) -> None:
    arguments = ["--model", tiny_model_path, "--config", "threads=60", "--config", "logging.file=/proc/none/log"]
    done = wasi_nn("doctor", *arguments)  # a process of its own: the doctor looks at what it runs in
    assert done.returncode == 1
    assert "model.threads is 60" in done.stdout
    assert "/proc/none/log" in done.stdout
    findings = json.loads(wasi_nn_here("doctor", *arguments, "--json").stdout)
    assert {f["name"] for f in findings if f["status"] == "problem"} == {"threads", "log"}
    assert all({"name", "status", "detail", "advice"} == set(f) for f in findings)


def test_doctor_names_a_truncated_model(tiny_model_path: Path, tmp_path: Path, wasi_nn_here: Command) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_model_path.read_bytes()[:5000])
    done = wasi_nn_here("doctor", "--model", cut)
    assert done.returncode == 1
    assert "cut short" in done.stdout
