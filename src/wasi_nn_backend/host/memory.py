"""The only access to a guest's memory.

wasmtime-py hands every i32 over as a signed number, and its own ``Memory.read`` cuts an out-of-range read short
without a word, so nothing here uses it: each address is masked to its width, each range is compared with the memory's
size of that moment, and only then are bytes copied. Nothing keeps a pointer between two calls, because a memory that
grows may move.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from wasmtime import Caller, Memory

from wasi_nn_backend.errors import InvalidArgument, InvalidEncoding, MissingMemory, TooLarge

__all__ = ["GuestMemory", "TensorWords", "unsigned32"]

_U32 = struct.Struct("<I")
_TENSOR = struct.Struct("<5I")
_BUILDER = struct.Struct("<2I")


def unsigned32(word: int) -> int:
    """A guest's i32 as the unsigned number that addresses, lengths and handles are."""
    return word & 0xFFFF_FFFF


@dataclass(frozen=True, slots=True)
class TensorWords:
    """A tensor as it lies in memory, 20 bytes: the numbers only, nothing followed or checked yet."""

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

    __slots__ = ("_caller", "_memory")

    def __init__(self, caller: Caller) -> None:
        # Looked up at each call: about a microsecond, against the risk of mixing up two instances of one store.
        self._caller = caller
        memory = caller.get("memory")
        if not isinstance(memory, Memory):
            raise MissingMemory(
                "the module exports no memory named 'memory' (shared memories do not count): "
                "link it so that it exports its own"
            )
        self._memory = memory

    @property
    def n_bytes(self) -> int:
        return self._memory.data_len(self._caller)

    def check(self, address: int, n_bytes: int, what: str) -> int:
        """The address as an unsigned number, once ``n_bytes`` from it on are known to lie inside the memory."""
        address = unsigned32(address)
        n_bytes = unsigned32(n_bytes)
        n_memory_bytes = self._memory.data_len(self._caller)
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
        n_bytes = unsigned32(n_bytes)
        if max_bytes is not None and n_bytes > max_bytes:
            raise TooLarge(f"{what}: {n_bytes} bytes are more than the {max_bytes} that this host takes: send less")
        address = self.check(address, n_bytes, what)
        # An empty memory has no address at all, and ctypes refuses to look at a null pointer.
        return ctypes.string_at(self._base() + address, n_bytes) if n_bytes else b""

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
        return TensorWords(*_TENSOR.unpack(self.read(address, _TENSOR.size, "the tensor")))

    def read_dimensions(self, address: int, n_dims: int, *, max_dims: int) -> tuple[int, ...]:
        """``n_dims`` little-endian 32-bit words. More than ``max_dims``: ``TooLarge``."""
        n_dims = unsigned32(n_dims)
        if n_dims > max_dims:
            raise TooLarge(f"the tensor: {n_dims} dimensions are more than the {max_dims} that this host takes")
        data = self.read(address, n_dims * _U32.size, "the tensor's dimensions")
        return struct.unpack(f"<{n_dims}I", data)

    def read_builders(self, address: int, n_builders: int, *, max_builders: int) -> Sequence[tuple[int, int]]:
        """The (address, length) pairs of ``load``'s builder array."""
        n_builders = unsigned32(n_builders)
        if n_builders > max_builders:
            raise TooLarge(f"load: {n_builders} builders are more than the {max_builders} that this host takes")
        return list(_BUILDER.iter_unpack(self.read(address, n_builders * _BUILDER.size, "the builder array")))

    def write(self, address: int, data: bytes, what: str) -> None:
        address = self.check(address, len(data), what)
        if data:
            ctypes.memmove(self._base() + address, data, len(data))

    def write_u32(self, address: int, value: int, what: str) -> None:
        self.write(address, _U32.pack(value), what)

    def _base(self) -> int:
        return ctypes.addressof(self._memory.data_ptr(self._caller).contents)
