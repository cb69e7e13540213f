"""Components as guests: commands and libraries, what they are told before they start, and how they end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.host.component_guests import MEMORY, command_component, imports_wat
from tests.host.scripted import scripted
from wasi_nn_backend.backend import Backend
from wasi_nn_backend.dialects import WITX
from wasi_nn_backend.errors import InvalidArgument, UnsupportedOperation
from wasi_nn_backend.host import GuestResult, GuestRunner, HostLimits, RunConfig, run_module

ASK = Path(__file__).parents[2] / "examples" / "component" / "ask.wat"
SAY_BEFORE = "(call $say (i32.const 256) (i32.const 7))"
SAY_AFTER = "(call $say (i32.const 263) (i32.const 5))"
OK = "(i32.const 0)"

#: A library of functions that give back what they are given, one for each kind of value.
ECHO = f"""(component {MEMORY}
  (core module $Echo
    (import "memory" "memory" (memory 1))
    (func (export "word") (param i32) (result i32) (local.get 0))
    (func (export "long") (param i64) (result i64) (local.get 0))
    (func (export "real") (param f64) (result f64) (local.get 0))
    (func (export "pair") (param i32 i32) (result i32)
      (i32.store (i32.const 16) (local.get 0)) (i32.store (i32.const 20) (local.get 1)) (i32.const 16))
    (func (export "case") (param i32) (result i32)
      (i32.store8 (i32.const 16) (local.get 0)) (i32.store (i32.const 20) (i32.const 7)) (i32.const 16))
    (func (export "nothing")))
  (core instance $echo (instantiate $Echo (with "memory" (instance $memory))))
  (type $colour' (enum "red" "green"))
  (export $colour "colour" (type $colour'))
  (func (export "flag") (param "v" bool) (result bool) (canon lift (core func $echo "word")))
  (func (export "byte") (param "v" u8) (result u8) (canon lift (core func $echo "word")))
  (func (export "whole") (param "v" s32) (result s32) (canon lift (core func $echo "word")))
  (func (export "long") (param "v" u64) (result u64) (canon lift (core func $echo "long")))
  (func (export "real") (param "v" f64) (result f64) (canon lift (core func $echo "real")))
  (func (export "letter") (param "v" char) (result char) (canon lift (core func $echo "word")))
  (func (export "paint") (param "v" $colour) (result $colour) (canon lift (core func $echo "word")))
  (func (export "text") (param "v" string) (result string)
    (canon lift (core func $echo "pair") (memory $mem) (realloc (core func $realloc))))
  (func (export "bytes") (param "v" (list u8)) (result (list u8))
    (canon lift (core func $echo "pair") (memory $mem) (realloc (core func $realloc))))
  (func (export "texts") (param "v" (list string)) (result (list string))
    (canon lift (core func $echo "pair") (memory $mem) (realloc (core func $realloc))))
  (func (export "either") (param "v" u32) (result (result u32 (error u32)))
    (canon lift (core func $echo "case") (memory $mem)))
  (func (export "perhaps") (param "v" u32) (result (result (error u32)))
    (canon lift (core func $echo "case") (memory $mem)))
  (func (export "odd") (param "v" (tuple u8)) (canon lift (core func $echo "nothing2")))
  (func $nothing (canon lift (core func $echo "nothing")))
  (instance $one (export "same" (func $nothing)) (export "own" (func $nothing)))
  (instance $two (export "same" (func $nothing)))
  (export "test:echo/one" (instance $one))
  (export "test:echo/two" (instance $two)))""".replace(
    '(func (export "odd") (param "v" (tuple u8)) (canon lift (core func $echo "nothing2")))',
    '(func (export "odd") (param "v" (tuple u8)) (result u8) (canon lift (core func $echo "word")))',
).encode()


def run(module: bytes | str | Path, backend: Backend, **options: Any) -> tuple[GuestResult, bytes]:
    out = bytearray()
    config = RunConfig(module, stdout=out.extend, use_cache=False, inherit_stdin=False, **options)
    return run_module(config, backend), bytes(out)


# --- commands ---


@pytest.mark.parametrize("fixture", ["fake_backend", "tiny_backend"])
def test_the_output_of_guest_and_host_comes_in_order(fixture: str, request: pytest.FixtureRequest) -> None:
    backend: Backend = request.getfixturevalue(fixture)
    settings = {"prompt_mode": "raw", "max_tokens": 5}
    with backend.load_by_name("default") as graph, graph.init_execution_context(settings) as context:
        expected = context.run_inference("once upon").encode()
    body = SAY_BEFORE + "(call $generate)" + SAY_AFTER
    result, out = run(command_component(body * 3 + OK), backend)
    assert (result.outcome, result.exit_status, result.reason, result.returned) == ("exited", 0, None, ())
    assert out == (b"before " + expected + b"after") * 3


@pytest.mark.parametrize(
    ("body", "outcome", "exit_status"),
    [
        (OK, "exited", 0),
        ("(i32.const 1)", "exited", 1),
        (f"(call $exit (i32.const 0)) {OK}", "exited", 0),
        (f"(call $exit (i32.const 1)) {OK}", "exited", 1),
        (f"(unreachable) {OK}", "trapped", 134),
    ],
)
def test_exit_statuses(fake_backend: Backend, body: str, outcome: str, exit_status: int) -> None:
    result, out = run(command_component(SAY_BEFORE + body), fake_backend)
    assert (result.outcome, result.exit_status) == (outcome, exit_status)
    assert out == b"before "
    assert ("unreachable" in (result.reason or "")) == (outcome == "trapped")


def test_a_guest_that_spins_runs_into_its_timeout(fake_backend: Backend) -> None:
    timers: list[Callable[[], None]] = []

    class Timer:
        def cancel(self) -> None: ...

    def start_timer(delay_s: float, action: Callable[[], None]) -> Timer:
        timers.append(action)
        return Timer()

    def stop_at_output(data: bytes) -> None:
        timers[0]()

    config = RunConfig(
        command_component(f"{SAY_BEFORE} (loop (br 0)) {OK}"), stdout=stop_at_output, timeout_s=5, use_cache=False
    )
    result = GuestRunner(config, fake_backend, start_timer=start_timer).run()
    assert (result.outcome, result.exit_status) == ("timeout", 124)


def test_a_compute_is_cancelled_when_the_guest_is_stopped() -> None:
    entered = threading.Event()

    def block() -> str:
        entered.set()
        return "block"

    backend, script = scripted({"compute": block})
    runner = GuestRunner(RunConfig(command_component(f"(call $generate) {OK}"), use_cache=False), backend)

    def stop() -> None:
        entered.wait()
        runner.stop("interrupt")

    threading.Thread(target=stop).start()
    result = runner.run()
    assert (result.outcome, result.exit_status) == ("interrupt", 130)
    assert script.n_open == 0


def test_fuel_and_memory_have_limits(fake_backend: Backend) -> None:
    result, _ = run(command_component(f"(loop (br 0)) {OK}"), fake_backend, fuel=10_000)
    assert (result.outcome, "all fuel consumed" in (result.reason or "")) == ("trapped", True)
    result, _ = run(command_component(OK), fake_backend, max_memory_bytes=65536)
    assert (result.outcome, "exceeds memory limits" in (result.reason or "")) == ("trapped", True)


def test_limits_reach_components(fake_backend: Backend) -> None:
    result, _ = run(command_component(f"(call $generate) {OK}"), fake_backend, limits=HostLimits(max_name_bytes=3))
    assert result.outcome == "trapped"
    assert result.last_error is not None
    assert result.last_error.code.value == "too_large"


# --- what is told before the start ---


def refusal(module: bytes | str, backend: Backend, **options: Any) -> str:
    with pytest.raises(UnsupportedOperation) as raised:
        run(module, backend, **options)
    return str(raised.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("@0.2.0-rc-2024-10-28", "@0.3.0", ["wasi:nn/tensor@0.3.0", "0.2.0-rc-2024-10-28"]),
        ("nn/tensor@", "nn/matrix@", ["wasi:nn/matrix@", "tensor, errors, inference, graph"]),
        ("(type $dimensions (list u32))", "(type $dimensions (list u64))", ["[constructor]tensor", "list<u64>"]),
        ('"[method]tensor.data"', '"[method]tensor.text"', ["[method]tensor.text", "no such function"]),
        ('"FP64" "BF16"', '"BF16" "FP64"', ["[method]tensor.ty", "FP64 BF16"]),
    ],
)
def test_a_wasi_nn_that_is_not_ours_is_told(fake_backend: Backend, old: str, new: str, words: list[str]) -> None:
    wat = imports_wat()
    assert old in wat
    message = refusal(f"(component {wat.replace(old, new)})".encode(), fake_backend)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("wasi:http/types@0.2.0", "no network"),
        ("wasi:cli/stdout@0.3.0", "neither"),
        ("wasi:cli/everything@0.2.0", "neither"),
        ("my:own/thing", "neither"),
    ],
)
def test_other_imports_that_are_missing_are_told(fake_backend: Backend, name: str, reason: str) -> None:
    message = refusal(f'(component (import "{name}" (instance)))'.encode(), fake_backend)
    assert name in message
    assert reason in message


@pytest.mark.parametrize(
    ("module", "options", "words"),
    [
        (b"\0asm\x0d\0\x01\0rubbish", {}, "does not compile"),
        (b"(component)", {}, "no command"),
        (b"(component)", {"invoke": "ask"}, "no function 'ask'"),
        (ECHO, {"invoke": "same"}, "several functions"),
        (ECHO, {}, "invoke one of test:echo/one#same"),
        (command_component(OK), {"dialect": WITX}, "leave the dialect out"),
    ],
    ids=["rubbish", "library", "no export", "two exports", "echo", "dialect"],
)
def test_what_cannot_be_started(fake_backend: Backend, module: bytes, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        run(module, fake_backend, **options)


# --- libraries ---


@pytest.mark.parametrize(
    ("function", "argument", "returned"),
    [
        ("flag", "true", "true"),
        ("byte", "0xff", 255),
        ("whole", "-5", -5),
        ("long", str(2**64 - 1), 2**64 - 1),
        ("real", "2.5", 2.5),
        ("letter", "é", "é"),
        ("paint", "green", "green"),
        ("text", "a tëxt", "a tëxt"),
        ("bytes", "bÿtes", "bÿtes"),
        ("texts", '["a", "b"]', '["a", "b"]'),
        ("either", "0", 7),
    ],
)
def test_arguments_and_results_of_each_kind(
    fake_backend: Backend, function: str, argument: str, returned: object
) -> None:
    result, _ = run(ECHO, fake_backend, invoke=function, args=[argument])
    assert (result.outcome, result.exit_status, result.returned) == ("exited", 0, (returned,))


@pytest.mark.parametrize(("function", "argument"), [("either", "1"), ("perhaps", "1")])
def test_an_error_that_is_returned_is_a_failed_run(fake_backend: Backend, function: str, argument: str) -> None:
    result, _ = run(ECHO, fake_backend, invoke=function, args=[argument])
    assert (result.outcome, result.exit_status, result.returned) == ("exited", 1, ())
    assert result.reason == f"{function} returned an error: 7"


def test_functions_are_found_in_interfaces(fake_backend: Backend) -> None:
    for name in ("own", "test:echo/one#own", "test:echo/two#same"):
        result, _ = run(ECHO, fake_backend, invoke=name)
        assert (result.outcome, result.returned) == ("exited", ())
    assert run(ECHO, fake_backend, invoke="perhaps", args=["0"])[0].returned == ()


@pytest.mark.parametrize(
    ("function", "args"),
    [
        ("flag", ["yes"]),
        ("byte", ["256"]),
        ("byte", ["one"]),
        ("whole", [str(2**31)]),
        ("real", ["x"]),
        ("letter", ["ab"]),
        ("paint", ["blue"]),
        ("texts", ["a"]),
        ("texts", ["[1]"]),
        ("text", []),
        ("odd", ["1"]),
    ],
)
def test_arguments_that_do_not_fit(fake_backend: Backend, function: str, args: list[str]) -> None:
    with pytest.raises(InvalidArgument):
        run(ECHO, fake_backend, invoke=function, args=args)


@pytest.mark.parametrize("fixture", ["fake_backend", "tiny_backend"])
def test_the_component_written_by_hand_answers(fixture: str, request: pytest.FixtureRequest) -> None:
    backend: Backend = request.getfixturevalue(fixture)
    settings = {"prompt_mode": "chat", "max_tokens": 64, "temperature": 0}
    with backend.load_by_name("default") as graph, graph.init_execution_context(settings) as context:
        expected = context.run_inference("hello?")
    result, _ = run(ASK, backend, invoke="ask", args=["default", "hello?"])
    assert result.returned == (expected,)
    result, _ = run(ASK, backend, invoke="ask", args=["nobody", "hello?"])
    assert (result.exit_status, result.returned) == (1, ())
    assert result.reason is not None
    assert "nobody" in result.reason
