"""The component examples: built by the commands in their READMEs, and run on SmolLM2 by the commands there.

What was built is kept outside of the checkout, under a hash of the sources and the commands.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import missing
from wasi_nn_backend.backend import Backend
from wasi_nn_backend.host import RunConfig, run_module

EXAMPLES = Path(__file__).parents[2] / "examples"
CACHE = Path.home() / ".cache" / "wasi-nn-backend" / "examples"
PARIS = "Name the capital city of France."

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]


def commands(name: str) -> list[str]:
    """The lines of a README's shell blocks."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (EXAMPLES / name / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


def build_commands(name: str) -> list[str]:
    return [line for line in commands(name) if not line.startswith(("wasi-nn ", "pip "))]


def built(name: str) -> Path:
    """The folder of an example with its component in it, built now or at an earlier run."""
    own = [path for path in (EXAMPLES / name).iterdir() if path.suffix in (".js", ".py", ".wat")]
    sources = sorted([*own, *(EXAMPLES / "wit").rglob("*.wit")])
    lines = build_commands(name)
    digest = hashlib.sha256("\n".join(lines).encode())
    for path in sources:
        digest.update(path.relative_to(EXAMPLES).as_posix().encode() + path.read_bytes())
    folder = CACHE / digest.hexdigest()[:16]
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        for path in sources:
            (folder / path.relative_to(EXAMPLES)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / path.relative_to(EXAMPLES))
        for line in lines:
            run_line(line, folder / name)
        (folder / "done").touch()
    return folder / name


def run_line(line: str, folder: Path) -> str:
    """Run a command as a shell would find it, the tools of this Python's environment first."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    words = shlex.split(line)
    program = shutil.which(words[0], path=environment["PATH"])
    if program is None:
        missing(f"{words[0]} is not installed, which {folder.name}'s example needs")
    ran = subprocess.run(
        [program, *words[1:]], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=800
    )
    assert ran.returncode == 0, f"{line}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout


@pytest.fixture
def smollm2(smollm2_path: Path) -> Iterator[Backend]:
    with Backend() as backend:
        backend.register("default", smollm2_path)
        yield backend


@pytest.mark.parametrize("name", ["python", "javascript", "component"])
def test_the_readmes_commands_answer(name: str, smollm2_path: Path) -> None:
    (line,) = [line for line in commands(name) if line.startswith("wasi-nn ")]
    assert "Paris" in run_line(line, built(name))


def ask(backend: Backend, name: str, *args: str) -> tuple[int, str, str]:
    """The exit status, the answer, and what was said about an error."""
    (component,) = [path for path in built(name).iterdir() if path.suffix in (".wasm", ".wat")]
    invoke = None if name == "python" else "ask"
    out, err = bytearray(), bytearray()
    config = RunConfig(component, args=args, invoke=invoke, stdout=out.extend, stderr=err.extend)
    result = run_module(config, backend)
    answer = out.decode() + "".join(map(str, result.returned))
    return result.exit_status, answer, err.decode() + (result.reason or "")


@pytest.mark.parametrize("name", ["python", "javascript", "component"])
def test_all_languages_get_the_same_answer(name: str, smollm2: Backend) -> None:
    settings = {"prompt_mode": "chat", "max_tokens": 64, "temperature": 0}
    with smollm2.load_by_name("default") as graph, graph.init_execution_context(settings) as context:
        expected = context.run_inference(PARIS)
    assert ask(smollm2, name, "default", PARIS) == (0, expected + "\n" * (name == "python"), "")


@pytest.mark.parametrize("name", ["python", "javascript", "component"])
def test_errors_reach_the_program_with_their_text(name: str, smollm2: Backend) -> None:
    exit_status, answer, error = ask(smollm2, name, "nobody", PARIS)
    assert (exit_status, answer) == (1, "")
    assert 'no graph is registered as "nobody"' in error


def test_the_embedding_program_answers(smollm2_path: Path) -> None:
    assert "Paris" in run_line("python component.py", EXAMPLES / "embedding")
