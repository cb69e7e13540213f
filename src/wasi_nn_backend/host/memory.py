"""The only access to a guest's memory, and to its ``malloc``.

wasmtime-py hands every number over as a signed one, and its own ``Memory.read`` cuts an out-of-range read short
without a word, so nothing here uses it: each address is masked to its width, each range is compared with the memory's
size, and only then are bytes copied. Nothing keeps a pointer between two calls, because a memory that grows may move.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

from wasmtime import Caller, Func, Memory, Store, Trap, WasmtimeError

from wasi_nn_backend.errors import (
    InvalidArgument,
    InvalidEncoding,
    MissingMemory,
    RuntimeFailure,
    TooLarge,
    UnsupportedOperation,
)
from wasi_nn_backend.host.layouts import MEMORY32, MemoryLayout

__all__ = ["GuestMemory", "TensorWords"]

_U32 = struct.Struct("<I")


class TensorWords(NamedTuple):
    """A tensor as it lies in memory: the numbers only, nothing followed or checked yet."""

    dims: int
    n_dims: int
    type_word: int
    data: int
    n_data_bytes: int


class GuestMemory:
    """The memory that the calling instance exports as ``memory``, for the length of one host call.

    Every method takes addresses and lengths as the guest sent them and raises ``InvalidArgument`` where a range does
    not lie inside the memory. An empty range may lie anywhere: no byte of it is looked at, and compilers leave the
    address of an empty slice undefined.
    """

    __slots__ = ("_caller", "_find", "_memory", "_span", "layout")

    def __init__(
        self,
        caller: Caller | Store,
        layout: MemoryLayout = MEMORY32,
        *,
        find: Callable[[str], object] | None = None,
    ) -> None:
        """``find`` looks up an instance's exports outside of a host call, where ``caller`` is the store."""
        # Looked up at each call: about a microsecond, against the risk of mixing up two instances of one store.
        if find is None:
            if not isinstance(caller, Caller):
                raise TypeError("with a store comes the look-up of its instance's exports")
            find = caller.get
        self._caller = caller
        self._find = find
        self.layout = layout
        memory = find("memory")
        if not isinstance(memory, Memory):
            raise MissingMemory(
                "the module exports no memory named 'memory' (shared memories do not count): "
                "link it so that it exports its own"
            )
        self._memory = memory
        # Asking wasmtime costs 2 microseconds, and a call checks up to four ranges while the guest stands still.
        self._span: tuple[int, int] | None = None

    @property
    def n_bytes(self) -> int:
        return self._address_and_size()[1]

    def refresh(self) -> None:
        """Forget where the memory lies and how large it is: after guest code that the host itself has called."""
        self._span = None

    def check(self, address: int, n_bytes: int, what: str) -> int:
        """The address as an unsigned number, once ``n_bytes`` from it on are known to lie inside the memory."""
        address &= self.layout.word_mask
        n_bytes &= self.layout.word_mask
        n_memory_bytes = self._address_and_size()[1]
        if n_bytes and address + n_bytes > n_memory_bytes:
            raise InvalidArgument(
                f"{what}: {n_bytes} bytes at address {address} do not lie inside the guest's memory of "
                f"{n_memory_bytes} bytes: pass a pointer into the exported memory"
            )
        return address

    def check_u32(self, address: int, what: str) -> int:
        """An out-parameter, checked before the work whose result it is to receive."""
        return self.check(address, _U32.size, what)

    def read(self, address: int, n_bytes: int, what: str, *, max_bytes: int | None = None) -> bytes:
        """A copy of a range. Longer than ``max_bytes``: ``TooLarge``, before a byte is copied."""
        n_bytes &= self.layout.word_mask
        if max_bytes is not None and n_bytes > max_bytes:
            raise TooLarge(f"{what}: {n_bytes} bytes are more than the {max_bytes} that this host takes: send less")
        address = self.check(address, n_bytes, what)
        # An empty memory has no address at all, and ctypes refuses to look at a null pointer.
        return ctypes.string_at(self._address_and_size()[0] + address, n_bytes) if n_bytes else b""

    def read_name(self, address: int, n_bytes: int, *, max_bytes: int) -> str:
        """A name: UTF-8 (else ``InvalidEncoding``) without a NUL (else ``InvalidArgument``)."""
        name = self.read(address, n_bytes, "the name", max_bytes=max_bytes)
        if b"\0" in name:
            raise InvalidArgument(f"the name {name[:64]!r} has a NUL in it: pass its length without a terminator")
        try:
            return name.decode()
        except UnicodeDecodeError as error:
            raise InvalidEncoding(f"the name {name[:64]!r} is not UTF-8 ({error.reason}): encode it so") from None

    def read_tensor(self, address: int) -> TensorWords:
        form = self.layout.tensor
        return TensorWords(*form.unpack(self.read(address, form.size, "the tensor")))

    def read_legacy_tensor(self, address: int, *, max_dims: int) -> TensorWords:
        """A tensor without a length: the data's size in bytes is the product of the dimensions.

        Raises ``InvalidArgument`` where there is no dimension, since nothing else says how long the data is.
        """
        form = self.layout.legacy_tensor
        shape, type_word, data = form.unpack(self.read(address, form.size, "the tensor"))
        dims, n_dims = self.read_span(shape, "the tensor's shape")
        if not n_dims:
            raise InvalidArgument("the tensor has no dimensions: pass one, the length of the data in bytes")
        n_data_bytes = math.prod(self.read_dimensions(dims, n_dims, max_dims=max_dims))
        if n_data_bytes > self.layout.word_mask:
            raise TooLarge(f"the tensor: its {n_dims} dimensions multiply to {n_data_bytes} bytes: send less")
        return TensorWords(dims, n_dims, type_word, data, n_data_bytes)

    def read_u32(self, address: int, what: str) -> int:
        return int(_U32.unpack(self.read(address, _U32.size, what))[0])

    def read_text(self, address: int, what: str, *, max_bytes: int) -> bytes:
        """The bytes before the next NUL. ``TooLarge`` where none follows within ``max_bytes``, ``InvalidArgument``
        where the memory ends before it."""
        address = self.check(address, 1, what)
        n_bytes = min(max_bytes + 1, self.n_bytes - address)
        text, terminator, _ = ctypes.string_at(self._address_and_size()[0] + address, n_bytes).partition(b"\0")
        if terminator:
            return text
        if n_bytes > max_bytes:
            raise TooLarge(f"{what}: no NUL within {max_bytes} bytes, which is the longest text that this host takes")
        raise InvalidArgument(f"{what}: no NUL between address {address} and the end of memory: terminate the text")

    def read_span(self, address: int, what: str) -> tuple[int, int]:
        """A pointer and how much lies there."""
        form = self.layout.span
        pointer, count = form.unpack(self.read(address, form.size, what))
        return pointer, count

    def read_dimensions(self, address: int, n_dims: int, *, max_dims: int) -> tuple[int, ...]:
        """``n_dims`` little-endian 32-bit words. More than ``max_dims``: ``TooLarge``."""
        n_dims &= self.layout.word_mask
        if n_dims > max_dims:
            raise TooLarge(f"the tensor: {n_dims} dimensions are more than the {max_dims} that this host takes")
        data = self.read(address, n_dims * _U32.size, "the tensor's dimensions")
        return struct.unpack(f"<{n_dims}I", data)

    def read_builders(self, address: int, n_builders: int, *, max_builders: int) -> Sequence[tuple[int, int]]:
        """The (address, length) pairs of ``load``'s builder array."""
        n_builders &= self.layout.word_mask
        if n_builders > max_builders:
            raise TooLarge(f"load: {n_builders} builders are more than the {max_builders} that this host takes")
        form = self.layout.span
        return list(form.iter_unpack(self.read(address, n_builders * form.size, "the builder array")))

    def write(self, address: int, data: bytes, what: str) -> None:
        address = self.check(address, len(data), what)
        if data:
            ctypes.memmove(self._address_and_size()[0] + address, data, len(data))

    def allocator(self) -> Func:
        """The guest's ``malloc``. Raises ``UnsupportedOperation`` where it exports none."""
        pointer = self.layout.pointer_type
        malloc = self._find("malloc")
        if isinstance(malloc, Func):
            signature = malloc.type(self._caller)
            if [str(kind) for kind in (*signature.params, *signature.results)] == [pointer, pointer]:
                return malloc
        raise UnsupportedOperation(
            f"the module exports no malloc ({pointer}) -> ({pointer}), which texts are copied in through: "
            "link it with --export=malloc"
        )

    def place_text(self, malloc: Func, text: bytes) -> int:
        """Copy a text and a NUL into a block of the guest's heap; returns its address.

        ``malloc`` is the guest's code and may do anything: trap, grow the memory, return an address outside of it.
        Raises ``RuntimeFailure`` where it gives no usable block.
        """
        n_bytes = len(text) + 1
        try:
            address = int(malloc(self._caller, n_bytes)) & self.layout.word_mask
        except (Trap, WasmtimeError) as error:
            reason = " ".join(str(error).split())
            raise RuntimeFailure(f"the guest's malloc({n_bytes}) did not return: {reason}") from None
        self.refresh()
        if not address:
            raise RuntimeFailure(f"the guest's malloc({n_bytes}) returned NULL: let its memory grow larger")
        if address + n_bytes > self.n_bytes:
            raise RuntimeFailure(
                f"the guest's malloc({n_bytes}) returned {address}, outside of its memory of {self.n_bytes} bytes"
            )
        self.write(address, text + b"\0", "the text")
        return address

    def write_u32(self, address: int, value: int, what: str) -> None:
        self.write(address, _U32.pack(value), what)

    def _address_and_size(self) -> tuple[int, int]:
        span = self._span
        if span is None:
            n_bytes = self._memory.data_len(self._caller)
            # An empty memory has no address.
            address = ctypes.addressof(self._memory.data_ptr(self._caller).contents) if n_bytes else 0
            span = self._span = (address, n_bytes)
        return span
