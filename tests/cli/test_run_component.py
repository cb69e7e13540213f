"""``wasi-nn run`` with components."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Command

ASK = Path(__file__).parents[2] / "examples" / "component" / "ask.wat"


def test_a_library_prints_what_its_function_returns(wasi_nn_here: Command, tiny_model_path: Path) -> None:
    graph = f"default={tiny_model_path}"
    ran = wasi_nn_here("run", "--nn-graph", graph, "--invoke", "ask", ASK, "default", "hello?")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert len(ran.stdout) > 1


def test_a_functions_error_is_the_commands(wasi_nn_here: Command, tiny_model_path: Path) -> None:
    ran = wasi_nn_here("run", "--nn-graph", f"default={tiny_model_path}", "--invoke", "ask", ASK, "nobody", "hello?")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith('error: ask returned an error: no graph is registered as "nobody"')
    assert "last WASI-NN error: load-by-name: not_found (6)" in ran.stderr


def test_a_library_without_invoke_is_told_what_there_is(wasi_nn_here: Command) -> None:
    ran = wasi_nn_here("run", ASK)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "invoke one of ask" in ran.stderr


def test_a_component_has_no_dialect(wasi_nn_here: Command) -> None:
    ran = wasi_nn_here("run", "--dialect", "witx", "--invoke", "ask", ASK, "default", "x")
    assert (ran.returncode, "leave the dialect out" in ran.stderr) == (1, True)
