"""The user guide's flow with a real model."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.capi.conftest import need, run
from wasi_nn_backend import Backend

pytestmark = pytest.mark.real
EXAMPLES = Path(__file__).parents[2] / "examples" / "c" / "native"
Compile = Callable[..., Path]


@pytest.fixture
def ask(library_dir: Path, tmp_path: Path) -> Path:
    flags = [f"-I{library_dir / 'include'}", f"-L{library_dir}", f"-Wl,-rpath,{library_dir}", "-lwasi_nn_backend"]
    run(need("gcc"), EXAMPLES / "ask.c", "-o", tmp_path / "ask", *flags)
    return tmp_path / "ask"


def test_the_capital_of_france(ask: Path, smollm2_path: Path) -> None:
    assert "Paris" in run(ask, smollm2_path, "Name the capital city of France.")


def test_a_session_remembers_a_name(ask: Path, smollm2_path: Path) -> None:
    answers = run(ask, smollm2_path, "My name is Ada.", "What is my name?").splitlines()
    assert "Ada" in answers[-1]


@pytest.mark.timeout(600)
def test_many_sessions_are_as_fast_as_in_python(
    compile_program: Compile, library_dir: Path, smollm2_path: Path
) -> None:
    """Several rounds of both, taking turns, and the best of each: a busy machine slows down either."""
    config = {"max_tokens": 12, "temperature": 0}
    program = compile_program("sessions.c", library_dir)
    ratios = []
    for _ in range(3):
        lines = run(program, smollm2_path, json.dumps(config), "8", "16", "32", timeout=300).splitlines()
        c_seconds = float(lines[-1].split()[1])
        ratios.append(_python_seconds(smollm2_path, config, n_threads=8, n_sessions=16, n_calls=32) / c_seconds)
        if ratios[-1] >= 0.95:
            break
    assert max(ratios) >= 0.95


def _python_seconds(model: Path, config: dict[str, int], *, n_threads: int, n_sessions: int, n_calls: int) -> float:
    with Backend() as backend, backend.load_by_name_with_config(model, config) as graph:
        contexts = [graph.init_execution_context() for _ in range(n_sessions)]

        def serve(first: int) -> None:
            for call in range(n_calls):
                session = call % n_sessions
                if session % n_threads == first:
                    contexts[session].run_inference(f"Session {session}, turn {call // n_sessions}: tell me something.")

        threads = [threading.Thread(target=serve, args=(n,)) for n in range(n_threads)]
        start = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.monotonic() - start
