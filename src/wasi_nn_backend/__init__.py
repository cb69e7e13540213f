"""Large language models for WebAssembly through WASI-NN, served by llama.cpp.

>>> from wasi_nn_backend import Backend
>>> with Backend() as backend:
...     graph = backend.load_by_name("smollm2")
...     with graph.init_execution_context() as context:
...         print(context.run_inference("Name the capital city of France."))
"""

from __future__ import annotations

from importlib.metadata import version

from wasi_nn_backend.backend import Backend, Graph
from wasi_nn_backend.errors import (
    Busy,
    Cancelled,
    ContextFull,
    DeadlineExceeded,
    EndOfSequence,
    ErrorCode,
    InvalidArgument,
    InvalidEncoding,
    MissingMemory,
    ModelNotFound,
    NotFound,
    PromptTooLong,
    RuntimeFailure,
    SecurityViolation,
    TooLarge,
    UnsupportedOperation,
    WasiNNError,
)
from wasi_nn_backend.execution_context import ExecutionContext
from wasi_nn_backend.session import Message
from wasi_nn_backend.types import Door, ExecutionTarget, GraphEncoding, Tensor, TensorType

__all__ = [
    "Backend",
    "Busy",
    "Cancelled",
    "ContextFull",
    "DeadlineExceeded",
    "Door",
    "EndOfSequence",
    "ErrorCode",
    "ExecutionContext",
    "ExecutionTarget",
    "Graph",
    "GraphEncoding",
    "InvalidArgument",
    "InvalidEncoding",
    "Message",
    "MissingMemory",
    "ModelNotFound",
    "NotFound",
    "PromptTooLong",
    "RuntimeFailure",
    "SecurityViolation",
    "Tensor",
    "TensorType",
    "TooLarge",
    "UnsupportedOperation",
    "WasiNNError",
    "__version__",
]

__version__ = version("wasi-nn-backend")
