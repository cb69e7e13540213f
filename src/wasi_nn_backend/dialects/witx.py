"""The official witx ABI, ``wasi_ephemeral_nn`` (WebAssembly/wasi-nn, ``wasi-nn.witx``): six functions.

Beyond the witx: the numbers 100 to 103, which it has no names for and which the families that extend it share, and
encoding 6. Modules built for WasmEdge that happen to import only these six functions look the same from outside, and
6 is ggml there; nothing official has that number.
"""

from __future__ import annotations

from wasi_nn_backend.dialects.table import Dialect, frozen
from wasi_nn_backend.errors import ErrorCode
from wasi_nn_backend.types import Door, ExecutionTarget, GraphEncoding, TensorType

__all__ = ["WITX"]

WITX = Dialect(
    name="witx",
    import_module="wasi_ephemeral_nn",
    # A guest counts its tokens and handles a full context itself: shifting would hide that from it. It also writes and
    # reads the model's control tokens itself.
    door=Door(
        name="witx",
        prompt_mode="raw",
        is_trusted=False,
        defaults=frozen(
            {
                "memory": frozen({"context_shifting": False}),
                "backend": frozen({"default_task_timeout_ms": 0}),
                "session": frozen({"keep_control_text": True}),
            }
        ),
    ),
    functions=frozen(
        {
            "load": ("builders", "n_builders", "encoding", "target", "out_graph"),
            "load_by_name": ("name", "n_name_bytes", "out_graph"),
            "init_execution_context": ("graph", "out_context"),
            "set_input": ("context", "index", "tensor"),
            "compute": ("context",),
            "get_output": ("context", "index", "buffer", "n_buffer_bytes", "out_n_bytes"),
        }
    ),
    errnos=frozen(
        {
            ErrorCode.SUCCESS: 0,
            ErrorCode.INVALID_ARGUMENT: 1,
            ErrorCode.INVALID_ENCODING: 2,
            ErrorCode.MISSING_MEMORY: 3,
            ErrorCode.BUSY: 4,
            ErrorCode.TIMEOUT: 4,  # no number of its own; "try again" is the nearest
            ErrorCode.RUNTIME_ERROR: 5,
            ErrorCode.UNKNOWN: 5,
            ErrorCode.UNSUPPORTED_OPERATION: 6,
            ErrorCode.SECURITY: 6,  # what is not allowed here is not supported here
            ErrorCode.TOO_LARGE: 7,
            ErrorCode.NOT_FOUND: 8,
            ErrorCode.END_OF_SEQUENCE: 100,
            ErrorCode.CONTEXT_FULL: 101,
            ErrorCode.PROMPT_TOO_LONG: 102,
            ErrorCode.MODEL_NOT_FOUND: 103,
        }
    ),
    tensor_types=frozen(
        {
            0: TensorType.FP16,
            1: TensorType.FP32,
            2: TensorType.FP64,
            3: TensorType.U8,
            4: TensorType.I32,
            5: TensorType.I64,
        }
    ),
    encodings=frozen(
        {
            0: GraphEncoding.OPENVINO,
            1: GraphEncoding.ONNX,
            2: GraphEncoding.TENSORFLOW,
            3: GraphEncoding.PYTORCH,
            4: GraphEncoding.TENSORFLOWLITE,
            5: GraphEncoding.AUTODETECT,
            6: GraphEncoding.GGML,
        }
    ),
    targets=frozen({0: ExecutionTarget.CPU, 1: ExecutionTarget.GPU, 2: ExecutionTarget.TPU}),
    metadata_keys=None,
)
