"""The documents tell the truth: their programs and command lines run, and the list of configuration keys is whole."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from wasi_nn_backend.config.keys import SECTIONS
from wasi_nn_backend.config.section import key_of

PROJECT = Path(__file__).resolve().parents[2]
CONFIGURATION = PROJECT / "docs" / "configuration.md"
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/asyncio.md",
    "docs/configuration.md",
    "docs/dialects.md",
    "docs/map.md",
    "examples/c/README.md",
    "examples/wat/README.md",
]

#: Command lines that no test runs, by how they begin, and why.
NOT_RUN = {
    "git clone": "needs the network",
    "cd wasi-nn-backend": "goes with git clone",
    "make": "builds and tests the project: CI calls these targets, and this test is part of one",
    "CMAKE_ARGS=": "needs the network and compiles llama.cpp",
    ".venv/bin/": "one test file, lint, format: what make check runs",
    "python -m ziglang": "tests/host/test_examples.py builds the programs",
}


def blocks(document: str, language: str) -> list[str]:
    text = (PROJECT / document).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def command_lines() -> list[tuple[str, str]]:
    """(document, command line) of every shell block; a backslash joins lines."""
    return [
        (document, line)
        for document in DOCUMENTS
        for block in blocks(document, "sh")
        for line in block.replace("\\\n", " ").splitlines()
    ]


COMMAND_LINES = [(document, line) for document, line in command_lines() if not line.startswith(tuple(NOT_RUN))]
PROGRAMS = [(document, source) for document in DOCUMENTS for source in blocks(document, "python")]


@pytest.fixture
def user_directory(tmp_path: Path, smollm2_path: Path) -> Path:
    """What a reader has: the examples, in both places from which commands name them, and a model."""
    shutil.copytree(PROJECT / "examples", tmp_path / "examples")
    for module in (*(PROJECT / "examples" / "c").glob("*.wasm"), *(PROJECT / "examples" / "wat").glob("*.wat")):
        shutil.copy(module, tmp_path)
    (tmp_path / "model.gguf").symlink_to(smollm2_path)
    return tmp_path


def run(command: list[str], directory: Path, stdin: str = "") -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=directory, env=environment, input=stdin, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.real
@pytest.mark.parametrize(("document", "source"), PROGRAMS, ids=[document for document, _ in PROGRAMS])
def test_python_programs_run(document: str, source: str, user_directory: Path) -> None:
    printed = run([sys.executable, "-c", source], user_directory)
    if document == "README.md":
        france, italy, similarity = printed.splitlines()
        assert 0.5 < float(similarity.removeprefix("similarity: ")) < 1
        assert "Paris" in france
        assert "Rome" in italy


@pytest.mark.real
@pytest.mark.parametrize(("document", "line"), COMMAND_LINES, ids=[line[:40] for _, line in COMMAND_LINES])
def test_command_lines_run(document: str, line: str, user_directory: Path) -> None:
    printed = run(["sh", "-c", line], user_directory, stdin="Hello\n")
    assert printed.strip()
    if "France" in line:
        assert "Paris" in printed or "temperature" not in line, "an answer that is not sampled is the same every time"


def test_every_reason_not_to_run_a_line_is_needed() -> None:
    assert COMMAND_LINES
    assert PROGRAMS
    lines = [line for _, line in command_lines()]
    assert [start for start in NOT_RUN if not any(line.startswith(start) for line in lines)] == []


def documented_keys() -> dict[str, tuple[set[str], str]]:
    """key -> (other spellings, default as JSON), from the tables' first three columns."""
    rows = re.findall(
        r"^\| `([\w.]+)` \|([^|]*)\| `([^`]*)` \|", CONFIGURATION.read_text(encoding="utf-8"), re.MULTILINE
    )
    return {key: (set(re.findall(r"`(\w+)`", spellings)), default) for key, spellings, default in rows}


def test_every_key_is_documented_with_its_spellings_and_default() -> None:
    fields = {
        f"{name}.{key}" if key_of(field).nested_only else key: field
        for name, section in SECTIONS.items()
        for key, field in section.model_fields.items()
    }
    in_force = {
        key: ({*key_of(field).spellings, *key_of(field).negations}, json.dumps(field.default))
        for key, field in fields.items()
    }
    assert documented_keys() == in_force


@pytest.mark.parametrize(
    "document",
    [
        *DOCUMENTS,
        "docs/architecture.md",
        "docs/benchmarks.md",
        "docs/performance.md",
        "docs/dependencies.md",
        "docs/grammars.md",
        "docs/monitoring.md",
        "CHANGELOG.md",
    ],
)
def test_links_lead_somewhere(document: str) -> None:
    text = (PROJECT / document).read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    missing = [target for target in targets if not ((PROJECT / document).parent / target).exists()]
    assert missing == []
