"""``wasi-nn run``: what the guest gets, what comes out, how it exits.

As a process where the process is the point, else inside the test's own: starting Python and its imports takes a hundred
times as long as running such a guest.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from tests.cli.conftest import EXAMPLES, Command, command_line
from wasi_nn_backend.cli import main
from wasi_nn_backend.cli import run as command
from wasi_nn_backend.host.pacing import Pacer

GUESTS = Path(__file__).parent / "guests"
WORLD = GUESTS / "world.wat"
WASMEDGE = GUESTS / "wasmedge.wat"
CONTEXTS = GUESTS / "contexts.wat"
METADATA_KEYS = ["input_tokens", "output_tokens", "llama_build_number", "llama_commit"]

#: A random model ends whenever it likes; these tests count tokens.
ENDLESS = '{"temp": 0, "ignore-eos": true}'


def n_answer_tokens(done: subprocess.CompletedProcess[str]) -> int:
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout.splitlines()[-1])["output_tokens"])


def test_everything_behind_the_module_belongs_to_the_guest(wasi_nn_here: Command) -> None:
    done = wasi_nn_here("run", WORLD, "--help", "--nn-graph", "a=b", "--", "-x")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "world.wat\0--help\0--nn-graph\0a=b\0--\0-x\0"


def test_environment_and_directories(wasi_nn_here: Command, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for directory in ("data::/in", "/in:data"):
        done = wasi_nn_here("run", "--env", "A=1", "--env", "B=x=y", "--dir", directory, WORLD)
        assert done.stdout == "world.wat\0A=1\0B=x=y\0/in"


def test_a_directory_to_read_only(wasi_nn_here: Command, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "file"

    def open_file(directory: str, flags: int, rights: int) -> int:
        done = wasi_nn_here("run", "--dir", directory, "--invoke", "open", WORLD, flags, rights)
        assert (done.returncode, done.stderr) == (0, "")
        return int(done.stdout)

    assert open_file("/in:data:readonly", 1, 64) > 0
    assert not file.exists()
    assert open_file("/in:data", 1, 64) == 0
    assert file.exists()
    assert open_file("/in:data:readonly", 0, 2) == 0
    assert open_file("/in:data:readonly", 0, 64) > 0


@pytest.mark.parametrize("status", [0, 7, 126, 255])
def test_the_exit_status_is_the_guests(wasi_nn_here: Command, status: int) -> None:
    done = wasi_nn_here("run", "--invoke", "exit", WORLD, status)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


def test_a_trap_says_why(wasi_nn: Command) -> None:
    done = wasi_nn("run", "--invoke", "trap", WORLD)
    assert (done.returncode, done.stdout) == (134, "")
    assert done.stderr.startswith("error: the guest trapped: wasm trap: wasm `unreachable` instruction executed")
    assert done.stderr.count("\n") == 1


def test_invoke_prints_what_the_export_returns(wasi_nn_here: Command) -> None:
    done = wasi_nn_here("run", "--invoke", "grow", WORLD, 3)
    assert (done.returncode, done.stdout) == (0, "2\n")


def test_invoke_copies_texts_in_and_prints_the_text_that_comes_back(
    wasi_nn_here: Command, tiny_model_path: Path
) -> None:
    """The C example that is built as HyperBEAM's modules are."""
    handle = ("run", "--nn-graph", f"default={tiny_model_path}", "--invoke", "handle")
    texts = (EXAMPLES / "hyperbeam.wasm", "Hello?", ENDLESS[:-1] + ', "n-predict": 9}')
    done = wasi_nn_here(*handle, *texts)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.strip()) >= 9
    address = wasi_nn_here(*handle, "--returns", "number", *texts)
    assert address.returncode == 0
    assert int(address.stdout) > 0


def test_invoke_that_returns_null_says_which_call_failed(wasi_nn_here: Command) -> None:
    done = wasi_nn_here("run", "--invoke", "handle", EXAMPLES / "hyperbeam.wasm", "Hello?", "{}")
    assert (done.returncode, done.stdout) == (1, "")
    assert "returned NULL" in done.stderr
    assert "load_by_name_with_config: not_found (8)" in done.stderr


def test_every_dialect_can_be_asked_for_and_lacks_what_others_have(wasi_nn_here: Command) -> None:
    assert wasi_nn_here("run", "--dialect", "wamr", WORLD).returncode == 0
    wrong = wasi_nn_here("run", "--dialect", "witx", EXAMPLES / "wasmedge_stream.wasm", "default", "x")
    assert wrong.returncode == 1
    assert "compute_single: the witx dialect has no such function (wasmedge: yes)" in wrong.stderr
    unknown = wasi_nn_here("run", "--dialect", "wamrr", WORLD)
    assert unknown.returncode == 2
    assert "witx, wasmedge, wamr, hyperbeam, wamr-legacy" in " ".join(unknown.stderr.replace("│", " ").split())


def test_limits(wasi_nn_here: Command) -> None:
    assert wasi_nn_here("run", "--invoke", "grow", "--max-memory", 1, WORLD, 100).stdout == "-1\n"
    out_of_fuel = wasi_nn_here("run", "--fuel", 1000, "--invoke", "spin", WORLD)
    assert out_of_fuel.returncode == 134
    assert "raise --fuel" in out_of_fuel.stderr
    too_large = wasi_nn_here("run", "--max-memory", 1, EXAMPLES / "ask.wasm")
    assert too_large.returncode == 134
    assert "raise --max-memory" in too_large.stderr
    late = wasi_nn_here("run", "--timeout", 0.2, "--invoke", "spin", WORLD)
    assert late.returncode == 124
    assert "0.2 seconds" in late.stderr


def test_ctrl_c_stops_a_guest_that_spins() -> None:
    with subprocess.Popen(
        command_line("run", "--invoke", "spin", WORLD), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (130, "", "")


def test_ctrl_c_at_a_guest_that_waits_for_its_input(tmp_path: Path) -> None:
    """Nothing wakes it: the terminal says so, and a second Ctrl-C does not wait."""
    module = tmp_path / "read.wat"
    module.write_text("""(module
      (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
      (memory (export "memory") 1)
      (data (i32.const 0) "\\10\\00\\00\\00\\06\\00\\00\\00")
      (data (i32.const 16) "ready\\n")
      (func (export "_start")
        (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))
        (drop (call $read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8)))))""")
    terminal, terminal_end = os.openpty()
    with subprocess.Popen(
        command_line("run", module), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=terminal_end
    ) as process:
        os.close(terminal_end)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        shown = b""
        while b"Ctrl-C ends it at once" not in shown:
            shown += os.read(terminal, 4096)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    os.close(terminal)


@pytest.mark.parametrize(("now_s", "n_lines"), [([0.0, 0.4], 0), ([7.0, 7.6, 9.0], 1)])
def test_a_guest_that_does_not_end_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], now_s: list[float], n_lines: int
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    waiting = command._Waiting(iter(now_s).__next__)
    for _ in now_s:
        waiting.note()
    assert capsys.readouterr().err.count("\n") == n_lines


def test_a_guest_that_must_write_to_a_closed_stdout_ends_quietly(closed_pipe: int) -> None:
    done = subprocess.run(
        command_line("run", "--invoke", "must_write", WORLD),
        stdout=closed_pipe,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (141, b"")


def test_what_cannot_be_started(wasi_nn_here: Command, tmp_path: Path) -> None:
    (tmp_path / "text.wasm").write_text("not a module")
    (tmp_path / "alien.wat").write_text('(module (import "alien" "call" (func)) (func (export "_start")))')
    (tmp_path / "model.gguf").write_bytes(b"GGUF\3\0\0\0")
    for module, complaint in (
        ("nowhere.wasm", "No such file"),
        ("text.wasm", "neither"),
        ("alien.wat", "alien.call"),
        ("model.gguf", "--nn-graph NAME=FILE"),
    ):
        done = wasi_nn_here("run", module)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert complaint in done.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--nn-graph", "smollm2"], "--nn-graph"),
        (["--nn-graph", "d=m.gguf,temperature=warm"], "--nn-graph d: temperature"),
        (["--nn-preload", "d:ggml"], "--nn-preload"),
        (["--nn-config", "{"], "--nn-config"),
        (["--nn-config", "nowhere.json"], "--nn-config"),
        (["--nn-config", __file__], "test_run.py"),
        (["--dir", "nowhere"], "--dir"),
        (["--env", "A"], "--env"),
        (["--dialect", "klingon"], "--dialect"),
        (["--timeout", "soon"], "--timeout"),
        (["--fuel", "0"], "--fuel"),
    ],
)
def test_usage_errors_name_the_option(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *arguments, str(WORLD)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    first, second = captured.err.splitlines()
    assert first.startswith("error: ")
    assert complaint in first
    assert second == "Try 'wasi-nn run --help'."


# --- guests that use a model ---


def test_a_wasmedge_command_line(wasi_nn_here: Command, tiny_model_path: Path) -> None:
    """A module built for WasmEdge: dims = [1], metadata at output 1."""
    done = wasi_nn_here(
        "run", "--nn-preload", f"default:GGML:AUTO:{tiny_model_path}", WASMEDGE, "default", "prompt", '{"n-predict": 4}'
    )
    assert (done.returncode, done.stderr) == (0, "")
    metadata = json.loads(done.stdout.splitlines()[-1])
    assert list(metadata) == METADATA_KEYS
    assert metadata["input_tokens"] > 0


@pytest.mark.real
def test_a_wasmedge_command_line_on_smollm2(wasi_nn: Command, smollm2_path: Path) -> None:
    prompt = "<|im_start|>user\nName the capital city of France.<|im_end|>\n<|im_start|>assistant\n"
    done = wasi_nn(
        "run", "--dir", ".:.", "--nn-preload", f"default:GGML:AUTO:{smollm2_path}", WASMEDGE, "default", prompt,
        '{"temp": 0, "n-predict": 40, "ctx-size": 512, "n-gpu-layers": 0}',
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    *answer, metadata = done.stdout.splitlines()
    assert "Paris" in "\n".join(answer)
    assert list(json.loads(metadata)) == METADATA_KEYS


def test_settings_of_the_command_line_lie_under_the_guests(wasi_nn_here: Command, tiny_model_path: Path) -> None:
    config = ["--nn-config", '{"max_tokens": 3}']
    of_all = wasi_nn_here("run", *config, "--nn-graph", f"d={tiny_model_path}", WASMEDGE, "d", "x", ENDLESS)
    assert n_answer_tokens(of_all) == 3
    graph = ["--nn-graph", f"d={tiny_model_path},max_tokens=2"]
    of_the_graph = wasi_nn_here("run", *config, *graph, WASMEDGE, "d", "x", ENDLESS)
    assert n_answer_tokens(of_the_graph) == 2
    of_the_guest = wasi_nn_here("run", *config, *graph, WASMEDGE, "d", "x", '{"n-predict": 1, "ignore-eos": true}')
    assert n_answer_tokens(of_the_guest) == 1


def test_a_limit_of_the_command_line_holds(wasi_nn_here: Command, tiny_model_path: Path) -> None:
    arguments = ["--nn-graph", f"d={tiny_model_path},max_tokens=2", WASMEDGE, "d", "a prompt", "{}"]
    assert wasi_nn_here("run", *arguments).returncode == 0
    done = wasi_nn_here("run", "--limit", "max_prompt_bytes=3", *arguments)
    assert done.returncode == 7
    assert "8 bytes are more than the 3 that this host takes" in done.stderr


@pytest.mark.parametrize("runs", [0, 1])
def test_a_lone_guest_may_have_as_many_contexts_and_runs_as_it_likes(
    wasi_nn_here: Command, tiny_model_path: Path, runs: int
) -> None:
    """Nothing of WasmEdge's limits them, and guests that stop reading at a word leave their runs open."""
    graph = ["--nn-graph", f"default={tiny_model_path},max_tokens=2,n_ctx=128"]
    done = wasi_nn_here("run", *graph, "--invoke", "open", CONTEXTS, 120, runs)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
    few = wasi_nn_here(
        "run", *graph, "--limit", f"max_{'open_runs' if runs else 'contexts'}=3", "--invoke", "open", CONTEXTS, 4, runs
    )
    assert few.stdout == "4\n"


@pytest.mark.parametrize("command", ["run", "map"])
def test_buffers_of_length_zero_are_an_option(wasi_nn_here: Command, tiny_model_path: Path, command: str) -> None:
    graph = ["--nn-graph", f"default={tiny_model_path},n_ctx=128"]

    def status(*options: str) -> int:
        done = wasi_nn_here(command, *graph, *options, CONTEXTS, stdin='{"args": []}\n')
        assert ("need --unsized-output-bytes 245888" in done.stderr) == (not options)
        return done.returncode if command == "run" else int(json.loads(done.stdout)["exit_status"])

    assert status("--unsized-output-bytes", "245888") == 0
    assert status() == 7


def test_nobody_waits_for_a_lone_guest_to_be_paced(
    wasi_nn_here: Command, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = count()
    pauses: list[float] = []

    def now_s() -> float:
        return 0.02 * next(ticks)

    pacer = partial(Pacer, clock=now_s, cpu_clock=now_s, sleep=pauses.append)
    monkeypatch.setattr("wasi_nn_backend.host.state.Pacer", pacer)
    graph = ["--nn-graph", f"default={tiny_model_path},max_tokens=2,n_ctx=128"]
    assert wasi_nn_here("run", *graph, "--invoke", "open", CONTEXTS, 10, 0).stdout == "0\n"
    assert pauses == []


def test_a_name_that_nobody_registered_is_not_found(wasi_nn_here: Command) -> None:
    done = wasi_nn_here("run", WASMEDGE, "default", "x", "{}")
    assert (done.returncode, done.stdout) == (8, "")
    assert "last WASI-NN error: load_by_name_with_config: not_found (8)" in done.stderr


@pytest.mark.parametrize(
    "option", [["--nn-preload", "default:GGML:AUTO:gone.gguf"], ["--nn-graph", "default=gone.gguf"]]
)
def test_a_name_without_its_file_is_model_not_found(wasi_nn_here: Command, option: list[str]) -> None:
    done = wasi_nn_here("run", *option, WASMEDGE, "default", "x", "{}")
    assert (done.returncode, done.stdout) == (103, "")
    assert "warn: " in done.stderr
    assert "gone.gguf" in done.stderr


def test_a_model_that_cannot_be_looked_at_is_a_warning(wasi_nn_here: Command, tmp_path: Path) -> None:
    """The guest may never load it: it runs, whatever the system says about the path."""
    (tmp_path / "file").touch()
    done = wasi_nn_here("run", "--nn-graph", "d=file/model.gguf", WORLD)
    assert (done.returncode, done.stdout) == (0, "world.wat\0")
    assert done.stderr == "warn: --nn-graph d: file/model.gguf: Not a directory; loading it will fail\n"


def test_the_first_preload_of_a_name_wins(wasi_nn_here: Command, tiny_model_path: Path) -> None:
    first, second = f"d:ggml:cpu:{tiny_model_path}", "d:ggml:cpu:gone.gguf"
    assert wasi_nn_here("run", "--nn-preload", first, "--nn-preload", second, WASMEDGE, "d", "x", "{}").returncode == 0
    assert (
        wasi_nn_here("run", "--nn-preload", second, "--nn-preload", first, WASMEDGE, "d", "x", "{}").returncode == 103
    )


def test_an_unserved_encoding_skips_the_entry(wasi_nn_here: Command, tiny_model_path: Path) -> None:
    done = wasi_nn_here("run", "--nn-preload", f"d:whisper:auto:{tiny_model_path}", WASMEDGE, "d", "x", "{}")
    assert done.returncode == 8
    assert "error: --nn-preload d:whisper:auto" in done.stderr


def test_models_from_the_guests_memory_need_permission(wasi_nn_here: Command, tmp_path: Path) -> None:
    """Refused as unsupported (6); with permission the bytes are looked at, and are no model (1)."""
    (tmp_path / "load.wat").write_text(
        """
        (module
          (import "wasi_ephemeral_nn" "load" (func $load (param i32 i32 i32 i32 i32) (result i32)))
          (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
          (memory (export "memory") 1)
          (data (i32.const 0) "\\10\\00\\00\\00\\04\\00\\00\\00")
          (data (i32.const 16) "junk")
          (func (export "_start")
            (call $proc_exit
              (call $load (i32.const 0) (i32.const 1) (i32.const 6) (i32.const 0) (i32.const 8)))))
        """
    )
    assert wasi_nn_here("run", "load.wat").returncode == 6
    assert wasi_nn_here("run", "--allow-load-bytes", "load.wat").returncode == 1


def test_the_dialect_can_be_prescribed(wasi_nn_here: Command, tiny_model_path: Path) -> None:
    arguments = ["--nn-graph", f"d={tiny_model_path}", WASMEDGE, "d", "x", '{"n-predict": 1}']
    assert wasi_nn_here("run", "--dialect", "WasmEdge", *arguments).returncode == 0
    refused = wasi_nn_here("run", "--dialect", "witx", *arguments)
    assert refused.returncode == 1
    assert "load_by_name_with_config" in refused.stderr


def test_the_log_shows_llama_cpp_on_stderr_only(wasi_nn_here: Command, tiny_model_path: Path) -> None:
    arguments = ["run", "--nn-graph", f"d={tiny_model_path}", WASMEDGE, "d", "x", '{"temp": 0, "n-predict": 4}']
    quiet, loud = wasi_nn_here(*arguments), wasi_nn_here("--log-level", "debug", *arguments)
    assert quiet.stderr == ""
    assert "llama" in loud.stderr
    assert loud.stdout == quiet.stdout


def test_the_examples_run(wasi_nn_here: Command, tiny_model_path: Path) -> None:
    for module in ("ask.wasm", "wasmedge_stream.wasm"):
        done = wasi_nn_here(
            "run", "--nn-graph", f"default={tiny_model_path},max_tokens=4", EXAMPLES / module, "default", "x"
        )
        assert done.returncode == 0, done.stderr


def test_loading_shows_on_a_terminal(tiny_model_path: Path) -> None:
    terminal, terminal_end = os.openpty()
    arguments = command_line("run", "--nn-graph", f"d={tiny_model_path}", WASMEDGE, "d", "x", '{"n-predict": 1}')
    done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=terminal_end, timeout=60, check=False)
    os.close(terminal_end)
    shown = os.read(terminal, 65536)
    os.close(terminal)
    assert done.returncode == 0
    assert b"Loading d" in shown
    assert b"Loading" not in done.stdout
