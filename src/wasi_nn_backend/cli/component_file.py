"""Reads from a component's binary which interfaces it imports.

wasmtime tells them only of a component that it has compiled, which takes a minute for an interpreter in WebAssembly.
The names stand in plain sight in the import section of the binary format (WebAssembly/component-model, ``Binary.md``).
"""

from __future__ import annotations

import io
from typing import BinaryIO

from wasi_nn_backend.errors import InvalidArgument

__all__ = ["component_imports", "is_component"]

_MAGIC = b"\0asm"
_N_HEADER_BYTES = 8
_COMPONENT_LAYER = b"\x01\0"  # bytes 6 and 7
_IMPORT_SECTION = 10

# What an import's description begins with, where it is not followed by one index alone.
_CORE_MODULE = 0x00  # a second byte, then an index
_VALUE = 0x02  # a bound: 0 and an index, or 1 and a type
_TYPE = 0x03  # a bound: 0 and an index, or 1 for a resource of its own


def is_component(header: bytes) -> bool:
    """Whether a file that begins with these 8 bytes is a component."""
    return header.startswith(_MAGIC) and header[6:8] == _COMPONENT_LAYER


def component_imports(binary: bytes) -> list[str]:
    """The names of a component's own imports, such as ``wasi:nn/graph@0.2.0-rc-2024-10-28``, in their order.

    Raises ``InvalidArgument`` for a file that is cut short or does not follow the format.
    """
    stream = io.BytesIO(binary)
    stream.seek(_N_HEADER_BYTES)
    names: list[str] = []
    try:
        while section_id := stream.read(1):
            section = io.BytesIO(_take(stream, _number(stream)))
            if section_id[0] == _IMPORT_SECTION:
                names.extend(_import_name(section) for _ in range(_number(section)))
    except (EOFError, UnicodeDecodeError):
        raise InvalidArgument("the component is damaged or cut short; build or copy it again") from None
    return names


def _import_name(section: BinaryIO) -> str:
    """The next import's name; its description is read past."""
    _take(section, 1)  # how the name is written: no difference for a reader
    name = _take(section, _number(section)).decode()
    kind = _take(section, 1)[0]
    if kind == _CORE_MODULE:
        _take(section, 1)
        _number(section)
    elif kind in (_VALUE, _TYPE):
        is_index = _take(section, 1)[0] == 0
        if is_index or kind == _VALUE:
            _number(section)
    else:
        _number(section)
    return name


def _take(stream: BinaryIO, n_bytes: int) -> bytes:
    data = stream.read(n_bytes)
    if len(data) != n_bytes:
        raise EOFError
    return data


def _number(stream: BinaryIO) -> int:
    """An unsigned LEB128 number."""
    value = shift = 0
    while True:
        byte = _take(stream, 1)[0]
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value
