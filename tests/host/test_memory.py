"""Guest memory against a plain bytearray: any address, any length, never a byte too many."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis.strategies import binary, integers, one_of
from wasmtime import Caller, Func, FuncType, Instance, Memory, Module, Store, ValType

from tests.conftest import n_examples
from wasi_nn_backend.errors import InvalidArgument, InvalidEncoding, TooLarge, WasiNNError
from wasi_nn_backend.host.memory import GuestMemory

PAGE = 65536
N_BYTES = 2 * PAGE

#: Signed and unsigned 32-bit words, with a preference for the memory's edges.
words = one_of(
    integers(-(2**31), 2**32 - 1),
    integers(N_BYTES - 16, N_BYTES + 16),
    integers(0, 64),
    integers(-64, -1),
)
lengths = one_of(words, integers(0, 64))


class MemoryGuest:
    """A guest with a memory full of known bytes; ``use`` runs an action on it inside a host call."""

    def __init__(self) -> None:
        self._store = Store()
        self._action: Callable[[GuestMemory], Any] = lambda memory: None
        self._outcome: Any = None
        i32 = ValType.i32
        module = Module(
            self._store.engine,
            f'(module (import "host" "call" (func $call (result i32))) (memory (export "memory") {N_BYTES // PAGE})'
            ' (func (export "run") (result i32) (call $call)))',
        )
        host_call = Func(self._store, FuncType([], [i32()]), self._host_call, access_caller=True)
        self._instance = Instance(self._store, module, [host_call])
        memory = self._instance.exports(self._store)["memory"]
        assert isinstance(memory, Memory)
        self.memory = memory
        self.content = bytes((i * 7 + i // 256) & 0xFF for i in range(N_BYTES))
        self.restore()

    def restore(self) -> None:
        self.memory.write(self._store, self.content, 0)

    def now(self) -> bytes:
        return bytes(self.memory.read(self._store, 0, N_BYTES))

    def use(self, action: Callable[[GuestMemory], Any]) -> Any:
        """The action's result, or the ``WasiNNError`` that it raised."""
        self._action = action
        self._instance.exports(self._store)["run"](self._store)
        return self._outcome

    def _host_call(self, caller: Caller) -> int:
        try:
            self._outcome = self._action(GuestMemory(caller))
        except WasiNNError as error:
            self._outcome = error
        return 0


@pytest.fixture(scope="module")
def guest() -> MemoryGuest:
    return MemoryGuest()


def lies_inside(address: int, n_bytes: int) -> bool:
    n_unsigned = n_bytes & 0xFFFF_FFFF
    return not n_unsigned or (address & 0xFFFF_FFFF) + n_unsigned <= N_BYTES


@settings(max_examples=n_examples(400), deadline=None)
@given(address=words, n_bytes=lengths)
def test_reads_give_the_range_or_refuse_it(guest: MemoryGuest, address: int, n_bytes: int) -> None:
    outcome = guest.use(lambda memory: memory.read(address, n_bytes, "it"))
    if lies_inside(address, n_bytes):
        start = address & 0xFFFF_FFFF
        assert outcome == guest.content[start : start + (n_bytes & 0xFFFF_FFFF)]
    else:
        assert isinstance(outcome, InvalidArgument)


@settings(max_examples=n_examples(300), deadline=None)
@given(address=words, data=binary(max_size=40))
def test_writes_change_the_range_and_nothing_else(guest: MemoryGuest, address: int, data: bytes) -> None:
    outcome = guest.use(lambda memory: memory.write(address, data, "it"))
    expected = bytearray(guest.content)
    if lies_inside(address, len(data)):
        start = address & 0xFFFF_FFFF
        if data:  # an empty range may begin behind the memory's end
            expected[start : start + len(data)] = data
        assert outcome is None
    else:
        assert isinstance(outcome, InvalidArgument)
    assert guest.now() == bytes(expected)
    guest.restore()


@settings(max_examples=n_examples(200), deadline=None)
@given(address=words, value=integers(0, 2**32 - 1))
def test_numbers_are_little_endian_and_checked_the_same_way(guest: MemoryGuest, address: int, value: int) -> None:
    checked = guest.use(lambda memory: memory.check_u32(address, "it"))
    written = guest.use(lambda memory: memory.write_u32(address, value, "it"))
    assert isinstance(checked, InvalidArgument) == isinstance(written, InvalidArgument) == (not lies_inside(address, 4))
    if written is None:
        assert guest.use(lambda memory: memory.read(address, 4, "it")) == struct.pack("<I", value)
    guest.restore()


@settings(max_examples=n_examples(200), deadline=None)
@given(name=binary(max_size=30), max_bytes=integers(0, 30))
def test_names_are_utf8_without_nul_and_of_bounded_length(guest: MemoryGuest, name: bytes, max_bytes: int) -> None:
    guest.memory.write(guest._store, name or b"x", 100)
    outcome = guest.use(lambda memory: memory.read_name(100, len(name), max_bytes=max_bytes))
    guest.restore()
    if len(name) > max_bytes:
        assert isinstance(outcome, TooLarge)
    elif b"\0" in name:
        assert isinstance(outcome, InvalidArgument)
    else:
        try:
            assert outcome == name.decode()
        except UnicodeDecodeError:
            assert isinstance(outcome, InvalidEncoding)


@settings(max_examples=n_examples(100), deadline=None)
@given(address=words, n_dims=lengths)
def test_dimensions_and_builders_are_bounded_before_they_are_read(
    guest: MemoryGuest, address: int, n_dims: int
) -> None:
    n_unsigned = n_dims & 0xFFFF_FFFF
    dims = guest.use(lambda memory: memory.read_dimensions(address, n_dims, max_dims=64))
    builders = guest.use(lambda memory: memory.read_builders(address, n_dims, max_builders=16))
    if n_unsigned > 64:
        assert isinstance(dims, TooLarge)
    elif lies_inside(address, n_unsigned * 4):
        assert len(dims) == n_unsigned
    else:
        assert isinstance(dims, InvalidArgument)
    if n_unsigned > 16:
        assert isinstance(builders, TooLarge)
    elif lies_inside(address, n_unsigned * 8):
        assert len(builders) == n_unsigned
    else:
        assert isinstance(builders, InvalidArgument)


def test_a_limit_is_looked_at_before_the_range(guest: MemoryGuest) -> None:
    assert isinstance(guest.use(lambda memory: memory.read(0, -1, "it", max_bytes=10)), TooLarge)


@pytest.mark.parametrize("address", [0, N_BYTES, N_BYTES + 1, 0x7FFF_FFFF, -1, 0xAAAA_AAAA])
def test_an_empty_range_lies_anywhere(guest: MemoryGuest, address: int) -> None:
    assert guest.use(lambda memory: memory.read(address, 0, "it")) == b""
    assert guest.use(lambda memory: memory.read_dimensions(address, 0, max_dims=1)) == ()
    assert guest.use(lambda memory: memory.write(address, b"", "it")) is None
    assert guest.now() == guest.content


def test_an_empty_memory_has_an_empty_range() -> None:
    store = Store()
    module = Module(
        store.engine,
        '(module (import "host" "call" (func $call (result i32))) (memory (export "memory") 0)'
        ' (func (export "run") (result i32) (call $call)))',
    )
    outcomes: list[Any] = []

    def host_call(caller: Caller) -> int:
        memory = GuestMemory(caller)
        outcomes.extend([memory.n_bytes, memory.read(0, 0, "it"), memory.write(0, b"", "it")])
        try:
            memory.read(0, 1, "it")
        except InvalidArgument as error:
            outcomes.append(str(error))
        return 0

    function = Func(store, FuncType([], [ValType.i32()]), host_call, access_caller=True)
    Instance(store, module, [function]).exports(store)["run"](store)
    assert outcomes[:3] == [0, b"", None]
    assert "memory of 0 bytes" in outcomes[3]
