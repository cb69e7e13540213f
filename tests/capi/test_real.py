"""The user guide's flow with a real model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import bench.capi
from bench.capi import CClient, Work, judge, run_alone
from tests.capi.conftest import need, run
from tests.capi.test_command import capi

pytestmark = pytest.mark.real
EXAMPLES = Path(__file__).parents[2] / "examples" / "c" / "native"
Compile = Callable[..., Path]


def compiled(compiler: str, source: str, folder: Path) -> Path:
    """By the line that the example's first comment gives."""
    flags = capi("--build", folder, "--cflags", "--libs").split()
    run(need(compiler), EXAMPLES / source, "-o", folder / "program", *flags)
    return folder / "program"


def test_the_capital_of_france(tmp_path: Path, smollm2_path: Path) -> None:
    assert "Paris" in run(compiled("gcc", "ask.c", tmp_path), smollm2_path, "Name the capital city of France.")


def test_a_session_remembers_a_name(tmp_path: Path, smollm2_path: Path) -> None:
    program = compiled("g++", "ask.cpp", tmp_path)
    answers = run(program, smollm2_path, "My name is Ada.", "What is my name?").splitlines()
    assert "Ada" in answers[-1]


def test_many_sessions_get_the_right_texts(compile_program: Compile, library_dir: Path, smollm2_path: Path) -> None:
    config = {"max_tokens": 6, "temperature": 0, "repeat_penalty": 1.0, "n_ctx": 512, "max_concurrent": 8}
    work = Work(n_threads=8, n_sessions=8, n_calls=16, config=config)
    client = CClient(compile_program(Path(bench.capi.__file__).with_suffix(".c"), library_dir), smollm2_path, work)
    texts = client.run("one").texts
    client.close()
    verdicts = judge(texts, run_alone(smollm2_path, work))
    assert verdicts["wrong"] == 0
    assert verdicts["equal"] > verdicts["near"]
