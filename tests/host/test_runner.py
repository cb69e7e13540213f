"""Whole runs: how guests end, what they get, where their output goes, and that all of them can be stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fakes.llama import FakeLlama
from tests.host.conftest import GREEDY, MODEL
from tests.host.guests import OUT, PAGE, U8, command_wat, iovec_data, print_wat, text_data
from tests.host.scripted import scripted
from wasi_nn_backend.backend import Backend
from wasi_nn_backend.errors import InvalidArgument, UnsupportedOperation
from wasi_nn_backend.host import GuestResult, GuestRunner, RunConfig, modules, run_module
from wasi_nn_backend.host.output import CapturedOutput, DescriptorWriter

ROOT = Path(__file__).parents[2]

#: Loads "default" at 100 into graph 0 with one context, 0.
NAME_AT, CONFIG_AT, PROMPT_AT, TENSOR_AT = 100, 120, 200, 300
STREAMING = b'{"stream-stdout": true}'
SETUP_DATA = (
    text_data(NAME_AT, MODEL)
    + text_data(CONFIG_AT, STREAMING)
    + text_data(PROMPT_AT, b"hello")
    + text_data(TENSOR_AT, b"".join(word.to_bytes(4, "little") for word in (NAME_AT, 1, U8, PROMPT_AT, len(b"hello"))))
)


def call_wat(name: str, *words: int) -> str:
    return f"(call ${name} {' '.join(f'(i32.const {word})' for word in words)})"


SETUP = "".join(
    f"(drop {call})"
    for call in (
        call_wat("load_by_name_with_config", NAME_AT, len(MODEL), CONFIG_AT, len(STREAMING), OUT),
        call_wat("init_execution_context", 0, OUT),
        call_wat("set_input", 0, 0, TENSOR_AT),
    )
)
COMPUTE = f"(drop {call_wat('compute', 0)})"
SPIN = "(loop $again (br $again))"
HELLO = iovec_data(400, 410, b"hello\n")


class ManualTimer:
    """A timer that fires when the test says so."""

    def __init__(self) -> None:
        self.delay_s: float | None = None
        self.is_cancelled = False
        self._action: Callable[[], None] = lambda: None

    def start(self, delay_s: float, action: Callable[[], None]) -> ManualTimer:
        self.delay_s, self._action = delay_s, action
        return self

    def cancel(self) -> None:
        self.is_cancelled = True

    def fire(self) -> None:
        self._action()


def run(module: bytes, **options: object) -> GuestResult:
    backend, _ = scripted()
    return run_module(RunConfig(module, use_cache=False, **options), backend)  # type: ignore[arg-type]


# --- endings ---


@pytest.mark.parametrize(
    ("status", "expected"), [(0, 0), (3, 3), (125, 125), (126, 126), (200, 200), (-1, 255), (256, 0)]
)
def test_the_exit_status_is_the_guests(status: int, expected: int) -> None:
    result = run(command_wat(f"(call $exit (i32.const {status}))"))
    assert (result.outcome, result.exit_status, result.reason) == ("exited", expected, None)


def test_returning_from_start_is_success() -> None:
    assert run(command_wat("")) == GuestResult("exited", 0)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("unreachable", "unreachable"),
        ("(drop (i32.load (i32.const -1)))", "out of bounds memory access"),
        ("(drop (i32.div_u (i32.const 1) (i32.const 0)))", "divide by zero"),
    ],
)
def test_a_trap_is_134_with_its_reason(body: str, reason: str) -> None:
    result = run(command_wat(body))
    assert (result.outcome, result.exit_status) == ("trapped", 134)
    assert result.reason is not None
    assert reason in result.reason
    assert "\n" not in result.reason


def test_endless_recursion_is_a_trap() -> None:
    result = run(b'(module (memory (export "memory") 1) (func $f (export "_start") (call $f)))')
    assert result.exit_status == 134
    assert "stack" in str(result.reason)


def test_a_trap_comes_with_the_last_wasi_nn_error(fake_backend: Backend) -> None:
    body = f"(drop {call_wat('load_by_name', NAME_AT, 3, OUT)}) unreachable"
    module = command_wat(body, data=text_data(NAME_AT, MODEL))
    result = run_module(RunConfig(module, use_cache=False), fake_backend)
    assert result.exit_status == 134
    assert result.last_error is not None
    assert result.last_error.errno == 8
    assert str(result.last_error).startswith("load_by_name: not_found (8): ")


def test_a_defect_of_the_host_is_reported_after_the_guest_has_ended() -> None:
    def fail() -> None:
        raise ZeroDivisionError("a defect")

    backend, script = scripted({"compute": fail})
    result = run_module(RunConfig(command_wat(SETUP + COMPUTE, data=SETUP_DATA), use_cache=False), backend)
    assert (result.outcome, result.exit_status) == ("exited", 0)
    assert isinstance(result.fault, ZeroDivisionError)
    assert script.n_open == 0


@pytest.mark.parametrize("end", ["", "unreachable", "(call $exit (i32.const 9))"])
def test_everything_is_closed_however_the_guest_ends(end: str) -> None:
    backend, script = scripted()
    run_module(RunConfig(command_wat(SETUP + end, data=SETUP_DATA), use_cache=False), backend)
    assert script.calls[-2:] == ["close", "unload"]
    assert script.n_open == 0


def test_fuel_is_spent() -> None:
    result = run(command_wat(SPIN), fuel=10_000)
    assert result.exit_status == 134
    assert "fuel" in str(result.reason)
    assert run(command_wat(""), fuel=10_000).exit_status == 0


def test_memory_is_limited() -> None:
    grow = command_wat("(call $exit (i32.add (memory.grow (i32.const 1)) (i32.const 1)))")
    assert run(grow).exit_status == 3
    assert run(grow, max_memory_bytes=2 * PAGE).exit_status == 0
    too_much = run(grow, max_memory_bytes=PAGE)
    assert too_much.exit_status == 134
    assert "memory" in str(too_much.reason)


# --- modules that cannot be started ---


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (b"neither", InvalidArgument, "neither a WebAssembly binary nor WAT"),
        (b"\xff\xfe", InvalidArgument, "neither a WebAssembly binary nor WAT text: check"),
        (b"", InvalidArgument, "does not compile|neither"),
        (b"\0asm", InvalidArgument, "version"),
        (b"\0asm\1\0\0\0garbage", InvalidArgument, "does not compile"),
        (b"\0asm\x0d\0\1\0", InvalidArgument, "the component is no command"),
        (b'(module (func (export "main")))', InvalidArgument, "exports no function '_start'.*main"),
        (b'(module (import "env" "f" (func)) (func (export "_start")))', UnsupportedOperation, r"env\.f"),
        (
            b'(module (import "wasi_nn" "unload" (func (param i32) (result i32))) (func (export "_start")))',
            UnsupportedOperation,
            r"wasi_nn\.unload",
        ),
        (
            b'(module (import "wasi_ephemeral_nn" "compute" (func (param i64) (result i32))) (func (export "_start")))',
            UnsupportedOperation,
            r"\(i64\) -> \(i32\), this host has \(i32\) -> \(i32\)",
        ),
        (
            b'(module (import "wasi_ephemeral_nn" "dream" (func)) (func (export "_start")))',
            UnsupportedOperation,
            "no such function",
        ),
    ],
)
def test_what_cannot_be_started_says_why(module: bytes, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(module, stdout=lambda data: None)


def test_files_are_read_in_both_formats(tmp_path: Path) -> None:
    backend, _ = scripted()
    with pytest.raises(InvalidArgument, match=r"cannot read the module .*nowhere\.wasm"):
        run_module(RunConfig(tmp_path / "nowhere.wasm"), backend)
    with pytest.raises(InvalidArgument, match="cannot read the module"):
        run_module(RunConfig(tmp_path), backend)
    text = tmp_path / "guest.wat"
    text.write_bytes(command_wat("(call $exit (i32.const 4))"))
    assert run_module(RunConfig(text, use_cache=False), backend).exit_status == 4
    assert run_module(RunConfig(str(text), use_cache=False), backend).exit_status == 4


def test_no_more_of_a_file_is_read_than_a_module_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "_N_BYTES_MAX", 100)
    whole, larger = tmp_path / "whole.wat", tmp_path / "larger.wat"
    whole.write_bytes(b"(module)".ljust(100))
    larger.write_bytes(b"(module)".ljust(101))
    assert modules.read_binary(whole)
    for path in (larger, Path("/dev/zero")):
        with pytest.raises(InvalidArgument, match="larger than"):
            modules.read_binary(path)


def test_a_model_is_told_from_a_module_before_it_is_read(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    with model.open("wb") as sparse:
        sparse.write(b"GGUF")
        sparse.truncate(1 << 40)
    with pytest.raises(InvalidArgument, match="is a model, not a module"):
        modules.read_binary(model)


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="cannot open the directory"):
        run(command_wat(""), dirs=[(tmp_path / "nowhere", "/")])


def test_a_runner_is_used_once() -> None:
    backend, _ = scripted()
    runner = GuestRunner(RunConfig(command_wat(""), use_cache=False), backend)
    runner.run()
    with pytest.raises(InvalidArgument, match="make one for each run"):
        runner.run()


def test_compiled_modules_are_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    backend, _ = scripted()
    config = RunConfig(command_wat("(call $exit (i32.const 4))"))
    assert [run_module(config, backend).exit_status for _ in range(2)] == [4, 4]
    assert any(path.is_file() for path in tmp_path.rglob("*"))


def test_a_cache_that_cannot_be_used_is_no_reason_not_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    backend, _ = scripted()
    assert run_module(RunConfig(command_wat("(call $exit (i32.const 4))")), backend).exit_status == 4


# --- what a guest gets ---


def wasi_text_wat(sizes: str, get: str) -> bytes:
    """Prints what args_get or environ_get put into memory."""
    return f"""(module
      (import "wasi_snapshot_preview1" "{sizes}" (func $sizes (param i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "{get}" (func $get (param i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
      (memory (export "memory") 1)
      (func (export "_start")
        (drop (call $sizes (i32.const 0) (i32.const 12)))
        (drop (call $get (i32.const 64) (i32.const 1024)))
        (i32.store (i32.const 8) (i32.const 1024))
        {print_wat(8)}))""".encode()


def test_arguments_and_environment_arrive(tmp_path: Path) -> None:
    captured = bytearray()
    arguments = wasi_text_wat("args_sizes_get", "args_get")
    run(arguments, args=["a", "b c"], program_name="prog", stdout=captured.extend)
    assert captured == b"prog\0a\0b c\0"
    captured.clear()
    path = tmp_path / "guest.wat"
    path.write_bytes(arguments)
    backend, _ = scripted()
    run_module(RunConfig(path, stdout=captured.extend, use_cache=False), backend)
    assert captured == b"guest.wat\0"
    captured.clear()
    run(wasi_text_wat("environ_sizes_get", "environ_get"), env={"A": "1", "B": "two"}, stdout=captured.extend)
    assert captured == b"A=1\0B=two\0"


def test_directories_are_opened_under_their_guest_names(tmp_path: Path) -> None:
    captured = bytearray()
    module = f"""(module
      (import "wasi_snapshot_preview1" "fd_prestat_dir_name" (func $name (param i32 i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
      (memory (export "memory") 1) {iovec_data(0, 100, b"?????")}
      (func (export "_start") (drop (call $name (i32.const 3) (i32.const 100) (i32.const 5))) {print_wat(0)}))"""
    run(module.encode(), dirs=[(tmp_path, "/data")], stdout=captured.extend)
    assert captured == b"/data"


INVOCABLE = b"""(module
  (global $n (mut i32) (i32.const 0))
  (func (export "_initialize") (global.set $n (i32.const 40)))
  (func (export "add") (param i32) (result i32) (i32.add (global.get $n) (local.get 0)))
  (func (export "mix") (param i64 f32 f64) (result f64 i64) (f64.add (local.get 2) (f64.promote_f32 (local.get 1)))
    (local.get 0))
  (func (export "reference") (param externref)))"""


def test_an_export_can_be_invoked_with_numbers() -> None:
    assert run(INVOCABLE, invoke="add", args=["2"]).returned == (42,)
    assert run(INVOCABLE, invoke="add", args=["0xffffffff"]).returned == (39,)
    assert run(INVOCABLE, invoke="mix", args=["-5", "0.5", "2"]).returned == (2.5, -5)
    assert run(INVOCABLE, invoke="_initialize").returned == ()


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("nothing", [], "exports no function 'nothing'.*add, mix"),
        ("add", [], "takes 1 arguments .i32., not 0"),
        ("add", ["x"], "'x' is no i32"),
        ("add", ["1.5"], "'1.5' is no i32"),
        ("add", ["0x100000000"], "does not fit"),
        ("mix", ["1", "x", "1"], "'x' is no f32"),
        ("reference", ["1"], "cannot be invoked from outside"),
    ],
)
def test_a_wrong_invocation_says_what_is_wrong(name: str, args: list[str], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        run(INVOCABLE, invoke=name, args=args)


# --- output ---

CONVERSATION = SETUP + "".join(print_wat(400) + COMPUTE for _ in range(5)) + print_wat(400)


def test_streamed_text_and_the_guests_own_output_are_captured_in_order(fake_backend: Backend) -> None:
    captured = bytearray()
    module = command_wat(CONVERSATION, data=SETUP_DATA + HELLO)
    result = run_module(RunConfig(module, stdout=captured.extend, use_cache=False), fake_backend)
    assert result.exit_status == 0
    parts = bytes(captured).split(b"hello\n")
    assert len(parts) == 7
    assert parts[0] == parts[6] == b""
    assert len(set(parts[1:6])) == 1
    assert len(parts[1]) >= 24


def test_inherited_output_is_the_same_text(fake_backend: Backend, tmp_path: Path) -> None:
    captured = bytearray()
    module = tmp_path / "guest.wat"
    module.write_bytes(command_wat(CONVERSATION, data=SETUP_DATA + HELLO))
    run_module(RunConfig(module, stdout=captured.extend, use_cache=False), fake_backend)
    (tmp_path / "fake.gguf").touch()
    program = f"""
from pathlib import Path
from tests.fakes.llama import FakeLlama
from wasi_nn_backend.backend import Backend
from wasi_nn_backend.host import RunConfig, run_module
with Backend({GREEDY!r}, llama=FakeLlama()) as backend:
    backend.register("default", Path({str(tmp_path / "fake.gguf")!r}))
    raise SystemExit(run_module(RunConfig({str(module)!r}, use_cache=False), backend).exit_status)
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=False, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert ended.stdout == bytes(captured)


def test_standard_error_is_captured_apart() -> None:
    out, err = bytearray(), bytearray()
    body = print_wat(400) + "(drop (call $fd_write (i32.const 2) (i32.const 420) (i32.const 1) (i32.const 0)))"
    data = HELLO + iovec_data(420, 430, b"wrong\n")
    run(command_wat(body, data=data), stdout=out.extend, stderr=err.extend)
    assert (bytes(out), bytes(err)) == (b"hello\n", b"wrong\n")


def test_a_failing_output_callback_is_a_fault_and_does_not_stop_the_guest() -> None:
    def fail(data: bytes) -> None:
        raise ValueError("no room")

    result = run(command_wat(print_wat(400) * 3 + "(call $exit (i32.const 5))", data=HELLO), stdout=fail)
    assert result.exit_status == 5
    assert isinstance(result.fault, ValueError)


def test_a_reader_that_has_gone_does_not_disturb_the_writer() -> None:
    read_end, write_end = os.pipe()
    write = DescriptorWriter(write_end)
    write(b"one")
    assert os.read(read_end, 10) == b"one"
    os.close(read_end)
    write(b"two")
    write(b"three")
    os.close(write_end)


def test_a_writer_waits_for_a_slow_reader_of_a_non_blocking_pipe() -> None:
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    data = bytes(range(256)) * 2048
    received = bytearray()

    def read() -> None:
        while chunk := os.read(read_end, 1000):
            received.extend(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    DescriptorWriter(write_end)(data)
    os.close(write_end)
    reader.join()
    os.close(read_end)
    assert bytes(received) == data


def test_a_capture_delivers_everything_before_it_is_closed() -> None:
    captured = bytearray()
    capture = CapturedOutput(captured.extend)
    for _ in range(100):
        capture.write(b"x" * 10_000)
    capture.close()
    assert len(captured) == 1_000_000


# --- stopping ---

SAY_AND_SPIN = command_wat(print_wat(400) + SPIN, data=HELLO)


def test_a_spinning_guest_is_stopped_by_its_timeout() -> None:
    timer = ManualTimer()
    backend, _ = scripted()
    config = RunConfig(SAY_AND_SPIN, timeout_s=7.5, stdout=lambda data: timer.fire(), use_cache=False)
    result = GuestRunner(config, backend, start_timer=timer.start).run()
    assert (result.outcome, result.exit_status, result.was_left_behind) == ("timeout", 124, False)
    assert "7.5 seconds" in str(result.reason)
    assert timer.delay_s == 7.5
    assert timer.is_cancelled


def test_the_timer_is_cancelled_when_the_guest_ends_by_itself() -> None:
    timer = ManualTimer()
    backend, _ = scripted()
    result = GuestRunner(
        RunConfig(command_wat(""), timeout_s=1, use_cache=False), backend, start_timer=timer.start
    ).run()
    assert (result.outcome, timer.is_cancelled) == ("exited", True)


@pytest.mark.parametrize("timeout_s", [0.5, 1e10, 1e300, float("inf")])
def test_a_timer_gets_no_more_than_it_can_wait_for(timeout_s: float) -> None:
    timer = ManualTimer()
    backend, _ = scripted()
    config = RunConfig(command_wat(""), timeout_s=timeout_s, use_cache=False)
    assert GuestRunner(config, backend, start_timer=timer.start).run().outcome == "exited"
    assert timer.delay_s == min(timeout_s, threading.TIMEOUT_MAX)


@pytest.mark.parametrize("timeout_s", [float("nan"), -1.0, float("-inf")])
def test_a_timeout_that_is_no_time_is_refused(timeout_s: float) -> None:
    with pytest.raises(InvalidArgument, match="timeout_s is"):
        run(command_wat(""), timeout_s=timeout_s)


def test_a_timeout_while_the_last_output_is_delivered_comes_too_late() -> None:
    timer = ManualTimer()
    unloaded = threading.Event()
    backend, _ = scripted({"unload": unloaded.set})

    def deliver(data: bytes) -> None:
        # Graphs are closed when the guest has ended, output is delivered to the last byte after that.
        unloaded.wait()
        timer.fire()

    module = command_wat(SETUP + print_wat(400) + "(call $exit (i32.const 5))", data=SETUP_DATA + HELLO)
    runner = GuestRunner(
        RunConfig(module, timeout_s=1, stdout=deliver, use_cache=False), backend, start_timer=timer.start
    )
    assert runner.run().exit_status == 5


def test_the_default_timer_ends_a_guest() -> None:
    result = run(command_wat(SPIN), timeout_s=0.05)
    assert (result.outcome, result.exit_status) == ("timeout", 124)


def test_ctrl_c_in_the_main_thread_stops_a_guest() -> None:
    def interrupt(data: bytes) -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    result = run(SAY_AND_SPIN, stdout=interrupt)
    assert (result.outcome, result.exit_status) == ("interrupt", 130)


def test_a_guest_that_waits_in_compute_is_stopped() -> None:
    entered = threading.Event()

    def block() -> str:
        entered.set()
        return "block"

    backend, script = scripted({"compute": block})
    # It ignores the error and calls again and again: the trap has to end it.
    module = command_wat(f"{SETUP} (loop $again {COMPUTE} (br $again))", data=SETUP_DATA)
    runner = GuestRunner(RunConfig(module, use_cache=False), backend)
    stopper = threading.Thread(target=lambda: (entered.wait(), runner.stop()))
    stopper.start()
    result = runner.run()
    stopper.join()
    assert (result.outcome, result.exit_status) == ("stop", 143)
    assert script.n_open == 0


def test_a_long_compute_of_the_real_backend_is_stopped_between_tokens(tmp_path: Path) -> None:
    (tmp_path / "fake.gguf").touch()
    n_decodes = 0
    reached, go_on = threading.Event(), threading.Event()

    def gate(batch: object) -> None:
        nonlocal n_decodes
        n_decodes += 1
        if n_decodes == 20:
            reached.set()
            go_on.wait()

    config = {"sampling": {"temperature": 0.0}, "stopping": {"max_tokens": 1500}}
    with Backend(config, llama=FakeLlama(before_decode=gate)) as backend:
        backend.register("default", tmp_path / "fake.gguf")
        module = command_wat(f"{SETUP} (loop $again {COMPUTE} (br $again))", data=SETUP_DATA)
        runner = GuestRunner(
            RunConfig(module, timeout_s=1, stdout=lambda data: None, use_cache=False),
            backend,
            start_timer=ManualTimer().start,
        )

        def stop() -> None:
            reached.wait()
            runner.stop("timeout")
            go_on.set()

        stopper = threading.Thread(target=stop)
        stopper.start()
        result = runner.run()
        stopper.join()
    assert (result.outcome, result.exit_status) == ("timeout", 124)
    assert n_decodes < 100


def test_a_stop_before_the_start_counts() -> None:
    backend, script = scripted()
    runner = GuestRunner(RunConfig(command_wat(SETUP + SPIN, data=SETUP_DATA), use_cache=False), backend)
    runner.stop("interrupt")
    runner.stop("timeout")
    assert runner.run().outcome == "interrupt"
    assert script.calls == []


def test_stopping_one_guest_leaves_the_others_running() -> None:
    backend, _ = scripted()
    spinning, finish = threading.Event(), threading.Event()

    def first_output(data: bytes) -> None:
        spinning.set()

    def other_output(data: bytes) -> None:
        finish.wait()

    other = GuestRunner(
        RunConfig(
            command_wat(print_wat(400) * 50 + "(call $exit (i32.const 6))", data=HELLO),
            stdout=other_output,
            use_cache=False,
        ),
        backend,
    )
    results: list[GuestResult] = []
    thread = threading.Thread(target=lambda: results.append(other.run()))
    thread.start()
    runner = GuestRunner(RunConfig(SAY_AND_SPIN, stdout=first_output, use_cache=False), backend)
    stopper = threading.Thread(target=lambda: (spinning.wait(), runner.stop()))
    stopper.start()
    assert runner.run().outcome == "stop"
    finish.set()
    stopper.join()
    thread.join()
    assert results[0].exit_status == 6


def test_a_guest_blocked_in_a_wasi_call_is_left_behind_with_its_graphs_closed() -> None:
    blocked, release = threading.Event(), threading.Event()

    def block(data: bytes) -> None:
        blocked.set()
        release.wait()

    backend, script = scripted()
    # More text than a pipe holds: the guest blocks inside fd_write as long as the callback does.
    big = text_data(500, (PAGE).to_bytes(4, "little") + (PAGE).to_bytes(4, "little"))
    module = command_wat(SETUP + print_wat(500) * 8, data=SETUP_DATA + big)
    runner = GuestRunner(RunConfig(module, stdout=block, use_cache=False), backend, grace_s=0.1)
    stopper = threading.Thread(target=lambda: (blocked.wait(), runner.stop()))
    stopper.start()
    result = runner.run()
    stopper.join()
    assert (result.outcome, result.was_left_behind) == ("stop", True)
    assert "left behind" in str(result.reason)
    assert script.n_open == 0
    release.set()
    for thread in threading.enumerate():
        if thread.name.startswith("wasi-nn-guest"):
            thread.join()
