"""Pools of guests: the order of outputs, what one guest's end does to the others, how far the input is read ahead."""

from __future__ import annotations

import os
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.llama import FakeContext, FakeLlama
from tests.host.component_guests import command_component
from tests.host.guests import command_wat, iovec_data, print_wat, text_data
from tests.host.scripted import scripted
from wasi_nn_backend.backend import Backend
from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.host import GuestPool, RunConfig
from wasi_nn_backend.host.module_cache import ModuleCache, SharedCode

#: Writes what it reads, up to 1,000 bytes of it, and exits with the number of bytes.
ECHO = b"""(module
  (import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "\\64\\00\\00\\00\\e8\\03\\00\\00")
  (func (export "_start")
    (drop (call $fd_read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 4)))
    (drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))))"""
SPIN = b'(module (func (export "_start") (loop $forever (br $forever))))'
TRAP = b'(module (func (export "_start") unreachable))'
RECURSE = b'(module (func $f (export "_start") (call $f)))'
#: What a component's ``run`` gives back: ok, and an error.
EXIT_0, EXIT_1 = "(i32.const 0)", "(i32.const 1)"
EXIT_7 = command_wat("(call $exit (i32.const 7))")
#: Prints "x" for ever.
FLOOD = command_wat(f"(loop $forever {print_wat(16)} (br $forever))", data=iovec_data(16, 64, b"x" * 100))


@pytest.fixture
def backend() -> Backend:
    return scripted()[0]


@pytest.fixture
def pool(backend: Backend) -> Iterator[GuestPool]:
    with GuestPool(backend, 3, max_output_bytes=1000, use_cache=False) as pool:
        yield pool


def echo(text: str) -> RunConfig:
    return RunConfig(ECHO, stdin=text.encode())


def test_outputs_come_in_the_order_of_the_input(pool: GuestPool) -> None:
    texts = [f"line {i}" for i in range(40)]
    outputs = list(pool.map(map(echo, texts)))
    assert [output.stdout.decode() for output in outputs] == texts
    assert {(output.exit_status, output.error, output.stderr) for output in outputs} == {(0, None, b"")}


def test_components_run_in_a_pool(pool: GuestPool) -> None:
    good, bad = command_component(f"(call $say (i32.const 256) (i32.const 7)) {EXIT_0}"), command_component(EXIT_1)
    outputs = list(pool.map(RunConfig(component) for component in [good, bad, ECHO, good] * 5))
    assert [output.stdout for output in outputs] == [b"before ", b"", b"", b"before "] * 5
    assert [output.exit_status for output in outputs] == [0, 1, 0, 0] * 5


def test_no_guest_harms_another(pool: GuestPool) -> None:
    bad = {
        "trapped": RunConfig(TRAP),
        "call stack exhausted": RunConfig(RECURSE),
        "all fuel consumed": RunConfig(SPIN, fuel=10_000),
        "longer than 0.05 seconds": RunConfig(SPIN, timeout_s=0.05),
        "status 7": RunConfig(EXIT_7),
        "more than 1000 bytes": RunConfig(FLOOD),
        "neither a WebAssembly binary": RunConfig(b"junk"),
        "cannot read": RunConfig("nowhere.wasm"),
        "a bad line": InvalidArgument("a bad line"),
    }
    configs = [config for each in bad.values() for config in (each, echo("good"))]
    outputs = list(pool.map(configs))
    assert [output.stdout for output in outputs[1::2]] == [b"good"] * len(bad)
    for part, output in zip(bad, outputs[::2], strict=True):
        assert output.error is not None
        assert part in output.error
        assert output.exit_status != 0
    statuses = [output.exit_status for output in outputs[::2]]
    assert statuses == [134, 134, 134, 124, 7, 143, 1, 1, 1]


def test_output_beyond_the_limit_is_cut(pool: GuestPool) -> None:
    output = pool.submit(RunConfig(FLOOD)).result()
    assert output.stdout == b"x" * 1000


def test_the_input_is_read_as_outputs_are_taken(pool: GuestPool) -> None:
    n_read = 0

    def source() -> Iterator[RunConfig]:
        nonlocal n_read
        for i in range(100):
            n_read += 1
            yield echo(str(i))

    n_taken = 0
    for _ in pool.map(source()):
        n_taken += 1
        assert n_read <= n_taken + 6
    assert n_taken == n_read == 100


def test_an_output_does_not_wait_for_more_input(pool: GuestPool) -> None:
    """Who writes a line and waits for the answer before the next one gets it."""
    has_answer = threading.Event()

    def source() -> Iterator[RunConfig]:
        for i in range(5):
            yield echo(str(i))
            assert has_answer.wait(60)
            has_answer.clear()

    texts = []
    for output in pool.map(source()):
        texts.append(output.stdout)
        has_answer.set()
    assert texts == [b"0", b"1", b"2", b"3", b"4"]


def test_what_reading_the_input_raises_comes_after_the_outputs_before_it(pool: GuestPool) -> None:
    def source() -> Iterator[RunConfig]:
        yield echo("one")
        raise OSError("the disk is gone")

    outputs = pool.map(source())
    assert next(outputs).stdout == b"one"
    with pytest.raises(OSError, match="the disk is gone"):
        next(outputs)


def test_stop_ends_what_runs_and_what_waits(backend: Backend) -> None:
    with GuestPool(backend, 2, use_cache=False) as pool:
        futures = [pool.submit(RunConfig(SPIN)) for _ in range(5)]
        pool.stop("interrupt")
        assert [future.result().exit_status for future in futures] == [130] * 5
    with pytest.raises(InvalidArgument, match="the pool is closed"):
        pool.submit(RunConfig(ECHO))


def test_a_pool_needs_a_worker(backend: Backend) -> None:
    with pytest.raises(InvalidArgument, match="0 workers"):
        GuestPool(backend, 0)


def test_a_guest_that_cannot_be_stopped_keeps_its_engine_and_the_worker_goes_on(backend: Backend) -> None:
    def never_ends(self: object) -> bool:
        return False

    with GuestPool(backend, 1, use_cache=False) as pool, pytest.MonkeyPatch.context() as patch:
        first = pool._caches.get()
        pool._caches.put(first)
        patch.setattr("wasi_nn_backend.host.runner.GuestRunner._wait_for_end", never_ends)
        output = pool.submit(RunConfig(SPIN, timeout_s=0.01)).result()
        patch.undo()
        assert output.result is not None
        assert output.result.was_left_behind
        assert pool.submit(echo("on")).result().stdout == b"on"
        assert pool._caches.get() is not first


def test_guests_of_a_pool_run_at_the_same_time() -> None:
    """Each waits in its load until all three are there."""
    together = threading.Barrier(3)
    backend, _ = scripted({"load_by_name": lambda: together.wait(60)})
    body = "(drop (call $load_by_name (i32.const 0) (i32.const 0) (i32.const 16)))"
    with GuestPool(backend, 3, use_cache=False) as pool:
        assert [output.error for output in pool.map([RunConfig(command_wat(body))] * 3)] == [None] * 3


# --- compiled modules ---


def test_a_module_is_compiled_once_for_all_workers_and_loaded_once_by_each(monkeypatch: pytest.MonkeyPatch) -> None:
    n_compiled = 0

    def counting(*arguments: object) -> object:
        nonlocal n_compiled
        n_compiled += 1
        return original(*arguments)  # type: ignore[arg-type]

    from wasi_nn_backend.host import module_cache  # noqa: PLC0415

    original = module_cache.compile_module
    monkeypatch.setattr(module_cache, "compile_module", counting)
    code = SharedCode()
    caches = [ModuleCache(code, use_cache=False) for _ in range(3)]
    found = [cache.get(ECHO, has_fuel=False, dialect=None) for cache in caches for _ in range(2)]
    assert n_compiled == 1
    assert len({id(each) for each in found}) == 3
    assert len({id(each.engine) for each in found}) == 3
    caches[0].get(ECHO, has_fuel=True, dialect=None)
    assert n_compiled == 2  # other machine code


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "module.wat"
    cache = ModuleCache(SharedCode(), use_cache=False)
    path.write_bytes(ECHO)
    first = cache.get(path, has_fuel=False, dialect=None)
    assert cache.get(path, has_fuel=False, dialect=None) is first
    path.write_bytes(TRAP)
    assert cache.get(path, has_fuel=False, dialect=None) is not first


def test_a_cache_keeps_so_many_modules_and_no_more() -> None:
    cache = ModuleCache(SharedCode(), use_cache=False)
    modules = [f'(module (func (export "_start")) (func (export "f{i}")))'.encode() for i in range(20)]
    first = cache.get(modules[0], has_fuel=False, dialect=None)
    for module in modules:
        cache.get(module, has_fuel=False, dialect=None)
    assert len(cache._modules) == 16
    assert cache.get(modules[0], has_fuel=False, dialect=None) is not first


def test_a_component_is_compiled_once_for_a_pool() -> None:
    code = SharedCode()
    caches = [ModuleCache(code, use_cache=False) for _ in range(3)]
    component = command_component(EXIT_0)
    found = [cache.get_component(component, has_fuel=False) for cache in caches for _ in range(2)]
    assert len({id(each.component) for each in found}) == len({id(each.engine) for each in found}) == 3
    assert len(code._codes) == 1


@pytest.mark.skipif(
    sys.platform != "linux" or os.getpriority(os.PRIO_PROCESS, 0) >= 10,
    reason="needs Linux, where threads have a niceness of their own, and this process to be below that of guests",
)
def test_guests_stand_back_and_the_engines_that_they_start_do_not(
    fake_backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading, decoding = [], []
    load_model, decode = FakeLlama.load_model, FakeContext.decode

    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, 0)

    monkeypatch.setattr(FakeLlama, "load_model", lambda *a, **k: (loading.append(niceness()), load_model(*a, **k))[1])
    monkeypatch.setattr(FakeContext, "decode", lambda *a: (decoding.append(niceness()), decode(*a))[1])
    ask = command_wat(
        """(drop (call $load_by_name (i32.const 100) (i32.const 7) (i32.const 16)))
        (drop (call $init_execution_context (i32.const 0) (i32.const 16)))
        (drop (call $set_input (i32.const 0) (i32.const 0) (i32.const 200)))
        (drop (call $compute (i32.const 0)))""",
        data=text_data(100, b"default") + text_data(200, struct.pack("<5I", 0, 0, 3, 300, 4)) + text_data(300, b"Once"),
    )
    with GuestPool(fake_backend, 1, use_cache=False) as pool:
        assert pool.submit(RunConfig(ask)).result().error is None
    own = niceness()
    assert set(loading) == {max(own, 10)}
    assert set(decoding) == {own}
