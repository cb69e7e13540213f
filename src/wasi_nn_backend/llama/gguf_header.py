"""Reads the header of a GGUF file without trusting it.

The ``gguf`` package's reader builds an array object for every token of the vocabulary: 2 s for SmolLM2, where this one
needs some 25 ms because it skips what nobody asks for. Every length is held against the file's size before it is used
and every loop has a bound, so that a damaged or hostile file costs an error message and no time or memory.

Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from wasi_nn_backend.errors import InvalidArgument, ModelNotFound

__all__ = ["GgufHeader", "TensorInfo", "Value", "read_gguf_header"]

Value = bool | int | float | str | tuple[int, ...]

_MAGIC = b"GGUF"
_MAX_KEY_BYTES = 65535
_MAX_STRING_BYTES = 2**24  # chat templates are the longest strings, some 20 kB
_MAX_ARRAY_STRINGS = 2**22  # of all arrays together; the largest vocabularies have some 600,000 tokens and merges
_MAX_KEPT_INTEGERS = 4096  # arrays of one value a layer are kept, those of one a token skipped
_MAX_TENSORS = 2**16
_MAX_KEYS = 2**16
_MAX_DIMENSIONS = 4
_MAX_SPLITS = 10_000

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FORMATS = {number: struct.Struct("<" + code) for number, code in _SCALARS.items()}
_U32, _U64 = _FORMATS[4], _FORMATS[10]
_FLOATS = (6, 12)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    name: str
    shape: tuple[int, ...]  # the fastest dimension first, as in the file
    type_number: int
    offset: int

    @property
    def n_values(self) -> int:
        n = 1
        for length in self.shape:
            n *= length
        return n

    @property
    def n_bytes(self) -> int | None:
        """None for a type that the gguf package does not know."""
        try:
            n_block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(self.type_number)]
        except (ValueError, KeyError):
            return None
        return self.n_values // n_block * block_bytes


@dataclass(slots=True)
class GgufHeader:
    """``values`` has scalars, strings and short integer arrays; ``array_lengths`` the length of every array.

    ``value_types`` has the ``gguf_type`` of every key: llama.cpp aborts when it reads one as another.
    """

    version: int
    n_file_bytes: int
    values: dict[str, Value] = field(default_factory=dict)
    array_lengths: dict[str, int] = field(default_factory=dict)
    value_types: dict[str, int] = field(default_factory=dict)
    tensors: list[TensorInfo] = field(default_factory=list)

    def integer(self, key: str, default: int = 0) -> int:
        value = self.values.get(key, default)
        return value if isinstance(value, int) else default

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        return value if isinstance(value, str) else None


class _Damaged(Exception):
    """What is wrong with the bytes; the caller adds the file's name."""


def read_gguf_header(path: Path) -> GgufHeader:
    """Raises ``ModelNotFound`` for a missing file, ``InvalidArgument`` for whatever is no whole GGUF file."""
    with _open(path) as file:
        n_file_bytes = os.fstat(file.fileno()).st_size
        if n_file_bytes == 0:
            raise InvalidArgument(f"{path} is empty; download or copy the model again")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content[:4] != _MAGIC:
                raise InvalidArgument(
                    f"{path} is no GGUF file: it begins with {bytes(content[:4])!r}; give a model in GGUF format"
                )
            try:
                return _Reader(content).header()
            except _Damaged as damage:
                raise InvalidArgument(f"{path} is damaged or cut short: {damage}; download or copy it again") from None


def _open(path: Path) -> BinaryIO:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise InvalidArgument(f"{path} is a directory; name the GGUF file in it")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for its writer
            raise InvalidArgument(f"{path} is no regular file; copy the model to one")
        return path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        raise ModelNotFound(f"{path}: no such file; check the path") from None
    except PermissionError:
        raise InvalidArgument(f"{path} may not be read by this user; change its permissions") from None
    except (OSError, ValueError) as error:  # a loop of links, a name too long, a NUL in the name
        raise InvalidArgument(f"{path!s} cannot be opened: {error}") from None


class _Reader:
    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self._size = len(content)
        self._at = len(_MAGIC)
        self._n_strings_left = _MAX_ARRAY_STRINGS

    def header(self) -> GgufHeader:
        version = self._number(_U32)
        if version not in (2, 3):
            if version & 0xFFFF == 0:
                raise _Damaged("it is written for big-endian machines")
            raise _Damaged(f"its format version is {version}, and only 2 and 3 are known")
        n_tensors, n_keys = self._number(_U64), self._number(_U64)
        if n_tensors > _MAX_TENSORS or n_keys > _MAX_KEYS:
            raise _Damaged(f"it claims {n_tensors} tensors and {n_keys} keys")
        header = GgufHeader(version=version, n_file_bytes=self._size)
        for _ in range(n_keys):
            self._read_key(header)
        for _ in range(n_tensors):
            header.tensors.append(self._tensor())
        self._check_data(header)
        return header

    def _read_key(self, header: GgufHeader) -> None:
        key = self._string(_MAX_KEY_BYTES)
        if key in header.values or key in header.array_lengths:
            raise _Damaged(f"it has the key {key!r} twice")
        type_number = header.value_types[key] = self._number(_U32)
        if type_number == _ARRAY:
            self._read_array(header, key)
        elif type_number == _STRING:
            header.values[key] = self._string(_MAX_STRING_BYTES)
        else:
            header.values[key] = self._scalar(type_number)

    def _read_array(self, header: GgufHeader, key: str) -> None:
        type_number, n = self._number(_U32), self._number(_U64)
        header.array_lengths[key] = n
        if type_number == _STRING:
            self._skip_strings(n, distinct=key == "tokenizer.ggml.tokens")
            return
        form = _FORMATS.get(type_number)
        if form is None:
            raise _Damaged(f"the array {key!r} has elements of type {type_number}")
        start = self._skip(n * form.size)
        if n <= _MAX_KEPT_INTEGERS and type_number not in _FLOATS:
            header.values[key] = struct.unpack_from(f"<{n}{_SCALARS[type_number]}", self._content, start)

    def _skip_strings(self, n: int, *, distinct: bool) -> None:
        """``distinct`` for the tokens: llama.cpp aborts the process when two are equal."""
        self._n_strings_left -= n
        if self._n_strings_left < 0 or n * _U64.size > self._size:
            raise _Damaged(f"it claims an array of {n} strings")
        # Local names: this loop runs half a million times for a large vocabulary.
        content, at, size, unpack = self._content, self._at, self._size, _U64.unpack_from
        seen: set[bytes] = set()
        for _ in range(n):
            if at + 8 > size:
                raise _Damaged("an array of strings ends beyond the end of the file")
            start = at + 8
            at = start + unpack(content, at)[0]
            if distinct:
                seen.add(content[start:at])
        self._at = at
        self._skip(0)
        if distinct and len(seen) != n:
            raise _Damaged(f"its vocabulary has {n - len(seen)} tokens twice")

    def _tensor(self) -> TensorInfo:
        name = self._string(_MAX_KEY_BYTES)
        n_dimensions = self._number(_U32)
        if not 1 <= n_dimensions <= _MAX_DIMENSIONS:
            raise _Damaged(f"the tensor {name!r} has {n_dimensions} dimensions")
        shape = tuple(self._number(_U64) for _ in range(n_dimensions))
        return TensorInfo(name, shape, type_number=self._number(_U32), offset=self._number(_U64))

    def _check_data(self, header: GgufHeader) -> None:
        """Whether every tensor's bytes lie in the file: llama.cpp maps it, and reading past its end is SIGBUS."""
        alignment = header.values.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
            raise _Damaged(f"general.alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        for tensor in header.tensors:
            n_bytes = tensor.n_bytes
            if tensor.n_values == 0:
                raise _Damaged(f"the tensor {tensor.name!r} is empty")
            if n_bytes is not None and start + tensor.offset + n_bytes > self._size:
                missing = start + tensor.offset + n_bytes - self._size
                raise _Damaged(f"the tensor {tensor.name!r} ends {missing} bytes beyond the end of the file")

    def _scalar(self, type_number: int) -> Value:
        form = _FORMATS.get(type_number)
        if form is None:
            raise _Damaged(f"a key has a value of the unknown type {type_number}")
        value: Value = form.unpack_from(self._content, self._skip(form.size))[0]
        return value

    def _number(self, form: struct.Struct) -> int:
        return int(form.unpack_from(self._content, self._skip(form.size))[0])

    def _string(self, n_max: int) -> str:
        n = self._number(_U64)
        if n > n_max:
            raise _Damaged(f"it claims a string of {n} bytes")
        start = self._skip(n)
        return bytes(self._content[start : start + n]).decode("utf-8", "replace")

    def _skip(self, n: int) -> int:
        """Move over ``n`` bytes that must be there; returns where they begin."""
        start = self._at
        if start + n > self._size:
            raise _Damaged(f"it ends after {self._size} bytes, in the middle of its header")
        self._at = start + n
        return start
