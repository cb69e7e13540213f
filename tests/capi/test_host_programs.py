"""C programs against the libraries: what goes wrong in them is an error code, and their process stays as it was."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

import bench.capi
from bench.capi import CClient, Work, prompt, run_in_python
from tests.capi.conftest import PROGRAMS, SANITIZERS, STRICT, need, run
from wasi_nn_backend import Backend
from wasi_nn_backend.capi.build import INCLUDE_DIR

Compile = Callable[..., Path]
SHIM = INCLUDE_DIR.parent / "shim"
BENCH_CLIENT = Path(bench.capi.__file__).with_suffix(".c")
WAMR = {"library": "wasi_nn_llamacpp"}


@pytest.mark.parametrize("flavour", ["backend", "wamr"])
@pytest.mark.parametrize(
    "is_sanitized", [pytest.param(False, id="plain"), pytest.param(True, id="sanitized", marks=pytest.mark.slow)]
)
def test_every_wrong_call_is_an_error_code(
    flavour: str,
    is_sanitized: bool,
    compile_program: Compile,
    tiny_model_path: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    folder = request.getfixturevalue("sanitized_dir" if is_sanitized else "library_dir")
    flags = SANITIZERS if is_sanitized else ()
    if flavour == "wamr":
        program = compile_program("matrix.c", folder, "-DWASI_NN_WAMR", *flags, **WAMR)
    else:
        program = compile_program("matrix.c", folder, *flags)
    env = {"WASI_NN_MODEL_DIR": str(tiny_model_path.parent), "ASAN_OPTIONS": "detect_leaks=0"}
    assert run(program, tiny_model_path.name, tmp_path, env=env) == "done\n"


@pytest.mark.slow
def test_the_process_is_as_before_after_20_rounds(
    compile_program: Compile, library_dir: Path, tiny_model_path: Path
) -> None:
    program = compile_program("guest.c", library_dir, library="")
    # One line and nothing else: the library prints nothing on standard output.
    report = json.loads(run(program, library_dir / "libwasi_nn_backend.so", tiny_model_path))
    rounds = report["rounds"]
    assert len(rounds) == 20
    assert {(one["threads"], one["fds"]) for one in rounds} == {(report["before"]["threads"], report["before"]["fds"])}
    # It moves by 3 MiB and does not grow, also in 120 rounds: a model and its context, kept 18 times, would be more.
    assert rounds[-1]["resident_kib"] - rounds[1]["resident_kib"] < 6 * 1024


def test_the_order_of_calls_of_wamr(compile_program: Compile, library_dir: Path, tiny_model_path: Path) -> None:
    program = compile_program("wamr.c", library_dir, library="")
    env = {"WASI_NN_MODELS": f"default={tiny_model_path}", "LD_LIBRARY_PATH": str(library_dir)}
    texts = run(program, "libwasi_nn_llamacpp.so", "default", env=env)
    config = {"max_tokens": 24, "temperature": 0, "n_ctx": 256, "prompt_mode": "raw", "context_shifting": False}
    with Backend() as backend, backend.load_by_name_with_config(tiny_model_path, config) as graph:
        expected = graph.init_execution_context().run_inference("Once upon a time")
    assert texts == f"{expected}\n" * 8


@pytest.mark.slow
def test_whatever_threads_do_at_random_is_answered_with_a_code(
    compile_program: Compile, sanitized_dir: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    """8 threads with 150 calls each. By hand, with more: ``stress MODEL FOLDER SEED 8 10000``."""
    program = compile_program("stress.c", sanitized_dir, *SANITIZERS)
    command = (program, tiny_model_path, tmp_path, "1", "8", "150")
    codes = {int(line.split(":")[0]) for line in run(*command, env={"ASAN_OPTIONS": "detect_leaks=0"}).splitlines()}
    assert {0, 1} < codes


@pytest.mark.slow
def test_threads_and_sessions_get_the_texts_of_the_python_api(
    compile_program: Compile, library_dir: Path, tiny_f32_model_path: Path
) -> None:
    """The model's weights and cache are in full precision, so that no rounding changes a text."""
    config = {"max_tokens": 4, "temperature": 0, "cache_type_k": "f32", "cache_type_v": "f32", "max_concurrent": 4}
    work = Work(n_threads=8, n_sessions=32, n_calls=200, config=config)
    client = CClient(compile_program(BENCH_CLIENT, library_dir), tiny_f32_model_path, work)
    found = client.run("one").texts
    client.close()
    with Backend() as backend, backend.load_by_name_with_config(tiny_f32_model_path, config) as graph:
        expected = run_in_python(graph, work, "two").texts
        context = graph.init_execution_context()
        alone = [context.run_inference(prompt(3, turn)) for turn in range(6)]
    assert found == expected
    assert alone == [expected[3, turn] for turn in range(6)]


def test_a_guests_paths_are_refused_and_the_log_says_why(
    compile_program: Compile, library_dir: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(tiny_model_path.read_bytes())
    (folder / "link.gguf").symlink_to(tiny_model_path)
    program = compile_program("paths.c", library_dir, "-DWASI_NN_WAMR", **WAMR)
    names = ["/etc/passwd", "../x.gguf", "link.gguf", "n" * 5000, "n" * 300, "missing.gguf", "model.gguf"]
    env = {**os.environ, "WASI_NN_MODEL_DIR": str(folder)}
    done = subprocess.run([program, *names], capture_output=True, text=True, check=False, env=env)
    assert (done.returncode, done.stdout.split()) == (0, ["6", "6", "6", "1", "1", "8", "0", "1"])
    rules = [line for line in done.stderr.splitlines() if "is refused: " in line]
    expected = ("absolute paths", '".." is', "symbolic link", "has 5000 bytes", "a part of more than 255", "has a NUL")
    for rule, words in zip(rules, expected, strict=True):
        assert rule.startswith("wasi-nn: WARNING: ")
        assert words in rule


def test_warnings_go_to_standard_error_until_a_configuration_says_where(
    compile_program: Compile, library_dir: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    """The log of a graph lasts until it is unloaded."""
    program, log = compile_program("keys.c", library_dir), tmp_path / "log"
    logs: tuple[dict[str, str], ...] = ({}, {"level": "info"}, {"file": str(log)}, {"level": "error"}, {})
    configs = [{"max_tokens": 1, "logging": logging, f"nonsense_{n}": 1} for n, logging in enumerate(logs)]
    done = subprocess.run(
        [program, tiny_model_path, "hello"],
        input="".join(f"{json.dumps(config)}\n" for config in configs),
        capture_output=True,
        text=True,
        check=True,
        timeout=110,
        env={**os.environ, "WASI_NN_ATTENTION_PROBE": "0"},
    )
    own: list[str] = []
    configured: list[str] = []
    for line in done.stderr.splitlines():
        (own if line.startswith("wasi-nn: ") else configured).append(line)
    assert ["nonsense_0" in line or "nonsense_4" in line for line in own] == [True, True]
    assert [line for line in configured if " info: " in line]
    assert ["nonsense_1" in line for line in configured if " warn: " in line] == [True]
    assert log.read_text().count("nonsense_2") == 1


def compile_alone(tmp_path: Path, *flags: str, program: str = "shim_alone.c") -> Path:
    need("gcc")
    target = tmp_path / "alone"
    sources = [PROGRAMS / program, PROGRAMS / "stand_in.c", SHIM / "calls.c", SHIM / "exports.c"]
    includes = [f"-I{path}" for path in (PROGRAMS, INCLUDE_DIR, SHIM)]
    version = '-DWASI_NN_VERSION="0"'
    run("gcc", "-std=gnu11", "-O1", *STRICT, *flags, version, *includes, *sources, "-pthread", "-o", target)
    return target


def test_a_cancelled_thread_leaves_no_call_and_a_forked_process_ends(tmp_path: Path) -> None:
    program = compile_alone(tmp_path, "-Wl,--wrap=pthread_cond_signal", program="interrupted.c")
    assert run(program) == "done\n"


@pytest.mark.slow
def test_valgrind_finds_nothing_in_the_shim(tmp_path: Path) -> None:
    valgrind = need("valgrind")
    program = compile_alone(tmp_path)
    assert run(valgrind, "-q", "--error-exitcode=9", "--leak-check=full", program) == "done\n"


@pytest.mark.slow
def test_the_thread_sanitizer_finds_nothing_in_the_shim(tmp_path: Path) -> None:
    assert run(compile_alone(tmp_path, "-fsanitize=thread")) == "done\n"


@pytest.mark.slow
def test_a_program_that_passes_no_size_is_served_where_the_environment_says_so(
    compile_program: Compile, library_dir: Path, tiny_model_path: Path
) -> None:
    program = compile_program("careless.c", library_dir)
    without = [int(word) for word in run(program, tiny_model_path).split()]
    assert without[0] == 6
    assert without[1] > 16
    sizes = [
        [int(word) for word in run(program, tiny_model_path, env={"WASI_NN_LEGACY_OUTPUT_BYTES": limit}).split()]
        for limit in ("8", "16", "8192")
    ]
    assert [code for code, _ in sizes] == [0, 0, 0]
    assert all(small < large for (_, small), (_, large) in pairwise(sizes))
    assert sizes[0][1] <= 8
    assert sizes[1][1] <= 16
    assert sizes[2][1] == without[1]


@pytest.mark.parametrize(
    "value", ["", *(pytest.param(value, marks=pytest.mark.slow) for value in ("many", "-1", "0", "99999999999"))]
)
def test_a_senseless_legacy_capacity_counts_as_none(
    value: str, compile_program: Compile, library_dir: Path, tiny_model_path: Path
) -> None:
    program = compile_program("careless.c", library_dir)
    assert run(program, tiny_model_path, env={"WASI_NN_LEGACY_OUTPUT_BYTES": value}).startswith("6 ")
