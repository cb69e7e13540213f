"""Erlang's external term format, as far as the port's packets use it.

Source: the chapter "External Term Format" of the ERTS user's guide. What a peer sends may be anything: reading is
bounded in depth and in the number of terms, never makes more than a few objects for each byte, and knows neither
compressed terms, which could grow a thousandfold, nor processes, ports, references, functions and bit strings.
"""

from __future__ import annotations

import struct
from typing import TypeAlias, Union

from wasi_nn_backend.errors import InvalidArgument, InvalidEncoding

__all__ = ["Atom", "Term", "decode", "encode"]

N_DEPTH_MAX = 16
N_TERMS_MAX = 10_000
_N_INTEGER_BYTES_MAX = 8
_N_ATOM_BYTES_MAX = 255
_VERSION = 131

_SMALL_INTEGER, _INTEGER, _ATOM, _SMALL_TUPLE, _LARGE_TUPLE, _NIL = 97, 98, 100, 104, 105, 106
_STRING, _LIST, _BINARY, _SMALL_BIG, _SMALL_ATOM = 107, 108, 109, 110, 115
_ATOM_UTF8, _SMALL_ATOM_UTF8 = 118, 119


class Atom(str):
    """An Erlang atom. A type of its own, since atoms and binaries differ on the other side."""

    __slots__ = ()


#: Binaries are ``bytes``, lists are proper ones.
Term: TypeAlias = Union[Atom, int, bytes, tuple["Term", ...], list["Term"]]  # noqa: UP007  ``|`` takes no quoted name


def encode(term: Term) -> bytes:
    """The term's bytes, with the version in front. ``bool`` becomes the atom.

    Raises ``InvalidArgument`` for what has no place in a packet.
    """
    out = bytearray((_VERSION,))
    _encode(term, out)
    return bytes(out)


def decode(data: bytes) -> Term:
    """The term that ``data`` holds, all of it. Raises ``InvalidEncoding`` for anything else."""
    if not data or data[0] != _VERSION:
        raise InvalidEncoding(f"a packet of {len(data)} bytes is no external term: it begins with 131")
    reader = _Reader(data)
    term = reader.term(0)
    if reader.position != len(data):
        raise InvalidEncoding(f"{len(data) - reader.position} bytes follow the term: send one term a packet")
    return term


def _encode(term: Term, out: bytearray) -> None:
    if isinstance(term, Atom | bool):
        _encode_atom(term if isinstance(term, Atom) else Atom(str(term).lower()), out)
    elif isinstance(term, int):
        _encode_integer(term, out)
    elif isinstance(term, bytes):
        out += struct.pack(">BI", _BINARY, len(term)) + term
    elif isinstance(term, tuple):
        out += struct.pack(">BI", _LARGE_TUPLE, len(term))
        for part in term:
            _encode(part, out)
    elif isinstance(term, list):
        if term:
            out += struct.pack(">BI", _LIST, len(term))
        for part in term:
            _encode(part, out)
        out.append(_NIL)
    else:
        raise InvalidArgument(f"{type(term).__name__} has no place in a packet: pass Atom, int, bytes, tuple or list")


def _encode_atom(atom: Atom, out: bytearray) -> None:
    name = atom.encode()
    if len(name) > _N_ATOM_BYTES_MAX:
        raise InvalidArgument(f"an atom of {len(name)} bytes: at most {_N_ATOM_BYTES_MAX} fit")
    out += bytes((_SMALL_ATOM_UTF8, len(name))) + name


def _encode_integer(number: int, out: bytearray) -> None:
    if -(2**31) <= number < 2**31:
        out += struct.pack(">Bi", _INTEGER, number)
        return
    if abs(number) >= 2 ** (8 * _N_INTEGER_BYTES_MAX):
        raise InvalidArgument(f"an integer of {number.bit_length()} bits: at most {8 * _N_INTEGER_BYTES_MAX} fit")
    out += bytes((_SMALL_BIG, _N_INTEGER_BYTES_MAX, number < 0)) + abs(number).to_bytes(_N_INTEGER_BYTES_MAX, "little")


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 1
        self._n_terms_left = N_TERMS_MAX

    def term(self, depth: int) -> Term:
        self._n_terms_left -= 1
        if depth > N_DEPTH_MAX or self._n_terms_left < 0:
            raise InvalidEncoding(
                f"a term is deeper than {N_DEPTH_MAX} or has more than {N_TERMS_MAX} parts: send less"
            )
        tag = self._take(1)[0]
        if tag in (_SMALL_TUPLE, _LARGE_TUPLE, _LIST, _NIL):
            return self._collection(tag, depth)
        return self._scalar(tag)

    def _scalar(self, tag: int) -> Term:
        if tag == _SMALL_INTEGER:
            return self._take(1)[0]
        if tag == _INTEGER:
            return int.from_bytes(self._take(4), "big", signed=True)
        if tag == _SMALL_BIG:
            return self._big()
        if tag == _BINARY:
            return self._take(self._length(4))
        if tag == _STRING:  # how Erlang writes a list of numbers below 256
            numbers = self._take(self._length(2))
            self._n_terms_left -= len(numbers)
            return list(numbers)
        if tag in (_SMALL_ATOM, _SMALL_ATOM_UTF8):
            return self._atom(self._length(1), "latin-1" if tag == _SMALL_ATOM else "utf-8")
        if tag in (_ATOM, _ATOM_UTF8):
            return self._atom(self._length(2), "latin-1" if tag == _ATOM else "utf-8")
        raise InvalidEncoding(f"the term has the tag {tag} at byte {self.position - 1}, which no packet needs")

    def _collection(self, tag: int, depth: int) -> Term:
        if tag == _NIL:
            return []
        n_parts = self._length(1 if tag == _SMALL_TUPLE else 4)
        if n_parts > self._n_terms_left:  # before anything is made of it
            raise InvalidEncoding(f"a term has {n_parts} parts or more, at most {N_TERMS_MAX} are read: send less")
        parts = [self.term(depth + 1) for _ in range(n_parts)]
        if tag != _LIST:
            return tuple(parts)
        if self._take(1)[0] != _NIL:
            raise InvalidEncoding("a list does not end with nil: send proper lists")
        return parts

    def _big(self) -> int:
        n_bytes = self._length(1)
        if n_bytes > _N_INTEGER_BYTES_MAX:
            raise InvalidEncoding(f"an integer has {n_bytes} bytes, at most {_N_INTEGER_BYTES_MAX} are read")
        sign = self._take(1)[0]
        magnitude = int.from_bytes(self._take(n_bytes), "little")
        return -magnitude if sign else magnitude

    def _atom(self, n_bytes: int, encoding: str) -> Atom:
        if n_bytes > 4 * _N_ATOM_BYTES_MAX:
            raise InvalidEncoding(f"an atom has {n_bytes} bytes, at most {4 * _N_ATOM_BYTES_MAX} are read")
        try:
            return Atom(self._take(n_bytes).decode(encoding))
        except UnicodeDecodeError as error:
            raise InvalidEncoding(f"an atom is not {encoding} ({error.reason})") from None

    def _length(self, n_bytes: int) -> int:
        return int.from_bytes(self._take(n_bytes), "big")

    def _take(self, n_bytes: int) -> bytes:
        end = self.position + n_bytes
        if end > len(self._data):
            raise InvalidEncoding(f"the term is cut off: {end - len(self._data)} bytes are missing at its end")
        part = self._data[self.position : end]
        self.position = end
        return part
