"""Large language models for WebAssembly through WASI-NN, served by llama.cpp.

>>> from wasi_nn_backend import Backend
>>> with Backend() as backend:
...     graph = backend.load_by_name("smollm2")
...     with graph.init_execution_context() as context:
...         print(context.run_inference("Name the capital city of France."))
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

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
from wasi_nn_backend.types import Door, ExecutionTarget, GraphEncoding, Tensor, TensorType

if TYPE_CHECKING:
    __version__: str
    from wasi_nn_backend.async_backend import AsyncBackend, AsyncExecutionContext, AsyncGraph
    from wasi_nn_backend.backend import Backend
    from wasi_nn_backend.execution_context import ExecutionContext
    from wasi_nn_backend.graph import Graph
    from wasi_nn_backend.session import Message

__all__ = [
    "AsyncBackend",
    "AsyncExecutionContext",
    "AsyncGraph",
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

#: Where the names live whose import takes a third of a second: `wasi-nn --help` and programs that only catch the errors
#: do not wait for pydantic and numpy.
_LAZY = {
    "AsyncBackend": "wasi_nn_backend.async_backend",
    "AsyncGraph": "wasi_nn_backend.async_backend",
    "AsyncExecutionContext": "wasi_nn_backend.async_backend",
    "Backend": "wasi_nn_backend.backend",
    "Graph": "wasi_nn_backend.graph",
    "ExecutionContext": "wasi_nn_backend.execution_context",
    "Message": "wasi_nn_backend.session",
}

# Warnings are for programs that set up a log, or ask for one in the configuration; see logs.py.
logging.getLogger(__name__).addHandler(logging.NullHandler())

if not TYPE_CHECKING:  # a type checker would take every misspelt name for Any

    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            value = getattr(importlib.import_module(_LAZY[name]), name)
        elif name == "__version__":
            value = importlib.import_module("importlib.metadata").version("wasi-nn-backend")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
