"""How the structures of a call lie in a guest's memory: by the width of its pointers and by the dialect's form.

Handles, lengths and sizes are 32 bits wide in every structure. In a 64-bit memory the pointers are 64 bits wide and
everything is aligned as a C compiler aligns it; a length declared as ``size_t`` begins with the same four bytes.

    witx, 32 bits     tensor   dims +0, n_dims +4, type +8 (one byte), data +12, n_data +16; 20 bytes
    witx, 64 bits              dims +0, n_dims +8, type +16, data +24, n_data +32; 40 bytes
    legacy, 32 bits   tensor   shape +0, type +4, data +8; 12 bytes; shape -> dims +0, n_dims +4
    legacy, 64 bits            shape +0, type +8, data +16; 24 bytes; shape -> dims +0, n_dims +8; 16 bytes
    builder           pointer +0, n +4; 8 bytes; in 64 bits n +8; 16 bytes
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

__all__ = ["MEMORY32", "MEMORY64", "MemoryLayout"]


@dataclass(frozen=True, slots=True)
class MemoryLayout:
    """The structures of guests with pointers of one width. ``word_mask`` makes an address or a length unsigned.

    ``span`` is a pointer with a count of what lies there: a builder, a legacy tensor's shape, a legacy builder array.
    """

    pointer_type: str
    word_mask: int
    tensor: struct.Struct
    legacy_tensor: struct.Struct
    span: struct.Struct


MEMORY32 = MemoryLayout(
    pointer_type="i32",
    word_mask=0xFFFF_FFFF,
    tensor=struct.Struct("<5I"),
    legacy_tensor=struct.Struct("<3I"),
    span=struct.Struct("<2I"),
)
MEMORY64 = MemoryLayout(
    pointer_type="i64",
    word_mask=0xFFFF_FFFF_FFFF_FFFF,
    tensor=struct.Struct("<QI4xI4xQI4x"),
    legacy_tensor=struct.Struct("<QI4xQ"),
    span=struct.Struct("<QI4x"),
)
