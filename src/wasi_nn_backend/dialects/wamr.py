"""WAMR: what its ``iwasm`` expects of a library, and what its guests import.

``WAMR`` is the side of ``libwasi_nn_llamacpp.so``: errors as in the witx, encodings as in the C header. The names and
configurations come from guests, so the door is a guest's. WAMR passes tensor types on as bytes that mean one thing in
its older build and another in its newer one; text does not depend on them.

``WAMR_EPHEMERAL`` is what guests of its newer build import, the witx with one more function. ``WAMR_LEGACY`` is what
guests of its older build import, from a module of another name: a tensor has no length of its own there, its size is
the product of its dimensions.
"""

from __future__ import annotations

from wasi_nn_backend.dialects.capi import CAPI
from wasi_nn_backend.dialects.table import Dialect, frozen
from wasi_nn_backend.dialects.witx import WITX
from wasi_nn_backend.types import Door, TensorType

__all__ = ["WAMR", "WAMR_EPHEMERAL", "WAMR_LEGACY"]

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

WAMR_EPHEMERAL = Dialect(
    name="wamr",
    import_module="wasi_ephemeral_nn",
    door=WAMR.door,
    functions=frozen(
        {
            **WITX.functions,
            "load_by_name_with_config": ("name", "n_name_bytes", "config", "n_config_bytes", "out_graph"),
        }
    ),
    errnos=WAMR.errnos,
    tensor_types=WITX.tensor_types,
    encodings=WAMR.encodings,
    targets=WAMR.targets,
    metadata_keys=None,
)

WAMR_LEGACY = Dialect(
    name="wamr-legacy",
    import_module="wasi_nn",
    door=Door(name="wamr-legacy", prompt_mode="raw", is_trusted=False, defaults=WITX.door.defaults),
    functions=frozen(
        {
            "load": ("builder_array", "encoding", "target", "out_graph"),
            "load_by_name": ("name", "n_name_bytes", "out_graph"),
            "init_execution_context": ("graph", "out_context"),
            "set_input": ("context", "index", "tensor"),
            "compute": ("context",),
            "get_output": ("context", "index", "buffer", "inout_n_bytes"),
        }
    ),
    errnos=WAMR.errnos,
    tensor_types=frozen({0: TensorType.FP16, 1: TensorType.FP32, 2: TensorType.U8, 3: TensorType.I32}),
    encodings=WAMR.encodings,
    targets=WAMR.targets,
    metadata_keys=None,
    struct_form="wamr-legacy",
)
