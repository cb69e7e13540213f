"""``wasi-nn run`` with components."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Command

ASK = Path(__file__).parents[2] / "examples" / "component" / "ask.wat"
MAKE_DIRECTORY = Path(__file__).parent / "guests" / "make_directory.wat"
#: WASI's error not-permitted, as that component returns it.
NOT_PERMITTED = 131


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


def test_a_directory_to_read_only_is_that_for_components_too(wasi_nn_here: Command, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for directory, expected in (("/in:data:readonly", NOT_PERMITTED), ("/in:data", 0)):
        ran = wasi_nn_here("run", "--dir", directory, "--invoke", "make", MAKE_DIRECTORY)
        assert (ran.stdout, ran.stderr) == (f"{expected}\n", "")
        assert (tmp_path / "data" / "made").exists() == (expected == 0)
