"""What WAMR's ``iwasm`` expects of ``libwasi_nn_llamacpp.so``: errors as in the witx, encodings as in the C header.

The names and configurations come from guests, so the door is a guest's. WAMR passes tensor types on as bytes that mean
one thing in its older build and another in its newer one; text does not depend on them.
"""

from __future__ import annotations

from wasi_nn_backend.dialects.capi import CAPI
from wasi_nn_backend.dialects.table import Dialect, frozen
from wasi_nn_backend.dialects.witx import WITX
from wasi_nn_backend.types import Door

__all__ = ["WAMR"]

WAMR = Dialect(
    name="wamr",
    import_module="",
    door=Door(name="wamr", prompt_mode="raw", is_trusted=False, defaults=WITX.door.defaults),
    functions=frozen({}),
    errnos=WITX.errnos,
    tensor_types=frozen({}),
    encodings=CAPI.encodings,
    targets=CAPI.targets,
    metadata_keys=None,
)
