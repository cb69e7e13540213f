"""Exports called by name with texts: copied in through the guest's malloc, and read back."""

from __future__ import annotations

import pytest

from tests.host.abis import ABIS, Abi
from tests.host.conftest import MODEL
from tests.host.guests import PAGE, imports_wat, malloc_wat, memory_wat, text_data
from tests.host.scripted import scripted
from wasi_nn_backend.backend import Backend
from wasi_nn_backend.errors import InvalidArgument, RuntimeFailure
from wasi_nn_backend.host import GuestResult, GuestRunner, RunConfig, run_module

hyperbeams = pytest.mark.parametrize("abi", [abi for abi in ABIS if abi.dialect == "hyperbeam"], ids=str)


def handle_wat(abi: Abi) -> str:
    """A HyperBEAM module as its node calls it: ``handle(prompt, config) -> answer``, all NUL-terminated."""
    p, length = abi.pointer, "i64" if abi.has_wide_lengths else "i32"
    as_length = {("i32", "i32"): "", ("i64", "i64"): "", ("i64", "i32"): "i32.wrap_i64"}[p, length]
    data = text_data(64, MODEL) if p == "i32" else text_data(64, MODEL).replace("i32.const", "i64.const")
    return f"""(module {imports_wat(abi)} {memory_wat(abi, 4)} {malloc_wat(abi)} {data}
      (func $length (param $text {p}) (result {p}) (local $end {p})
        (local.set $end (local.get $text))
        (loop $next
          (if (i32.load8_u (local.get $end))
            (then (local.set $end ({p}.add (local.get $end) ({p}.const 1))) (br $next))))
        ({p}.sub (local.get $end) (local.get $text)))
      (func (export "handle") (param $prompt {p}) (param $config {p}) (result {p})
        (drop (call $load_by_name_with_config ({p}.const 64) ({length}.const {len(MODEL)})
          (local.get $config) (call $length (local.get $config)) {as_length} ({p}.const 0)))
        (drop (call $init_execution_context (i32.load ({p}.const 0)) ({p}.const 4)))
        (call $run_inference (local.get $prompt) (call $length (local.get $prompt)) {as_length})))"""


def invoke(module: str, name: str, *args: str, backend: Backend | None = None, **options: object) -> GuestResult:
    config = RunConfig(module.encode(), invoke=name, args=args, use_cache=False, **options)  # type: ignore[arg-type]
    return run_module(config, backend or scripted()[0])


@hyperbeams
def test_handle_takes_texts_and_returns_one(tiny_backend: Backend, abi: Abi) -> None:
    config = '{"n-predict": 7}'
    with tiny_backend.load_by_name("default") as graph, graph.init_execution_context(config) as context:
        expected = context.run_inference("héllo wörld", {"prompt_mode": "raw"})
    result = invoke(handle_wat(abi), "handle", "héllo wörld", config, backend=tiny_backend)
    assert (result.outcome, result.exit_status, result.returned) == ("exited", 0, (expected,))


@hyperbeams
def test_a_text_that_reads_as_a_number_is_marked(fake_backend: Backend, abi: Abi) -> None:
    marked = invoke(handle_wat(abi), "handle", "text:42", "{}", backend=fake_backend).returned
    with fake_backend.load_by_name("default") as graph, graph.init_execution_context() as context:
        assert marked == (context.run_inference("42", {"prompt_mode": "raw"}),)


@hyperbeams
def test_an_answer_that_is_null_says_which_call_failed(fake_backend: Backend, abi: Abi) -> None:
    with pytest.raises(RuntimeFailure, match=r"returned NULL.*last failed call: run_inference: prompt_too_long .102."):
        invoke(handle_wat(abi), "handle", "x" * 5000, "{}", backend=fake_backend)


#: Not HyperBEAM's: integers that come back are numbers, unless they are said to be texts.
ECHO = """(module (memory (export "memory") 1)
  (global $break (mut i32) (i32.const 4096))
  (func (export "malloc") (param i32) (result i32)
    (global.get $break) (global.set $break (i32.add (global.get $break) (local.get 0))))
  (func (export "echo") (param i32) (result i32) (local.get 0))
  (func (export "first") (param i32 i32) (result i32) (i32.load8_u (local.get 0)))
  (func (export "both") (param i32) (result i32 f32) (local.get 0) (f32.const 0.5))
  (func (export "wide") (param i64) (result i64) (local.get 0))
  (func (export "end") (result i32)
    (i32.store8 (i32.const 65535) (i32.const 65)) (i32.const 65535)))"""


def test_results_are_numbers_unless_told_otherwise() -> None:
    assert invoke(ECHO, "echo", "abc").returned == (4096,)
    assert invoke(ECHO, "echo", "abc", invoke_returns="text").returned == ("abc",)
    assert invoke(ECHO, "echo", "", invoke_returns="text").returned == ("",)
    assert invoke(ECHO, "echo", "-5").returned == (-5,)
    assert invoke(ECHO, "first", "hello", "0x10").returned == (ord("h"),)
    assert invoke(ECHO, "both", "x", invoke_returns="text").returned == ("x", 0.5)
    assert invoke(ECHO, "echo", "\udcff", invoke_returns="text").returned == ("\ufffd",)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("wide", ["abc"], "'abc' is no i64: pass a number"),
        ("echo", ["a\0b"], "NUL"),
        ("echo", ["0x100000000"], "does not fit an i32"),
        ("echo", ["99999"], "returned: 1 bytes at address 99999 do not lie inside"),
        ("end", [], "no NUL between address 65535 and the end of memory"),
    ],
)
def test_a_wrong_invocation_says_what_is_wrong(name: str, args: list[str], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        invoke(ECHO, name, *args, invoke_returns="text")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("(i32.const 0)", "malloc.4. returned NULL"),
        ("(i32.const 65534)", "malloc.4. returned 65534, outside of its memory of 65536 bytes"),
        ("(i32.const -1)", "malloc.4. returned 4294967295"),
        ("unreachable", "malloc.4. did not return: .*unreachable"),
    ],
)
def test_a_malloc_of_no_use_is_named(body: str, message: str) -> None:
    module = f"""(module (memory (export "memory") 1) (func (export "malloc") (param i32) (result i32) {body})
      (func (export "echo") (param i32) (result i32) (local.get 0)))"""
    with pytest.raises(RuntimeFailure, match=message):
        invoke(module, "echo", "abc")


def test_texts_need_a_memory_and_a_malloc() -> None:
    for rest in ("", '(memory (export "memory") 1)'):
        with pytest.raises(InvalidArgument, match=r"'abc' is no i32, and cannot be passed as a text: .*exports no m"):
            invoke(f'(module {rest} (func (export "echo") (param i32)))', "echo", "abc")


def test_a_guest_that_is_stopped_is_not_blamed_for_its_null() -> None:
    """Cancelled calls answer 0, so its export returns NULL: it was stopped all the same."""
    backend, script = scripted({"compute": lambda: "block"})
    abi = next(abi for abi in ABIS if abi.dialect == "hyperbeam")
    config = RunConfig(handle_wat(abi).encode(), invoke="handle", args=("a", "{}"), use_cache=False, timeout_s=0.05)
    result = GuestRunner(config, backend).run()
    assert (result.outcome, result.exit_status) == ("timeout", 124)
    assert script.n_open == 0


def test_a_long_text_fits_in_a_memory_that_grows() -> None:
    abi = next(abi for abi in ABIS if abi.dialect == "hyperbeam")
    grow = f"(i32.mul (memory.grow (i32.const 4)) (i32.const {PAGE}))"
    module = (
        f"(module {memory_wat(abi, 1)} {malloc_wat(abi, grow)}"
        ' (func (export "echo") (param i32) (result i32) (local.get 0)))'
    )
    text = "x" * (4 * PAGE - 1)
    assert invoke(module, "echo", text, invoke_returns="text").returned == (text,)
