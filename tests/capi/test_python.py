"""The library's Python: in a host that runs one already, at the end of the process, and when it is broken."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.capi.conftest import PROGRAMS, run
from wasi_nn_backend import Backend

Compile = Callable[..., Path]
HOST = PROGRAMS / "host.py"
BACKEND, WAMR = "libwasi_nn_backend.so", "libwasi_nn_llamacpp.so"
#: The interpreter without its virtual environment, which knows nothing of this package.
BARE = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture(scope="module")
def expected(tiny_model_path: Path) -> dict[str, str]:
    config = {"max_tokens": 8, "temperature": 0, "n_ctx": 256}
    with Backend() as backend, backend.load_by_name_with_config(tiny_model_path, config) as graph:
        texts = {}
        for library, mode in ((BACKEND, "chat"), (WAMR, "raw")):
            with graph.init_execution_context({"prompt_mode": mode}) as context:
                texts[library] = context.run_inference("hello").encode().hex()
    return texts


@pytest.mark.parametrize(
    ("python", "kind"),
    [
        pytest.param(Path(sys.executable), "CDLL", id="own-CDLL", marks=pytest.mark.slow),
        pytest.param(Path(sys.executable), "PyDLL", id="own-PyDLL", marks=pytest.mark.slow),
        pytest.param(BARE, "CDLL", id="bare-CDLL"),
        pytest.param(BARE, "PyDLL", id="bare-PyDLL", marks=pytest.mark.slow),
    ],
)
def test_a_python_program_gets_the_same_texts(
    kind: str, python: Path, library_dir: Path, tiny_model_path: Path, expected: dict[str, str]
) -> None:
    out = run(python, HOST, kind, tiny_model_path, "serve", library_dir / BACKEND)
    assert out.split() == [expected[BACKEND]]


def test_both_libraries_share_a_process(library_dir: Path, tiny_model_path: Path, expected: dict[str, str]) -> None:
    libraries = [library_dir / BACKEND, library_dir / WAMR]
    out = run(
        sys.executable, HOST, "CDLL", tiny_model_path, "together", *libraries, env={"WASI_NN_ALLOW_ANY_PATH": "1"}
    )
    assert sorted(out.split()) == sorted([*expected.values()] * 2)


@pytest.mark.slow
def test_a_python_program_may_end_with_everything_open(
    library_dir: Path, tiny_model_path: Path, expected: dict[str, str]
) -> None:
    out = run(sys.executable, HOST, "CDLL", tiny_model_path, "leave-open", library_dir / BACKEND)
    assert out.split() == [expected[BACKEND]]


def test_a_c_program_may_end_in_the_middle_of_a_compute(
    compile_program: Compile, library_dir: Path, tiny_model_path: Path
) -> None:
    assert run(compile_program("leave_open.c", library_dir), tiny_model_path) == "done\n"


def test_calls_in_a_fork_are_refused(library_dir: Path, tiny_model_path: Path) -> None:
    out = run(sys.executable, HOST, "CDLL", tiny_model_path, "fork", library_dir / BACKEND)
    assert out == "44\n"  # runtime_error of both calls


@pytest.mark.parametrize("damage", ["missing", "without the package", "without a library"])
def test_a_broken_environment_is_an_error_and_a_line(
    damage: str, compile_program: Compile, library_dir: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    (home / "bin").mkdir(parents=True)
    if damage == "without the package":
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    elif damage == "without a library":
        (home / "bin" / "python3").symlink_to(BARE)
        (home / "pyvenv.cfg").write_text("home = /nowhere/bin\n")
    program = compile_program("leave_open.c", library_dir)
    env = {**os.environ, "WASI_NN_PYTHON_HOME": str(home)}
    done = subprocess.run([program, tiny_model_path], capture_output=True, text=True, check=False, env=env, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert "init_backend(&ctx) is 4" in done.stderr
    assert str(home) in done.stderr


@pytest.mark.slow
def test_the_environment_names_another_python(
    compile_program: Compile, library_dir: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    """An environment that finds the package through a .pth file, as an editable installation does."""
    home = tmp_path / "home"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    site_packages = next((home / "lib").glob("python3.*")) / "site-packages"
    import wasi_nn_backend  # noqa: PLC0415

    places = [Path(wasi_nn_backend.__file__).parents[1], *filter(lambda p: p.endswith("site-packages"), sys.path)]
    (site_packages / "other.pth").write_text("".join(f"{place}\n" for place in places))
    assert run(compile_program("leave_open.c", library_dir), tiny_model_path, env={"WASI_NN_PYTHON_HOME": str(home)})
