"""A sequence's cache as bytes, with a header that says whose it is.

llama.cpp checks the layout only: the state of another model of the same shape would be taken, and the text would be
nonsense. It is no protection against forged bytes: restore only what came from ``save``.
"""

from __future__ import annotations

import ctypes
import hashlib
import struct
from collections.abc import Iterable

import numpy as np

from wasi_nn_backend.errors import RuntimeFailure
from wasi_nn_backend.llama.bindings import native

__all__ = ["fingerprint", "restore", "save"]

_MAGIC = b"WNNS\x01"
_FINGERPRINT_BYTES = 16
_HEADER = struct.Struct(f"<5s{_FINGERPRINT_BYTES}siQ")  # magic, fingerprint, last position, bytes that follow


def fingerprint(parts: Iterable[object]) -> bytes:
    """16 bytes that two contexts share if one may read the other's states."""
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=_FINGERPRINT_BYTES).digest()


def save(context: int, sequence_id: int, last_position: int, owner: bytes) -> bytes:
    """The cells of one sequence of the native ``context``; ``owner`` is the context's fingerprint.

    Cost: SmolLM2 takes 23 kB a token with an f16 cache. Raises ``RuntimeFailure`` when llama.cpp writes nothing.
    """
    n_bytes = int(native.llama_state_seq_get_size(context, sequence_id))
    buffer = np.empty(_HEADER.size + n_bytes, dtype=np.uint8)
    data = ctypes.cast(buffer.ctypes.data + _HEADER.size, ctypes.POINTER(ctypes.c_uint8))
    n_written = int(native.llama_state_seq_get_data(context, data, n_bytes, sequence_id))
    if n_written == 0 or n_written > n_bytes:
        raise RuntimeFailure(f"llama.cpp could not save sequence {sequence_id}: {n_written} of {n_bytes} bytes")
    buffer[: _HEADER.size] = np.frombuffer(_HEADER.pack(_MAGIC, owner, last_position, n_written), dtype=np.uint8)
    return buffer[: _HEADER.size + n_written].tobytes()


def restore(context: int, sequence_id: int, state: bytes, owner: bytes) -> int | None:
    """The last position that the sequence must now have, or None where the bytes are not for this context."""
    if len(state) < _HEADER.size:
        return None
    magic, saved_by, last_position, n_bytes = _HEADER.unpack_from(state)
    if magic != _MAGIC or saved_by != owner or n_bytes != len(state) - _HEADER.size:
        return None
    payload = np.frombuffer(state, dtype=np.uint8, offset=_HEADER.size)
    data = ctypes.cast(payload.ctypes.data, ctypes.POINTER(ctypes.c_uint8))
    n_read = int(native.llama_state_seq_set_data(context, data, n_bytes, sequence_id))
    return int(last_position) if n_read == n_bytes else None
