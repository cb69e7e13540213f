"""The numbers of the C header, which follow the WIT's order, for hosts of ``libwasi_nn_backend.so``.

The header has no number for ``busy`` and ``missing_memory``. Prompts are bytes: any type number of one byte passes, so
there is no table of tensor types.
"""

from __future__ import annotations

from wasi_nn_backend.dialects.table import Dialect, frozen
from wasi_nn_backend.errors import ErrorCode
from wasi_nn_backend.types import Door, ExecutionTarget, GraphEncoding

__all__ = ["CAPI"]

CAPI = Dialect(
    name="capi",
    import_module="",
    door=Door(name="capi", prompt_mode="chat", is_trusted=True),
    functions=frozen({}),
    errnos=frozen(
        {
            ErrorCode.SUCCESS: 0,
            ErrorCode.INVALID_ARGUMENT: 1,
            ErrorCode.INVALID_ENCODING: 2,
            ErrorCode.TIMEOUT: 3,
            ErrorCode.BUSY: 3,  # the other one that says "try again"
            ErrorCode.RUNTIME_ERROR: 4,
            ErrorCode.MISSING_MEMORY: 4,
            ErrorCode.UNSUPPORTED_OPERATION: 5,
            ErrorCode.TOO_LARGE: 6,
            ErrorCode.NOT_FOUND: 7,
            ErrorCode.SECURITY: 8,
            ErrorCode.UNKNOWN: 9,
            ErrorCode.END_OF_SEQUENCE: 100,
            ErrorCode.CONTEXT_FULL: 101,
            ErrorCode.PROMPT_TOO_LONG: 102,
            ErrorCode.MODEL_NOT_FOUND: 103,
        }
    ),
    tensor_types=frozen({}),
    encodings=frozen(
        {
            0: GraphEncoding.OPENVINO,
            1: GraphEncoding.ONNX,
            2: GraphEncoding.TENSORFLOW,
            3: GraphEncoding.PYTORCH,
            4: GraphEncoding.TENSORFLOWLITE,
            5: GraphEncoding.GGML,
            6: GraphEncoding.AUTODETECT,
        }
    ),
    targets=frozen({0: ExecutionTarget.CPU, 1: ExecutionTarget.GPU, 2: ExecutionTarget.TPU}),
    metadata_keys=None,
)
