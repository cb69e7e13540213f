"""The names and numbers of ``wasi:nn``, the component model's interface (WebAssembly/wasi-nn, ``wit/wasi-nn.wit``).

Components name what core modules number; an error's number is the position of its name in the WIT's enum. The release
candidates that are served have these shapes in common; the older ones have a constructor of ``error``, too.

The WIT has no names for what llama.cpp's families number from 100 on, nor for ``busy``: those get the nearest name, and
the error's text says the rest.
"""

from __future__ import annotations

from collections.abc import Iterable

from wasi_nn_backend.dialects.table import Dialect, frozen
from wasi_nn_backend.errors import ErrorCode
from wasi_nn_backend.types import Door, ExecutionTarget, GraphEncoding, TensorType

__all__ = [
    "WIT",
    "WIT_ENCODINGS",
    "WIT_ERROR_CODES",
    "WIT_FUNCTIONS",
    "WIT_INPUTS",
    "WIT_OUTPUTS",
    "WIT_PACKAGE",
    "WIT_TARGETS",
    "WIT_TENSOR_TYPES",
    "WIT_VERSIONS",
]

WIT_PACKAGE = "wasi:nn"
WIT_VERSIONS = ("0.2.0-rc-2024-10-28", "0.2.0-rc-2024-08-19", "0.2.0-rc-2024-06-25")

#: ``enum error-code``, in its order.
WIT_ERROR_CODES = (
    "invalid-argument",
    "invalid-encoding",
    "timeout",
    "runtime-error",
    "unsupported-operation",
    "too-large",
    "not-found",
    "security",
    "unknown",
)

#: ``enum tensor-type``, ``graph-encoding`` and ``execution-target``, in their order.
WIT_TENSOR_TYPES = frozen(
    {
        "FP16": TensorType.FP16,
        "FP32": TensorType.FP32,
        "FP64": TensorType.FP64,
        "BF16": TensorType.BF16,
        "U8": TensorType.U8,
        "I32": TensorType.I32,
        "I64": TensorType.I64,
    }
)
WIT_ENCODINGS = frozen(
    {
        "openvino": GraphEncoding.OPENVINO,
        "onnx": GraphEncoding.ONNX,
        "tensorflow": GraphEncoding.TENSORFLOW,
        "pytorch": GraphEncoding.PYTORCH,
        "tensorflowlite": GraphEncoding.TENSORFLOWLITE,
        "ggml": GraphEncoding.GGML,
        "autodetect": GraphEncoding.AUTODETECT,
    }
)
WIT_TARGETS = frozen({"cpu": ExecutionTarget.CPU, "gpu": ExecutionTarget.GPU, "tpu": ExecutionTarget.TPU})

#: An input's or output's name -> its index at the other doors.
WIT_INPUTS = frozen({"prompt": 0, "0": 0, "config": 1, "1": 1})
#: The name of the prompt -> the names of outputs 0 and 1.
WIT_OUTPUTS = frozen({"prompt": ("output", "metadata"), "0": ("0", "1")})

WIT = Dialect(
    name="wit",
    import_module=WIT_PACKAGE,
    # compute() either gives the text or an error, so there is no part of a text to go on from: full windows are
    # shifted, as for any caller who gives a token limit.
    door=Door(
        name="wit", prompt_mode="raw", is_trusted=False, defaults=frozen({"backend": {"default_task_timeout_ms": 0}})
    ),
    functions=frozen({}),  # of core modules: none
    errnos=frozen(
        {
            ErrorCode.INVALID_ARGUMENT: 0,
            ErrorCode.INVALID_ENCODING: 1,
            ErrorCode.TIMEOUT: 2,
            ErrorCode.BUSY: 2,  # the other one that says "try again"
            ErrorCode.RUNTIME_ERROR: 3,
            ErrorCode.MISSING_MEMORY: 3,
            ErrorCode.UNSUPPORTED_OPERATION: 4,
            ErrorCode.TOO_LARGE: 5,
            ErrorCode.PROMPT_TOO_LONG: 5,
            ErrorCode.CONTEXT_FULL: 5,
            ErrorCode.NOT_FOUND: 6,
            ErrorCode.MODEL_NOT_FOUND: 6,
            ErrorCode.SECURITY: 7,
            ErrorCode.UNKNOWN: 8,
            ErrorCode.END_OF_SEQUENCE: 8,  # of token-by-token calls, which the WIT does not have
        }
    ),
    # Components pass these by name.
    tensor_types=frozen({}),
    encodings=frozen({}),
    targets=frozen({}),
    metadata_keys=None,
)


def _enum(names: Iterable[str]) -> str:
    return f"enum{{{' '.join(names)}}}"


_TENSOR_TYPE = _enum(WIT_TENSOR_TYPES)
_ERROR_CODE = _enum(WIT_ERROR_CODES)

#: Interface -> function -> its shape, as ``host/component_imports.py`` writes shapes.
WIT_FUNCTIONS = frozen(
    {
        "tensor": frozen(
            {
                "[constructor]tensor": f"(list<u32>, {_TENSOR_TYPE}, list<u8>) -> own",
                "[method]tensor.dimensions": "(borrow) -> list<u32>",
                "[method]tensor.ty": f"(borrow) -> {_TENSOR_TYPE}",
                "[method]tensor.data": "(borrow) -> list<u8>",
            }
        ),
        "errors": frozen(
            {
                "[constructor]error": f"({_ERROR_CODE}, string) -> own",
                "[method]error.code": f"(borrow) -> {_ERROR_CODE}",
                "[method]error.data": "(borrow) -> string",
            }
        ),
        "inference": frozen(
            {
                "[method]graph-execution-context.compute": "(borrow, list<tuple<string, own>>)"
                " -> result<list<tuple<string, own>>, own>",
            }
        ),
        "graph": frozen(
            {
                "[method]graph.init-execution-context": "(borrow) -> result<own, own>",
                "load": f"(list<list<u8>>, {_enum(WIT_ENCODINGS)}, {_enum(WIT_TARGETS)}) -> result<own, own>",
                "load-by-name": "(string) -> result<own, own>",
            }
        ),
    }
)
