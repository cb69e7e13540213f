"""The documents tell the truth: their programs and command lines run, and the list of configuration keys is whole."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from wasi_nn_backend.config import parse_layer
from wasi_nn_backend.config.keys import SECTIONS
from wasi_nn_backend.config.section import key_of

PROJECT = Path(__file__).resolve().parents[2]
CONFIGURATION = PROJECT / "docs" / "configuration.md"
#: Written out of the code by tools/: nobody's commands.
GENERATED = PROJECT / "docs" / "reference"
DOCUMENTS = [
    path.relative_to(PROJECT).as_posix()
    for path in (
        PROJECT / "README.md",
        PROJECT / "CONTRIBUTING.md",
        *sorted((PROJECT / "docs").rglob("*.md")),
        *sorted((PROJECT / "examples").rglob("README.md")),
    )
    if GENERATED not in path.parents and "node_modules" not in path.parts
]

#: Command lines of any document that no test runs, by how they begin, and why. A single block is marked in its document
#: with ``<!-- not run: why -->`` on the line before it.
NOT_RUN = {
    "git clone": "needs the network",
    "cd wasi-nn-backend": "goes with git clone",
    "make": "builds and tests the project: CI calls these targets, and this test is part of one",
    "CMAKE_ARGS=": "needs the network and compiles llama.cpp",
    ".venv/bin/": "one test file, lint, format: what make check runs",
    "python -m ziglang": "tests/host/test_examples.py builds the programs",
}
#: What a block may be in without being run: output, which is compared with what the block before it prints.
OUTPUT = ("text", "")
_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<why>[^>]+) -->\n)?^```(?P<language>\w*)\n(?P<body>.*?)^```\n"
    r"(?:\s*^```(?:text)?\n(?P<output>.*?)^```)?",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Block:
    """``output`` is what the document says that it prints, None where it says nothing; ``...`` stands for anything."""

    document: str
    language: str
    body: str
    why_not_run: str | None
    output: str | None

    @property
    def id(self) -> str:
        return f"{self.document}: {self.body.splitlines()[0][:50] if self.body.strip() else ''}"

    def lines(self) -> list[str]:
        """The command lines; a backslash joins two."""
        return self.body.replace("\\\n", " ").splitlines()

    def check(self, printed: str) -> None:
        """Whether it printed what the document shows, apart from how lines are broken."""
        if self.output is None:
            assert printed.strip()
            return
        pattern = ".*".join(re.escape(" ".join(part.split())) for part in self.output.split("..."))
        assert re.fullmatch(
            pattern.replace(r"\ .*", ".*").replace(r".*\ ", ".*"), " ".join(printed.split()), re.DOTALL
        ), f"{self.document} says\n{self.output}\nbut it printed\n{printed}"


def read_blocks() -> list[Block]:
    return [
        Block(document, match["language"], match["body"], match["why"], match["output"])
        for document in DOCUMENTS
        for match in _BLOCK.finditer((PROJECT / document).read_text(encoding="utf-8"))
    ]


BLOCKS = read_blocks()


def to_run(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language and block.why_not_run is None]


SCRIPTS = [
    replace(block, body="\n".join(lines))
    for block in to_run("sh")
    if (lines := [line for line in block.lines() if line.strip() and not line.startswith(tuple(NOT_RUN))])
]


@pytest.fixture
def user_directory(tmp_path: Path, smollm2_path: Path) -> Path:
    """What a reader has: the examples and a model, in whose folders their pages' commands run."""
    ignored = shutil.ignore_patterns("node_modules", "__pycache__")
    shutil.copytree(PROJECT / "examples", tmp_path / "examples", ignore=ignored)
    for folder in (tmp_path, *(path for path in (tmp_path / "examples").iterdir() if path.is_dir())):
        (folder / "model.gguf").symlink_to(smollm2_path)
    return tmp_path


def run(command: list[str], directory: Path, stdin: str = "") -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=directory, env=environment, input=stdin, capture_output=True, text=True, timeout=380, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.real
@pytest.mark.parametrize("block", to_run("python"), ids=lambda block: block.id)
def test_python_programs_run(block: Block, user_directory: Path) -> None:
    printed = run([sys.executable, "-c", block.body], user_directory)
    if block.output is not None or "print(" in block.body:
        block.check(printed)
    if block.document == "README.md" and "similarity" in block.body:
        france, italy, similarity = printed.splitlines()
        assert 0.5 < float(similarity.removeprefix("similarity: ")) < 1
        assert "Paris" in france
        assert "Rome" in italy


@pytest.mark.real
@pytest.mark.timeout(400)
@pytest.mark.parametrize("block", SCRIPTS, ids=lambda block: block.id)
def test_command_lines_run(block: Block, user_directory: Path) -> None:
    folder = Path(block.document).parent  # readers of an example's page are in its folder
    directory = user_directory / folder if folder.parts[:1] == ("examples",) else user_directory
    printed = run(["sh", "-ec", block.body], directory, stdin="Hello\n")
    block.check(printed)
    if "France" in block.body:
        assert "Paris" in printed


@pytest.mark.parametrize("block", to_run("json"), ids=lambda block: block.id)
def test_configurations_are_right(block: Block) -> None:
    parse_layer(block.body, name=block.document, unknown="error")


def test_every_other_block_says_why_it_is_not_run() -> None:
    known = {"sh", "python", "json", *OUTPUT}
    unexplained = [block.id for block in BLOCKS if block.language not in known and block.why_not_run is None]
    assert unexplained == []


def test_every_reason_not_to_run_a_line_is_needed() -> None:
    assert SCRIPTS
    assert to_run("python")
    lines = [line for block in to_run("sh") for line in block.lines()]
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


@pytest.mark.parametrize("document", [*DOCUMENTS, "CHANGELOG.md"])
def test_links_lead_somewhere(document: str) -> None:
    text = _BLOCK.sub("", (PROJECT / document).read_text(encoding="utf-8"))
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    missing = [target for target in targets if not ((PROJECT / document).parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize(("tool", "document"), [("cli_docs", "cli.md"), ("c_docs", "c.md")])
def test_generated_references_are_up_to_date(tool: str, document: str) -> None:
    module = importlib.import_module(f"tools.{tool}")
    generated = {"cli_docs": "cli_markdown", "c_docs": "c_markdown"}[tool]
    written = (GENERATED / document).read_text(encoding="utf-8")
    assert written == getattr(module, generated)(), f"run: python tools/{tool}.py"
